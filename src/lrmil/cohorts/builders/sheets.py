"""Reading the tables of portals: one meaning under many column names, and many marks for "nothing is known"."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lrmil.cohorts.reading import read_table
from lrmil.errors import CohortError

_NOTHING = frozenset(
    {
        *("", "'--", "--", "nan", "na", "n/a", "#n/a", "none", "unknown", "not reported", "not available"),
        *("not applicable", "not evaluated", "discrepancy", "completed", "not allowed to collect"),
    }
)


def value(cell: object) -> str | None:
    """Return the text of a cell, or None for one of the marks of a portal for nothing: '--, [Not Available], ..."""
    text = "" if cell is None or cell != cell else str(cell).strip()
    return None if text.strip("[]").strip().lower() in _NOTHING else text


def number(cell: object) -> float | None:
    """Return a cell as a number; None where it holds nothing, or no finite number."""
    text = value(cell)
    try:
        parsed = None if text is None else float(text)
    except ValueError:
        return None
    return parsed if parsed is not None and abs(parsed) < float("inf") else None


def find_columns(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Return the columns that are among `names`, in the order of `names`; case, blanks and hyphens do not matter."""
    there = {_plain(str(column)): str(column) for column in table.columns}
    return [there[_plain(name)] for name in names if _plain(name) in there]


def find_column(table: pd.DataFrame, names: Sequence[str]) -> str | None:
    """Return the first of `find_columns`, preferring columns that hold anything at all."""
    found = find_columns(table, names)
    return next((c for c in found if any(value(v) is not None for v in table[c])), found[0] if found else None)


def need_column(path: Path, table: pd.DataFrame, meaning: str, names: Sequence[str], fix: str) -> str:
    """Return the column of a meaning.

    Raises:
        CohortError: there is none; the message lists the names that were looked for, and those that are there.
    """
    found = find_column(table, names)
    if found is None:
        there = [str(c) for c in table.columns]
        shown = ", ".join(there[:30]) + (f", and {len(there) - 30} more" if len(there) > 30 else "")
        raise CohortError(f"{path}: no column for {meaning}; looked for {', '.join(names)}; there is {shown}.", fix=fix)
    return found


def read_sheet(path: Path, needed: Sequence[Sequence[str]]) -> pd.DataFrame:
    """Read a table; of a workbook, the first sheet that has all columns `needed` (each a list of names).

    Raises:
        CohortError: see `read_table`.
    """
    if path.suffix.lower() not in (".xlsx", ".xlsm") or not path.is_file():
        return read_table(path)
    first = read_table(path)  # also says what is wrong with the file
    if all(find_columns(first, names) for names in needed):
        return first
    openpyxl = importlib.import_module("openpyxl")
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        for sheet in book.worksheets[1:]:
            rows = [["" if c is None else str(c).strip() for c in row] for row in sheet.values]
            rows = [row for row in rows if any(row)]
            if len(rows) < 2:
                continue
            table = pd.DataFrame(rows[1:], columns=rows[0], dtype=object)
            if all(find_columns(table, names) for names in needed):
                return table.loc[:, ~table.columns.duplicated()]
    finally:
        book.close()
    return first


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())
