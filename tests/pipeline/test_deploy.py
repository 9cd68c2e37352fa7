"""model/: what the cross-validated recipe gives when it learns from everybody, and never that of another config."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lrmil.inference import load_bundle, read_manifest


def stored(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_the_bundle_answers_a_slide_as_the_final_student_did(lab: Any, finished: Any) -> None:
    answers = stored(finished.out / "folds" / "final" / "student" / "outputs.npz")
    bundle = load_bundle(finished.out / "model", device="cpu")
    for row in (0, 5):
        slide = answers["slides"][row]
        found = bundle.predict(lab.table.parent / "slides" / f"{slide}.tif")
        assert list(found.probabilities) == ["negative", "positive"]
        # Training keeps features in float16; deployment keeps none.
        np.testing.assert_allclose(list(found.probabilities.values()), answers["probabilities"][row], atol=2e-3)
        assert found.attention is not None
        assert found.attention.sum() == pytest.approx(1, abs=1e-5)


def test_the_bundle_says_what_it_is(lab: Any, finished: Any) -> None:
    manifest = read_manifest(finished.out / "model")
    assert manifest.classes == ["negative", "positive"]
    assert manifest.task == "label"
    assert manifest.licence_note == (
        "distilled from Tiny (Apache-2.0); a model distilled from it may be passed on, with credit."
    )
    results = pd.read_csv(finished.out / "tables" / "results.csv").set_index("method")
    assert set(manifest.cross_validation) == {
        f"{method}, {metric}"
        for method in ("LRMIL", "HR teacher", "LR without distillation")
        for metric in ("AUC", "accuracy")
    }
    assert manifest.cross_validation["LRMIL, AUC"].startswith(f"{results.loc['LRMIL', 'auc']:.3f} (95 % interval ")
    assert (manifest.trained_on.slides, manifest.trained_on.patients) == (12, 10)
    assert manifest.trained_on.slides_per_class == {"negative": 6, "positive": 6}
    assert manifest.grid == finished.settings.grid
    assert manifest.encoder_origin["name"] == "tiny"
    assert manifest.recipe["student"] == finished.settings.student.model_dump(mode="json")
    assert manifest.software["torch"]


def test_the_bundle_holds_no_path_of_this_machine(lab: Any, finished: Any) -> None:
    root = lab.table.parents[1]
    for path in (finished.out / "model").iterdir():
        content = path.read_bytes()
        assert str(root).encode() not in content, path
        assert str(finished.out).encode() not in content, path


def test_the_final_model_trains_on_everybody_but_the_patients_who_choose_the_epoch(
    lab: Any, finished: Any, watch: Any, tmp_path: Path
) -> None:
    calls = []
    watch("lrmil.pipeline.student.train_student", lambda train, val, *args, **kwargs: calls.append((train, val)))
    out = finished.copy(tmp_path / "run")
    (out / "folds" / "final" / "student" / "done.json").unlink()
    lab.run(out, evaluation={"baselines": ["majority"]})
    ((train, val),) = calls
    patients = pd.read_csv(lab.table, dtype=str).set_index("slide_id")["patient_id"]
    learnt, chosen = ({patients[bag.slide_id] for bag in bags} for bags in (train, val))
    assert learnt | chosen == set(patients)
    assert not learnt & chosen
    assert chosen


@pytest.mark.parametrize(
    "changes",
    [{"student": {"loss": {"hard_k": 2}}}, {"evaluation": {"bootstrap": 101}}, {"grid": {"mpp_tolerance": 0.04}}],
    ids=["student", "metrics", "grid"],
)
def test_no_results_of_other_settings_are_left_behind(
    lab: Any, finished: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Already gone when the first stage begins: a run that is killed there must not leave it, either."""
    out = finished.copy(tmp_path / "run")

    def stop(*args: Any) -> None:
        assert not any((out / name).exists() for name in ("model", "tables", "report.html", "figures"))
        raise KeyboardInterrupt

    monkeypatch.setattr("lrmil.pipeline.study.tile_cohort", stop)
    with pytest.raises(KeyboardInterrupt):
        lab.run(out, **lab.merged({"deploy": False}, changes))


@pytest.mark.usefixtures("no_report")
def test_other_metrics_are_written_into_the_model_without_training(
    lab: Any, finished: Any, work: Counter[str], tmp_path: Path
) -> None:
    out = finished.copy(tmp_path / "run")
    before = read_manifest(out / "model")
    lab.run(out, evaluation={"bootstrap": 150, "baselines": ["majority"]})
    after = read_manifest(out / "model")
    assert dict(work) == {"bundle": 1}
    assert "LR without distillation, AUC" not in after.cross_validation
    assert after.files == before.files
    assert after.checksum != before.checksum


def test_results_of_the_same_settings_stay(lab: Any, finished: Any, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "run")
    before = lab.times(out, "model", "tables", "figures")
    evaluation = finished.settings.evaluation.model_dump()
    lab.run_until("encode", out, evaluation=evaluation, threads=2)
    assert lab.times(out, "model", "tables", "figures") == before
    assert (out / "report.html").is_file()


@pytest.mark.usefixtures("no_report")
def test_a_model_that_was_lost_is_written_again(lab: Any, finished: Any, work: Counter[str], tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "run")
    (out / "model" / "bundle.json").unlink()
    evaluation = finished.settings.evaluation.model_dump() | {"timed_slides": 1}
    lab.run(out, evaluation=evaluation)
    assert dict(work) == {"bundle": 1}
    assert read_manifest(out / "model").files == read_manifest(finished.out / "model").files
