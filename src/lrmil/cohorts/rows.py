"""The steps by which the rows of a table become the rows of a cohort. Messages name the row of the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from lrmil.cohorts.columns import FILE, Columns, near, understand
from lrmil.cohorts.labels import event_number
from lrmil.cohorts.reading import is_empty, read_table
from lrmil.cohorts.slide_files import (
    FEATURE_SUFFIXES,
    SLIDE_SUFFIXES,
    FolderIndex,
    is_feature_file,
    locate,
    require_files,
    stem,
)
from lrmil.errors import CohortError
from lrmil.slides.scale import MAX_MPP, MIN_MPP

_SHOWN = 10


@dataclass
class Loading:
    """A table on its way to becoming a cohort. The index of `rows` is the row of the file."""

    path: Path
    raw: pd.DataFrame
    columns: Columns
    tasks: Sequence[str]
    """Label columns"""
    notes: list[str] = field(default_factory=list)
    outcomes: Sequence[str] = ()
    """Columns of time and event of survival tasks"""
    rows: pd.DataFrame = field(init=False)

    def __post_init__(self) -> None:
        for name in self.asked:
            if name not in self.columns.source:
                there = ", ".join(map(str, self.raw.columns))
                hint = next((c for c in self.columns.unknown if near(c, [name]) == name), None)
                what, setting = ("label column", "`task`") if name in self.tasks else ("column", "`time` or `event`")
                raise CohortError(
                    f"{self.path}: no {what} {name!r} (there is {there}).",
                    fix=f"Did you mean {hint!r}? Set {setting} to the column's name."
                    if hint
                    else f"Set {setting} to one of them.",
                )
        chosen = {
            meaning: [None if is_empty(v) else v for v in self.raw[name]]
            for meaning, name in self.columns.source.items()
        }
        chosen |= {name: list(self.raw[name]) for name in self.columns.unknown if name not in chosen}
        self.rows = pd.DataFrame(chosen, index=self.raw.index, dtype=object)
        empty = [c for c in self.rows if self.rows[c].isna().all() and c not in self.asked]
        self.rows = self.rows.drop(columns=empty)

    @property
    def asked(self) -> list[str]:
        """Columns that must be there."""
        return list(dict.fromkeys([*self.tasks, *self.outcomes]))

    def labels(self, task: str) -> pd.Series:
        """Return the labels of a task: text, or None."""
        return self.rows[task]

    def fail(self, row: int, column: str, problem: str, fix: str) -> CohortError:
        """Make an error about one cell. `column` is our name; the message uses that of the file."""
        return CohortError(
            f"{self.path}: row {row}, column {self.columns.source.get(column, column)}: {problem}.", fix=fix
        )


def join_slide_table(
    path: Path, patients: pd.DataFrame, slide_table: Path, tasks: Sequence[str]
) -> tuple[pd.DataFrame, list[str]]:
    """Join a table of patients (labels) with one of slides (patient, file name). Rows are those of the slide table.

    Raises:
        CohortError: a table has no patient column, or a patient stands twice in the first with different content.
    """
    slides = read_table(slide_table)
    keys = []
    for where, table in ((path, patients), (slide_table, slides)):
        key = understand(list(table.columns), tasks).source.get("patient_id")
        if key is None:
            raise CohortError(
                f"{where}: no patient column (there is {', '.join(table.columns)}).", fix="Add patient_id."
            )
        keys.append(key)
    once = patients.drop_duplicates()
    twice = once[once[keys[0]].duplicated()]
    if len(twice):
        raise CohortError(
            f"{path}: row {twice.index[0]}: patient {twice[keys[0]].iloc[0]} stands twice, with different content.",
            fix="Keep one row for each patient.",
        )
    once = once.rename(columns={keys[0]: keys[1]}).drop(columns=[c for c in slides if c in once and c != keys[1]])
    known = slides[keys[1]].isin(set(once[keys[1]]))
    notes = []
    if not known.all():
        who = ", ".join(slides[keys[1]][~known].unique()[:_SHOWN])
        notes.append(f"{int((~known).sum())} slides of {slide_table.name} are of patients not in {path.name} ({who})")
    without = set(once[keys[1]]) - set(slides[keys[1]])
    if without:
        notes.append(f"{len(without)} patients of {path.name} have no slide ({', '.join(sorted(without)[:_SHOWN])})")
    if not known.any():
        raise CohortError(f"{slide_table}: no slide of a patient of {path.name}.", fix="Check the patient ids of both.")
    joined = slides[known].reset_index(names="__row").merge(once, on=keys[1], how="left").set_index("__row")
    return joined.rename_axis(None), notes


def check_unknown(loading: Loading, strict: bool) -> None:
    """Report columns that mean nothing to us, with the name that each may be a misspelling of."""
    unknown = loading.columns.unknown
    if not unknown:
        return
    guesses = {name: near(name, loading.asked) for name in unknown}
    listed = ", ".join(f"{name} (did you mean {guess}?)" if guess else name for name, guess in guesses.items())
    if strict:
        raise CohortError(f"{loading.path}: unknown columns: {listed}.", fix="Rename or remove them.")
    loading.notes.append(f"columns not used: {listed}")


def fill_ids(loading: Loading, slides_dir: str | Path | None, features_dir: str | Path | None) -> None:
    """Give every row its slide_id and patient_id, making one row a slide where the rows are patients."""
    _sort_files(loading)
    if not {"slide_id", "path", "features"} & set(loading.rows):
        _slides_of_patients(loading, slides_dir, features_dir)
    rows = loading.rows
    for column in ("slide_id", "path", "features"):
        if column not in rows:
            rows[column] = None
    rows["slide_id"] = [
        next((stem(v) if i else v for i, v in enumerate(cells) if v is not None), None)
        for cells in zip(rows["slide_id"], rows["path"], rows["features"], strict=True)
    ]
    _require(loading, "slide_id", "Give every slide an id, or a path.")
    if "patient_id" not in rows:
        if loading.asked:
            raise CohortError(
                f"{loading.path}: no column says whose slide it is (there is {', '.join(loading.raw.columns)}).",
                fix="Add patient_id; slides of one patient must never both train and test. "
                "If every slide is of another patient, copy slide_id into it.",
            )
        rows["patient_id"] = rows["slide_id"]
    _require(loading, "patient_id", "Slides of one patient must never both train and test, so every slide needs one.")


def fill_files(
    loading: Loading, slides_dir: str | Path | None, features_dir: str | Path | None, *, check_files: bool, drop: bool
) -> None:
    """Make `path` and `features` absolute, look them up by name in the folders given, and see that they exist."""
    rows, base = loading.rows, loading.path.parent
    folders = {
        "path": _index(slides_dir, SLIDE_SUFFIXES, "slides"),
        "features": _index(features_dir, FEATURE_SUFFIXES, "feature files"),
    }
    if all(rows[c].isna().all() for c in folders) and not any(folders.values()):
        if check_files:
            raise CohortError(
                f"{loading.path}: nothing says where the slides are.",
                fix="Add a column path (or features), or give slides_dir, where they are found by slide_id.",
            )
        loading.rows = rows.drop(columns=list(folders))
        return
    missing: list[tuple[int, str, str, Path]] = []
    lost = np.zeros(len(rows), bool)  # by place: slides of a table of patients share their row of the file
    for column, index in folders.items():
        files: list[str | None] = []
        for place, (row, slide_id, value) in enumerate(zip(rows.index, rows["slide_id"], rows[column], strict=True)):
            if value is not None:
                found: Path | None = locate(value, base, None if index is None else index.folder)
            else:
                found = None if index is None else index.find(slide_id)
                if index is not None and found is None:
                    missing.append((row, slide_id, "nothing by that name in", index.folder))
                    lost[place] = True
            if found is not None and check_files and not found.exists():
                missing.append((row, slide_id, loading.columns.source.get(column, column), found))
                lost[place] = True
            files.append(None if found is None else str(found))
        rows[column] = files
    for place in np.flatnonzero(rows["path"].isna() & rows["features"].isna() & ~lost).tolist():
        missing.append((int(rows.index[place]), rows["slide_id"].iloc[place], "an empty", Path("path")))
        lost[place] = True
    if missing and (drop or not check_files):
        if drop:
            names = ", ".join(rows["slide_id"][lost][:_SHOWN])
            loading.notes.append(f"{lost.sum()} slides are left out because files are missing ({names})")
            rows = rows[~lost]
            if not len(rows):
                require_files(loading.path, missing, len(lost))
    else:
        require_files(loading.path, missing, len(rows))
    loading.rows = rows.drop(columns=[c for c in folders if rows[c].isna().all()])


def check_slides(loading: Loading) -> None:
    """Every slide once, by a name that files can have: neither an id nor a file may stand in two rows."""
    rows = loading.rows
    for row, slide_id in rows["slide_id"].items():
        if slide_id in (".", "..") or any(c in "/\\" or ord(c) < 32 for c in slide_id):
            raise loading.fail(
                int(str(row)),
                "slide_id",
                f"{slide_id!r} cannot be the name of a file",
                "Outputs are named after the slide: give an id without folders, and the file in a column path.",
            )
    for column in ("slide_id", "path", "features"):
        if column not in rows:
            continue
        values = rows[column].dropna()
        twice = values[values.duplicated(keep=False)]
        if not len(twice):
            continue
        shown = []
        for value, own in list(twice.groupby(twice))[:_SHOWN]:
            shown.append(f"{value!r} in rows {', '.join(map(str, own.index[:_SHOWN]))}")
        raise CohortError(
            f"{loading.path}: {twice.nunique()} values of {loading.columns.source.get(column, column)} stand more than "
            f"once: {'; '.join(shown)}.",
            fix="Keep one row for each slide; two different slides need two slide_ids."
            if column == "slide_id"
            else "One file under two ids would be learnt and tested; keep one row for each slide.",
        )


def parse_numbers(loading: Loading) -> None:
    """Turn mpp, time and event into numbers, and check that they can be true."""
    rules = {
        "mpp": (
            lambda v: MIN_MPP <= v <= MAX_MPP,
            f"um per level-0 pixel, {MIN_MPP:g} to {MAX_MPP:g}",
        ),
        "time": (lambda v: 0 <= v < float("inf"), "a time of follow-up, 0 or more"),
        "event": (lambda v: v in (0.0, 1.0), "1 (true, dead) where the event was seen, 0 (false, alive) where not"),
    }
    for column, (possible, meaning) in rules.items():
        if column not in loading.rows or column in loading.asked:
            continue
        numbers = []
        for row, value in loading.rows[column].items():
            try:
                number = event_number(value) if column == "event" or value is None else float(value)
            except ValueError:
                number = float("-inf")
            if value is not None and not possible(number):
                point = " (write a decimal point, not a comma)" if "," in value else ""
                raise loading.fail(
                    int(str(row)), column, f"{value!r} is not {meaning}{point}", "Correct it, or leave it empty."
                )
            numbers.append(number)
        loading.rows[column] = pd.Series(numbers, index=loading.rows.index, dtype="float64")


def check_patients(loading: Loading, task: str, labels: Sequence[str | None], num_folds: int) -> None:
    """Every class (or whatever else must be in every fold) needs a patient for every fold."""
    from lrmil.training.folds import check_class_sizes

    try:
        check_class_sizes(list(loading.rows["patient_id"]), labels, num_folds)
    except CohortError as error:
        raise CohortError(f"{loading.path}: column {task}: {error.message}", fix=error.fix) from error


def _sort_files(loading: Loading) -> None:
    """Put names of a `wsi` or `FILENAME` column where they belong: slides into path, feature files into features."""
    rows = loading.rows
    if FILE not in rows:
        return
    names = rows.pop(FILE)
    for column, belongs in (("path", lambda v: not is_feature_file(v)), ("features", is_feature_file)):
        own = [v if v is not None and belongs(v) else None for v in names]
        if column not in rows and any(v is not None for v in own):
            rows[column] = pd.Series(own, index=rows.index, dtype=object)
            loading.columns.source.setdefault(column, loading.columns.source[FILE])


def _slides_of_patients(loading: Loading, slides_dir: str | Path | None, features_dir: str | Path | None) -> None:
    """Turn rows of patients into rows of slides, by the files whose names begin with the patient's id."""
    rows = loading.rows
    if "patient_id" not in rows:
        raise CohortError(
            f"{loading.path}: no column names the slides (there is {', '.join(loading.raw.columns)}).",
            fix="Add slide_id, or path.",
        )
    column, index = "path", _index(slides_dir, SLIDE_SUFFIXES, "slides")
    if index is None:
        column, index = "features", _index(features_dir, FEATURE_SUFFIXES, "feature files")
    if index is None:
        raise CohortError(
            f"{loading.path}: it lists patients, and no column names their slides.",
            fix="Add slide_id or path, or give slides_dir, where files are found that begin with the patient's id.",
        )
    _require(loading, "patient_id", "Give every patient an id.")
    if rows["patient_id"].duplicated().any():
        twice = rows.index[rows["patient_id"].duplicated()][0]
        raise loading.fail(
            int(twice), "patient_id", f"{rows['patient_id'][twice]!r} stands twice", "Keep one row for each."
        )
    owned, strangers = index.of_patients(rows["patient_id"])
    without = [p for p in rows["patient_id"] if not owned[p]]
    if without:
        loading.notes.append(f"{len(without)} patients have no file in {index.folder} ({', '.join(without[:_SHOWN])})")
    if strangers:
        shown = ", ".join(p.name for p in strangers[:_SHOWN])
        loading.notes.append(f"{len(strangers)} files in {index.folder} are of no patient of the table ({shown})")
    files = [(row, str(f)) for row, patient in rows["patient_id"].items() for f in owned[patient]]
    if not files:
        raise CohortError(
            f"{index.folder}: no file name begins with a patient's id.", fix="Check the ids and the folder."
        )
    expanded = rows.loc[[row for row, _ in files]].copy()
    expanded[column] = [f for _, f in files]
    loading.rows = expanded


def _index(folder: str | Path | None, suffixes: frozenset[str], what: str) -> FolderIndex | None:
    return None if folder is None else FolderIndex(folder, suffixes, what)


def _require(loading: Loading, column: str, fix: str) -> None:
    empty = loading.rows.index[loading.rows[column].isna()]
    if len(empty):
        rows = ", ".join(str(r) for r in empty[:_SHOWN])
        raise CohortError(
            f"{loading.path}: {loading.columns.source.get(column, column)} is empty in {len(empty)} rows (row {rows}).",
            fix=fix,
        )
