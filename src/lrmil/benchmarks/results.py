"""What a part of the benchmark says: tables, and targets that are met or missed. Plain data, ready for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    key: str
    heading: str
    form: str = "{}"
    """how `str.format` writes a value that is there"""

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the cell of a row; empty where it has no value."""
        value = row.get(self.key)
        if value is None or value != value:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "NO"
        return self.form.format(value)

    @property
    def numeric(self) -> bool:
        """Whether it stands to the right."""
        return self.form != "{}"


@dataclass
class Table:
    """Rows under columns. Rows may hold more than is shown."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """A limit that a value should keep."""

    limit: float
    sense: Literal["at least", "at most"] = "at least"

    def met(self, value: float) -> bool:
        """Say whether `value` keeps it."""
        return bool(value >= self.limit if self.sense == "at least" else value <= self.limit)


@dataclass(frozen=True)
class Check:
    """A target and what was measured."""

    what: str
    value: float
    target: Target

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.target.met(self.value)

    def as_json(self) -> Row:
        """Return it as plain data."""
        return {"what": self.what, "value": self.value, "sense": self.target.sense, "limit": self.target.limit} | {
            "met": self.met
        }


@dataclass
class Part:
    """All that one part of the benchmark found."""

    name: str
    title: str
    tables: list[Table]
    checks: list[Check]
    skipped: list[str] = field(default_factory=list)
    """what was not measured, and why"""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "name": self.name,
            "title": self.title,
            "seconds": self.seconds,
            "tables": [{"name": t.name, "title": t.title, "rows": t.rows, "notes": t.notes} for t in self.tables],
            "checks": [check.as_json() for check in self.checks],
            "skipped": self.skipped,
        }


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3g}..{self.high:.3g}"


def spread(values: Iterable[float]) -> Spread:
    """Return median and quartiles."""
    low, median, high = np.percentile(np.fromiter(values, np.float64), [25, 50, 75])
    return Spread(float(median), float(low), float(high))
