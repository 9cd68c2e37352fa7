"""Differences with their intervals, a row each, beside 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lrmil.evaluation.plots import BLACK, BLUE, new_figure, set_title, style_axes


def forest(frame: pd.DataFrame, value: str, names: Sequence[str], axis: str, title: str) -> Figure:
    """Draw the differences of a frame from top to bottom.

    Args:
        frame: a row each, with columns of the difference and its interval: `value`, value_low, value_high.
        value: which difference.
        names: what stands left of each row.
        axis: what the difference is.
        title: above the figure.
    """
    drawn = new_figure(7.5, 1.2 + 0.3 * len(frame))
    ax = drawn.subplots()
    rows: list[dict[Any, Any]] = frame.to_dict("records")
    for place, row in enumerate(rows):
        ax.plot([row[f"{value}_low"], row[f"{value}_high"]], [place, place], color=BLUE, lw=1.6, alpha=0.6)
        ax.plot([row[value]], [place], "o", color=BLUE, ms=5)
    ax.axvline(0, color=BLACK, linewidth=0.8)
    style_axes(ax, axis, "")
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    ax.invert_yaxis()
    set_title(drawn, title)
    return drawn
