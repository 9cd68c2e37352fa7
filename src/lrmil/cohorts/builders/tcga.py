"""TCGA slides: what their barcodes say, and which of them are the diagnostic slides of primary tumours.

TCGA-A1-A0SB-01Z-00-DX1.B34C267B-CAAA-4AB6-AD5C-276C26F997A1.svs
     site  |   |      DX: diagnostic (paraffin); TS, BS, MS: frozen sections next to what was sequenced
patient: 12 characters; 01: primary tumour, 06: metastasis, 11: normal tissue
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lrmil.cohorts.builders.account import Account
from lrmil.cohorts.builders.sheets import find_column, need_column, value
from lrmil.cohorts.reading import read_table
from lrmil.cohorts.slide_files import SLIDE_SUFFIXES, absolute, stem
from lrmil.errors import CohortError

PATIENT_CHARACTERS = 12
_PATIENT = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])", re.IGNORECASE)
_SLIDE = re.compile(
    r"(?P<patient>TCGA-(?P<site>[A-Z0-9]{2})-[A-Z0-9]{4})-(?P<sample>\d{2})[A-Z]?-\w{2,3}-(?P<kind>DX|TS|BS|MS)\w*",
    re.IGNORECASE,
)
_PRIMARY = "01"
_FILE_NAMES = ("file_name", "filename", "File Name", "slides.submitter_id", "slide_submitter_id", "bcr_slide_barcode")
_FROZEN = "frozen sections (TS, BS or MS; only DX slides are diagnostic)"


@dataclass(frozen=True)
class TcgaSlide:
    """One diagnostic slide."""

    slide_id: str
    patient_id: str
    site: str
    """Tissue source site, the second part of the barcode"""
    path: Path | None


def patient_of(text: str | None) -> str | None:
    """Return the patient, the first 12 characters of a TCGA barcode; None if the text is no such barcode."""
    found = _PATIENT.match(text or "")
    return None if found is None else found.group().upper()


def sample_type_of(text: str) -> str | None:
    """Return the two digits of the sample type of a barcode that is longer than the patient's; else None."""
    found = re.match(r"-(\d{2})", text[PATIENT_CHARACTERS:])
    return None if found is None else found.group(1)


def find_slides(slides_dir: Path | None, sheet: Path | None, account: Account) -> dict[str, TcgaSlide]:
    """Find the diagnostic slides of primary tumours, by id.

    Args:
        slides_dir: folder with the slide files, in subfolders as the GDC client leaves them, too.
        sheet: a sample sheet, manifest or slide.tsv of the GDC. With `slides_dir` it says which files to use; without,
            the table will have no paths.
        account: gets what is left out.

    Raises:
        CohortError: neither is given, or there is no slide in them.
    """
    if slides_dir is None and sheet is None:
        raise CohortError("nothing says which slides there are.", fix="Give --slides-dir, --slide-sheet, or both.")
    files = {} if slides_dir is None else _files(slides_dir, account)
    names = {name: files.get(name) for name in files} if sheet is None else _listed(sheet, files, account, slides_dir)
    slides = {}
    for name, path in names.items():
        parts = _SLIDE.match(name)
        if parts is None:
            account.leave_out("slides whose names are no TCGA slide barcodes", name)
        elif parts["kind"].upper() != "DX":
            account.leave_out(_FROZEN, name)
        elif parts["sample"] != _PRIMARY:
            account.leave_out(f"slides of sample type {parts['sample']}, not of a primary tumour (01)", name)
        else:
            slides[name] = TcgaSlide(name, parts["patient"].upper(), parts["site"].upper(), path)
    if not slides:
        raise CohortError(
            f"{slides_dir or sheet}: no diagnostic slide of a primary tumour among {len(names)}.",
            fix="Diagnostic slides are called like TCGA-A1-A0SB-01Z-00-DX1.<UUID>.svs.",
        )
    return slides


def slide_table(slides: Mapping[str, TcgaSlide], labels: pd.DataFrame) -> pd.DataFrame:
    """Join slides with a table of labels, whose index is the patient; slides of other patients are not in it."""
    rows = [s for _, s in sorted(slides.items()) if s.patient_id in labels.index]
    cells: dict[str, list[object]] = {
        "slide_id": [s.slide_id for s in rows],
        "patient_id": [s.patient_id for s in rows],
        **{str(column): [labels.at[s.patient_id, column] for s in rows] for column in labels.columns},
        "path": [None if s.path is None else str(s.path) for s in rows],
        "site": [s.site for s in rows],
    }
    return pd.DataFrame(cells, dtype=object)


def _files(folder: Path, account: Account) -> dict[str, Path]:
    folder = absolute(folder.expanduser())
    if not folder.is_dir():
        raise CohortError(f"{folder}: no such folder of slides.", fix="Check the path.")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.*")):
        if path.suffix.lower() not in SLIDE_SUFFIXES or not path.is_file() or path.name.startswith("."):
            continue
        if path.stem in files:
            account.leave_out("files of a name that another folder has too", str(path))
        else:
            files[path.stem] = path
    account.found.append(f"{folder}: {len(files)} slide files")
    return files


def _listed(
    sheet: Path, files: Mapping[str, Path], account: Account, slides_dir: Path | None
) -> dict[str, Path | None]:
    """Return the slides of a sheet with their files; a name without the UUID stands for the file that has one."""
    table = read_table(sheet)
    column = need_column(
        sheet, table, "slide names", _FILE_NAMES, "Give a sample sheet, manifest or slide.tsv of the GDC."
    )
    by_barcode = {name.split(".")[0].upper(): name for name in files}
    names: dict[str, Path | None] = {}
    other = find_column(table, ("Data Type", "data_type"))
    for row, cell in table[column].items():
        name = stem(value(cell) or "")
        if not name or (other is not None and value(table.at[row, other]) not in (None, "Slide Image")):
            account.leave_out("rows of the sheet that are not slide images", str(cell) or f"row {row}")
            continue
        name = name if name in files else by_barcode.get(name.upper(), name)
        if slides_dir is not None and name not in files:
            account.leave_out("slides of the sheet without a file", name)
        elif name in names:
            account.leave_out("rows of the sheet that name a slide again", name)
        else:
            names[name] = files.get(name)
    for name in files.keys() - names.keys():
        account.leave_out("slide files that the sheet does not list", name)
    account.found.append(f"{sheet}: {len(table)} rows, slides by column {column}")
    return names
