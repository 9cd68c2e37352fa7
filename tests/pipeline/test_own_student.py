"""A run whose student is another network than its teacher: from the config to a bundle that answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lrmil.encoders import load_encoder
from lrmil.inference.bundle import read_manifest
from lrmil.inference.predict import load_bundle
from lrmil.pipeline.config import parse_config
from lrmil.pipeline.deploy import _began_as, licence_note
from lrmil.pipeline.keys import stage1_key
from lrmil.pipeline.overrides import apply_overrides
from lrmil.pipeline.splits import make_splits
from lrmil.pipeline.variants import ablation_plan, sensitivity_plan

SMALLER = {"name": "lrmil-small", "random_seed": 1, "width": 16, "depth": 2, "heads": 2}


def test_a_narrower_student_is_trained_deployed_and_answers(
    lab: Any, finished: Any, no_report: None, work: Any, tmp_path: Path
) -> None:
    out = finished.copy_features(tmp_path / "run")
    changes = {"stage1": {"student": SMALLER, "loss": {"lambda_attention_feature": 0.5}}}
    lab.run(out, **changes, evaluation={"baselines": ["lr_only"], "timed_slides": 1})
    assert work["encode 20x"] == 0, "the teacher's features do not depend on the student"
    for place in (out / "folds" / "0" / "stage1", out / "model"):
        student = load_encoder(place)
        assert (student.trunk_width, student.depth, student.embedding) == (16, 2, "token_mean")
        stored = load_file(place / "encoder.safetensors")
        assert all(key.startswith("trunk.") for key in stored), "maps to the teacher's width are not kept"
    epochs = json.loads((out / "folds" / "0" / "stage1" / "history.json").read_text())["epochs"]
    assert {"val_layer0", "val_layer1", "val_layer2", "val_attention_feature"} <= epochs[0].keys()
    # The baseline without distillation looks with the frozen HR encoder's eyes.
    heads = {
        name: json.loads((out / "folds" / "0" / name / "head.json").read_text()) for name in ("student", "lr_only")
    }
    assert [heads[name]["in_dim"] for name in ("student", "lr_only")] == [16, 32]

    manifest = read_manifest(out / "model")
    assert manifest.encoder_origin["name"] == "tiny"
    assert manifest.licence_note.startswith("distilled from Tiny")
    assert "began as" not in manifest.licence_note, "random weights have no terms"
    assert "weights" not in manifest.recipe["stage1"]["student"]
    assert "lrmil-small-w16-d2, width 16, distilled from tiny" in (out / "model" / "README.md").read_text()
    bundle = load_bundle(out / "model", device="cpu")
    found = bundle.predict(lab.table.parent / "slides" / "S001.tif")
    assert sum(found.probabilities.values()) == pytest.approx(1, abs=1e-5)

    work.clear()
    lab.run(out, **changes, evaluation={"baselines": ["lr_only"], "timed_slides": 1})
    assert not work, "a second run with the same config finds all of it"


def test_the_terms_of_the_weights_that_a_student_began_as_are_told(lab: Any, tmp_path: Path) -> None:
    run = lab.parts(tmp_path, stage1={"student": {"name": "lrmil-small", "depth": 3}})
    began = _began_as(run)
    assert began is not None
    assert "its encoder began as LRMIL small (Apache-2.0)" in licence_note(run.build_encoder(), began)
    assert _began_as(lab.parts(tmp_path, stage1={"student": SMALLER})) is None
    assert _began_as(lab.parts(tmp_path)) is None


def test_stage_1_depends_on_what_its_student_begins_as(lab: Any, tmp_path: Path) -> None:
    keys = set()
    for student in (None, SMALLER, SMALLER | {"random_seed": 2}, SMALLER | {"layer_pairs": [[1, 1]]}):
        run = lab.parts(tmp_path, stage1={"student": student})
        split = make_splits(run, [entry.slide_id for entry in run.all_entries()])[0][0]
        keys.add(stage1_key(run, split, run.build_encoder()))
        # Where it is written to, or by which of its names, does not matter.
        renamed = dataclasses.replace(run, settings=run.settings.model_copy(update={"out": "elsewhere"}))
        assert stage1_key(renamed, split, run.build_encoder()) in keys
    assert len(keys) == 4


def test_paths_of_a_student_count_from_the_config(lab: Any, tmp_path: Path) -> None:
    given = {"name": "lrmil-small", "weights": "w.safetensors"}
    tree = lab.tree(tmp_path / "run", stage1={"student": given})
    apply_overrides(tree, ["stage1.student.depth=2"])
    student = parse_config(tree, base=tmp_path).stage1.student
    assert student is not None
    assert (student.name, student.weights, student.depth) == ("lrmil-small", str(tmp_path / "w.safetensors"), 2)


def test_variants_keep_the_student_but_not_pairs_of_other_layers(lab: Any, tmp_path: Path) -> None:
    settings = lab.settings(tmp_path, stage1={"student": SMALLER | {"layer_pairs": [[1, 1]]}})
    plan = sensitivity_plan("layers", settings, 3)
    for variant in plan.variants:
        student = variant.applied(settings).stage1.student
        assert student is not None
        assert (student.width, bool(student.layer_pairs)) == (16, variant == plan.reference)
    assert any("frozen HR encoder" in note for note in ablation_plan(settings).notes)
    assert not any("frozen HR encoder" in note for note in ablation_plan(lab.settings(tmp_path)).notes)
