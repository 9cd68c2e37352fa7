"""The cohort: a table of slides, patients and labels, checked once so that nothing later has to doubt it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.cohorts import strata as strata_of
from lrmil.cohorts.columns import understand
from lrmil.cohorts.labels import event_number, find_classes, labels_per_patient
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
from lrmil.cohorts.targets import (
    TaskSpec,
    check_outcomes,
    describe_numbers,
    describe_survival,
    read_events,
    read_numbers,
    read_times,
)
from lrmil.errors import CohortError, ConfigError
from lrmil.files import atomic_path
from lrmil.tasks import Task, TaskKind

_FIRST = ("slide_id", "patient_id")
_LATER = ("path", "features", "mpp", "site", "time", "event", "fold")


@dataclass(frozen=True, eq=False)
class Cohort:
    """Slides, patients and labels. Made by `load_cohort`, which checks all that can be checked without pixels."""

    table: pd.DataFrame
    """One row a slide: slide_id, patient_id, each task (classes: text, None where unlabelled; numbers: float, NaN where
    unlabelled), and what else the table gives: path and features (absolute, text or None), mpp, time, event (float, NaN
    where empty), site, fold, fold_<i>, and columns of other names as they were"""
    tasks: tuple[Task, ...]
    """What is to be learnt; the first is the main one. Empty for slides that are only to be predicted"""
    source: Path
    """The file it was read from"""
    warnings: tuple[str, ...] = ()
    """What is unusual and allowed, to be shown to the user"""
    outcomes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Columns of time and event of each survival task"""

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
        """Return the rows that have a label: for survival, both time and event."""
        chosen = self.task(task)
        columns = self.outcomes.get(chosen.name, (chosen.name,))
        return self.table[self.table[list(columns)].notna().all(axis=1)]

    def targets(self, task: str | None = None) -> npt.NDArray[Any]:
        """Return the target of every row of `table`, as `Task` says: class numbers (S,) int64, -1 where there is no
        label; numbers (S,), or time and event (S, 2), NaN where there is none.
        """
        chosen = self.task(task)
        if chosen.kind == "classification":
            number = {label: i for i, label in enumerate(chosen.classes)}
            return np.array([number.get(label, -1) for label in self.table[chosen.name]], dtype=np.int64)
        if chosen.kind == "regression":
            return self.table[chosen.name].to_numpy(dtype=np.float64)
        time, event = (self.table[c] for c in self.outcomes[chosen.name])
        # Either may also be the label of another task, and then is text.
        both = [[float("nan") if t is None else float(t), event_number(e)] for t, e in zip(time, event, strict=True)]
        found = np.array(both, dtype=np.float64).reshape(-1, 2)
        found[np.isnan(found).any(axis=1)] = float("nan")
        return found

    def target_of(self, slide_id: str, task: str | None = None) -> int | float | npt.NDArray[np.float64]:
        """Return the target of one slide: a class number, a number, or (2,) time and event.

        Raises:
            CohortError: there is no such slide, or it has no label.
        """
        self._row(slide_id)
        target = self._targets(task)[self._rows_by_id[slide_id]]
        kind = self.task(task).kind
        if (kind == "classification" and target < 0) or (kind != "classification" and np.isnan(target).any()):
            raise CohortError(f"{self.source}: slide {slide_id} has no {self.task(task).name}.")
        return target if kind == "survival" else int(target) if kind == "classification" else float(target)

    def strata(self, task: str | None = None, *, num_folds: int = 5) -> pd.Series:
        """Return what folds of a task are stratified by: text for every row of `table`, None where there is no label.

        Classes as they are; numbers in up to five quantile bins; survival by event and tertile of time. What is too
        rare for `num_folds` is made coarser, see `cohorts.strata`.
        """
        chosen, patients = self.task(task), list(self.table["patient_id"])
        if chosen.kind == "classification":
            found: strata_of.Strata = [None if v is None or v != v else str(v) for v in self.table[chosen.name]]
        elif chosen.kind == "regression":
            found = strata_of.number_strata(patients, self.targets(task), num_folds=num_folds)
        else:
            found = strata_of.survival_strata(patients, self.targets(task), num_folds=num_folds)
        return pd.Series(found, index=self.table.index, dtype=object, name="stratum")

    def joint_strata(self, tasks: Sequence[str] | None = None, *, num_folds: int = 5) -> pd.Series:
        """Return what folds that several tasks share are stratified by: combinations of their strata, the first task
        above all, rare ones joined. See `cohorts.strata.joint_strata`. None: all tasks.
        """
        names = [t.name for t in self.tasks] if tasks is None else list(tasks)
        parts = [list(self.strata(name, num_folds=num_folds)) for name in names]
        found = strata_of.joint_strata(list(self.table["patient_id"]), parts, num_folds=num_folds)
        return pd.Series(found, index=self.table.index, dtype=object, name="stratum")

    def label_of(self, slide_id: str, task: str | None = None) -> int:
        """Return the class number of one slide.

        Raises:
            CohortError: there is no such slide, it has no label, or the task has no classes.
        """
        chosen = self.task(task)
        if chosen.kind != "classification":
            raise CohortError(
                f"{self.source}: {chosen.name} is {chosen.kind} and has no classes.", fix="Use target_of."
            )
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
            said = self._describe(task, rows)
            if task.kind != "classification":
                said += f"; {len(rows)} slides of {rows['patient_id'].nunique()} patients"
            lines.append(f"  {task.name}: {said}; {len(self.table) - len(rows)} without")
        return "\n".join(lines + [f"  warning: {w}" for w in self.warnings])

    def _describe(self, task: Task, rows: pd.DataFrame) -> str:
        if task.kind == "classification":
            counts = rows.groupby(task.name)["patient_id"].agg(["size", "nunique"])
            each = [f"{c} {counts['size'].get(c, 0)} ({counts['nunique'].get(c, 0)})" for c in task.classes]
            return f"{', '.join(each)}; slides (patients) of each class"
        targets = self.targets(task.name)[self.table.index.isin(rows.index)]
        if task.kind == "regression":
            return describe_numbers(targets)
        return describe_survival(list(rows["patient_id"]), targets)

    def write(self, path: str | Path) -> None:
        """Write cohort.csv, which `load_cohort` reads again with the same result."""
        with atomic_path(path) as scratch:
            self.table.to_csv(scratch, index=False)

    def _row(self, slide_id: str) -> Any:
        rows = self._rows_by_id
        if slide_id not in rows:
            raise CohortError(f"{self.source}: no slide {slide_id!r}.")
        return self.table.iloc[rows[slide_id]]

    def _targets(self, task: str | None) -> npt.NDArray[Any]:
        name = self.task(task).name
        if name not in self._known_targets:
            self._known_targets[name] = self.targets(name)
        return self._known_targets[name]

    @cached_property
    def _known_targets(self) -> dict[str, npt.NDArray[Any]]:
        return {}

    @cached_property
    def _rows_by_id(self) -> dict[str, int]:
        return {slide_id: i for i, slide_id in enumerate(self.table["slide_id"])}


