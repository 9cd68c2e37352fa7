"""Figures of a comparison: differences from the reference as a forest, and what `plots` draws of methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lrmil.evaluation.comparison import Comparison, file_name
from lrmil.evaluation.metrics import MAIN, metric
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
from lrmil.evaluation.predictions import Predictions
from lrmil.evaluation.regression_plots import predicted_against_true
from lrmil.evaluation.survival_plots import survival_of_risk_groups
from lrmil.evaluation.tables import metric_text, p_value_text
from lrmil.evaluation.values import Values


def comparison_figures(comparison: Comparison) -> dict[str, Figure]:
    """Every figure of a comparison, by the name of its file: forests, metric against seconds, and what the kind of task
    has besides: ROC and reliability; predicted against true; survival of risk groups, where thresholds were given.

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
    ours = comparison.predictions[comparison.reference]
    main = MAIN[ours.kind]
    if results[main].notna().any() and results["seconds_per_slide"].notna().any():
        found[f"figure_{main}_against_seconds"] = metric_against_seconds(results, main, comparison.title)
    if isinstance(ours, Values) and ours.kind == "regression":
        title = f"{comparison.title}, {comparison.reference}"
        found["figure_predicted_against_true"] = predicted_against_true(ours, seed=comparison.seed, title=title)
    for method, limits in comparison.thresholds.items():
        values = comparison.predictions[method]
        if isinstance(values, Values):
            title = f"{comparison.title}, {method}"
            found[f"figure_survival_{file_name(method)}"] = survival_of_risk_groups(values, limits, title=title)
    if ours.kind == "classification":
        found |= _class_figures(comparison, main)
    return found


def _class_figures(comparison: Comparison, main: str) -> dict[str, Figure]:
    results = comparison.results
    others = results[(results["method"] != comparison.reference) & (results["group"] != "Reference")]
    best = others.sort_values(main, ascending=False, kind="stable").drop_duplicates("group").sort_index()
    found = {m: comparison.predictions[m] for m in [comparison.reference, *best["method"]]}
    shown = {method: p for method, p in found.items() if isinstance(p, Predictions)}
    return {
        "figure_roc": roc_curves(shown, comparison.title),
        "figure_reliability": reliability(shown, comparison.title),
    }


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
    factor = 100.0 if of.percent else 1.0
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
        shown = [metric_text(row[k], name, sign=True) for k in ("difference", "low", "high")]
        ends = f" [{shown[1]}, {shown[2]}]" if math.isfinite(low) else ""
        p = row["p_holm"] if corrected else row["p_permutation"]
        text = f"{shown[0]}{ends}   p {p_value_text(p)}{'' if corrected else ' (uncorrected)'}"
        ax.annotate(text, (1.02, y), **beside, annotation_clip=False)
    ax.set_yticks(range(len(rows)), [str(row["method"]) for row in reversed(rows)], fontsize=8)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.margins(x=0.08)
    set_title(figure, title)
    return figure
