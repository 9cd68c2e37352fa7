"""The tables of studies as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lrmil.studies.figures import KIND_STYLE, arm_title, target_title
from lrmil.studies.settings import ProbeSettings


def study_page(
    results: pd.DataFrame, retrieval: pd.DataFrame, settings: ProbeSettings, titles: Mapping[str, str]
) -> str:
    """One table for each target, then slot retrieval. 95 % intervals in brackets."""
    parts = []
    for target in settings.targets:
        lines = [
            "| embedding of a region | output | R² | gain over 5x, not distilled | recovered of 20x - 5x | runs |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for row in results[results["target"] == target].to_dict("records"):
            recovered = _percent(row) if row["arm"] not in ("hr", "lr", "colour", "random") else ""
            cells = [
                arm_title(row["arm"], titles),
                KIND_STYLE[row["embedding"]][2],
                _number(row, "r2"),
                _number(row, "gain", signed=True),
                recovered,
                f"{row['cells']}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append(f"### {target_title(target).capitalize()}\n\n" + "\n".join(lines))
    if len(retrieval):
        lines = ["| student | block | own child found | runs |", "|---|---:|---:|---:|"]
        for row in retrieval[retrieval["last"] | (retrieval["layer"] == _deepest(retrieval))].to_dict("records"):
            cells = [arm_title(row["arm"], titles), str(row["layer"]), _number(row, "retrieval", scale=100, unit=" %")]
            lines.append("| " + " | ".join([*cells, f"{row['cells']}"]) + " |")
        k, ratio = settings.ratio**2, settings.ratio
        note = f"Chance is {100 / k:.1f} %; the diagonal, which transposing leaves in place, {100 / ratio:.0f} %."
        parts.append("### Slot retrieval\n\n" + note + "\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _deepest(retrieval: pd.DataFrame) -> pd.Series:
    """The last block that an arm distils."""
    return retrieval.groupby("arm")["layer"].transform("max")


def _number(row: Mapping[Any, Any], name: str, *, signed: bool = False, scale: float = 1, unit: str = "") -> str:
    if not np.isfinite(row.get(name, np.nan)):
        return ""
    form = "+.2f" if signed else (".0f" if scale == 100 else ".2f")
    return bracketed(row, name, form, scale=scale, unit=unit)


def bracketed(row: Mapping[Any, Any], name: str, form: str, *, scale: float = 1, unit: str = "") -> str:
    """Write row[name] with its interval, row[name_low] to row[name_high], each in the format `form`."""
    value, low, high = (scale * float(row[key]) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:{form}}{unit} [{low:{form}}, {high:{form}}]"


def _percent(row: Mapping[Any, Any]) -> str:
    if not np.isfinite(row.get("gap_low", np.nan)):
        return ""
    if not np.isfinite(row.get("recovery", np.nan)):
        return "no gap"
    return _number(row, "recovery", scale=100, unit=" %")
