from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import auc as area
from sklearn.metrics import roc_curve

from lrmil.errors import ConfigError
from lrmil.evaluation import Cost, Predictions, result_row, results_frame
from lrmil.evaluation.overlay import AttentionMap, mask_outlines
from lrmil.evaluation.plots import (
    TrainingCurve,
    metric_against_seconds,
    reliability,
    roc_curves,
    save_figure,
    to_image,
    training_curves,
)
from lrmil.evaluation.slide_figures import attention_figure, side_by_side

Simulate = Callable[..., Predictions]


def _texts(figure: Figure) -> list[str]:
    found = [t.get_text() for ax in figure.axes for t in (*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label)]
    for ax in figure.axes:
        if ax.get_legend():
            found += [t.get_text() for t in ax.get_legend().get_texts()]
    return found + [t.get_text() for legend in figure.legends for t in legend.get_texts()]


def test_training_curves_draw_each_fold_and_its_kept_epoch() -> None:
    curves = [
        TrainingCurve("fold 0", (3.0, 2.0, 1.0), (3.0, 2.5, 2.6), (0.5, float("nan"), 0.8), best_epoch=2),
        TrainingCurve("fold 1", (4.0, 2.0), (3.0, 2.9), (float("nan"), 0.7), best_epoch=1),
    ]
    figure = training_curves(curves)
    loss, validation, auc = figure.axes
    assert (loss.get_ylabel(), validation.get_ylabel(), auc.get_ylabel()) == (
        "training loss",
        "validation loss",
        "validation AUC",
    )
    lines = [line for line in loss.lines if len(line.get_xdata()) > 1]
    np.testing.assert_array_equal(lines[0].get_ydata(), [3, 2, 1])
    np.testing.assert_array_equal(lines[0].get_xdata(), [1, 2, 3])
    kept = [line for line in loss.lines if len(line.get_xdata()) == 1]
    assert [(k.get_xdata()[0], k.get_ydata()[0]) for k in kept] == [(3, 1.0), (2, 2.0)]
    assert {"fold 0", "fold 1"} <= set(_texts(figure))
    assert len(training_curves([TrainingCurve("only", (1.0,))]).axes) == 1


def test_roc_is_the_vertical_mean_of_the_folds_curves(simulate: Simulate) -> None:
    p = simulate(np.random.default_rng(0), 40, separation=1.5)
    figure = roc_curves({"ours": p})
    ax = figure.axes[0]
    mean = next(line for line in ax.lines if line.get_label().startswith("ours"))
    grid = np.asarray(mean.get_xdata())
    folds = []
    for _, _, rows in p.cells():
        fpr, tpr, _ = roc_curve(p.labels[rows], p.probabilities[rows, 1], drop_intermediate=False)
        # At a jump the curve takes its upper end.
        folds.append([tpr[fpr <= x + 1e-12].max() for x in grid])
    wanted = np.mean(folds, axis=0)
    inside = ~np.isclose(grid * 4, np.round(grid * 4), atol=0.03)
    np.testing.assert_allclose(np.asarray(mean.get_ydata())[inside], wanted[inside], atol=1e-6)
    aucs = [area(*roc_curve(p.labels[r], p.probabilities[r, 1])[:2]) for _, _, r in p.cells()]
    assert f"{np.mean(aucs):.3f} ± {np.std(aucs, ddof=1):.3f}" in mean.get_label()


def test_roc_without_a_defined_fold_says_so(simulate: Simulate) -> None:
    p = simulate(np.random.default_rng(0), 40)
    assert "one-sided: AUC undefined" in _texts(roc_curves({"one-sided": p.take(p.labels == 1)}))


def test_scatter_shows_each_timed_method_once_and_others_as_lines(simulate: Simulate) -> None:
    rng = np.random.default_rng(0)
    spec = [("LRMIL", "Ours", Cost(31, 0.4)), ("ABMIL", "Full HR", Cost(500, 5)), ("Majority class", "Reference", None)]
    rows = [
        result_row(simulate(rng, 40), dataset="d", task="t", method=m, group=g, seed=0, cost=c, resamples=50)
        for m, g, c in spec
    ]
    results = results_frame(rows)
    figure = metric_against_seconds(results)
    ax = figure.axes[0]
    assert ax.get_xscale() == "log"
    assert {"LRMIL", "ABMIL", "Majority class"} <= set(_texts(figure))
    points = {line.get_label(): line for line in ax.lines if line.get_marker() in ("*", "s")}
    ours = results[results["method"] == "LRMIL"].iloc[0]
    assert points["Ours"].get_xdata()[0] == 0.4
    assert points["Ours"].get_ydata()[0] == pytest.approx(100 * ours["auc"])
    undefined = results.assign(auc=float("nan"), seconds_per_slide=float("nan"))
    assert isinstance(to_image(metric_against_seconds(undefined)), bytes)


