"""A run that gives the student's embedding back its spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lrmil.bags import read_bag
from lrmil.errors import ConfigError
from lrmil.files import read_json


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
        before, after = _features(frozen, train), _features(out / "folds" / str(fold) / "features", train)
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
