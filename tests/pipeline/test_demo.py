"""Where the demo may work, which is seen before it simulates anything."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from lrmil.errors import ConfigError
from lrmil.pipeline import demo
from lrmil.pipeline.reporting import Reporter


class Simulating(Exception):
    """The demo began its work."""


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls the demo as far as the simulation."""

    def simulate(*args: Any, **kwargs: Any) -> None:
        raise Simulating

    monkeypatch.setattr(demo, "simulate_cohort", simulate)

    def begin(out: Path) -> None:
        demo.run_demo(out, Reporter(out / "log.jsonl", quiet=True, stream=io.StringIO()))

    return begin


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("notes.txt",),
        ("cohort/cohort.csv", "cohort/slides/a.svs"),
        ("log.jsonl", "cohort/simulated.json", "thesis.tex"),
        ("log.jsonl", "config.yaml", "cohort/other.csv"),
    ],
)
def test_a_folder_of_others_is_refused_and_left_as_it_was(begin: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    out = write(tmp_path / "out", *names)
    with pytest.raises(ConfigError, match=r"no folder of `lrmil demo`.*Name a new folder"):
        begin(out)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == sorted(names)


@pytest.mark.parametrize(
    "names",
    [
        (),
        (".DS_Store",),
        ("log.jsonl", "cohort/slides/a.tif"),
        ("log.jsonl", "cohort/simulated.json", "cohort/cohort.csv", "config.yaml", "tiles/a.npz", "report.html"),
    ],
)
def test_a_new_folder_and_that_of_a_demo_are_worked_in(begin: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(Simulating):
        begin(write(tmp_path / "out", *names))
