"""BRACS: 547 slides of 189 patients in seven classes, with an official split, from its spreadsheet BRACS.xlsx."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pandas as pd

from lrmil.cohorts.builders.account import Account, BuiltCohort
from lrmil.cohorts.builders.sheets import need_column, read_sheet, value
from lrmil.cohorts.slide_files import SLIDE_SUFFIXES, FolderIndex, stem
from lrmil.errors import CohortError

CLASSES = ("N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC")
"""Normal, pathological benign, usual ductal hyperplasia, flat epithelial atypia, atypical ductal hyperplasia, ductal
carcinoma in situ, invasive carcinoma"""
SLIDE = ("WSI Filename", "WSI_Filename", "filename", "slide_id", "WSI")
PATIENT = ("Patient Id", "patient_id", "patient")
LABEL = ("WSI label", "label", "WSI_label", "type")
SPLIT = ("Set", "split", "reference set", "subset")
_SETS = {"training": "train", "train": "train", "validation": "val", "val": "val", "testing": "test", "test": "test"}
_FIX = "Give BRACS.xlsx as it comes with the data set."


def build_bracs(spreadsheet: Path, slides_dir: Path | None, *, official_split: bool = True) -> BuiltCohort:
    """Make the table of BRACS.

    Args:
        spreadsheet: BRACS.xlsx, or a table with its columns.
        slides_dir: folder with the slide files, in subfolders too; without it the table has no paths.
        official_split: keep the official training, validation and test sets as column fold. Without that column, folds
            are made by patient, as for the paper's five.

    Raises:
        CohortError: a column is missing, or no slide is left.
    """
    account = Account()
    table = read_sheet(spreadsheet, [SLIDE, PATIENT, LABEL, SPLIT])
    slide, patient, label = (
        need_column(spreadsheet, table, meaning, names, _FIX)
        for meaning, names in (("the slide", SLIDE), ("the patient", PATIENT), ("the class", LABEL))
    )
    columns = [slide, patient, label]
    split = need_column(spreadsheet, table, "the official set", SPLIT, _FIX) if official_split else None
    if split is not None:
        columns.append(split)
    account.found.append(f"{spreadsheet}: {len(table)} rows, by columns {', '.join(columns)}")
    index = None if slides_dir is None else FolderIndex(slides_dir, SLIDE_SUFFIXES, "slides")

    rows, seen = [], set()
    for cells in table.to_dict("records"):
        name, owner, said = (value(cells[c]) for c in (slide, patient, label))
        name = None if name is None else stem(name)
        found = _class(said)
        path = None if index is None or name is None else index.find(name)
        if name is None:
            account.leave_out("rows without a slide", str(cells[patient]))
        elif name in seen:
            account.leave_out("rows of a slide that an earlier row has", name)
        elif owner is None:
            account.leave_out("slides without a patient", name)
        elif found is None:
            account.leave_out(f"slides labelled {said!r}, which is none of {', '.join(CLASSES)}", name)
        elif split is not None and (value(cells[split]) or "").lower() not in _SETS:
            account.leave_out("slides of no official set", name)
        elif index is not None and path is None:
            account.leave_out("slides without a file", name)
        else:
            row = {"slide_id": name, "patient_id": f"BRACS-P{owner}", "label": found}
            if split is not None:
                row["fold"] = _SETS[(value(cells[split]) or "").lower()]
            if path is not None:
                row["path"] = str(path)
            rows.append(row)
            seen.add(name)
    if not rows:
        raise CohortError(
            f"{spreadsheet}: no slide is left. {'; '.join(account.lines()[1:])}",
            fix="Check the folder of slides and the spreadsheet.",
        )
    if split is not None:
        _require_whole_patients(spreadsheet, rows)
    return BuiltCohort(pd.DataFrame(rows, dtype=object), ("label",), account)


def _class(said: str | None) -> str | None:
    """Read IC, Type_IC and 6_IC as the same class."""
    plain = re.sub(r"^(type|\d)_", "", (said or "").strip(), flags=re.IGNORECASE).upper()
    return plain if plain in CLASSES else None


def _require_whole_patients(path: Path, rows: list[dict[str, str]]) -> None:
    sets: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        sets[row["patient_id"]].add(row["fold"])
    torn = sorted(p for p, own in sets.items() if len(own) > 1)
    if torn:
        raise CohortError(
            f"{path}: {len(torn)} patients have slides in several official sets ({', '.join(torn[:5])}).",
            fix="Make the table with --split cross-validation: folds by patient.",
        )
