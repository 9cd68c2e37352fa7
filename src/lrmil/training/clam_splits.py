"""CLAM's split files: `splits_<k>.csv`, columns train, val, test of slide ids, as long as each part is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from lrmil.errors import CohortError
from lrmil.files import atomic_path
from lrmil.training.folds import PARTS, UNUSED, Splits

_SHOWN = 10


def read_clam_splits(folder: str | Path, patient_of: Mapping[str, str], *, ignore_unknown: bool = False) -> Splits:
    """Read the folds of CLAM in numerical order; slides become patients by `patient_of`.

    Args:
        folder: with splits_0.csv, splits_1.csv, ...
        patient_of: patient of every slide of the cohort. Those that no file names are left out of that fold.
        ignore_unknown: pass over slides that are not in the cohort, where it is a part of what CLAM split.

    Raises:
        CohortError: there are no such files, a slide is not in the cohort, or a patient is in two parts of a fold.
    """
    folder = Path(folder)
    found = {
        int(m.group(1)): p for p in folder.glob("splits_*.csv") if (m := re.fullmatch(r"splits_(\d+)\.csv", p.name))
    }
    if not found:
        raise CohortError(f"{folder}: no splits_0.csv, splits_1.csv, ... there.")
    names = sorted(set(patient_of.values()))
    table = pd.DataFrame({"patient_id": names})
    for k, number in enumerate(sorted(found)):
        part_of = _read_one(found[number], patient_of, ignore_unknown)
        table[f"fold_{k}"] = [part_of.get(p, UNUSED) for p in names]
    return Splits(table)


def write_clam_splits(splits: Splits, folder: str | Path, patients: Sequence[str], slides: Sequence[str]) -> None:
    """Write one `splits_<k>.csv` a fold, for the slides of a cohort and their patients."""
    for k, name in enumerate(splits.names):
        part_of = splits.part_of(name, list(patients))
        columns = {p: [s for s, q in zip(slides, part_of, strict=True) if q == p] for p in PARTS}
        table = pd.DataFrame({p: pd.Series(own, dtype=object) for p, own in columns.items()})
        with atomic_path(Path(folder) / f"splits_{k}.csv") as scratch:
            table.to_csv(scratch, index=False)


def _read_one(path: Path, patient_of: Mapping[str, str], ignore_unknown: bool) -> dict[str, str]:
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [part for part in PARTS if part not in table]
    if missing:
        raise CohortError(f"{path}: no column {', '.join(missing)} (there are {', '.join(map(str, table.columns))}).")
    parts: dict[str, str] = {}
    unknown = []
    for part in PARTS:
        for slide in (s.strip() for s in table[part] if s.strip()):
            if slide not in patient_of:
                unknown.append(slide)
                continue
            patient = patient_of[slide]
            if parts.setdefault(patient, part) != part:
                raise CohortError(
                    f"{path}: slide {slide} is in {part}, another slide of patient {patient} in {parts[patient]}.",
                    fix="These folds were not split by patient; make new ones.",
                )
    if unknown and not ignore_unknown:
        raise CohortError(
            f"{path}: {len(unknown)} slides are not in the cohort: {', '.join(unknown[:_SHOWN])}.",
            fix="Check the slide ids (with or without file suffix), or say that unknown slides are to be ignored.",
        )
    return parts
