"""Tasks without classes: a number, or a time with an event. What cells may hold, and what they are turned into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.cohorts.labels import event_number
from lrmil.cohorts.rows import Loading
from lrmil.errors import CohortError
from lrmil.tasks import TaskKind

_SHOWN = 10


@dataclass(frozen=True)
class TaskSpec:
    """One question to a table: which column, and what kind of answer it holds."""

    name: str
    """The label column; for survival any name"""
    kind: TaskKind = "classification"
    classes: Sequence[str] | None = None
    """Labels in the order of the outputs; None sorts them. Classification only"""
    time: str = "time"
    """Column of the time until event or end of observation. Survival only"""
    event: str = "event"
    """Column that says whether the event was seen. Survival only"""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the table must have."""
        return (self.time, self.event) if self.kind == "survival" else (self.name,)


def read_numbers(loading: Loading, task: str) -> pd.Series:
    """Numbers of a regression task, nan where empty.

    Raises:
        CohortError: a cell holds no number, or all hold the same.
    """
    found = []
    for row, value in loading.rows[task].items():
        try:
            number = float("nan") if value is None or value != value else float(value)
        except ValueError:
            number = float("inf")
        if value is not None and np.isinf(number):
            raise loading.fail(
                int(str(row)), task, f"{value!r} is no number{_comma(value)}", "Correct it, or leave the cell empty."
            )
        found.append(number)
    numbers = pd.Series(found, index=loading.rows.index, dtype="float64")
    if numbers.dropna().nunique() < 2:
        held = "no number" if numbers.isna().all() else f"only the number {numbers.dropna().iloc[0]:g}"
        raise CohortError(
            f"{loading.path}: column {task} holds {held}.",
            fix="Learning needs numbers that differ; check that this is the column.",
        )
    return numbers


def read_times(loading: Loading, column: str) -> pd.Series:
    """Times of a survival task, nan where empty.

    Raises:
        CohortError: a cell holds no positive number.
    """
    found = []
    for row, value in loading.rows[column].items():
        try:
            time = float("nan") if value is None or value != value else float(value)
        except ValueError:
            time = -1.0
        if time <= 0 or np.isinf(time):
            raise loading.fail(
                int(str(row)),
                column,
                f"{value!r} is not a positive time{_comma(value)}",
                "Correct it, or leave it empty to leave the slide out; write half a day for an observation that ended "
                "on its first day.",
            )
        found.append(time)
    return pd.Series(found, index=loading.rows.index, dtype="float64")


def read_events(loading: Loading, column: str) -> pd.Series:
    """Events of a survival task (1 seen, 0 censored), nan where empty.

    Raises:
        CohortError: a cell holds neither.
    """
    found = []
    for row, value in loading.rows[column].items():
        try:
            found.append(event_number(value))
        except ValueError:
            raise loading.fail(
                int(str(row)),
                column,
                f"{value!r} does not say whether the event was seen",
                "Write 1, true or dead where it was seen, 0, false or alive where it was not; leave it empty to leave "
                "the slide out.",
            ) from None
    return pd.Series(found, index=loading.rows.index, dtype="float64")


def check_outcomes(loading: Loading, task: str, time: pd.Series, event: pd.Series) -> list[str]:
    """Say which rows have only one of time and event.

    Raises:
        CohortError: no slide has both, or no event was seen.
    """
    both = time.notna() & event.notna()
    if not both.any():
        raise CohortError(f"{loading.path}: no slide has both a time and an event of {task}.", fix="Check the columns.")
    if not event[both].any():
        raise CohortError(
            f"{loading.path}: no event of {task} was seen, all {int(both.sum())} slides are censored.",
            fix="Survival cannot be learnt without events; check how events are written.",
        )
    half = time.notna() ^ event.notna()
    if not half.any():
        return []
    rows = ", ".join(str(r) for r in half.index[half][:_SHOWN])
    return [f"{int(half.sum())} slides have only one of time and event of {task} and count as unlabelled (rows {rows})"]


def describe_numbers(values: npt.NDArray[np.float64]) -> str:
    """Range and quartiles of the numbers given, none of them nan."""
    low, first, middle, third, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    return f"{low:g} to {high:g}, quartiles {first:g}, {middle:g}, {third:g}"


def describe_survival(patients: Sequence[str], targets: npt.NDArray[np.float64]) -> str:
    """Events and censored patients, and how long they were followed; (S, 2) time and event of labelled slides."""
    from lrmil.evaluation.survival import median_follow_up

    first = np.unique(np.asarray(patients, dtype=str), return_index=True)[1]
    own = targets[first]
    events = int(own[:, 1].sum())
    median = median_follow_up(own)
    followed = "not reached" if np.isnan(median) else f"{median:g}"
    return f"{events} patients with event, {len(own) - events} censored; median follow-up {followed}"


def _comma(value: Any) -> str:
    return " (write a decimal point, not a comma)" if "," in str(value) else ""
