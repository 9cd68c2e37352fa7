"""Predicted against true numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lrmil.errors import ConfigError
from lrmil.evaluation.intervals import RESAMPLES, bootstrap
from lrmil.evaluation.metrics import metric
from lrmil.evaluation.plots import BLUE, VERMILION, new_figure, set_title, style_axes
from lrmil.evaluation.scored import FloatArray
from lrmil.evaluation.tables import metric_text
from lrmil.evaluation.values import Values

_TOLD = ("r2", "mae", "spearman")


def predicted_against_true(
    values: Values, *, seed: int, bins: int = 5, resamples: int = RESAMPLES, unit: str = "", title: str = ""
) -> Figure:
    """Scatter of the true number over the predicted one, a point for each slide, seeds averaged; the diagonal is ideal.

    On it: mean truth in bins of equally many predictions, with 95 % intervals over patients, which shows where
    predictions are too high or too low; and the metrics with their intervals, averaged over folds as in the tables.

    Raises:
        ConfigError: these are not predictions of a number.
    """
    if values.kind != "regression":
        raise ConfigError("a scatter of predicted against true needs predictions of a number.")
    slides, place = np.unique(
        np.stack([values.folds.astype(str), values.slide_ids.astype(str)], 1), axis=0, return_inverse=True
    )
    place = place.ravel()
    count = np.bincount(place, minlength=len(slides))
    predicted = np.bincount(place, weights=values.predicted) / count
    first = np.unique(place, return_index=True)[1]
    true, patients = values.targets[first], values.patient_ids[first].astype(str)

    figure = new_figure(5.0, 4.8)
    ax = figure.subplots()
    suffix = f" ({unit})" if unit else ""
    style_axes(ax, f"predicted{suffix}", f"true{suffix}")
    ends = [float(min(predicted.min(), true.min())), float(max(predicted.max(), true.max()))]
    room = 0.05 * (ends[1] - ends[0]) or 1.0
    ends = [ends[0] - room, ends[1] + room]
    ax.plot(ends, ends, color="#999999", lw=1, ls="--", zorder=1)
    ax.plot(predicted, true, "o", color=BLUE, ms=4.5, alpha=0.45, mew=0, zorder=2, label="slide")
    label: str | None = "mean of a fifth" if bins == 5 else "mean of a bin"
    rng = np.random.default_rng(seed)
    for rows in np.array_split(np.argsort(predicted, kind="stable"), bins):
        if not len(rows):
            continue
        x, y = float(predicted[rows].mean()), float(true[rows].mean())
        low, high = _mean_interval(true[rows], patients[rows], resamples, rng)
        ax.plot([x, x], [low, high], color=VERMILION, lw=1.8, zorder=3)
        ax.plot([x], [y], "D", color=VERMILION, ms=6.5, mec="white", mew=0.9, zorder=4, label=label)
        label = None
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    lines = []
    for name in _TOLD:
        interval = bootstrap(values, name, seed=seed, resamples=resamples)
        text = metric_text(interval.value, name) if np.isfinite(interval.value) else "undefined"
        if np.isfinite(interval.low):
            text += f" [{metric_text(interval.low, name)}, {metric_text(interval.high, name)}]"
        lines.append(f"{metric(name).title} {text}")
    place_of: dict[str, Any] = {"transform": ax.transAxes, "va": "top", "fontsize": 8}
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2}
    ax.text(0.02, 0.98, "\n".join(lines), **place_of, bbox=box, zorder=5)
    ax.legend(loc="lower right", frameon=False, fontsize=8)
    set_title(figure, title)
    return figure


def _mean_interval(
    true: FloatArray, patients: np.ndarray, resamples: int, rng: np.random.Generator
) -> tuple[float, float]:
    """95 % interval of the mean over slides, patients drawn whole; nan for one patient."""
    names, member = np.unique(patients, return_inverse=True)
    if len(names) < 2:
        return float("nan"), float("nan")
    draws = len(names) - 1
    counts = rng.multinomial(draws, np.full(len(names), 1 / len(names)), size=resamples)
    weights = counts[:, member]
    kept = weights.sum(axis=1) > 0
    means = (weights[kept] @ true) / weights[kept].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
