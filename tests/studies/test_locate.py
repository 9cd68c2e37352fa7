"""Whether attention finds the true areas: the scores, on slides made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lrmil.cohorts.truth import NucleusTable, box_polygon
from lrmil.evaluation.overlay import AttentionMap
from lrmil.studies.locate import (
    TOP,
    attention_of_regions,
    epithelial_nuclei,
    found_by,
    share_inside,
    summarise,
    to_markdown,
)


def _grid(side: int, step_px: int) -> np.ndarray:
    """Boxes (side * side, 4) row by row."""
    y, x = np.divmod(np.arange(side * side), side)
    return np.stack([x, y, x + 1, y + 1], axis=1) * step_px


def test_the_share_of_a_box_inside_areas_is_that_of_its_pixels() -> None:
    areas = [box_polygon(100, 60, 300, 220), box_polygon(500, 500, 620, 640)]
    boxes = _grid(5, 128)
    truth = np.zeros((640, 640), bool)
    truth[60:220, 100:300] = True
    truth[500:640, 500:620] = True
    expected = [truth[y0:y1, x0:x1].mean() for x0, y0, x1, y1 in boxes]
    assert share_inside(boxes, areas, (640, 640), 4.0) == pytest.approx(expected, abs=0.04)
    hole = [[*box_polygon(0, 0, 128, 128), *box_polygon(32, 32, 96, 96)]]
    assert share_inside(boxes[:1], hole, (640, 640), 4.0) == pytest.approx([0.75], abs=0.04)


def test_a_region_has_the_attention_of_its_own_children() -> None:
    regions, children = _grid(2, 128), _grid(8, 32)
    rng = np.random.default_rng(0)
    weights = rng.random(64)
    weights /= weights.sum()
    expected = weights.reshape(2, 4, 2, 4).sum(axis=(1, 3)).ravel()
    order = rng.permutation(64)  # in whatever order the children come
    shuffled = AttentionMap("teacher", children[order], weights[order])
    assert attention_of_regions(shuffled, regions) == pytest.approx(expected)
    logits = AttentionMap("teacher", children[order], np.log(weights[order]) + 7)
    assert attention_of_regions(logits, regions) == pytest.approx(expected)
    own = AttentionMap("lrmil", regions, np.array([0.1, 0.2, 0.3, 0.4]))
    assert attention_of_regions(own, regions).tolist() == [0.1, 0.2, 0.3, 0.4]


def test_attention_on_the_truth_scores_one_and_attention_elsewhere_nothing() -> None:
    positive = np.arange(20) < TOP
    right = found_by(positive + np.linspace(0, 0.1, 20), positive)
    wrong = found_by(-(positive + np.linspace(0, 0.1, 20)), positive)
    assert (right["auc"], right["top_share"]) == (1.0, 1.0)
    assert (wrong["auc"], wrong["top_share"]) == (0.0, 0.0)
    assert right["positive_share"] == 0.25
    assert found_by(np.full(20, 0.05), positive)["auc"] == 0.5


def test_intervals_resample_patients_and_differences_are_paired() -> None:
    rng = np.random.default_rng(1)
    easy = rng.normal(0.7, 0.1, 30)  # how easy a slide is, for both
    rows = [
        {
            "slide_id": f"s{i}",
            "patient_id": f"p{i // 2}",
            "fold": "0",
            "method": method,
            "auc": easy[i] + gain + rng.normal(0, 0.005),
            "top_share": 0.5,
            "positive_share": 0.3,
            "regions": 20,
        }
        for i in range(30)
        for method, gain in (("lr_only", 0.0), ("lrmil", 0.05))
    ]
    found = pd.DataFrame(rows)
    summary = summarise(found, {"lr_only": "5x", "lrmil": "LRMIL"}, baseline="lr_only", resamples=500).set_index(
        "method"
    )
    ours = summary.loc["lrmil"]
    assert ours["auc"] == pytest.approx(found[found["method"] == "lrmil"]["auc"].mean())
    assert ours["auc_low"] < ours["auc"] < ours["auc_high"]
    assert ours["auc_gain"] == pytest.approx(0.05, abs=0.01)
    assert ours["auc_gain_high"] - ours["auc_gain_low"] < 0.25 * (ours["auc_high"] - ours["auc_low"])
    assert summary.loc["lr_only", ["auc_gain_low", "auc_gain_high"]].tolist() == [0, 0]
    text = to_markdown(summary.reset_index(), found)
    assert "30 slides of 15 patients" in text
    assert "LRMIL - 5x without distillation, paired | +0.05" in text


def test_epithelial_nuclei_are_counted_where_they_lie() -> None:
    kind = np.array([0, 0, 1, 0, 1], np.uint8)
    nuclei = NucleusTable(
        x_l0=np.array([10, 127.9, 20, 128, 300], np.float32),
        y_l0=np.array([10, 127.9, 20, 5, 300], np.float32),
        kind=kind,
        pattern=np.zeros(5, np.uint8),
        in_positive_area=np.zeros(5, bool),
        kinds=("epithelial", "fibroblast"),
    )
    assert epithelial_nuclei(_grid(2, 128), nuclei).tolist() == [2, 1, 0, 0]
