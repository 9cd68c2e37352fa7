"""No part of a fold's model has seen what it is tested on. Checked from the outside, against splits.csv."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lrmil.pipeline.distill as distill
from lrmil.slides import open_slide

Watch = Callable[[str, Callable[..., Any]], None]


class NamedTargets(distill.CachedTargets):
    """Targets that know their slide."""

    def __init__(self, path: Path, *args: Any) -> None:
        super().__init__(path, *args)
        self.slide = path.stem


class NamedRegions(distill.CohortRegions):
    """Regions that know their slides."""

    def __init__(self, slides: Any, split: str, *, foreign_seed: int | None) -> None:
        assert foreign_seed is None, "children of other slides are for a negative control alone"
        super().__init__(slides, split)
        self.slides = [targets.slide for _, targets in slides]
        self.pixels = {targets.slide: pixels for pixels, targets in slides}


@pytest.fixture
def stage1(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> list[dict[str, Any]]:
    """What stage 1 is given, call by call."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("lrmil.pipeline.distill.CachedTargets", NamedTargets)
    monkeypatch.setattr("lrmil.pipeline.distill.CohortRegions", NamedRegions)

    def note(student: Any, train: NamedRegions, val: NamedRegions, *args: Any, **kwargs: Any) -> None:
        calls.append({"student": student, "sha": student.weights_sha256, "train": train, "val": val})

    watch("lrmil.pipeline.distill.distil_encoder", note)
    return calls


def test_stage_1_of_a_fold_is_given_its_training_and_validation_patients_alone(
    lab: Any, finished: Any, stage1: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = finished.copy_features(tmp_path / "run")
    lab.run_until("distill", out)
    assert len(stage1) == 3
    for fold, call in zip(("0", "1", "2"), stage1, strict=True):
        parts = finished.splits[fold]
        assert set(call["train"].slides) == parts["train"]
        assert set(call["val"].slides) == parts["val"]
        seen = set(call["train"].slides) | set(call["val"].slides)
        assert not seen & parts["test"]
        patients = pd.read_csv(finished.out / "cohort.csv", dtype=str).set_index("slide_id")["patient_id"]
        assert not set(patients[list(seen)]) & set(patients[list(parts["test"])])
        for regions in (call["train"], call["val"]):
            _check_pixels(lab, finished, regions)


def _check_pixels(lab: Any, finished: Any, regions: NamedRegions) -> None:
    """The pixels beside a slide's targets are that slide's, and each lies where the grid says."""
    for slide_id, pixels in regions.pixels.items():
        with open_slide(lab.table.parent / "slides" / f"{slide_id}.tif") as slide:
            whole = slide.read(0, 0, 128, 128, 2.0)
        with np.load(finished.out / "tiles" / f"{slide_id}.npz") as grid:
            places = grid["region_index"][pixels.rows] * 32
        assert np.array_equal(pixels.images[:], np.stack([whole[y : y + 32, x : x + 32] for x, y in places]))


def test_every_fold_begins_with_a_student_of_its_own_and_the_teachers_weights(
    lab: Any, finished: Any, stage1: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The released program goes on from fold to fold: its second student has seen the second fold's test patients."""
    out = finished.copy_features(tmp_path / "run")
    lab.run_until("distill", out)
    teacher = lab.parts(out).build_encoder()
    assert len({id(call["student"]) for call in stage1}) == 3
    assert {call["sha"] for call in stage1} == {teacher.weights_sha256}
    trained = {call["student"].weights_sha256 for call in stage1}
    assert len(trained) == 3
    assert teacher.weights_sha256 not in trained


def test_heads_are_trained_on_their_folds_slides_alone(lab: Any, finished: Any, watch: Watch, tmp_path: Path) -> None:
    calls: dict[str, list[tuple[set[str], set[str], set[str]]]] = {"teacher": [], "student": []}

    def note(name: str) -> Callable[..., None]:
        def before(train: Any, val: Any, *args: Any, **kwargs: Any) -> None:
            signals = set(args[0]) if name == "student" else set()
            calls[name].append(({b.slide_id for b in train}, {b.slide_id for b in val}, signals))

        return before

    watch("lrmil.pipeline.teacher.train_teacher", note("teacher"))
    watch("lrmil.pipeline.student.train_student", note("student"))
    lab.run_until("student", finished.copy_features(tmp_path / "run"))
    for name, found in calls.items():
        assert len(found) == 3
        for fold, (train, val, signals) in zip(("0", "1", "2"), found, strict=True):
            parts = finished.splits[fold]
            assert train == parts["train"]
            assert val == parts["val"]
            assert signals == (parts["train"] if name == "student" else set())


def test_labels_of_test_slides_change_no_weight(lab: Any, finished: Any, tmp_path: Path) -> None:
    """The same folds, with the labels of fold 0's test slides turned round: fold 0 learns the same, bit for bit."""
    table = pd.read_csv(finished.out / "cohort.csv")
    fold_of = {slide: int(fold) for fold, parts in finished.splits.items() for slide in parts["test"]}
    table["fold"] = table["slide_id"].map(fold_of)
    tested = table["slide_id"].isin(finished.splits["0"]["test"])
    other = {"positive": "negative", "negative": "positive"}
    table.loc[tested, "label"] = table.loc[tested, "label"].map(other)
    table.to_csv(tmp_path / "turned.csv", index=False)
    out = finished.copy_features(tmp_path / "run")

    lab.run_until("student", out, cohort={"table": str(tmp_path / "turned.csv")})

    def weights(folder: Path, fold: int) -> dict[str, bytes]:
        paths = sorted((folder / "folds" / str(fold)).glob("*/*.safetensors"))
        return {p.parent.name: p.read_bytes() for p in paths if p.parent.name != "lr_only"}

    for fold in range(3):
        ours, theirs = weights(finished.out, fold), weights(out, fold)
        assert set(ours) == {"stage1", "teacher", "student"}
        assert ours["stage1"] == theirs["stage1"], "stage 1 looks at no label"
        if fold == 0:
            assert ours == theirs
        else:
            assert ours["teacher"] != theirs["teacher"], "in the other folds these slides do train"
            assert ours["student"] != theirs["student"]
