"""What depends on what: a changed setting changes the keys of exactly the parts that it can change."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.keys import (
    bag_provenance,
    features_of,
    label_head_key,
    outputs_key,
    results_key,
    stage1_key,
    student_key,
    tile_key,
)
from lrmil.pipeline.splits import make_splits

ALL = {"tiles", "features", "stage 1", "teacher", "student", "outputs", "results"}
TRAINED = ALL - {"tiles", "features"}


def keys(run: Run, split: Split | None = None) -> dict[str, Any]:
    """Keys of fold 0, and tiles and features of its first training slide."""
    slides = [entry.slide_id for entry in run.all_entries()]
    split = split or make_splits(run, slides)[0][0]
    teacher, student = run.build_encoder(), run.build_encoder(student=True)
    entry = run.entry(split.train[0])
    head = label_head_key(run, split, teacher, "teacher")
    return {
        "tiles": tile_key(run, entry),
        "features": bag_provenance(run, entry, features_of(run, teacher), 0.5),
        "stage 1": stage1_key(run, split, teacher),
        "teacher": head,
        "student": student_key(run, split, student, teacher),
        "outputs": outputs_key(run, head, slides),
        "results": results_key(run),
    }


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({"grid": {"mpp_tolerance": 0.04}}, ALL),
        ({"tissue": {"smooth_um": 3.21}}, ALL),
        ({"tiles": {"min_child_tissue": 0.2}}, ALL),
        ({"encoder": {"precision": "float32"}}, ALL - {"tiles"}),
        ({"encoder": {"student_embedding": None}}, {"stage 1", "results"}),
        ({"stage1": {"epochs": 2}}, {"stage 1", "results"}),
        ({"stage1": {"children": "own"}}, set()),
        ({"stage1": {"restore_spread": True}}, {"results"}),
        ({"stage1": {"children": "foreign"}}, {"stage 1", "results"}),
        ({"stage1": {"loss": {"layers": [0, 1]}}}, {"stage 1", "results"}),
        ({"stage1": {"loss": {"lambda_attention_feature": 1.0}}}, {"stage 1", "results"}),
        ({"teacher": {"patience": 7}}, {"teacher", "student", "outputs", "results"}),
        ({"teacher": {"head": {"options": {"gated": True}}}}, {"teacher", "student", "outputs", "results"}),
        ({"student": {"loss": {"hard_k": 2}}}, {"student", "results"}),
        ({"student": {"learning_rate": 0.5}}, {"student", "results"}),
        ({"seed": 1}, TRAINED),
        ({"evaluation": {"bootstrap": 200}}, {"results"}),
        ({"evaluation": {"baselines": []}}, {"results"}),
        ({"targets": "on_the_fly"}, set()),
        ({"deploy": False}, set()),
        ({"threads": 2, "memory_gb": 9}, set()),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_setting_changes_what_depends_on_it_and_nothing_else(
    lab: Any, tmp_path: Path, changes: dict[str, Any], stale: set[str]
) -> None:
    base = lab.parts(tmp_path / "a")
    split = make_splits(base, [entry.slide_id for entry in base.all_entries()])[0][0]
    before, after = keys(base, split), keys(lab.parts(tmp_path / "b", **changes), split)
    assert {name for name in before if before[name] != after[name]} == stale


def test_the_output_folder_is_in_no_key(lab: Any, tmp_path: Path) -> None:
    assert keys(lab.parts(tmp_path / "a")) == keys(lab.parts(tmp_path / "b"))


def test_stage_1_depends_on_the_teacher_head_only_where_it_looks_at_it(lab: Any, tmp_path: Path) -> None:
    on = {"stage1": {"loss": {"lambda_attention_feature": 1.0}}}
    patient = {"teacher": {"patience": 7}}
    looking, other = (keys(lab.parts(tmp_path / "a", **on, **more))["stage 1"] for more in ({}, patient))
    assert looking != other


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_changed_label_makes_heads_stale_unless_it_is_a_test_label(lab: Any, tmp_path: Path, part: str) -> None:
    run = lab.parts(tmp_path / "a")
    split = make_splits(run, [entry.slide_id for entry in run.all_entries()])[0][0]
    table = pd.read_csv(lab.table)
    table["path"] = [str(lab.table.parent / path) for path in table["path"]]
    row = table["slide_id"] == split.of(part)[0]
    table.loc[row, "label"] = table.loc[row, "label"].map({"positive": "negative", "negative": "positive"})
    table.to_csv(tmp_path / "cohort.csv", index=False)
    before = keys(run, split)
    after = keys(lab.parts(tmp_path / "a", cohort={"table": str(tmp_path / "cohort.csv")}), split)
    stale = {name for name in before if before[name] != after[name]}
    assert stale == ({"results"} if part == "test" else {"teacher", "student", "outputs", "results"})


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_changed_slide_makes_stale_what_saw_it(lab: Any, tmp_path: Path, part: str) -> None:
    run = lab.parts(tmp_path / "a")
    split = make_splits(run, [entry.slide_id for entry in run.all_entries()])[0][0]
    entry = run.entry(split.of(part)[0])
    before = keys(run, split)
    status = entry.path.stat()
    os.utime(entry.path, (status.st_atime, status.st_mtime + 100))
    try:
        after = keys(lab.parts(tmp_path / "a"), split)
    finally:
        os.utime(entry.path, (status.st_atime, status.st_mtime))
    stale = {name for name in before if before[name] != after[name]}
    assert stale == (ALL if part == "train" else {"outputs", "results"})
