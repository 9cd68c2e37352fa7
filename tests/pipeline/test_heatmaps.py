"""Heatmaps of many models side by side, from the fold that tests the slide."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrmil.errors import CohortError, ConfigError, HeadError
from lrmil.evaluation.overlay import AttentionMap
from lrmil.pipeline import heatmaps as room
from lrmil.pipeline.attention import StoredModels
from lrmil.pipeline.cohort import settings_cohort
from lrmil.pipeline.compare import compare
from lrmil.pipeline.config import RunSettings
from lrmil.pipeline.context import Run
from lrmil.pipeline.heads import load_outputs
from lrmil.pipeline.heatmaps import heatmaps
from lrmil.pipeline.reporting import Reporter
from lrmil.slides import open_slide

HEADS = ["abmil", "max_pool", "transmil", "zoommil", "hdmil", "lrmil"]


def quiet() -> Reporter:
    return Reporter(quiet=True, stream=io.StringIO())


@pytest.fixture(scope="module")
def compared(lab: Any, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """A run that is done, and a comparison whose heads are trained: its tables are not looked at here."""

    class Trained(Exception):
        pass

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Trained

    out = finished.copy(tmp_path_factory.mktemp("heatmaps") / "run")
    changes = {"evaluation": {"baselines": ["majority", "lr_only"]}, "compare": {"methods": HEADS, "jobs": 1}}
    settings: RunSettings = lab.settings(out, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrmil.pipeline.said.compare_report", stop)
        with pytest.raises(Trained):
            compare(settings, quiet())
    return settings


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[AttentionMap]]:
    """The maps of each figure that is drawn."""
    found: list[list[AttentionMap]] = []
    original = room.slide_figure

    def watched(run: Any, entry: Any, maps: list[AttentionMap], note: str = "") -> Any:
        found.append(maps)
        return original(run, entry, maps, note)

    monkeypatch.setattr(room, "slide_figure", watched)
    return found


def a_tested_slide(finished: Any, fold: str) -> str:
    return min(finished.splits[fold]["test"])


def test_each_slide_is_shown_by_the_fold_that_tests_it(
    compared: RunSettings, finished: Any, drawn: list[list[AttentionMap]]
) -> None:
    slides = [a_tested_slide(finished, fold) for fold in finished.splits]
    files = heatmaps(compared, slides, quiet())
    assert [path.name for path in files] == [f"{slide}.png" for slide in slides]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in files)
    for fold, slide, maps in zip(finished.splits, slides, drawn, strict=True):
        for shown, step in zip(maps, ("teacher", "lr_only", "student"), strict=True):
            path = Path(compared.out) / "folds" / fold / step
            with np.load(path / "outputs.npz") as stored:
                outputs = load_outputs(path, str(stored["key"]))
            assert outputs is not None
            assert np.allclose(shown.attention, outputs[slide].attention, atol=1e-6), (fold, step)


def test_nothing_is_trained_and_nothing_else_is_written(compared: RunSettings, finished: Any, work: Any) -> None:
    out = Path(compared.out)

    def state() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.parent.name != "heatmaps"}

    before = state()
    heatmaps(compared, [a_tested_slide(finished, "0")], quiet())
    assert not work
    assert state() == before


def test_other_heads_and_chosen_patches_are_shown(
    compared: RunSettings, finished: Any, drawn: list[list[AttentionMap]]
) -> None:
    slide = a_tested_slide(finished, "1")
    heatmaps(compared, [slide], quiet(), ["hdmil", "abmil", "transmil", "zoommil", "teacher"])
    hdmil, abmil, transmil, zoommil, teacher = drawn[0]
    assert abmil.title.startswith("ABMIL: ")
    assert np.allclose(abmil.attention, teacher.attention)
    assert len(transmil.attention) == len(teacher.attention)
    assert np.isclose(transmil.attention.sum(), 1, atol=1e-4)
    width, height = open_slide(next((Path(compared.cohort.table).parent / "slides").glob(f"{slide}*"))).dimensions
    for chosen in (hdmil, zoommil):
        assert "patches chosen" in chosen.title
        assert len(chosen.boxes_l0) == len(chosen.attention) <= 4 * len(teacher.boxes_l0)
        assert (chosen.boxes_l0 <= max(width, height)).all()
    # HDMIL chooses among the teacher's own patches.
    assert {tuple(b) for b in hdmil.boxes_l0.tolist()} <= {tuple(b) for b in teacher.boxes_l0.tolist()}


@pytest.mark.parametrize(
    ("slide", "methods", "error", "words"),
    [
        ("nobody", ["lrmil"], CohortError, "no slide 'nobody'"),
        (None, ["lrmil", "abmill"], ConfigError, "no method 'abmill'"),
        (None, ["majority", "lrmil"], ConfigError, "majority: this looks at no slide"),
        (None, ["max_pool"], HeadError, "Max-P weighs no patches"),
        (None, ["clam_sb"], ConfigError, "CLAM-SB of fold 1 of 3.*missing.*lrmil compare --methods clam_sb"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    compared: RunSettings, finished: Any, slide: str | None, methods: list[str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        heatmaps(compared, [slide or a_tested_slide(finished, "0")], quiet(), methods)


def test_models_of_other_settings_are_not_shown(lab: Any, compared: RunSettings, finished: Any) -> None:
    slide = a_tested_slide(finished, "2")
    student = compared.student.model_copy(update={"epochs": 7})
    with pytest.raises(ConfigError, match=r"LRMIL of fold 3 of 3, which tests .* with other settings.*lrmil run"):
        heatmaps(compared.model_copy(update={"student": student}), [slide], quiet(), ["lrmil"])


def test_an_empty_folder_says_what_to_run(lab: Any, finished: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.*First: lrmil run"):
        heatmaps(lab.settings(tmp_path / "run"), [a_tested_slide(finished, "0")], quiet())
    assert not (tmp_path / "run").exists()


def test_a_slide_that_failed_says_why(compared: RunSettings, finished: Any) -> None:
    slide = a_tested_slide(finished, "0")
    path = Path(compared.out) / "failures.csv"
    path.write_text(f"slide_id,stage,error,message\n{slide},tile,NoTissue,there is no tissue.\n")
    try:
        with pytest.raises(ConfigError, match="failed: there is no tissue"):
            heatmaps(compared, [slide], quiet())
        assert not stored_models(compared).shows(slide)
        assert stored_models(compared).shows(a_tested_slide(finished, "1"))
    finally:
        path.unlink()


def test_a_slide_that_no_fold_tests_has_no_map(compared: RunSettings, finished: Any) -> None:
    models, slide = stored_models(compared), a_tested_slide(finished, "0")
    assert models.shows(slide)
    models._folds = [split for split in models._folds if slide not in split.test]
    assert not models.shows(slide)
    with pytest.raises(ConfigError, match="no fold tests"):
        models.entry(slide)


def stored_models(settings: RunSettings) -> StoredModels:
    return StoredModels(Run.of(settings, settings_cohort(settings), quiet()))
