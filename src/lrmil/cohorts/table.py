"""The cohort: a table of slides, patients and labels, checked once so that nothing later has to doubt it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.cohorts.columns import understand
from lrmil.cohorts.labels import find_classes, labels_per_patient
from lrmil.cohorts.reading import read_table
from lrmil.cohorts.rows import (
    Loading,
    check_patients,
    check_slides,
    check_unknown,
    fill_files,
    fill_ids,
    join_slide_table,
    parse_numbers,
)
from lrmil.errors import CohortError
from lrmil.files import atomic_path
from lrmil.tasks import Task

_FIRST = ("slide_id", "patient_id")
_LATER = ("path", "features", "mpp", "site", "time", "event", "fold")


@dataclass(frozen=True, eq=False)
class Cohort:
    """Slides, patients and labels. Made by `load_cohort`, which checks all that can be checked without pixels."""

    table: pd.DataFrame
    """One row a slide: slide_id, patient_id, each task (text, None where unlabelled), and what else the table gives:
    path and features (absolute, text or None), mpp, time, event (float, NaN where empty), site, fold, fold_<i>, and
    columns of other names as they were"""
    tasks: tuple[Task, ...]
    """What is to be learnt; the first is the main one. Empty for slides that are only to be predicted"""
    source: Path
    """The file it was read from"""
    warnings: tuple[str, ...] = ()
    """What is unusual and allowed, to be shown to the user"""

    @property
    def name(self) -> str:
        """Name of the table, or of its folder if it is just called cohort."""
        return self.source.parent.name if self.source.stem == "cohort" else self.source.stem

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels of the main task, in the order of the outputs."""
        return self.task().classes

    def task(self, name: str | None = None) -> Task:
        """Return the task of that name, or the main one."""
        for task in self.tasks:
            if name in (None, task.name):
                return task
        raise CohortError(
            f"{self.source}: no task {name!r} (there is {', '.join(t.name for t in self.tasks) or 'none'})."
        )

    def labelled(self, task: str | None = None) -> pd.DataFrame:
        """Return the rows that have a label."""
        return self.table[self.table[self.task(task).name].notna()]

    def targets(self, task: str | None = None) -> npt.NDArray[np.int64]:
        """Return the class number of every row of `table`; -1 where there is no label."""
        chosen = self.task(task)
        number = {label: i for i, label in enumerate(chosen.classes)}
        return np.array([number.get(label, -1) for label in self.table[chosen.name]], dtype=np.int64)

    def label_of(self, slide_id: str, task: str | None = None) -> int:
        """Return the class number of one slide.

        Raises:
            CohortError: there is no such slide, or it has no label.
        """
        chosen = self.task(task)
        label = self._row(slide_id)[chosen.name]
        if label not in chosen.classes:
            raise CohortError(f"{self.source}: slide {slide_id} has no {chosen.name}.")
        return chosen.classes.index(label)

    def patient_of(self, slide_id: str) -> str:
        """Return the patient of one slide."""
        return str(self._row(slide_id)["patient_id"])

    def summary(self) -> str:
        """Return what there is, in a few lines: slides, patients, classes, warnings."""
        patients = self.table["patient_id"].nunique()
        lines = [f"{self.source}: {len(self.table)} slides of {patients} patients"]
        for task in self.tasks:
            rows = self.labelled(task.name)
            counts = rows.groupby(task.name)["patient_id"].agg(["size", "nunique"])
            classes = ", ".join(f"{c} {counts['size'].get(c, 0)} ({counts['nunique'].get(c, 0)})" for c in task.classes)
            lines.append(
                f"  {task.name}: {classes}; slides (patients) of each class; {len(self.table) - len(rows)} without"
            )
        return "\n".join(lines + [f"  warning: {w}" for w in self.warnings])

    def write(self, path: str | Path) -> None:
        """Write cohort.csv, which `load_cohort` reads again with the same result."""
        with atomic_path(path) as scratch:
            self.table.to_csv(scratch, index=False)

    def _row(self, slide_id: str) -> Any:
        rows = self._rows_by_id
        if slide_id not in rows:
            raise CohortError(f"{self.source}: no slide {slide_id!r}.")
        return self.table.iloc[rows[slide_id]]

    @cached_property
    def _rows_by_id(self) -> dict[str, int]:
        return {slide_id: i for i, slide_id in enumerate(self.table["slide_id"])}


def load_cohort(
    path: str | Path,
    *,
    task: str | Sequence[str] | None = "label",
    classes: Sequence[str] | None = None,
    slides_dir: str | Path | None = None,
    features_dir: str | Path | None = None,
    slide_table: str | Path | None = None,
    label_level: Literal["slide", "patient"] = "slide",
    num_folds: int | None = None,
    missing: Literal["error", "drop"] = "error",
    check_files: bool = True,
    strict: bool = False,
) -> Cohort:
    """Read and check a table of slides, CSV or XLSX.

    It may be ours, or one made for CLAM, STAMP, TRIDENT, slide2vec, slideflow or the program of the LRMIL authors.
    A row is a slide. Where rows are patients (LRMIL's P_ID tables), the slides are the files in `slides_dir` or
    `features_dir` whose names begin with the patient's id.

    Args:
        path: the table.
        task: the label column, or several; None for slides without labels, which are only to be predicted.
        classes: labels of the (main) task in the order of the outputs; None sorts them (numbers as numbers).
        slides_dir: folder of slides. Relative paths are looked up there first, then in the table's folder; without a
            path column, slides are found there by name, in subfolders too.
        features_dir: the same for feature files.
        slide_table: STAMP's second table (PATIENT, FILENAME); `path` is then the one of patients.
        label_level: "patient" makes two labels of one patient an error; otherwise they are counted and reported.
        num_folds: if given, every class must have as many patients (not asked of a table that brings its folds).
        missing: "drop" leaves slides whose files are missing out, with a warning.
        check_files: False for tables that are read where the slides are not.
        strict: unknown columns are an error, not a warning.

    Raises:
        CohortError: with row, column and value, and what to do.
    """
    path = Path(path)
    tasks = [] if task is None else [task] if isinstance(task, str) else list(task)
    raw = read_table(path)
    if slide_table is not None:
        raw, notes = join_slide_table(path, raw, Path(slide_table), tasks)
    else:
        notes = []
    loading = Loading(path, raw, understand(list(raw.columns), tasks), tasks, notes)

    check_unknown(loading, strict)
    fill_ids(loading, slides_dir, features_dir)
    fill_files(loading, slides_dir, features_dir, check_files=check_files, drop=missing == "drop")
    check_slides(loading)
    parse_numbers(loading)

    found = []
    for name in tasks:
        labels = loading.labels(name)
        found.append(Task(name, find_classes(path, name, labels, classes if name == tasks[0] else None)))
        loading.notes += labels_per_patient(path, name, labels, loading.rows["patient_id"], label_level)
    brings_folds = any(str(c) == "fold" or str(c).startswith("fold_") for c in loading.rows)
    if num_folds is not None and not brings_folds:
        check_patients(loading, num_folds)
    return Cohort(_tidy(loading), tuple(found), path, tuple(loading.notes))


def _tidy(loading: Loading) -> pd.DataFrame:
    rows = loading.rows
    first = [*_FIRST, *loading.tasks, *(c for c in _LATER if c in rows and c not in loading.tasks)]
    return rows[[*first, *(c for c in rows if c not in first)]].reset_index(drop=True)