def test_names_of_points_do_not_cover_that_of_a_line() -> None:
    rows = [
        ("LRMIL", "Ours", 0.6, 0.15),
        ("TransMIL", "Full HR", 0.5276, 1.64),
        ("Majority class", "Reference", 0.5, None),
    ]
    columns = ["method", "group", "auc", "seconds_per_slide"]
    frame = pd.DataFrame(rows, columns=columns).astype({"seconds_per_slide": float})
    frame["auc_low"], frame["auc_high"] = frame["auc"] - 0.2, frame["auc"] + 0.2
    figure = metric_against_seconds(frame)
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts}
    assert set(boxes) == set(frame["method"])
    assert not boxes["TransMIL"].overlaps(boxes["Majority class"])


def test_reliability_uses_every_slide(simulate: Simulate) -> None:
    p = simulate(np.random.default_rng(0), 40)
    line = next(line for line in reliability({"ours": p}).axes[0].lines if line.get_label() == "ours")
    assert np.mean(line.get_ydata()) == pytest.approx((p.probabilities.argmax(axis=1) == p.labels).mean())


def _slide() -> tuple[npt.NDArray[np.uint8], AttentionMap, npt.NDArray[np.bool_]]:
    rgb = np.full((80, 60, 3), 240, np.uint8)
    boxes = np.array([[x, y, x + 160, y + 160] for y in (320, 480, 640) for x in (160, 320)])
    mask = np.zeros((80, 60), bool)
    mask[25:40, 12:28] = True
    return rgb, AttentionMap("LRMIL", boxes, np.arange(6.0)), mask


def test_side_by_side_has_a_panel_each_and_says_how_colours_are_made() -> None:
    rgb, one, mask = _slide()
    maps = [AttentionMap(n, one.boxes_l0, one.attention) for n in ("HR teacher", "LR without distillation", "LRMIL")]
    figure = side_by_side(rgb, maps, (16, 16), mpp_l0=0.5, true_areas=mask_outlines(mask, (16, 16)), title="slide 1")
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:4] == ["slide, true areas outlined", "HR teacher", "LR without distillation", "LRMIL"]
    assert any("percentile" in t and "not looked at" in t for t in _texts(figure))
    assert "100 µm" in _texts(figure)
    # The outline is drawn in overview pixels, along the mask's edge, in every panel.
    for ax in figure.axes[:4]:
        (patch,) = ax.patches
        box = patch.get_path().get_extents()
        assert (box.x0, box.y0, box.x1, box.y1) == (12, 25, 28, 40)
        assert ax.images[0].get_extent() == [0, 60, 80, 0]
    ranged = attention_figure(rgb, one, (16, 16), scaling="range")
    assert any("lowest to its highest" in t for t in _texts(ranged))


def test_side_by_side_needs_a_map_and_a_value_for_each_box() -> None:
    rgb, one, _ = _slide()
    with pytest.raises(ConfigError, match="no attention map"):
        side_by_side(rgb, [], (16, 16))
    with pytest.raises(ConfigError, match="LRMIL: 6 boxes and 5"):
        side_by_side(rgb, [AttentionMap("LRMIL", one.boxes_l0, one.attention[:5])], (16, 16))


def test_images_are_whole_and_repeatable(tmp_path: Path) -> None:
    rgb, one, _ = _slide()
    png = to_image(attention_figure(rgb, one, (16, 16)), dpi=60)
    assert png == to_image(attention_figure(rgb, one, (16, 16)), dpi=60)
    jpeg = to_image(attention_figure(rgb, one, (16, 16)), "jpeg", dpi=60)
    for data, kind in ((png, "PNG"), (jpeg, "JPEG")):
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == kind
            assert min(image.size) > 300
    save_figure(tmp_path / "map.pdf", attention_figure(rgb, one, (16, 16)))
    assert (tmp_path / "map.pdf").read_bytes().startswith(b"%PDF")
    assert [p.name for p in tmp_path.iterdir()] == ["map.pdf"]


def test_no_pyplot_and_no_change_of_settings_for_everyone() -> None:
    code = (
        "import matplotlib, sys; before = matplotlib.rcParams.copy()\n"
        "import lrmil.evaluation.plots as p, lrmil.evaluation.slide_figures\n"
        "p.to_image(p.training_curves([p.TrainingCurve('a', (1.0, 0.5))]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert dict.__eq__(before, matplotlib.rcParams)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scatter_of_paper_sized_table_places_all_names(simulate: Simulate) -> None:
    rng = np.random.default_rng(0)
    names = [f"method {i}" for i in range(11)]
    rows = [
        result_row(
            simulate(rng, 40), dataset="d", task="t", method=m, group="Full HR", seed=0, cost=Cost(1, 5.0), resamples=20
        )
        for m in names
    ]
    frame: pd.DataFrame = results_frame(rows)
    assert set(names) <= set(_texts(metric_against_seconds(frame)))
