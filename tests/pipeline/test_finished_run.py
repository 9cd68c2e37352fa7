"""What a finished run leaves behind, and that running it again does nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml

from lrmil.pipeline.config import load_config

METHODS = {
    "HR teacher": "hr_teacher",
    "LRMIL": "lrmil",
    "LR without distillation": "lr_without_distillation",
    "Colour histogram": "colour_histogram",
    "Majority class": "majority_class",
}


def test_the_folder_holds_what_others_rely_on(finished: Any) -> None:
    names = {p.name for p in finished.out.iterdir()}
    assert names >= {"config.yaml", "cohort.csv", "splits.csv", "tiles", "features", "folds", "tables", "model"}
    assert names >= {"report.html", "log.jsonl"}
    assert "failures.csv" not in names
    slides = sorted(pd.read_csv(finished.out / "cohort.csv")["slide_id"])
    assert len(slides) == 12
    for folder in ("features/tiny_0.5mpp", "features/tiny_2mpp", "folds/0/features", "folds/final/features"):
        assert sorted(p.stem for p in (finished.out / folder).glob("*.h5")) == slides
    assert {p.name for p in (finished.out / "folds").iterdir()} == {"0", "1", "2", "final"}
    for step in ("teacher", "student", "lr_only"):
        held = {p.name for p in (finished.out / "folds" / "1" / step).iterdir()}
        assert held == {"done.json", "head.json", "head.safetensors", "history.json", "outputs.npz"}
    held = {p.name for p in (finished.out / "folds" / "1" / "stage1").iterdir()}
    assert held == {"done.json", "encoder.json", "encoder.safetensors", "history.json", "spreads.json"}
    assert not list(finished.out.rglob("*.tmp*")), "a file that was never renamed"


def test_config_yaml_alone_says_what_was_done(finished: Any) -> None:
    assert load_config(finished.out / "config.yaml") == finished.settings
    written = yaml.safe_load((finished.out / "config.yaml").read_text())
    assert written["tissue"], "defaults are written, too"
    assert Path(written["out"]).is_absolute()
    assert Path(written["cohort"]["table"]).is_absolute()


def test_every_slide_is_predicted_once_by_every_method_and_by_the_fold_that_tests_it(finished: Any) -> None:
    truth = pd.read_csv(finished.out / "cohort.csv").set_index("slide_id")["label"]
    fold_of = {slide: int(fold) for fold, parts in finished.splits.items() for slide in parts["test"]}
    for name in METHODS.values():
        table = pd.read_csv(finished.out / "tables" / "predictions" / f"{name}.csv")
        assert sorted(table["slide_id"]) == sorted(truth.index)
        assert dict(zip(table["slide_id"], table["fold"], strict=True)) == fold_of
        assert dict(zip(table["slide_id"], table["label"], strict=True)) == truth.to_dict()


def test_tables_hold_all_methods(finished: Any) -> None:
    results = pd.read_csv(finished.out / "tables" / "results.csv").set_index("method")
    assert set(results.index) == set(METHODS)
    assert np.isfinite(results.loc[["HR teacher", "LRMIL", "LR without distillation"], "seconds_per_slide"]).all()
    # 4 x 4 regions at most, of 16 children each
    assert results.loc["LRMIL", "patches_per_slide"] <= 16 < results.loc["HR teacher", "patches_per_slide"] <= 256
    markdown = (finished.out / "tables" / "results.md").read_text()
    assert all(method in markdown for method in METHODS)
    assert "Majority class" in "\n".join(finished.outcome.summary)


def test_the_proof_of_the_split_is_shown(finished: Any) -> None:
    assert "Each of 10 patients is tested exactly once." in finished.started
    assert "No patient and no slide is in two parts of a fold." in finished.started
    assert "No patient and no slide is in two parts of a fold." in (finished.out / "report.html").read_text()


def test_features_say_what_they_were_made_of(finished: Any) -> None:
    path = next((finished.out / "features" / "tiny_0.5mpp").glob("*.h5"))
    with h5py.File(path) as stored:
        assert stored["features"].dtype == np.float16
        assert stored["features"].chunks is None
        assert stored["coords"].dtype == np.int64
        about = json.loads(stored.attrs["lrmil"])
        assert sorted(stored["layer_cls"]) == ["0", "1", "2"]
    assert about["provenance"]["encoder"]["name"] == "tiny"
    assert about["provenance"]["software"]["torch"]


def test_the_log_is_one_json_a_line_and_tells_every_stage(finished: Any) -> None:
    events = [json.loads(line) for line in (finished.out / "log.jsonl").read_text().splitlines()]
    stages = [e["stage"] for e in events if e["event"] == "stage finished"]
    for stage in ("tile", "encode", "read", "distill", "teacher", "student", "time", "report", "deploy"):
        assert stage in stages
    assert events[-1]["event"] == "run finished"


@pytest.mark.usefixtures("no_report")
def test_a_second_run_trains_and_encodes_nothing(lab: Any, finished: Any, work: Counter[str], tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "run")
    before = lab.times(out, "tiles", "features", "folds", "model")
    seconds = (out / "seconds.json").read_bytes()
    changes = {"evaluation": {"timed_slides": 1, "heatmap_slides": 2}}
    changes["evaluation"]["baselines"] = ["majority", "colour_histogram", "lr_only"]
    lab.run(out, **changes)
    assert not work
    assert lab.times(out, "tiles", "features", "folds", "model") == before
    assert (out / "seconds.json").read_bytes() == seconds
    assert lab.predictions(out) == lab.predictions(finished.out)


@pytest.mark.parametrize(
    ("stage", "done"),
    [
        ("tile", {"tile": 12}),
        ("encode", {"tile": 12, "encode 20x": 12, "read 5x": 12}),
        ("teacher", {"tile": 12, "encode 20x": 12, "read 5x": 12, "label head": 3}),
    ],
)
def test_a_stage_by_itself_does_what_it_needs_and_no_more(
    lab: Any, work: Counter[str], tmp_path: Path, stage: str, done: dict[str, int]
) -> None:
    outcome = lab.run_until(stage, tmp_path / "run")
    assert dict(work) == done
    assert outcome.summary == [f"{stage}: done, in {tmp_path / 'run'}"]


@pytest.mark.usefixtures("no_report")
def test_tables_follow_the_config(lab: Any, finished: Any, work: Counter[str], tmp_path: Path) -> None:
    """A baseline that is no longer asked for leaves the tables; nothing is made again for that."""
    out = finished.copy(tmp_path / "run")
    lab.run(out, evaluation={"baselines": ["majority"]}, deploy=False)
    assert not work
    assert set(lab.predictions(out)) == {"hr_teacher.csv", "lrmil.csv", "majority_class.csv"}