def load_cohort(
    path: str | Path,
    *,
    task: str | TaskSpec | Sequence[str | TaskSpec] | None = "label",
    kind: TaskKind | Mapping[str, TaskKind] = "classification",
    classes: Sequence[str] | None = None,
    time: str = "time",
    event: str = "event",
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
        task: the label column, or several, or `TaskSpec`s, which say all of a task; for survival any name. None for
            slides without labels, which are only to be predicted.
        kind: of the tasks that are given by name: what the label column holds, classes or a number; "survival" takes
            the columns `time` and `event`. For several tasks of different kinds, the kind of each.
        classes: labels of the (main) task in the order of the outputs; None sorts them (numbers as numbers).
        time: column of the time until the event or the end of observation, positive, in any unit.
        event: column that says whether the event was seen: 1, true, dead; or not: 0, false, alive.
        slides_dir: folder of slides. Relative paths are looked up there first, then in the table's folder; without a
            path column, slides are found there by name, in subfolders too.
        features_dir: the same for feature files.
        slide_table: STAMP's second table (PATIENT, FILENAME); `path` is then the one of patients.
        label_level: "patient" makes two labels of one patient an error; otherwise they are counted and reported.
        num_folds: if given, every class must have as many patients, and the event of survival (not asked of a table
            that brings its folds).
        missing: "drop" leaves slides whose files are missing out, with a warning.
        check_files: False for tables that are read where the slides are not.
        strict: unknown columns are an error, not a warning.

    Raises:
        CohortError: with row, column and value, and what to do.
    """
    path = Path(path)
    specs = _specs(task, kind, classes, time, event)
    outcomes = {s.name: (s.time, s.event) for s in specs if s.kind == "survival"}
    asked = list(dict.fromkeys(c for s in specs for c in s.columns))
    raw = read_table(path)
    if slide_table is not None:
        raw, notes = join_slide_table(path, raw, Path(slide_table), asked)
    else:
        notes = []
    loading = Loading(
        path,
        raw,
        understand(list(raw.columns), asked),
        [s.name for s in specs if s.kind != "survival"],
        notes,
        [c for own in outcomes.values() for c in own],
    )

    check_unknown(loading, strict)
    fill_ids(loading, slides_dir, features_dir)
    fill_files(loading, slides_dir, features_dir, check_files=check_files, drop=missing == "drop")
    check_slides(loading)
    parse_numbers(loading)

    brings_folds = any(str(c) == "fold" or str(c).startswith("fold_") for c in loading.rows)
    found: list[Task] = []
    numbers: dict[str, pd.Series] = {}
    for spec in specs:
        texts, needed = _read_task(loading, spec, numbers)
        known = find_classes(path, spec.name, texts, spec.classes) if spec.kind == "classification" else ()
        found.append(Task(spec.name, known, spec.kind))
        loading.notes += labels_per_patient(path, spec.name, texts, loading.rows["patient_id"], label_level)
        if num_folds is not None and not brings_folds:
            check_patients(loading, spec.name, needed, num_folds)
    for column, values in numbers.items():
        loading.rows[column] = values
    return Cohort(_tidy(loading), tuple(found), path, tuple(loading.notes), outcomes)


def _specs(
    task: str | TaskSpec | Sequence[str | TaskSpec] | None,
    kind: TaskKind | Mapping[str, TaskKind],
    classes: Sequence[str] | None,
    time: str,
    event: str,
) -> list[TaskSpec]:
    given = [] if task is None else [task] if isinstance(task, str | TaskSpec) else list(task)
    specs = []
    for place, one in enumerate(given):
        if isinstance(one, str):
            own = kind if isinstance(kind, str) else kind.get(one, "classification")
            one = TaskSpec(one, own, classes if place == 0 else None, time, event)
        if one.classes is not None and one.kind != "classification":
            raise ConfigError(f"task {one.name} is {one.kind} and has no classes.", fix="Leave the classes out.")
        specs.append(one)
    names = [s.name for s in specs]
    if len(set(names)) < len(names):
        raise ConfigError(f"tasks {', '.join(names)}: two have one name.", fix="Give each a name of its own.")
    if not isinstance(kind, str) and set(kind) - set(names):
        raise ConfigError(
            f"a kind is given for {', '.join(sorted(set(kind) - set(names)))}, which is no task.",
            fix=f"Tasks are {', '.join(names)}.",
        )
    return specs


def _read_task(loading: Loading, spec: TaskSpec, numbers: dict[str, pd.Series]) -> tuple[pd.Series, list[str | None]]:
    """Read one task: what its cells say as text, None where unlabelled; and what must be in every fold, a word a row.

    Columns of numbers are put into `numbers`, unless they are classes of another task, too.
    """
    if spec.kind == "classification":
        texts = loading.labels(spec.name)
        return texts, list(texts)
    if spec.kind == "regression":
        values = numbers[spec.name] = read_numbers(loading, spec.name)
        shown = pd.Series([repr(v) if v == v else None for v in values], index=values.index, dtype=object)
        return shown, ["a number" if known else None for known in values.notna()]
    times, events = read_times(loading, spec.time), read_events(loading, spec.event)
    loading.notes += check_outcomes(loading, spec.name, times, events)
    for column, values in ((spec.time, times), (spec.event, events)):
        if column not in loading.tasks:
            numbers[column] = values
    both = times.notna() & events.notna()
    said = [f"{t:g} {'event' if e else 'censored'}" if k else None for t, e, k in zip(times, events, both, strict=True)]
    needed = ["event" if k and e else None for e, k in zip(events, both, strict=True)]
    return pd.Series(said, index=loading.rows.index, dtype=object), needed


def _tidy(loading: Loading) -> pd.DataFrame:
    rows = loading.rows
    first = [*_FIRST, *loading.tasks, *(c for c in _LATER if c in rows and c not in loading.tasks)]
    return rows[[*first, *(c for c in rows if c not in first)]].reset_index(drop=True)
