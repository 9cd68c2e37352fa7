"""Do the cells of a study that are not done, then write its tables and figures; publish them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lrmil.errors import ConfigError
from lrmil.evaluation.plots import save_figure
from lrmil.files import write_json, write_text
from lrmil.pipeline.reporting import Reporter
from lrmil.studies.arms import REFERENCE
from lrmil.studies.figures import gains_figure, probes_figure, retrieval_figure
from lrmil.studies.markdown import study_page
from lrmil.studies.probe import Cell, ProbeStudy
from lrmil.studies.settings import ProbeSettings
from lrmil.studies.summary import results_table, retrieval_table
from lrmil.studies.tables import write_table


def run_probe(
    settings: ProbeSettings, reporter: Reporter, *, publish: Path | None = None, train: bool = True
) -> list[Path]:
    """Do a study of region probes. Resumes: a finished cell is never done again.

    Args:
        settings: the study.
        reporter: console and log.
        publish: folder for copies of what is small enough to keep beside the text.
        train: False: only the tables and figures of what is finished.

    Returns:
        The files written.

    Raises:
        ConfigError: nothing is finished yet.
    """
    study = ProbeStudy.begin(settings, reporter)
    cells = list(study.cells())
    waiting = [cell for cell in cells if study.stored(cell) is None] if train else []
    reporter.line(f"{settings.title}: {len(study.fields)} fields, {len(cells)} cells, {len(waiting)} to do")
    for cell in waiting:
        found = study.do(cell)
        reporter.line(f"  {cell.arm}, seed {cell.seed}, fold {cell.fold}: {found['seconds']:.0f} s")
        reporter.event("cell done", arm=cell.arm, seed=cell.seed, fold=cell.fold, seconds=found["seconds"])
    written = write_results(study, cells)
    if publish is not None:
        publish.mkdir(parents=True, exist_ok=True)
        written = [Path(shutil.copy(path, publish / path.name)) for path in written]
    return written


def write_results(study: ProbeStudy, cells: Sequence[Cell]) -> list[Path]:
    """Write cells.csv, results.csv, retrieval.csv, summary.json, table.md and the figures of all finished cells."""
    done = [found for found in (study.stored(cell) for cell in cells) if found is not None]
    if not any(found["arm"] == REFERENCE for found in done):
        raise ConfigError("no cell of this study is finished.", fix="Run it first.")
    s = study.settings
    answers, retrieval = answers_frame(study, done), retrieval_frame(study, done)
    primary = s.recipes[0].name if s.recipes else None
    results = results_table(answers, s.targets, s.resamples, primary)
    found_slots = retrieval_table(retrieval, s.resamples, study.encoder.depth - 1)
    name = study.folder.name
    folder = study.folder / "report"
    titles = {recipe.name: recipe.title or recipe.name for recipe in s.recipes}
    tables = {"cells": cells_frame(study, done), "results": results, "retrieval": found_slots}
    written = []
    for table, frame in tables.items():
        written.append(folder / f"{name}_{table}.csv")
        write_table(written[-1], frame)
    summary = {
        "title": s.title,
        "fields": len(study.fields),
        "groups": len(set(study.groups)),
        "regions": len(study.probe),
        "cells_done": len(done),
        "cells": len(cells),
        "encoder": study.encoder.card.name,
        "weights_sha256": study.encoder.weights_sha256,
        "settings": s.model_dump(mode="json", exclude={"out": True, "fields": {"crchisto"}, "encoder": {"weights"}}),
    }
    write_json(folder / f"{name}_summary.json", summary)
    write_text(folder / f"{name}_table.md", study_page(results, found_slots, s, titles))
    written += [folder / f"{name}_summary.json", folder / f"{name}_table.md"]
    figures = {"probes": probes_figure(results, s, titles)}
    if s.recipes:
        figures["gains"] = gains_figure(results, s, titles)
        figures["retrieval"] = retrieval_figure(found_slots, s, titles, study.encoder.depth - 1)
    for figure, drawn in figures.items():
        written.append(folder / f"{name}_{figure}.png")
        save_figure(written[-1], drawn)
    return written


def answers_frame(study: ProbeStudy, done: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row for every answer to a test region."""
    frames = []
    truth = pd.DataFrame(study.probe.truth, columns=list(study.settings.targets))
    for cell in done:
        views = np.array(cell["views"])
        for answer in cell["answers"]:
            frames.append(
                pd.DataFrame(
                    {
                        "arm": answer["arm"],
                        "embedding": answer["embedding"],
                        "target": answer["target"],
                        "fold": cell["fold"],
                        "seed": cell["seed"],
                        "group": study.groups[views],
                        "view": views,
                        "truth": truth.loc[views, answer["target"]].to_numpy(),
                        "predicted": np.array(answer["predicted"], np.float64),
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def retrieval_frame(study: ProbeStudy, done: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row for every test region and distilled layer: the share of its slots that find their own child."""
    frames = []
    for cell in done:
        views = np.array(cell["views"])
        for layer, shares in cell.get("retrieval", {}).items():
            columns = {"layer": int(layer), "fold": cell["fold"], "seed": cell["seed"], "group": study.groups[views]}
            arm = "lr" if cell["arm"] == REFERENCE else cell["arm"]
            frames.append(pd.DataFrame({"arm": arm, **columns, "view": views, "share": shares}))
    return pd.concat(frames, ignore_index=True)


def cells_frame(study: ProbeStudy, done: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row for every arm, embedding, target, fold and seed: its R2, alpha, and how stage 1 went there."""
    rows = []
    truth = dict(zip(study.settings.targets, study.probe.truth.T, strict=True))
    for cell in done:
        views = np.array(cell["views"])
        fit = {k: v for k, v in cell.get("fit", {}).items() if k != "history"}
        slots = {f"retrieval_layer{layer}": float(np.mean(v)) for layer, v in cell.get("retrieval", {}).items()}
        for answer in cell["answers"]:
            true, said = truth[answer["target"]][views], np.array(answer["predicted"], np.float64)
            known = np.isfinite(true)
            spread = ((true[known] - true[known].mean()) ** 2).sum()
            score = 1 - ((true[known] - said[known]) ** 2).sum() / spread if spread > 0 else np.nan
            row = {k: answer[k] for k in ("arm", "embedding", "target")} | {k: cell[k] for k in ("fold", "seed")}
            row |= {"r2": score, "regions": int(known.sum()), "alpha": answer["alpha"], "seconds": cell["seconds"]}
            rows.append(row | fit | (slots if answer["arm"] not in ("hr", "random", "colour") else {}))
    return pd.DataFrame(rows)
