"""Figures of a run, as matplotlib `Figure`s that belong to their caller: no pyplot, no global state, no display.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; where several things share a plot they also
differ by marker or line style.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox, ScaledTranslation

from lrmil.evaluation.metrics import metric, reliability_bins, score
from lrmil.evaluation.predictions import Predictions
from lrmil.evaluation.scored import FloatArray
from lrmil.files import atomic_path

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73"),
    *("#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
)
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
GROUP_STYLE: dict[str, tuple[str, str]] = {
    "Reference": ("#777777", "o"),
    "Full HR": (BLUE, "s"),
    "SC": (GREEN, "D"),
    "LR only": (ORANGE, "^"),
    "Ours": (VERMILION, "*"),
}
_INK, _FAINT = "#222222", "#cccccc"
_TIGHT: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.06}


@dataclass(frozen=True)
class TrainingCurve:
    """History of one training run (one fold, one seed), an entry for each epoch. Empty tuples are not drawn."""

    name: str
    train_loss: tuple[float, ...]
    val_loss: tuple[float, ...] = ()
    val_auc: tuple[float, ...] = ()
    """nan where undefined"""
    best_epoch: int | None = None
    """Position (from 0) of the epoch whose weights were kept"""


def training_curves(curves: Sequence[TrainingCurve], title: str = "") -> Figure:
    """Loss in training and validation, and validation AUC if there is any, a line for each fold; dots: kept epochs."""
    panels: list[tuple[str, str]] = [("train_loss", "training loss")]
    for attribute, label in (("val_loss", "validation loss"), ("val_auc", "validation AUC")):
        if any(np.isfinite(getattr(c, attribute)).any() for c in curves):
            panels.append((attribute, label))
    figure = new_figure(3.3 * len(panels) + 1.0, 2.9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (attribute, label) in zip(axes, panels, strict=True):
        style_axes(ax, "epoch", label)
        for index, curve in enumerate(curves):
            values = np.asarray(getattr(curve, attribute), dtype=np.float64)
            if not len(values):
                continue
            colour = SERIES[index % len(SERIES)]
            epochs = np.arange(1, len(values) + 1)
            single = len(values) == 1
            ax.plot(epochs, values, color=colour, lw=1.4, marker="." if single else None, label=curve.name)
            best = curve.best_epoch
            if best is not None and best < len(values):
                ax.plot(best + 1, values[best], "o", color=colour, ms=6, mec="white", mew=0.8, zorder=3)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if attribute == "val_auc":
            low = min([0.5, *(v for c in curves for v in c.val_auc if math.isfinite(v))])
            ax.set_ylim(max(0.0, low - 0.05), 1.02)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    set_title(figure, title)
    return figure


def roc_curves(methods: Mapping[str, Predictions], title: str = "") -> Figure:
    """Mean ROC curve over folds of each method with a band of one sd over folds (seeds averaged first).

    Curves are averaged vertically, at fixed false positive rates, never pooled; for more than two classes the curve is
    the mean over classes of one against the rest. Folds without a class are left out.
    """
    figure = new_figure(4.6, 4.4)
    ax = figure.subplots()
    style_axes(ax, "false positive rate", "true positive rate")
    grid = np.linspace(0, 1, 201)
    ax.plot([0, 1], [0, 1], color=_FAINT, lw=1, ls="--", zorder=0)
    for index, (name, predictions) in enumerate(methods.items()):
        folds = _fold_rocs(predictions, grid)
        if not len(folds):
            ax.plot([], [], " ", label=f"{name}: AUC undefined")
            continue
        mean = folds.mean(axis=0)
        aucs = _fold_aucs(predictions)
        colour, style = SERIES[index % len(SERIES)], ("-", "--", "-.", ":")[index % 4]
        spread = f" ± {aucs.std(ddof=1):.3f}" if len(aucs) > 1 else ""
        ax.plot(grid, mean, color=colour, ls=style, lw=1.8, label=f"{name}: {aucs.mean():.3f}{spread}")
        if len(folds) > 1:
            sd = folds.std(axis=0, ddof=1)
            ax.fill_between(grid, (mean - sd).clip(0), (mean + sd).clip(max=1), color=colour, alpha=0.13, lw=0)
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.legend(loc="lower right", frameon=False, fontsize=8, title="AUC, mean ± sd over folds", title_fontsize=8)
    set_title(figure, title)
    return figure


def reliability(methods: Mapping[str, Predictions], title: str = "", bins: int = 5) -> Figure:
    """Accuracy against stated confidence, in bins of equally many slides over all test folds; the diagonal is ideal."""
    figure = new_figure(4.4, 4.2)
    ax = figure.subplots()
    style_axes(ax, "confidence in the called class", "accuracy")
    ax.plot([0, 1], [0, 1], color=_FAINT, lw=1, ls="--", zorder=0)
    lowest = 1.0
    for index, (name, p) in enumerate(methods.items()):
        table = reliability_bins(p, bins)
        x, y = table["confidence"].tolist(), table["accuracy"].tolist()
        lowest = min(lowest, *x, *y)
        colour, marker = SERIES[index % len(SERIES)], "os^Dv"[index % 5]
        ax.plot(x, y, marker=marker, color=colour, lw=1.4, ms=5, label=name)
    lowest = max(0.0, lowest - 0.05)
    ax.set(xlim=(lowest, 1.01), ylim=(lowest, 1.01), aspect="equal")
    ax.legend(loc="lower right", frameon=False, fontsize=8)
    set_title(figure, title)
    return figure


def metric_against_seconds(results: pd.DataFrame, name: str = "auc", title: str = "") -> Figure:
    """Metric against seconds per slide (log scale), a point with its interval for each method of a results frame.

    Methods without a measured time are drawn as dashed lines across. Points closer in time than 4 % are set a few
    points (typographic ones) apart, so that their intervals can be told apart. One dataset and task at a time.
    """
    percent = metric(name).percent
    factor = 100.0 if percent else 1.0
    figure = new_figure(6.6, 4.0)
    ax = figure.subplots()
    style_axes(ax, "seconds per slide, tissue to answer (log scale)", metric(name).title + (" (%)" if percent else ""))
    ax.set_xscale("log")
    known = results[results[name].notna()]
    timed = known[known["seconds_per_slide"].notna()].sort_values("seconds_per_slide", kind="stable")
    shifts = _dodge(timed["seconds_per_slide"].to_numpy(float))
    points: list[_Point] = []
    across: list[Annotation] = []
    drawn: dict[str, None] = {}
    for shift, row in zip(shifts, timed.to_dict("records"), strict=True):
        x, y, group = float(row["seconds_per_slide"]), factor * float(row[name]), str(row["group"])
        colour, marker = GROUP_STYLE.get(group, (PURPLE, "v"))
        beside = ax.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
        low, high = factor * row[f"{name}_low"], factor * row[f"{name}_high"]
        if math.isfinite(low):
            ax.plot([x, x], [low, high], color=colour, lw=1.3, alpha=0.6, transform=beside)
        size = 15 if marker == "*" else 8
        label = None if group in drawn else group
        ax.plot([x], [y], marker, color=colour, ms=size, mec="white", mew=0.9, label=label, zorder=3, transform=beside)
        drawn[group] = None
        points.append(_Point(x, y, shift, str(row["method"]), colour))
    if len(timed):
        seconds = timed["seconds_per_slide"].to_numpy(float)
        ax.set_xlim(seconds.min() / 1.8, seconds.max() * 2.6)
        ends = factor * timed[[name, f"{name}_low", f"{name}_high"]].to_numpy(float)
        margin = 0.06 * max(np.nanmax(ends) - np.nanmin(ends), 0.01 * factor)
        ax.set_ylim(np.nanmin(ends) - margin, np.nanmax(ends) + margin)
        handles, labels = ax.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: [*GROUP_STYLE, *labels].index(labels[i]))
        beside_plot: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
        ax.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False, fontsize=8, **beside_plot)
    for row in known[known["seconds_per_slide"].isna()].to_dict("records"):
        value = factor * float(row[name])
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, value - 0.05 * (high - low)), max(high, value + 0.05 * (high - low)))
        ax.axhline(value, color="#999999", lw=1, ls="--", zorder=0)
        place: dict[str, Any] = {
            "xytext": (-3, 3),
            "textcoords": "offset points",
            "ha": "right",
            "fontsize": 8,
            "color": "#666666",
        }
        across.append(ax.annotate(str(row["method"]), (1.0, value), xycoords=("axes fraction", "data"), **place))
    # Over less than a few decades matplotlib labels minor ticks, too, and on top of each other.
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    _label_points(figure, ax, points, across)
    set_title(figure, title)
    return figure


def to_image(figure: Figure, image_format: Literal["png", "jpeg"] = "png", dpi: int = 150) -> bytes:
    """Render a figure on white. PNG for lines; JPEG for pictures of slides, several times smaller."""
    buffer = io.BytesIO()
    options: dict[str, Any] = (
        {"metadata": {"Software": None}} if image_format == "png" else {"pil_kwargs": {"quality": 90}}
    )
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format=image_format, dpi=dpi, facecolor="white", **_TIGHT, **options)
    return buffer.getvalue()


def save_figure(path: str | os.PathLike[str], figure: Figure, dpi: int = 150) -> None:
    """Write a figure atomically; the suffix chooses the format (png, jpg, pdf, svg)."""
    FigureCanvasAgg(figure)
    with atomic_path(path) as scratch:
        figure.savefig(scratch, format=Path(path).suffix[1:], dpi=dpi, facecolor="white", **_TIGHT)


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure that belongs to nobody else."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_axes(ax: Axes, x: str, y: str) -> None:
    """Label the axes, in the look that all figures share."""
    ax.set_xlabel(x, fontsize=9, color=_INK)
    ax.set_ylabel(y, fontsize=9, color=_INK)
    ax.tick_params(labelsize=8, color=_FAINT, labelcolor=_INK)
    ax.grid(True, color="#ececec", lw=0.7)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)


def set_title(figure: Figure, title: str) -> None:
    """Write a title at the upper left, if there is one."""
    if title:
        figure.suptitle(title, fontsize=10, fontweight="bold", color=_INK, x=0.01, ha="left")


def _fold_rocs(predictions: Predictions, grid: FloatArray) -> FloatArray:
    """(F, len(grid)) true positive rates of each fold, seeds and classes averaged."""
    by_fold: dict[int, list[FloatArray]] = {}
    classes = [1] if predictions.num_classes == 2 else list(range(predictions.num_classes))
    for fold, _, rows in predictions.cells():
        labels, probabilities = predictions.labels[rows], predictions.probabilities[rows]
        if len(np.unique(labels)) < predictions.num_classes:
            continue
        curves = [_roc(labels == c, probabilities[:, c], grid) for c in classes]
        by_fold.setdefault(fold, []).append(np.mean(curves, axis=0))
    return np.array([np.mean(curves, axis=0) for curves in by_fold.values()])


def _roc(positive: np.ndarray, scores: FloatArray, grid: FloatArray) -> FloatArray:
    """True positive rate at each false positive rate of `grid`; ties give sloped segments, jumps their upper end."""
    order = np.argsort(-scores, kind="stable")
    ends = np.r_[np.flatnonzero(np.diff(scores[order])), len(scores) - 1]
    tpr = np.r_[0.0, np.cumsum(positive[order])[ends] / positive.sum()]
    fpr = np.r_[0.0, np.cumsum(~positive[order])[ends] / (~positive).sum()]
    return np.interp(grid, fpr + 1e-9 * np.arange(len(fpr)), tpr)


def _fold_aucs(predictions: Predictions) -> FloatArray:
    by_fold: dict[int, list[float]] = {}
    for fold, _, rows in predictions.cells():
        value = score(predictions.labels[rows], predictions.probabilities[rows], predictions.class_names)["auc"]
        if math.isfinite(value):
            by_fold.setdefault(fold, []).append(value)
    return np.array([np.mean(v) for v in by_fold.values()])


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    shift: float
    name: str
    colour: str


def _dodge(seconds: FloatArray, near: float = 1.04, step: float = 5.0) -> list[float]:
    """Sideways shift in typographic points for each of the sorted x values: runs of close ones are spread."""
    shifts: list[float] = []
    start = 0
    for end in range(1, len(seconds) + 1):
        if end == len(seconds) or seconds[end] > seconds[end - 1] * near:
            count = end - start
            shifts += [step * (i - (count - 1) / 2) for i in range(count)]
            start = end
    return shifts


def _label_points(figure: Figure, ax: Axes, points: Sequence[_Point], written: Sequence[Annotation]) -> None:
    """Write names beside points; each takes the first of several places where it covers no point and no other name.

    `written`: names that stand there already.
    """
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    per_point = figure.dpi / 72
    marks = [ax.transData.transform((p.x, p.y)) + np.array([p.shift * per_point, 0]) for p in points]
    taken: list[Bbox] = [text.get_window_extent(renderer) for text in written]
    heights = (0, 10, -10, 20, -20, 32, -32, 44, -44)
    places = [(side * 9, dy) for dy in heights for side in (1, -1)]
    for point in points:
        for dx, dy in places:
            text = ax.annotate(
                point.name,
                (point.x, point.y),
                xytext=(point.shift + dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                va="center",
                fontsize=8,
                color=point.colour,
            )
            box = text.get_window_extent(renderer)
            clear = not any(box.overlaps(other) for other in taken)
            clear &= not any(
                box.x0 - 6 * per_point < x < box.x1 + 6 * per_point
                and box.y0 - 3 * per_point < y < box.y1 + 3 * per_point
                for x, y in marks
            )
            clear &= ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and ax.bbox.y0 < box.y0 and box.y1 < ax.bbox.y1
            if clear or (dx, dy) == places[-1]:
                taken.append(box)
                break
            text.remove()
