"""A run that gives the student's embedding back its spread: with and without it are two views of one training."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lrmil.bags import read_bag
from lrmil.errors import ConfigError
from lrmil.files import read_json
from lrmil.pipeline.ablate import compare_recipes
from lrmil.pipeline.distill import stored_student
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.splits import make_splits


def quiet() -> Reporter:
    return Reporter(quiet=True, stream=io.StringIO())


def _features(folder: Path, slides: set[str]) -> np.ndarray:
    return np.concatenate([np.asarray(read_bag(folder / f"{s}.h5", layers=()).features, float) for s in sorted(slides)])


def test_the_student_of_a_fold_varies_as_the_frozen_encoder_does(lab: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    lab.run(out, stage1={"restore_spread": True, "epochs": 2}, evaluation={"baselines": ["lr_only"]}, deploy=False)
    (frozen,) = [folder for folder in (out / "features").iterdir() if folder.name.endswith("_2mpp")]
    splits = pd.read_csv(out / "splits.csv").set_index("patient_id")
    cohort = pd.read_csv(out / "cohort.csv").set_index("slide_id")["patient_id"]
    for fold in range(3):
        train = {slide for slide, patient in cohort.items() if splits.loc[patient, f"fold_{fold}"] == "train"}
        before, after = _features(frozen, train), _features(out / "folds" / str(fold) / "features_restored", train)
        assert not np.allclose(before, after, atol=0.05), "it has learned something"
        assert after.std(axis=0) == pytest.approx(before.std(axis=0), rel=0.1)
        assert after.mean(axis=0) == pytest.approx(before.mean(axis=0), abs=0.1)
        assert read_json(out / "folds" / str(fold) / "stage1" / "history.json")["spread"] > 0


def test_an_embedding_without_a_final_norm_is_refused_before_anything_is_read(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="restore_spread"):
        lab.run(
            tmp_path / "run",
            stage1={"restore_spread": True},
            encoder={"name": "lrmil-small", "student_embedding": "cls+token_mean"},
            grid={"patch_px": 64},
        )


def _recipes(settings: Any, recipes: dict[str, dict[str, Any]]) -> pd.DataFrame:
    outcome = compare_recipes(settings, quiet(), recipes)
    return pd.read_csv(outcome.folder.recipes / "results.csv").set_index("method")


@pytest.mark.parametrize("first", [False, True])
def test_restoring_the_spread_or_leaving_it_trains_no_stage_1_again(
    lab: Any, tmp_path: Path, work: Counter[str], first: bool
) -> None:
    """As a recipe beside the config's own, in either order, and as another config on the same folder."""
    out = tmp_path / "run"
    told: dict[str, Any] = {"evaluation": {"baselines": ["lr_only"]}, "deploy": False}
    settings = lab.settings(out, stage1={"restore_spread": first}, **told)
    beside = _recipes(settings, {"other": {"stage1": {"restore_spread": not first}}})
    assert work["stage 1"] == 3, "one for each fold"
    names = {name for name in ("features", "features_restored") if (out / "folds" / "0" / name).is_dir()}
    assert names == {"features", "features_restored"}

    lab.run(out, stage1={"restore_spread": not first}, **told)
    assert work["stage 1"] == 3
    alone = pd.read_csv(out / "tables" / "results.csv").set_index("method")
    assert alone.loc["LRMIL", "auc"] == beside.loc["other", "auc"]


def test_a_spread_that_was_never_measured_is_measured_when_it_is_wanted(lab: Any, tmp_path: Path) -> None:
    plain, restored = tmp_path / "plain", tmp_path / "restored"
    lab.run(plain, deploy=False, evaluation={"baselines": []})
    lab.run(restored, deploy=False, evaluation={"baselines": []}, stage1={"restore_spread": True})
    kept = [folder / "folds" / "1" / "stage1" / "spreads.json" for folder in (plain, restored)]
    expected = kept[1].read_bytes()
    assert kept[0].read_bytes() == expected
    kept[0].unlink()
    lab.run(plain, deploy=False, evaluation={"baselines": []}, stage1={"restore_spread": True})
    assert kept[0].read_bytes() == expected
    kept[0].unlink()
    run = lab.parts(plain, stage1={"restore_spread": True})
    split = make_splits(run, [entry.slide_id for entry in run.all_entries()])[0][1]
    with pytest.raises(ConfigError, match="not restored yet"):
        stored_student(run, split)
