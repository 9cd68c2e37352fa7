"""Figures of variants of one method: what a metric does as one setting is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lrmil.evaluation.metrics import metric
from lrmil.evaluation.plots import BLUE, GREEN, ORANGE, PURPLE, VERMILION, new_figure, set_title, style_axes
from lrmil.evaluation.tables import paper_metrics

_SERIES = ((BLUE, "o", "-"), (GREEN, "s", "--"), (ORANGE, "D", "-."), (PURPLE, "v", ":"))
_MOST_METRICS = 2
_UNDEFINED: dict[str, Any] = {"fontsize": 8, "color": "#777777", "ha": "left", "va": "center"}


def variant_rows(results: pd.DataFrame, *, reference: str, title: str = "") -> Figure:
    """Metric with its 95 % interval, a line for each variant in the order of the frame, a panel for each metric.

    The metrics are the paper's, or the first two of tasks that it leaves for later. A star is the reference; the dashed
    line is its value.

    Args:
        results: a results frame of one dataset and task, see `tables`.
        reference: the method that the others are compared with.
        title: above the figure.
    """
    rows = results.to_dict("records")
    names = paper_metrics(results)[:_MOST_METRICS]
    figure = new_figure(2.0 + 3.2 * len(names), 1.3 + 0.34 * len(rows))
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for ax, name in zip(axes, names, strict=True):
        style_axes(ax, f"{_label(name)}, 95 % interval over patients", "")
        ax.grid(False, axis="y")
        for place, row in enumerate(rows):
            y, ours = len(rows) - 1 - place, row["method"] == reference
            value, low, high = _values(row, name)
            if not math.isfinite(value):
                ax.annotate("undefined", (0.02, y), xycoords=("axes fraction", "data"), **_UNDEFINED)
                continue
            colour = VERMILION if ours else BLUE
            if math.isfinite(low):
                ax.plot([low, high], [y, y], color=colour, lw=1.8, alpha=0.6, solid_capstyle="butt")
            ax.plot([value], [y], "*" if ours else "o", color=colour, ms=11 if ours else 6, zorder=3)
            if ours:
                ax.axvline(value, color=VERMILION, lw=0.9, ls="--", alpha=0.7, zorder=1)
        ax.tick_params(axis="y", length=0)
        ax.margins(x=0.08)
    axes[0].set_yticks(range(len(rows)), [str(row["method"]) for row in reversed(rows)], fontsize=8)
    axes[0].set_ylim(-0.7, len(rows) - 0.3)
    set_title(figure, title)
    return figure


def variant_lines(
    results: pd.DataFrame,
    lines: Mapping[str, Sequence[tuple[float, str]]],
    *,
    axis: str,
    reference: str,
    title: str = "",
) -> Figure:
    """Metric with its 95 % interval against a number (log scale), a panel for each metric; a star is the reference.

    Args:
        results: a results frame of one dataset and task, see `tables`.
        lines: for each line, (value above 0, method) of its points. A method may stand on several.
        axis: what the number is.
        reference: the method that the others are compared with.
        title: above the figure.
    """
    found = {row["method"]: row for row in results.to_dict("records")}
    names = paper_metrics(results)[:_MOST_METRICS]
    ticks = sorted({value for points in lines.values() for value, _ in points})
    figure = new_figure(1.2 + 3.6 * len(names), 3.3)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        style_axes(ax, f"{axis} (log scale)", f"{_label(name)}, 95 % interval")
        ax.set_xscale("log", base=2)
        for index, (line, points) in enumerate(lines.items()):
            # Lines that share a value are set a little apart, so that their intervals can be told apart; at the
            # reference they meet.
            shift = 1.035 ** (index - (len(lines) - 1) / 2)
            shown = [(x if method == reference else x * shift, found[method]) for x, method in points]
            _draw_line(ax, index, line, shown, name, reference)
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    set_title(figure, title)
    return figure


def _draw_line(
    ax: Axes, index: int, line: str, points: Sequence[tuple[float, dict[Any, Any]]], name: str, reference: str
) -> None:
    colour, marker, style = _SERIES[index % len(_SERIES)]
    known = [(x, row) for x, row in points if math.isfinite(row[name])]
    values = [_values(row, name) for _, row in known]
    shown: dict[str, Any] = {"color": colour, "marker": marker, "ms": 6}
    ax.plot([x for x, _ in known], [v for v, _, _ in values], ls=style, lw=1.4, label=line or None, **shown)
    for (x, row), (value, low, high) in zip(known, values, strict=True):
        ours = row["method"] == reference
        if math.isfinite(low):
            ax.plot([x, x], [low, high], color=VERMILION if ours else colour, lw=1.5, alpha=0.55, solid_capstyle="butt")
        if ours:
            label = "the config's own" if index == 0 else None
            ax.plot([x], [value], "*", color=VERMILION, ms=13, zorder=4, label=label)


def _values(row: Mapping[Any, Any], name: str) -> tuple[float, float, float]:
    """Value and interval, in percent where tables print percent."""
    factor = 100.0 if metric(name).percent else 1.0
    value, low, high = (factor * float(row[key]) for key in (name, f"{name}_low", f"{name}_high"))
    return value, low, high


def _label(name: str) -> str:
    of = metric(name)
    unit = " (%)" if of.percent else ""
    return of.title + unit + ("" if of.higher_is_better else ", lower is better")
