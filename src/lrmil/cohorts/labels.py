"""What cells of labels say: classes, in an order that is never left to chance, and whether an event was seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from lrmil.errors import CohortError

EVENT_WORDS = {
    **dict.fromkeys(("1", "1.0", "true", "dead", "deceased", "1:deceased"), 1.0),
    **dict.fromkeys(("0", "0.0", "false", "alive", "living", "0:living"), 0.0),
}
"""How an event is written: seen (1) or not (0). Yes and no, or 1 and 2, mean different things to different people"""

_SHOWN = 10
_FEW = 3
"""Patients, and labels of each, that a message names"""


def find_classes(path: Path, task: str, labels: pd.Series, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Return the classes in order: those given, else those found, sorted (as numbers if all are numbers).

    Args:
        path: the table, for messages.
        task: the label column.
        labels: text, None where empty; its index is the row of the file.
        classes: the order that the user wants.

    Raises:
        CohortError: fewer than two classes, a label that is not among those given, or two spellings of one label.
    """
    present = labels.dropna()
    if classes is not None:
        classes = [str(c) for c in classes]
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise CohortError(f"classes {classes}: give at least two labels, each once.")
        other = present[~present.isin(classes)]
        if len(other):
            raise CohortError(
                f"{path}: row {other.index[0]}: {task} {other.iloc[0]!r} is not among the classes {classes} "
                f"({len(other)} such rows).",
                fix="Add it to the classes, or empty the cell to leave the slide out.",
            )
        return tuple(classes)
    found = sorted(set(present), key=_order)
    alike: dict[object, str] = {}
    for label in found:
        twin = alike.setdefault(_spelling(label), label)
        if twin != label:
            row = present.index[present == label][0]
            raise CohortError(
                f"{path}: row {row}: {task} {label!r} looks like {twin!r}; they would be two classes.",
                fix="Spell a label in one way, or list the classes to say that both are meant.",
            )
    if len(found) < 2:
        raise CohortError(
            f"{path}: column {task} holds {'no label' if not found else f'only the label {found[0]!r}'}.",
            fix="Learning needs at least two classes; check that this is the label column.",
        )
    return tuple(found)


def event_number(value: Any) -> float:
    """1 where the event was seen, 0 where not, nan for an empty cell.

    Raises:
        ValueError: the cell holds something else.
    """
    if value is None or value != value:
        return float("nan")
    word = str(value).strip().lower().replace(" ", "")
    if word not in EVENT_WORDS:
        raise ValueError(value)
    return EVENT_WORDS[word]


def labels_per_patient(
    path: Path, task: str, labels: pd.Series, patients: pd.Series, level: Literal["slide", "patient"]
) -> list[str]:
    """Report patients with two labels, and slides with none.

    Raises:
        CohortError: `level` is "patient" and a patient has two labels.
    """
    notes = []
    present = labels.notna()
    distinct = labels[present].groupby(list(patients[present])).unique()
    mixed = distinct[distinct.map(len) > 1]
    if len(mixed):
        shown = "; ".join(f"{p}: {_some(sorted(own))}" for p, own in list(mixed.items())[:_FEW])
        shown += "; ..." if len(mixed) > _FEW else ""
        if level == "patient":
            first = mixed.index[0]
            rows = ", ".join(str(r) for r in labels[patients == first].index[:_SHOWN])
            raise CohortError(
                f"{path}: {len(mixed)} patients have more than one {task} ({shown}); {first} stands in rows {rows}.",
                fix='Correct the labels, or set label_level to "slide" if slides of one patient may differ.',
            )
        notes.append(
            f"{len(mixed)} patients have slides of more than one {task} ({shown}); a patient's slides stay together"
        )
    unlabelled = int(labels.isna().sum())
    if unlabelled:
        rows = ", ".join(str(r) for r in labels[labels.isna()].index[:_SHOWN])
        notes.append(f"{unlabelled} slides have no {task} and are left out of training (rows {rows})")
    return notes


def _some(labels: list[str]) -> str:
    """Name the first of them: patients with many slides have many numbers."""
    more = len(labels) - _FEW
    return ", ".join(labels) if more <= 0 else f"{', '.join(labels[:_FEW])} and {more} more"


def _order(label: str) -> tuple[int, float, str]:
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _spelling(label: str) -> object:
    """What two spellings of one label have in common."""
    kind, number, _ = _order(label)
    return number if kind == 0 else " ".join(label.casefold().replace("_", " ").replace("-", " ").split())
