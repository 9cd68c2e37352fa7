"""Results in an output folder come of the config.yaml beside them: those of another go before new ones are made."""

from __future__ import annotations

import shutil

from lrmil.pipeline.context import Run
from lrmil.pipeline.keys import results_key


def discard_stale_results(run: Run) -> None:
    """Remove tables, report and model/ if they were made from other settings, slides or labels.

    Called before anything is made, so that neither a killed run nor `deploy: false` leaves them beside newer parts.
    """
    folder, key = run.folder, results_key(run)
    results = {folder.tables: (folder.tables, folder.report, folder.figures), folder.fold("final"): (folder.model,)}
    for step, held in results.items():
        there = [path for path in held if path.exists()]
        if there and folder.done_facts(step).get("made_from") != key:
            run.reporter.line(
                f"{', '.join(path.name for path in there)} in {folder.root} came of other settings, slides or labels, "
                "or of a run that was stopped: removed, to be made again."
            )
            folder.begin(step)
            for path in there:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
