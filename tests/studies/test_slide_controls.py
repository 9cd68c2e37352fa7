"""Negative controls of stage 2, on bags in memory."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lrmil.cohorts.simulated import SimulatedSettings
from lrmil.errors import ConfigError
from lrmil.files import write_json
from lrmil.pipeline.config import parse_config
from lrmil.pipeline.context import Split
from lrmil.pipeline.reporting import Reporter
from lrmil.studies.slide_controls import (
    ARMS,
    FoldBags,
    control_cells,
    controls_key,
    do_cell,
    load_slide_controls,
    shuffled_labels,
    write_controls,
)
from lrmil.training.objectives import Classification
from lrmil.training.stage2 import SlideBag, StudentSettings, TeacherSettings


def _fold(slides: int = 24) -> tuple[Any, FoldBags]:
    """Slides whose class shows in a quarter of their children, and less so in the regions around these."""
    rng = np.random.default_rng(0)
    names = tuple(f"s{i}" for i in range(slides))
    lr, hr = {}, {}
    for i, name in enumerate(names):
        high = rng.standard_normal((24, 6)).astype(np.float32)
        high[:6, i % 2] += 3
        low = high.reshape(6, 4, 6).mean(axis=1) + 0.3 * rng.standard_normal((6, 6)).astype(np.float32)
        coords = np.zeros((6, 2), np.int64)
        lr[name] = SimpleNamespace(features=low, coords_l0=coords, region=np.arange(6))
        hr[name] = SimpleNamespace(features=high, coords_l0=np.zeros((24, 2), np.int64), region=np.repeat(range(6), 4))
    quick = {"learning_rate": 1e-2, "epochs": 3}
    run = SimpleNamespace(
        settings=SimpleNamespace(teacher=TeacherSettings(**quick), student=StudentSettings(**quick)),
        objective=Classification(2),
        device=torch.device("cpu"),
        truth=lambda name: {"label": int(name[1:]) % 2, "target": None},
        cohort=SimpleNamespace(
            patient_of=lambda name: f"p{name}",
            label_of=lambda name: int(name[1:]) % 2,
            classes=("negative", "positive"),
        ),
    )
    split = Split("0", "fold 0", names[:12], names[12:18], names[18:])
    return run, FoldBags(split, lr, hr)  # type: ignore[arg-type]


def test_all_weights_zero_equals_labels_alone_and_the_other_arms_do_not(tmp_path: Path) -> None:
    run, fold = _fold()
    found = do_cell(run, fold, seed=0)
    assert set(found["answers"]) == set(ARMS)
    assert found["zero_equals_labels"]
    assert found["answers"]["zero"] == found["answers"]["labels"], "bit for bit"
    assert found["answers"]["stage2"] != found["answers"]["labels"]
    assert found["answers"]["shuffled"] != found["answers"]["stage2"]
    assert found["slides"] == list(fold.split.test)
    written = write_controls([found | {"seed": 0, "fold": 0}], tmp_path, "small", resamples=100)
    results = pd.read_csv(written[0]).set_index("arm")
    assert list(results.index) == list(ARMS)
    assert results.loc["zero", "gain"] == results.loc["zero", "gain_low"] == results.loc["zero", "gain_high"] == 0
    assert np.isnan(results.loc["labels", "gain"])
    assert np.isnan(results.loc["stage2", "than_stage2"])
    assert results.loc["labels", "than_stage2"] == pytest.approx(-results.loc["stage2", "gain"])
    assert "1 of 1 heads equal" in written[2].read_text()


def test_cells_are_kept_for_what_they_were_trained_on(tmp_path: Path) -> None:
    base = {"cohort": {"table": "a.csv"}, "out": "run", "folds": {"num_folds": 3}, "encoder": {"name": "lrmil-small"}}
    cohort = SimulatedSettings(slides=4, patients=4)

    def kept(**changes: Any) -> int:
        reporter = Reporter(quiet=True, stream=io.StringIO())
        return len(control_cells(parse_config(base | changes), cohort, (0,), tmp_path, reporter, train=False))

    key = controls_key(parse_config(base), cohort)
    for fold in range(3):
        write_json(tmp_path / f"seed0_fold{fold}.json", {"key": key, "seed": 0, "fold": fold})
    assert kept() == 3
    assert kept(threads=4, deploy=False, compare={"jobs": 1}, out="elsewhere") == 3
    assert kept(cohort={"table": "a.csv", "task": "other"}) == 0
    assert kept(teacher={"epochs": 3}) == 0
    with pytest.raises(ConfigError, match="asks for regression"):
        kept(cohort={"table": "a.csv", "task": "share", "kind": "regression"})


def test_shuffling_keeps_slides_and_the_number_of_each_label() -> None:
    bags = [SlideBag(f"s{i}", np.zeros((1, 2), np.float32), i % 3) for i in range(30)]
    dealt = shuffled_labels(bags, np.random.default_rng(0))
    assert [b.slide_id for b in dealt] == [b.slide_id for b in bags]
    assert sorted(b.label or 0 for b in dealt) == sorted(b.label or 0 for b in bags)
    kept = np.mean([a.label == b.label for a, b in zip(dealt, bags, strict=True)])
    assert kept < 0.7


def test_the_committed_config_is_valid(tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[2] / "evidence" / "controls-stage2.yaml"
    settings = load_slide_controls(path, [f"out={tmp_path}"])
    assert len(settings.seeds) >= 3
    assert settings.out == str(tmp_path)
    with pytest.raises(ConfigError, match="seedz"):
        load_slide_controls(path, ["seedz=[1]"])
