from __future__ import annotations

import importlib

import pytest

from lrmil.cohorts.reading import is_empty, read_table
from lrmil.errors import CohortError


def write(folder, text, name="t.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def rows(path):
    frame = read_table(path)
    return {row: list(cells) for row, cells in zip(frame.index, frame.to_numpy(), strict=True)}


def test_cells_are_text_and_stripped(tmp_path):
    path = write(tmp_path, "slide_id, label \n001,  LUAD\n1e5,\n")
    assert list(read_table(path).columns) == ["slide_id", "label"]
    assert rows(path) == {2: ["001", "LUAD"], 3: ["1e5", ""]}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_as_spreadsheets_save_them(tmp_path, delimiter, bom, end):
    path = write(tmp_path, bom + end.join(["slide_id,label", "s1,a", "s2,b", ""]).replace(",", delimiter))
    assert list(read_table(path).columns) == ["slide_id", "label"]
    assert rows(path) == {2: ["s1", "a"], 3: ["s2", "b"]}


def test_rows_are_numbered_as_in_the_file(tmp_path):
    """Blank lines, a cell of two lines, and a short row."""
    path = write(tmp_path, 'slide_id,note,x\ns1,"two\nlines",1\n\n,,\ns2,"a, b"\n')
    assert rows(path) == {2: ["s1", "two\nlines", "1"], 6: ["s2", "a, b", ""]}


def test_the_header_tells_the_delimiter_below_blank_lines_too(tmp_path):
    assert rows(write(tmp_path, "\n\nslide_id;label\ns1;1,5\n")) == {4: ["s1", "1,5"]}


def test_the_unnamed_index_of_pandas_is_dropped(tmp_path):
    assert list(read_table(write(tmp_path, ",slide_id\n0,s1\n1,s2\n")).columns) == ["slide_id"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the table is empty"),
        ("slide_id,patient_id,label\n", "the table is empty"),
        ("slide_id,patient_id,label\n,,\n", "the table is empty"),
        ("slide_id,label,label\ns1,a,b\n", "column 'label' stands twice"),
        ("slide_id,label\ns1,a\ns2,b,extra\n", "row 3 has 3 cells, the header 2"),
    ],
)
def test_tables_that_are_none(tmp_path, text, message):
    with pytest.raises(CohortError, match=message):
        read_table(write(tmp_path, text))


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(CohortError, match="no such table"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes("slide_id,label\ns1,Gr\xf6\xdfe".encode("latin-1"))
    with pytest.raises(CohortError, match="not UTF-8"):
        read_table(tmp_path / "a.csv")
    with pytest.raises(CohortError, match=r"a \.svs file is no table"):
        read_table(write(tmp_path, "x", "a.svs"))
    with pytest.raises(CohortError, match="not a readable XLSX"):
        read_table(write(tmp_path, "x", "a.xlsx"))


def test_xlsx(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [["slide_id", "label", None], ["01", 7, None], [None] * 3, [2.0, 0.5]]:
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    assert list(read_table(tmp_path / "t.xlsx").columns) == ["slide_id", "label"]
    assert rows(tmp_path / "t.xlsx") == {2: ["01", "7"], 4: ["2", "0.5"]}


def test_xlsx_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(CohortError, match=r"needs openpyxl\. Run `pip install 'lrmil\[xlsx\]'`"):
        read_table(write(tmp_path, "x", "t.xlsx"))


def test_marks_for_nothing():
    assert all(is_empty(cell) for cell in (None, float("nan"), "", " ", "NaN", "na", "N/A", "#N/A"))
    assert not any(is_empty(cell) for cell in ("None", "null", "0", "negative", "-", 0))
