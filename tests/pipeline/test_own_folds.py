"""A cohort's own folds need be no cross-validation: one official split, or random ones that test a slide twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lrmil.errors import CohortError, ConfigError
from lrmil.inference import read_manifest
from lrmil.pipeline.figures import _key_numbers
from lrmil.pipeline.splits import deployment_split


def with_parts(lab: Any, folder: Path, **columns: dict[str, str]) -> dict[str, Any]:
    """The cohort with fold columns: part by patient, the rest trains."""
    table = pd.read_csv(lab.table)
    table["path"] = [str(lab.table.parent / path) for path in table["path"]]
    for name, parts in columns.items():
        table[name] = [parts.get(patient, "train") for patient in table["patient_id"]]
    table.to_csv(folder / "cohort.csv", index=False)
    return {"table": str(folder / "cohort.csv")}


def by_label(lab: Any) -> tuple[list[str], list[str]]:
    """Patients of either class."""
    label = pd.read_csv(lab.table).groupby("patient_id")["label"].first()
    return tuple(sorted(label.index[label == name]) for name in ("negative", "positive"))  # type: ignore[return-value]


def test_repeated_splits_test_a_slide_in_each(lab: Any, finished: Any, tmp_path: Path) -> None:
    negative, positive = by_label(lab)
    parts = []
    for tested in (0, 1):
        test = dict.fromkeys([negative[tested], negative[2], positive[tested], positive[2]], "test")
        parts.append(test | dict.fromkeys([negative[3], positive[3]], "val"))
    out = finished.copy_features(tmp_path / "run")
    cohort = with_parts(lab, tmp_path, fold_1=parts[0], fold_2=parts[1])
    lab.run(out, cohort=cohort, deploy=False, evaluation={"baselines": ["majority"]})
    rows = pd.read_csv(out / "tables" / "predictions" / "lrmil.csv")
    for fold, part in enumerate(parts):
        tested = set(rows.loc[rows["fold"] == fold, "patient_id"])
        assert tested == {patient for patient, name in part.items() if name == "test"}
    results = pd.read_csv(out / "tables" / "results.csv")
    assert (results["patients"] == 6).all()
    assert (results["folds"] == 2).all()


def test_one_official_split_whatever_its_number(lab: Any, finished: Any, tmp_path: Path) -> None:
    """Only one class is tested: the AUC is undefined, and nowhere a number or a nan."""
    _, positive = by_label(lab)
    negative = by_label(lab)[0]
    parts = dict.fromkeys(positive[:2], "test") | dict.fromkeys([positive[2], negative[0]], "val")
    out = finished.copy_features(tmp_path / "run")
    outcome = lab.run(out, cohort=with_parts(lab, tmp_path, fold_0=parts), evaluation={"baselines": ["majority"]})
    said = read_manifest(out / "model").cross_validation
    assert said["LRMIL, AUC"] == "undefined (1 folds, 2 patients)"
    assert said["LRMIL, accuracy"].endswith(", 1 folds, 2 patients)")
    assert "nan" not in str(said)
    numbers = _key_numbers(outcome.scores)
    assert [(n.value, n.detail) for n in numbers if n.label == "AUC, LRMIL"] == [("undefined", "")]


@pytest.mark.usefixtures("no_report")
def test_students_of_other_folds_are_not_kept_in_memory(lab: Any, finished: Any, watch: Any, tmp_path: Path) -> None:
    """A large encoder for each fold at once would fit no GPU."""
    import gc
    import weakref

    students: list[weakref.ref[Any]] = []

    def note(student: Any, *args: Any, **kwargs: Any) -> None:
        gc.collect()
        assert not [other for other in students if other() is not None]
        students.append(weakref.ref(student))

    watch("lrmil.pipeline.distill.distil_encoder", note)
    loaded: list[weakref.ref[Any]] = []

    def encode(run: Any, split: Any, grids: Any, pixels: Any, student: Any) -> None:
        gc.collect()
        assert not [other for other in loaded if other() is not None]
        loaded.append(weakref.ref(student))

    watch("lrmil.pipeline.distill._encode_fold", encode)
    lab.run_until("student", finished.copy_features(tmp_path / "run"))
    assert len(students) == len(loaded) == 3


def test_folds_by_a_column_that_cannot_be(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(CohortError, match=r"no column scanner, by which folds\.group deals patients"):
        lab.run_until("encode", tmp_path / "a", folds={"group": "scanner"})
    cohort = with_parts(lab, tmp_path, fold_0=dict.fromkeys(by_label(lab)[0][:2], "test"))
    with pytest.raises(CohortError, match=r"brings folds of its own, and folds\.group asks for others"):
        lab.run_until("encode", tmp_path / "b", cohort=cohort, folds={"group": "site"})
    with pytest.raises(ConfigError, match="group and clam_splits both say"):
        lab.settings(tmp_path / "c", folds={"group": "site", "clam_splits": "splits"})


@pytest.mark.usefixtures("no_report")
def test_fewer_patients_are_left_out_of_the_deployed_model_too(lab: Any, finished: Any, tmp_path: Path) -> None:
    out = finished.copy_features(tmp_path / "run")
    lab.run(out, folds={"train_patients": 2}, evaluation={"baselines": []})
    splits = pd.read_csv(out / "splits.csv").set_index("patient_id")
    assert (splits == "train").sum().eq(2).all()
    assert (splits == "test").sum().sum() == len(splits), "all are tested"
    stage1 = lab.parts(out, folds={"train_patients": 2})
    final = deployment_split(stage1, list(stage1.cohort.table["slide_id"]))
    assert len({stage1.cohort.patient_of(slide) for slide in final.train}) == 2
