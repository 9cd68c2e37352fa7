"""The sentences of a report: a headline that says what came out, whatever it is, and the limits of the numbers."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from lrmil.evaluation.intervals import Interval
from lrmil.evaluation.metrics import metric
from lrmil.evaluation.tables import metric_text, three_digits


def headline(
    results: pd.DataFrame,
    *,
    ours: str = "LRMIL",
    teacher: str = "HR teacher",
    baseline: str = "LR without distillation",
    name: str = "auc",
    gain: Interval | None = None,
    gap: Interval | None = None,
) -> str:
    """Say in up to three lines what came out, good or bad. One dataset and task.

    Args:
        results: a results frame with lines for `ours`, `teacher` and `baseline`; missing lines are left out.
        ours: the method that reads low resolution only and was taught.
        teacher: the method that reads high resolution.
        baseline: the method that reads low resolution only and was not taught.
        name: of the metric.
        gain: paired interval of ours - baseline.
        gap: paired interval of ours - teacher.
    """
    rows = {str(r["method"]): r for r in results.to_dict("records")}
    mine, reading = rows.get(ours), rows.get(teacher)
    if mine is None or not _known(mine, name):
        return f"{ours} has no {metric(name).title} on this cohort; the table says why."
    others = [f"{who} {_number(rows[who][name], name)}" for who in (teacher, baseline) if _known(rows.get(who), name)]
    first = f"{ours} reaches {metric(name).title} {_number(mine[name], name)}{_ends(mine, name)}"
    lines = [f"{first}; {', '.join(others)}." if others else f"{first}."]
    verdicts = [
        _verdict(interval, name, other)
        for interval, other in ((gain, baseline), (gap, teacher))
        if interval is not None and math.isfinite(interval.low)
    ]
    if verdicts:
        lines.append(f"{ours} is {' and '.join(verdicts)}.")
    if reading is not None and _known(mine, "seconds_per_slide") and _known(reading, "seconds_per_slide"):
        ratio = reading["seconds_per_slide"] / mine["seconds_per_slide"]
        pace = f"{three_digits(ratio)} times faster" if ratio >= 1 else f"{three_digits(1 / ratio)} times slower"
        seconds = [three_digits(row["seconds_per_slide"]) for row in (mine, reading)]
        text = f"{seconds[0]} s per slide against {seconds[1]} s of the {teacher}: {pace}"
        if _known(mine, "patches_per_slide") and _known(reading, "patches_per_slide"):
            patches = [three_digits(row["patches_per_slide"]) for row in (mine, reading)]
            text += f", from {patches[0]} patches instead of {patches[1]}"
        lines.append(text + ".")
    return "\n".join(lines)


def standard_limits(*, patients: int, folds: int, seeds: int, simulated: bool, failed: int = 0) -> tuple[str, ...]:
    """What readers of any report have to know; add what is special to the run."""
    runs = f"{folds} folds" + (f", {seeds} seeds" if seeds > 1 else "")
    limits = [
        f"The numbers come from {patients} patients, each tested by models that never saw that patient ({runs}). "
        "Intervals resample these patients; they do not show how much the models would change with other training "
        "patients. Folds share training patients, so the sd over folds is no basis for a test.",
        "Other hospitals, scanners and stains are tested only as far as the cohort holds them; expect less elsewhere.",
        "Attention shows what a model weighted, not why, and not where disease is.",
        "Times hold for this machine and these settings; compare methods with each other, not with other machines.",
    ]
    if simulated:
        text = "The slides are simulated: they show what method and program do, not how either does on patients."
        limits.insert(0, text)
    if patients < 100:
        limits.append(f"With {patients} patients, differences of a few points cannot be told from chance.")
    if failed:
        noun = "slide" if failed == 1 else "slides"
        limits.append(f"{failed} {noun} failed and are missing here; if they have something in common, this is a bias.")
    return tuple(limits)


def _verdict(interval: Interval, name: str, other: str) -> str:
    unit = " points" if metric(name).percent else ""
    ends = f"{metric_text(interval.low, name, sign=True)} to {metric_text(interval.high, name, sign=True)}"
    where = f"{100 * interval.level:g} % interval of the difference {ends}{unit}"
    if not interval.excludes_zero():
        return f"not distinguishable from {other} on this cohort ({where})"
    better = (interval.value > 0) == metric(name).higher_is_better
    size = f"{metric_text(abs(interval.value), name)}{unit}"
    return f"{size} {'better' if better else 'worse'} than {other} ({where})"


def _number(value: float, name: str) -> str:
    return metric_text(value, name) + (" %" if metric(name).percent else "")


def _ends(row: dict[Any, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if not math.isfinite(low):
        return ""
    return f" (95 % interval {metric_text(low, name)} to {metric_text(high, name)})"


def _known(row: dict[Any, Any] | None, name: str) -> bool:
    return row is not None and math.isfinite(row[name])
