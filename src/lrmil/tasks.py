"""What is predicted of a slide: a class, a number, or survival. Cohort, training and evaluation share these words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TaskKind = Literal["classification", "regression", "survival"]
"""classification: one of several classes. regression: one number. survival: time until an event that may be censored"""


@dataclass(frozen=True)
class Task:
    """One question to the cohort. Targets are arrays with a row a slide, float64 unless said otherwise:

    classification  (S,) int64, positions in `classes`
    regression      (S,), the number in the unit of the table
    survival        (S, 2), time (any unit, positive) and event (1 seen, 0 censored)
    """

    name: str
    """The label column; for survival a name, since its columns are time and event"""
    classes: tuple[str, ...] = ()
    """`classes[i]` is what output i stands for; empty unless the kind is classification"""
    kind: TaskKind = "classification"
