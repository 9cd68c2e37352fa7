"""The command line, called in this process, and one study made by its own verbs: simulate, init, run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from lrmil.cli import main


@dataclass(frozen=True)
class Answer:
    """How a call ended."""

    code: int
    out: str
    err: str

    def refused(self, code: int = 2) -> str:
        """The one line on stderr with which a call was refused; fails if it was not, or with more than a line."""
        assert self.code == code, (self.code, self.out, self.err)
        assert "Traceback" not in self.err
        (line,) = (line for line in self.err.splitlines() if line.startswith("lrmil: "))
        assert self.err.rstrip().endswith(line), "the last line is the error"
        return line


def call_cli(*args: Any) -> Answer:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return Answer(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def call() -> Callable[..., Answer]:
    """`call("run", config)` runs a verb and returns exit code, stdout and stderr."""
    return call_cli


@dataclass(frozen=True)
class Study:
    """Made once, only read."""

    cohort: Path
    config: Path
    out: Path
    simulated: Answer
    initiated: Answer
    ran: Answer


# Small enough for a test: 5x regions of 32 px on slides of 512 px, few children, one epoch.
TINY = (
    *("--set", "grid.patch_px=32", "--set", "tiles.min_child_tissue=0.7", "--set", "folds.num_folds=3"),
    *("--set", "stage1.epochs=1", "--set", "teacher.epochs=2", "--set", "student.epochs=2"),
    *("--set", "evaluation={bootstrap: 100, timed_slides: 1, heatmap_slides: 1}", "--set", "device=cpu"),
)


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Overrides that make any config quick."""
    return TINY


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    small = ("slides=9", "patients=8", "slide_px=512", "nuclei.shapes=8")
    settings = [word for override in small for word in ("--set", override)]
    simulated = call_cli("simulate", folder / "cohort", "--size", "test", "--seed", 3, "--processes", 1, *settings)
    cohort, config = folder / "cohort" / "cohort.csv", folder / "config.yaml"
    initiated = call_cli("init", cohort, "--config", config, "--encoder", "lrmil-small", "--out", "runs/a")
    ran = call_cli("run", config, *TINY)
    return Study(cohort, config, folder / "runs" / "a", simulated, initiated, ran)
