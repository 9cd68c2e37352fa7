"""The output folder of a run: where each thing lies, and what is already done."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmil.errors import LrmilError
from lrmil.files import read_json, write_json, write_text

DONE = "done.json"


@dataclass(frozen=True)
class Failure:
    """A slide that could not be used, and why."""

    slide_id: str
    stage: str
    kind: str
    message: str

    @classmethod
    def of(cls, slide_id: str, stage: str, error: LrmilError) -> Failure:
        """Describe `error`, which `slide_id` met in `stage`."""
        return cls(slide_id, stage, type(error).__name__, str(error))


class RunFolder:
    """Names of everything under the output folder, and which steps are done.

    A step is a folder of several files. It is done when its done.json holds the key of the settings and inputs it
    depends on. The file is removed before anything in the folder changes and written last, so a step that was killed is
    simply repeated, and never taken for what it was before.
    """

    def __init__(self, root: str | Path, trained: str = "folds", task: str | None = None) -> None:
        """Name everything under `root`; with `task`, what is of that task alone lies in tasks/<task>/."""
        self.root = Path(root)
        self._task = task
        own = self.root if task is None else self.root / "tasks" / task.replace("/", "_")
        self._trained = own / trained
        self.config = own / "config.yaml"
        self.cohort = own / "cohort.csv"
        self.splits = (own if trained == "folds" else self._trained) / "splits.csv"
        self.failures = own / "failures.csv"
        self.log = self.root / "log.jsonl"
        self.seconds = own / "seconds.json"
        self.tables = own / "tables"
        self.report = own / "report.html"
        self.figures = own / "figures"
        self.model = own / "model"
        self.comparison = own / "compare"
        self.heatmaps = own / "heatmaps"
        self.ablation = own / "ablation"
        self.sensitivity = own / "sensitivity"
        self.recipes = own / "recipes"

    def tiles(self, slide_id: str) -> Path:
        """Tissue and grid of a slide; beside it lie a picture, .jpg, and what was read at 5x, .regions.npz."""
        return self.root / "tiles" / f"{slide_id}.npz"

    def bag(self, features: str, slide_id: str) -> Path:
        """Features that no fold trained: `features` is like "conch_v1_0.5mpp"."""
        return self.root / "features" / features / f"{slide_id}.h5"

    def fold(self, name: str) -> Path:
        """Everything trained for one fold; name "0".."n-1", or "final" for the deployed model."""
        return self._trained / name

    def variant(self, name: str) -> RunFolder:
        """Return the same folder with other trained parts, in variants/<name>/."""
        return RunFolder(self.root, f"variants/{name}", self._task)

    def is_done(self, step: Path, key: str) -> bool:
        """Say whether the step with that folder was finished with exactly these settings and inputs."""
        return self.done_facts(step).get("key") == key

    def done_facts(self, step: Path) -> dict[str, Any]:
        """Return what `mark_done` noted, `key` among it; empty if the step is not done."""
        try:
            facts = read_json(step / DONE)
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def begin(self, step: Path) -> None:
        """Note that the files of a step are about to change. To be called first."""
        (step / DONE).unlink(missing_ok=True)

    def mark_done(self, step: Path, key: str, **facts: Any) -> None:
        """Note that a step is finished. To be called last."""
        write_json(step / DONE, {"key": key, **facts})

    def write_failures(self, failures: list[Failure]) -> None:
        """Write failures.csv; an empty list removes it."""
        if not failures:
            self.failures.unlink(missing_ok=True)
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["slide_id", "stage", "error", "message"])
        writer.writerows([f.slide_id, f.stage, f.kind, f.message] for f in failures)
        write_text(self.failures, text.getvalue())
