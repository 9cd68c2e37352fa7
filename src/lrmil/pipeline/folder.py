"""The output folder of a run: where each thing lies, and what is already done."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmil.errors import LrmilError
from lrmil.files import read_json, write_json, write_text


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
    """Names of everything under the output folder.

    A step is done when its `done.json` holds the key of the settings and inputs it depends on; the file is written
    last, so a step that was killed is simply repeated.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    config = property(lambda self: self.root / "config.yaml")
    cohort = property(lambda self: self.root / "cohort.csv")
    splits = property(lambda self: self.root / "splits.csv")
    failures = property(lambda self: self.root / "failures.csv")
    log = property(lambda self: self.root / "log.jsonl")
    tables = property(lambda self: self.root / "tables")
    report = property(lambda self: self.root / "report.html")
    figures = property(lambda self: self.root / "figures")
    model = property(lambda self: self.root / "model")

    def tiles(self, slide_id: str) -> Path:
        """Tissue and grid of a slide; beside it lies a picture, .jpg."""
        return self.root / "tiles" / f"{slide_id}.npz"

    def bag(self, features: str, slide_id: str) -> Path:
        """Features that no fold trained: `features` is like "conch_v1_0.5mpp"."""
        return self.root / "features" / features / f"{slide_id}.h5"

    def fold(self, name: str) -> Path:
        """Everything trained for one fold; name "0".."n-1", or "final" for the deployed model."""
        return self.root / "folds" / name

    def is_done(self, step: Path, key: str) -> bool:
        """Say whether the step with that folder was finished with exactly these settings and inputs."""
        try:
            return bool(read_json(step / "done.json").get("key") == key)
        except (OSError, ValueError, AttributeError):
            return False

    def mark_done(self, step: Path, key: str, **facts: Any) -> None:
        """Note that a step is finished. To be called last."""
        write_json(step / "done.json", {"key": key, **facts})

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
