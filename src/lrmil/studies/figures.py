"""Figures of region probes: what each embedding tells, what each recipe gains, whether slots are found."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrmil.evaluation.plots import BLACK, BLUE, GREEN, ORANGE, VERMILION, new_figure, set_title, style_axes
from lrmil.studies.arms import REFERENCE_TITLES
from lrmil.studies.settings import ProbeSettings

KIND_STYLE = {
    "cls": (BLUE, "o", "class token"),
    "token_mean": (VERMILION, "s", "token mean"),
    "both": (GREEN, "D", "both"),
    "direct": (BLACK, "*", "own output"),
    "colours": (ORANGE, "^", "colours"),
}
"""colour, marker, name of each embedding"""
_ROW_IN = 0.42


def target_title(target: str) -> str:
    """Name a target in words."""
    return target.replace("_", " ")


def arm_title(arm: str, titles: Mapping[str, str]) -> str:
    """Name an arm in words."""
    return REFERENCE_TITLES.get(arm) or titles.get(arm, arm)


def probes_figure(results: pd.DataFrame, settings: ProbeSettings, titles: Mapping[str, str]) -> Figure:
    """R2 with intervals of the references, the first recipe and the ceiling, a panel for each target."""
    own = [recipe.name for recipe in settings.recipes[:1]]
    arms = [arm for arm in ("hr", *own, "lr", "ceiling", "random", "colour") if (results["arm"] == arm).any()]
    figure = new_figure(3.1 * len(settings.targets) + 1.6, _ROW_IN * len(arms) + 1.5)
    axes = figure.subplots(1, len(settings.targets), sharey=True, squeeze=False)[0]
    for ax, target in zip(axes, settings.targets, strict=True):
        _rows(ax, results[results["target"] == target], arms, "r2")
        style_axes(ax, "R² on test regions", "")
        ax.set_title(target_title(target), fontsize=9)
    _finish(figure, axes, [arm_title(arm, titles) for arm in arms], settings.title)
    return figure


def gains_figure(results: pd.DataFrame, settings: ProbeSettings, titles: Mapping[str, str]) -> Figure:
    """Gain of every recipe over the same embedding without distillation, a panel for each target."""
    arms = ["hr", *(r.name for r in settings.recipes if (results["arm"] == r.name).any())]
    figure = new_figure(3.1 * len(settings.targets) + 1.6, _ROW_IN * len(arms) + 1.5)
    axes = figure.subplots(1, len(settings.targets), sharey=True, squeeze=False)[0]
    for ax, target in zip(axes, settings.targets, strict=True):
        _rows(ax, results[results["target"] == target], arms, "gain")
        style_axes(ax, "R² more than 5x, not distilled", "")
        ax.axvline(0, color=BLACK, linewidth=0.8)
        ax.set_title(target_title(target), fontsize=9)
    _finish(figure, axes, [arm_title(arm, titles) for arm in arms], f"{settings.title}: gain of stage 1")
    return figure


def retrieval_figure(
    retrieval: pd.DataFrame, settings: ProbeSettings, titles: Mapping[str, str], last_layer: int
) -> Figure:
    """Slot retrieval after the last block of every arm that distils it."""
    own = retrieval[retrieval["layer"] == last_layer]
    arms = [arm for arm in ("lr", *(r.name for r in settings.recipes)) if (own["arm"] == arm).any()]
    figure = new_figure(5.4, 0.34 * len(arms) + 1.5)
    ax = figure.subplots()
    for place, arm in enumerate(arms):
        row = own[own["arm"] == arm].iloc[0]
        ax.plot([row["retrieval_low"], row["retrieval_high"]], [place, place], color=BLUE, linewidth=1.4)
        ax.plot(row["retrieval"], place, "o", color=BLUE, markersize=5)
    for value, text, style in (
        (1 / settings.ratio**2, "chance", ":"),
        (1 / settings.ratio, "diagonal", "--"),
    ):
        ax.axvline(value, color=BLACK, linewidth=0.9, linestyle=style, label=text)
    style_axes(ax, "share of slots that find their own child", "")
    ax.set_yticks(range(len(arms)), [arm_title(arm, titles) for arm in arms], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, max(0.3, float(own["retrieval_high"].max()) + 0.03))
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    set_title(figure, f"{settings.title}: slot retrieval")
    return figure


def _rows(ax: Axes, results: pd.DataFrame, arms: list[str], value: str) -> None:
    """A point with its interval for every embedding of every arm, arms below each other."""
    for place, arm in enumerate(arms):
        own = results[(results["arm"] == arm) & np.isfinite(results[value])]
        offsets = (np.arange(len(own)) - (len(own) - 1) / 2) * 0.2
        for offset, row in zip(offsets, own.to_dict("records"), strict=True):
            colour, marker, name = KIND_STYLE[str(row["embedding"])]
            y = place + offset
            ax.plot([row[f"{value}_low"], row[f"{value}_high"]], [y, y], color=colour, linewidth=1.3)
            ax.plot(row[value], y, marker, color=colour, markersize=4.5, label=name)


def _finish(figure: Figure, axes: np.ndarray, rows: list[str], title: str) -> None:
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(found.values()), list(found), loc="lower center", ncol=len(found), fontsize=8, frameon=False,
        bbox_to_anchor=(0.5, -0.09),
    )  # fmt: skip
    set_title(figure, title)
