"""Several studies of region probes as one picture: R2, and the share of the gap recovered, against the visibility."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrmil.errors import ConfigError
from lrmil.evaluation.plots import BLACK, BLUE, GREEN, VERMILION, new_figure, save_figure, set_title, style_axes
from lrmil.studies.figures import arm_title, target_title
from lrmil.studies.tables import write_table

_APART = 0.012
"""How far curves are moved sideways, so that their intervals can be told apart"""


def read_curve(summaries: Sequence[Path], ceiling: Path | None = None) -> pd.DataFrame:
    """Put the results of studies under each other, with the visibility of each.

    Args:
        summaries: NAME_summary.json of each study, with NAME_results.csv beside it, as published.
        ceiling: what `lrmil study ceiling` published of the same studies; what learned best from most regions takes
            the place of the studies' own ceilings, which learn from their own few.

    Returns:
        The columns of `results_table`, and visibility, study, title (of the arm).

    Raises:
        ConfigError: a file is missing, or a study is not one of simulated tissue.
    """
    frames = []
    for path in summaries:
        name = path.name.removesuffix("_summary.json")
        table = path.with_name(f"{name}_results.csv")
        if name == path.name or not (path.is_file() and table.is_file()):
            raise ConfigError(
                f"{path}: no summary of a study with {table.name} beside it.",
                fix="Give NAME_summary.json files that `lrmil study probe --publish` has written.",
            )
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
        simulated = settings["fields"]["simulated"]
        if simulated is None:
            raise ConfigError(f"{path}: not on simulated tissue, which alone has a visibility.", fix="Leave it out.")
        titles = {recipe["name"]: recipe["title"] or recipe["name"] for recipe in settings["recipes"]}
        frame = pd.read_csv(table)
        frame["title"] = [arm_title(arm, titles) for arm in frame["arm"]]
        frames.append(frame.assign(study=name, visibility=float(simulated["nuclei"]["visibility"])))
    curve = pd.concat(frames, ignore_index=True)
    if ceiling is not None:
        curve = pd.concat([curve[curve["arm"] != "ceiling"], _ceiling(ceiling, set(curve["study"]))])
    return curve.sort_values("visibility", kind="stable")


def _ceiling(path: Path, studies: Collection[str]) -> pd.DataFrame:
    """Read a study of the ceiling: of the most regions, the better of the ways to learn, both being lower bounds."""
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such table.", fix="Give the CSV that `lrmil study ceiling --publish` has written."
        )
    told = pd.read_csv(path)
    missing = sorted(set(studies) - set(told["study"]))
    if missing:
        raise ConfigError(f"{path} does not know {', '.join(missing)}.", fix="Name them in that study's config.")
    told = told[told["study"].isin(studies) & (told["regions"] == told["regions"].max())]
    told = told.loc[told.groupby(["study", "target"], sort=False)["r2"].idxmax()]
    return told.assign(arm="ceiling", embedding="direct", title=f"5x, trained on {told['regions'].max()} true regions")


def curve_figure(curve: pd.DataFrame, recipe: str, embedding: str) -> Figure:
    """R2 of 20x, 5x, the recipe and the ceiling above; below, what the recipe recovers, where there is a gap.

    Args:
        curve: see `read_curve`.
        recipe: name of a way to distil.
        embedding: cls, token_mean or both.
    """
    targets = list(dict.fromkeys(curve["target"]))
    figure = new_figure(3.1 * len(targets) + 0.8, 5.4)
    axes = figure.subplots(2, len(targets), sharex=True, sharey="row", squeeze=False)
    arms = (("hr", VERMILION, "s"), ("lr", BLACK, "o"), (recipe, BLUE, "D"), ("ceiling", GREEN, "*"))
    for column, target in enumerate(targets):
        own = curve[curve["target"] == target]
        for number, (arm, colour, marker) in enumerate(arms):
            rows = own[(own["arm"] == arm) & own["embedding"].isin([embedding, "direct"])]
            _line(axes[0, column], rows, "r2", colour, marker, (number - 1.5) * _APART)
        told = own[(own["arm"] == recipe) & (own["embedding"] == embedding) & np.isfinite(own["recovery"])]
        _line(axes[1, column], told, "recovery", BLUE, "D", 0.0)
        for level in (0, 1):
            axes[1, column].axhline(level, color=BLACK, linewidth=0.8, linestyle=":")
        style_axes(axes[0, column], "", "R² on test regions" if column == 0 else "")
        style_axes(axes[1, column], "visibility at 5x", "recovered of 20x - 5x" if column == 0 else "")
        axes[0, column].set_title(target_title(target), fontsize=9)
    low, high = axes[1, 0].get_ylim()
    axes[1, 0].set_ylim(max(low, -1.0), min(high, 2.0))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncol=len(labels), fontsize=8, frameon=False, bbox_to_anchor=(0.5, -0.06)
    )
    set_title(figure, "What stage 1 recovers, by how visible the evidence is")
    return figure


def write_curve(
    summaries: Sequence[Path], recipe: str, embedding: str, out: Path, ceiling: Path | None = None
) -> list[Path]:
    """Draw `curve_figure` to OUT.png, and write what it shows to OUT.csv.

    Raises:
        ConfigError: see `read_curve`; or no study has the recipe.
    """
    curve = read_curve(summaries, ceiling)
    if not (curve["arm"] == recipe).any():
        raise ConfigError(f"no study has a recipe {recipe!r}.", fix=f"Choose from {sorted(set(curve['arm']))}.")
    shown = curve[curve["arm"].isin(["hr", "lr", recipe, "ceiling"]) & curve["embedding"].isin([embedding, "direct"])]
    written = [out.with_suffix(".csv"), out.with_suffix(".png")]
    write_table(written[0], shown)
    save_figure(written[1], curve_figure(curve, recipe, embedding))
    return written


def _line(ax: Axes, rows: pd.DataFrame, value: str, colour: str, marker: str, aside: float) -> None:
    """Points with intervals, joined from one visibility to the next."""
    if rows.empty:
        return
    x = rows["visibility"].to_numpy() + aside
    ax.plot(
        x, rows[value], marker, color=colour, markersize=4.5, linestyle="-", linewidth=0.9, label=rows["title"].iloc[0]
    )
    ax.vlines(x, rows[f"{value}_low"], rows[f"{value}_high"], color=colour, linewidth=1.3)
