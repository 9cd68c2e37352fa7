"""An account of what was left out and why: nothing goes missing without a line that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from lrmil.files import atomic_path

_SHOWN = 3


@dataclass
class Account:
    """What was read, what was left out, and what is worth knowing. Reasons keep the order in which they came up."""

    found: list[str] = field(default_factory=list)
    """What was read, and from which columns"""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Reason: the ids"""
    emptied: dict[str, list[str]] = field(default_factory=dict)
    """Reason why a cell is empty although its row is there: the ids"""

    def leave_out(self, reason: str, name: str) -> None:
        """Count one slide, patient or row as left out."""
        self.left_out.setdefault(reason, []).append(name)

    def leave_empty(self, reason: str, name: str) -> None:
        """Count one slide or patient whose cell stays empty."""
        self.emptied.setdefault(reason, []).append(name)

    def lines(self) -> list[str]:
        """Return the account as lines of text."""
        lines = list(self.found)
        for title, reasons in (("left out", self.left_out), ("left empty", self.emptied)):
            lines += [f"{title}: {len(names)} {reason} ({_some(names)})" for reason, names in reasons.items()]
        return lines


@dataclass(frozen=True)
class BuiltCohort:
    """A table that `load_cohort` reads, and the account of how it came about."""

    table: pd.DataFrame
    """One row a slide: slide_id, patient_id, the label columns, and what else the files gave"""
    tasks: tuple[str, ...]
    """The label columns"""
    account: Account

    def lines(self) -> list[str]:
        """Return the account, and how many slides (patients) each label has."""
        lines = self.account.lines()
        lines.append(f"kept: {len(self.table)} slides of {self.table['patient_id'].nunique()} patients")
        for task in self.tasks:
            counts = self.table.groupby(task)["patient_id"].agg(["size", "nunique"])
            classes = ", ".join(f"{c} {n} ({p})" for c, n, p in counts.itertuples())
            lines.append(f"  {task}: {classes or 'none'}; slides (patients)")
        return lines

    def write(self, path: Path) -> None:
        """Write the table as CSV."""
        with atomic_path(path) as scratch:
            self.table.to_csv(scratch, index=False)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
