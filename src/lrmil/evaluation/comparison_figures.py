"""Figures of a comparison: differences from the reference as a forest, and what `plots` draws of methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lrmil.evaluation.comparison import Comparison
from lrmil.evaluation.metrics import metric
from lrmil.evaluation.plots import (
    GROUP_STYLE,
    PURPLE,
    metric_against_seconds,
    new_figure,
    reliability,
    roc_curves,
    set_title,
    style_axes,
)
from lrmil.evaluation.tables import p_value_text, signed


def comparison_figures(comparison: Comparison) -> dict[str, Figure]:
    """Every figure of a comparison, by the name of its file: forests, metric against seconds, ROC and reliability.

    ROC curves and reliability show the reference and the best of each other group (by AUC), since more lines cannot be
    told apart; what is only a scale (group "Reference") is left out.
    """
    found: dict[str, Figure] = {}
    differences, results = comparison.differences, comparison.results
    for name in dict.fromkeys(differences["metric"]):
        part = differences[differences["metric"] == name]
        if part["difference"].notna().any():
            found[f"figure_differences_{name}"] = difference_forest(
                part, comparison.groups, reference=comparison.reference, title=comparison.title
            )
    main = "auc"
    if results[main].notna().any() and results["seconds_per_slide"].notna().any():
        found[f"figure_{main}_against_seconds"] = metric_against_seconds(results, main, comparison.title)
    others = results[(results["method"] != comparison.reference) & (results["group"] != "Reference")]
    best = others.sort_values(main, ascending=False, kind="stable").drop_duplicates("group").sort_index()
    shown = {m: comparison.predictions[m] for m in [comparison.reference, *best["method"]]}
    found["figure_roc"] = roc_curves(shown, comparison.title)
    found["figure_reliability"] = reliability(shown, comparison.title)
    return found


def difference_forest(
    differences: pd.DataFrame, groups: Mapping[str, str], *, reference: str, title: str = ""
) -> Figure:
    """Differences of one metric, reference less other, with their intervals: a line for each method; zero is marked.

    Filled points: Holm-corrected p below 0.05; hollow: not, or not tested among the baselines. The p-value stands at
    the right. Methods without a difference say "undefined".

    Args:
        differences: rows of one metric, see `paired.compare_methods`.
        groups: block of each method, for colour and marker.
        reference: name of the method that the others are compared with.
        title: above the figure.
    """
    (name,) = set(differences["metric"])
    of = metric(name)
    factor, digits = (100.0, 1) if of.percent else (1.0, 3)
    rows = differences.to_dict("records")
    figure = new_figure(6.8, 1.4 + 0.3 * len(rows))
    ax = figure.subplots()
    unit = " (points)" if of.percent else ""
    side = "right" if of.higher_is_better else "left"
    label = f"{of.title}: {reference} less the other{unit}; {side} of 0 favours {reference}"
    style_axes(ax, f"{label}\n95 % intervals over patients; p of permutations, Holm over the baselines", "")
    ax.axvline(0, color="#888888", lw=1)
    ax.grid(False, axis="y")
    beside: dict[str, Any] = {"va": "center", "fontsize": 8, "xycoords": ("axes fraction", "data")}
    for place, row in enumerate(rows):
        y = len(rows) - 1 - place
        colour, marker = GROUP_STYLE.get(groups.get(row["method"], ""), (PURPLE, "v"))
        value, low, high = (factor * float(row[k]) for k in ("difference", "low", "high"))
        if not math.isfinite(value):
            ax.annotate("undefined", (0.02, y), **beside, color="#777777")
            continue
        if math.isfinite(low):
            ax.plot([low, high], [y, y], color=colour, lw=1.6, alpha=0.7, solid_capstyle="butt")
        corrected = math.isfinite(row["p_holm"])
        clear = corrected and row["p_holm"] < 0.05
        ax.plot([value], [y], marker, color=colour, mfc=colour if clear else "white", ms=7, mew=1.4, zorder=3)
        ends = f" [{signed(low, digits)}, {signed(high, digits)}]" if math.isfinite(low) else ""
        p = row["p_holm"] if corrected else row["p_permutation"]
        text = f"{signed(value, digits)}{ends}   p {p_value_text(p)}{'' if corrected else ' (uncorrected)'}"
        ax.annotate(text, (1.02, y), **beside, annotation_clip=False)
    ax.set_yticks(range(len(rows)), [str(row["method"]) for row in reversed(rows)], fontsize=8)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.margins(x=0.08)
    set_title(figure, title)
    return figure
