"""Several tasks of one cohort: the same patient folds and the same stage 1, heads and results of their own."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lrmil.errors import ConfigError
from lrmil.pipeline.config import RunSettings, parse_config
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.study import Study

TASKS = {"label": "classification", "stage": "classification", "age": "regression"}


def quiet() -> Reporter:
    return Reporter(quiet=True, stream=io.StringIO())


@pytest.fixture(scope="module")
def table(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's slides with two more tasks; the second and third lack labels of different slides."""
    rows = pd.read_csv(lab.table)
    rows["path"] = [str((lab.table.parent / p).resolve()) for p in rows["path"]]
    patients = sorted(rows["patient_id"].unique())
    rows["stage"] = ["late" if patients.index(p) % 2 else "early" for p in rows["patient_id"]]
    rows["age"] = [40.0 + 3 * patients.index(p) for p in rows["patient_id"]]
    rows.loc[0, "stage"] = None
    rows.loc[[1, 2], "age"] = None
    path = tmp_path_factory.mktemp("tasks") / "cohort.csv"
    rows.to_csv(path, index=False)
    return path


def settings_for(lab: Any, table: Path, out: Path, task: str, **changes: Any) -> RunSettings:
    cohort = {"table": str(table), "task": task, "tasks": TASKS}
    settings: RunSettings = lab.settings(out, cohort=cohort, **changes)
    return settings


def done(settings: RunSettings) -> Study:
    study = Study.begin(settings, quiet())
    for stage in ("tile", "encode", "distill", "teacher", "student"):
        study.do(stage)
    return study


@pytest.fixture(scope="module")
def first(lab: Any, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return done(settings_for(lab, table, tmp_path_factory.mktemp("tasks") / "run", "label"))


def test_stage_1_is_trained_once_for_all_tasks(lab: Any, table: Path, first: Study, work: Counter[str]) -> None:
    out = first.run.folder.root
    before = lab.times(out, "folds", "features", "tiles", "tasks/label")
    for task in ("stage", "age", "label"):
        done(settings_for(lab, table, out, task))
    assert not {"tile", "encode 20x", "encode 5x", "stage 1", "read 5x"} & set(work)
    # The first task's own heads were there, too.
    assert (work["label head"], work["student head"]) == (6, 6)
    after = lab.times(out, "folds", "features", "tiles", "tasks/label")
    written_by_every_run = {"config.yaml", "cohort.csv", "splits.csv"}
    assert {k for k in before if after[k] != before[k]} <= {f"tasks/label/{n}" for n in written_by_every_run}


def test_patients_are_in_the_same_part_for_every_task(lab: Any, table: Path, first: Study) -> None:
    out = first.run.folder.root
    for task in ("stage", "age"):
        study = Study.begin(settings_for(lab, table, out, task), quiet())
        study.prepare()
        own = (out / "tasks" / task / "splits.csv").read_bytes()
        assert own == (out / "tasks" / "label" / "splits.csv").read_bytes()
        labelled = set(study.run.cohort.labelled()["slide_id"])
        assert len(labelled) < len(first.slides)
        for split, of_first in zip(study.folds, first.folds, strict=True):
            for part in ("train", "val", "test"):
                # No head meets a slide that its task does not label.
                assert set(split.of(part)) == set(of_first.of(part)) & labelled


def test_the_loss_that_follows_a_teacher_has_a_stage_1_for_each_task(lab: Any, table: Path, tmp_path: Path) -> None:
    loss = {"stage1": {"loss": {"lambda_attention_feature": 0.1}}}
    study = Study.begin(settings_for(lab, table, tmp_path / "run", "stage", **loss), quiet())
    assert study.run.stage1_folder is None
    assert study.run.folder.fold("0") == tmp_path / "run" / "tasks" / "stage" / "folds" / "0"


@pytest.mark.parametrize(
    ("cohort", "words"),
    [
        ({"task": "grade", "tasks": TASKS}, "'grade' is not among tasks"),
        ({"task": "age", "kind": "classification", "tasks": TASKS}, "leave kind out"),
    ],
)
def test_tasks_that_contradict_themselves_are_refused(cohort: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({"cohort": {"table": "x.csv", **cohort}, "out": "run"})
