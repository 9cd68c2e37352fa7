"""The same seed gives the same answers, whatever the machine has to spare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lrmil.pipeline.distill import fold_bag
from lrmil.pipeline.heads import read_bags
from lrmil.pipeline.splits import make_splits
from lrmil.pipeline.teacher import label_head_outputs


@pytest.mark.usefixtures("no_report")
def test_the_same_seed_gives_the_same_predictions_bit_for_bit(lab: Any, finished: Any, tmp_path: Path) -> None:
    """From the slides on, with other numbers of reader threads and without memory for pixels."""
    out = tmp_path / "again"
    lab.run(out, threads=2, memory_gb=1e-9, deploy=False, evaluation={"baselines": ["majority", "colour_histogram"]})
    again, before = lab.predictions(out), lab.predictions(finished.out)
    assert set(again) == set(before) - {"lr_without_distillation.csv"}
    assert all(again[name] == before[name] for name in again)
    for path in sorted((out / "folds").rglob("*.safetensors")):
        assert path.read_bytes() == (finished.out / path.relative_to(out)).read_bytes(), path
    assert list((out / "tiles").glob("*.pixels.npy")), "nothing was kept in files"
    assert not list((finished.out / "tiles").glob("*.pixels.npy"))


def test_another_seed_gives_other_weights(lab: Any, finished: Any, tmp_path: Path) -> None:
    out = finished.copy_features(tmp_path / "other")
    lab.run_until("student", out, seed=1)
    for step in ("stage1/encoder", "teacher/head", "student/head"):
        mine, theirs = (f / "folds" / "0" / f"{step}.safetensors" for f in (out, finished.out))
        assert mine.read_bytes() != theirs.read_bytes(), step


def test_with_all_lambdas_0_the_student_is_the_head_on_labels_alone(lab: Any, finished: Any, tmp_path: Path) -> None:
    """Through the functions of the pipeline, on the student encoder's own features: bit for bit.

    Also where the student is trained in another way than the teacher: a 5x baseline differs from it in nothing else.
    """
    out = finished.copy(tmp_path / "run")
    own = {
        "loss": {"lambda_bag": 0, "lambda_soft": 0, "lambda_hard": 0},
        "learning_rate": 2e-2,
        "head": {"options": {"gated": True}},
    }
    lab.run_until("student", out, student=own)
    run = lab.parts(out, student=own)
    slides = [entry.slide_id for entry in run.entries()]
    folds, _ = make_splits(run, slides)
    encoder = run.build_encoder(student=True)
    for split in folds:
        bags = read_bags({slide: fold_bag(run, split, slide) for slide in slides})
        alone = label_head_outputs(run, split, bags, encoder, "labels_alone", "labels alone")
        fold = out / "folds" / split.name
        student, head = (load_file(fold / step / "head.safetensors") for step in ("student", "labels_alone"))
        assert student.keys() == head.keys()
        assert all(student[key].equal(head[key]) for key in head)
        before = load_file(finished.out / "folds" / split.name / "student" / "head.safetensors")
        assert any(not before[key].equal(head[key]) for key in before), "distillation changed nothing"
        assert set(alone) == set(slides)
