"""Reading a table of a cohort as text, cell by cell, remembering in which row of the file each thing stood."""

from __future__ import annotations

import csv
import importlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from lrmil.errors import CohortError

EMPTY = frozenset({"", "nan", "na", "n/a", "#n/a"})
"""What counts as an empty cell, in any case: what pandas, R and Excel write for one"""


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a .csv (comma, semicolon or tab), .tsv or .xlsx (first sheet) table of text.

    Ids stay as they are written (leading zeros kept), cells are stripped of blanks around them, empty ones are "". The
    index is the row of the file, the header being row 1; rows without any content are skipped.

    Raises:
        CohortError: no such file, another format, not UTF-8, a column twice, or a row longer than the header.
    """
    path = Path(path)
    if not path.is_file():
        raise CohortError(f"{path}: no such table.", fix="Check the path.")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv", ".txt"):
        rows = _csv_rows(path)
    elif suffix in (".xlsx", ".xlsm"):
        rows = _xlsx_rows(path)
    else:
        raise CohortError(f"{path}: a {suffix or 'nameless'} file is no table.", fix="Save it as CSV (UTF-8) or XLSX.")
    rows = [(number, cells) for number, cells in rows if any(cells)]
    if len(rows) < 2:
        raise CohortError(
            f"{path}: the table is empty.", fix="It needs a row of column names and a row for each slide."
        )
    return _frame(path, rows)


def is_empty(cell: Any) -> bool:
    """Say whether a cell holds nothing, or only a mark for nothing."""
    return cell is None or cell != cell or str(cell).strip().lower() in EMPTY


def _csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CohortError(f"{path}: not UTF-8 text ({error.reason}).", fix="Save it as CSV UTF-8.") from error
    header = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows, start = [], 1
    try:
        for cells in reader:
            rows.append((start, [c.strip() for c in cells]))
            start = reader.line_num + 1
    except csv.Error as error:
        raise CohortError(f"{path}: row {start}: {error}.", fix="Check the quotation marks there.") from error
    return rows


def _xlsx_rows(path: Path) -> list[tuple[int, list[str]]]:
    try:
        openpyxl = importlib.import_module("openpyxl")
    except ImportError as error:
        raise CohortError(
            f"{path}: reading XLSX needs openpyxl.", fix="Run `pip install 'lrmil[xlsx]'`, or save the table as CSV."
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:
        raise CohortError(f"{path}: not a readable XLSX file ({error}).", fix="Save it again, or as CSV.") from error
    try:
        return [(n, [_cell(c) for c in row]) for n, row in enumerate(book.worksheets[0].values, start=1)]
    finally:
        book.close()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _frame(path: Path, rows: list[tuple[int, list[str]]]) -> pd.DataFrame:
    header = rows[0][1]
    while header and not header[-1]:
        header = header[:-1]
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        raise CohortError(f"{path}: column {twice[0]!r} stands twice in the header.", fix="Rename one of them.")
    cells = []
    for number, row in rows[1:]:
        if any(row[len(header) :]):
            raise CohortError(
                f"{path}: row {number} has {len(row)} cells, the header {len(header)}.",
                fix="A comma inside a cell must be quoted.",
            )
        cells.append((row + [""] * len(header))[: len(header)])
    frame = pd.DataFrame(cells, columns=header, index=[number for number, _ in rows[1:]], dtype=object)
    # Tables that pandas wrote often begin with its unnamed index.
    return frame.drop(columns=[c for c in frame.columns if not c])
