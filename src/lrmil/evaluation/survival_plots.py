"""Kaplan-Meier curves of risk groups, with the log-rank test and numbers at risk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lrmil.errors import ConfigError
from lrmil.evaluation.plots import BLUE, GREEN, ORANGE, PURPLE, VERMILION, new_figure, set_title, style_axes
from lrmil.evaluation.survival import SurvivalCurve, Thresholds, kaplan_meier, log_rank, risk_groups
from lrmil.evaluation.tables import p_value_text
from lrmil.evaluation.values import Values

_COLOURS = (VERMILION, BLUE, GREEN, PURPLE, ORANGE)


def survival_of_risk_groups(values: Values, thresholds: Thresholds, *, unit: str = "", title: str = "") -> Figure:
    """Survival of test patients at high and low risk, divided at the median risk of each fold's training split.

    Args:
        values: of survival.
        thresholds: for each fold, the median risk of its TRAINING patients, see `survival.risk_groups`.
        unit: of the time.
        title: above the figure.

    Raises:
        ConfigError: a fold has no threshold, or this is not survival.
    """
    patients, high = risk_groups(values, thresholds)
    names = np.where(high, "high risk", "low risk")
    note = "divided at the median risk of the training patients of each fold"
    return survival_curves(
        patients.time, patients.event, names, order=("high risk", "low risk"), unit=unit, title=title, note=note
    )


def survival_curves(
    time: npt.ArrayLike,
    event: npt.ArrayLike,
    group: npt.ArrayLike,
    *,
    order: tuple[str, ...] | None = None,
    unit: str = "",
    title: str = "",
    note: str = "",
) -> Figure:
    """Kaplan-Meier curve of each group with 95 % bands (log-log) and ticks where patients were censored.

    Below: how many are at risk. In the corner: the log-rank test over all groups.

    Args:
        time: (n,).
        event: (n,) 1 seen, 0 censored.
        group: (n,) names.
        order: of the groups; None: sorted. Groups without a patient are named, not drawn.
        unit: of the time.
        title: above the figure.
        note: below the test.

    Raises:
        ConfigError: there are more than five groups.
    """
    t, seen, member = np.asarray(time, dtype=np.float64), np.asarray(event), np.asarray(group).astype(str)
    names = tuple(np.unique(member)) if order is None else order
    if len(names) > len(_COLOURS):
        raise ConfigError(f"{len(names)} survival curves cannot be told apart.", fix="Join groups, five at most.")
    figure = new_figure(5.8, 3.9 + 0.22 * len(names))
    ax, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 0.25 + 0.22 * len(names)])
    style_axes(ax, "", "share without event")
    curves: dict[str, SurvivalCurve] = {}
    for name, colour in zip(names, _COLOURS, strict=False):
        inside = member == name
        if inside.any():
            curves[name] = kaplan_meier(t[inside], seen[inside])
            _draw(ax, curves[name], colour, f"{name} (n = {inside.sum()}, {int(seen[inside].sum())} events)")
        else:
            ax.plot([], [], color=colour, label=f"{name} (no patient)")
    test = log_rank(t, seen, member)
    p = p_value_text(test.p_value)
    said = f"log-rank p {p if p.startswith('<') else f'= {p}'}" if math.isfinite(test.p_value) else "no log-rank test: "
    ax.set_ylim(-0.02, 1.04)
    ax.set_xlim(0, 1.03 * t.max())
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 3, 5, 6, 10]))
    outside: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 2, "alignment": "left"}
    ax.legend(frameon=False, fontsize=8, title=said + test.reason, title_fontsize=8, **outside)
    ax.tick_params(labelbottom=True)
    ax.set_xlabel("time" + (f" ({unit})" if unit else ""), fontsize=9)
    _at_risk(below, ax, names, curves)
    if note:
        below.set_xlabel(note, fontsize=8, loc="left", color="#555555")
    set_title(figure, title)
    return figure


def _draw(ax: Axes, curve: SurvivalCurve, colour: str, label: str) -> None:
    x, y = np.r_[0.0, curve.times], np.r_[1.0, curve.survival]
    ax.step(x, y, where="post", color=colour, lw=1.8, label=label)
    low, high = (np.r_[1.0, _hold(end)] for end in (curve.low, curve.high))
    ax.fill_between(x, low, high, step="post", color=colour, alpha=0.14, lw=0)
    cut = curve.censored > 0
    ax.plot(curve.times[cut], curve.survival[cut], "|", color=colour, ms=6, mew=1.0)


def _hold(ends: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 before the first event; where the curve has come down to 0 there is no interval, and no band."""
    known = np.flatnonzero(np.isfinite(ends))
    held = ends.copy()
    held[: known[0] if len(known) else len(ends)] = 1.0
    return held


def _at_risk(ax: Axes, above: Axes, names: tuple[str, ...], curves: Mapping[str, SurvivalCurve]) -> None:
    """A line of numbers for each group, at the ticks of the time axis."""
    ticks = [x for x in above.get_xticks() if 0 <= x <= above.get_xlim()[1]]
    for place, (name, colour) in enumerate(zip(names, _COLOURS, strict=False)):
        y = len(names) - 1 - place
        counts = curves[name].risk_set(ticks) if name in curves else np.zeros(len(ticks), np.int64)
        for x, count in zip(ticks, counts, strict=True):
            ax.text(x, y, str(count), ha="left" if x == 0 else "center", va="center", fontsize=8, color=colour)
    ax.set_ylim(-0.6, len(names) - 0.2)
    ax.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    ax.set_title("at risk", fontsize=8, loc="left", pad=2)
    ax.tick_params(labelsize=8, length=0, labelbottom=False)
    ax.spines[:].set_visible(False)
