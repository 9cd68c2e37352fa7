"""Cross-validation: every patient in one part of every fold, labels spread evenly, each patient tested once.

Test is fold k, validation fold k+1 (modulo the number of folds), training the rest. Whole groups of patients, such as
sites, may be dealt instead. A cohort may bring its own folds, as numbers (`fold`) or as parts (`fold_1`, `fold_2`, ...
with train, val, test).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.errors import CohortError, ConfigError
from lrmil.files import atomic_path
from lrmil.training.seeds import derive_seed

PARTS = ("train", "val", "test")
UNUSED = ""
"""Part of a patient that a fold leaves out"""
FINAL = "final"
"""Name of the split of the deployed model"""

_SPELLINGS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SPELLINGS |= {"testing": "test", "dev": "val", "": UNUSED}
_SHOWN = 10


@dataclass(frozen=True, eq=False)
class Splits:
    """Which patient is in which part: one row a patient, one column a fold. `table` is what splits.csv holds."""

    table: pd.DataFrame
    """`patient_id` and a column for every fold (`fold_0`, ..., or `final`) of train, val, test or empty"""

    def __post_init__(self) -> None:
        if "patient_id" not in self.table or len(self.table.columns) < 2:
            raise CohortError("splits need a patient_id column and at least one fold.")
        for name in self.names:
            wrong = ~self.table[name].isin([*PARTS, UNUSED])
            if wrong.any():
                row = self.table[wrong].iloc[0]
                raise CohortError(
                    f"splits: {name} of patient {row['patient_id']} is {row[name]!r}.", fix="Write train, val or test."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the folds."""
        return tuple(str(c) for c in self.table.columns if c != "patient_id")

    @property
    def num_folds(self) -> int:
        """How many folds there are."""
        return len(self.names)

    def patients(self, fold: int | str, part: str) -> list[str]:
        """Return the patients in a part ("train", "val", "test") of a fold, given by number or name."""
        return list(self.table.loc[self.table[self._name(fold)] == part, "patient_id"])

    def part_of(self, fold: int | str, patients: Sequence[str]) -> npt.NDArray[np.str_]:
        """Return the part of each of `patients` (one entry a slide, say), or "" where the fold leaves it out.

        Raises:
            CohortError: a patient is not in the splits at all.
        """
        parts = dict(zip(self.table["patient_id"], self.table[self._name(fold)], strict=True))
        strangers = sorted({p for p in patients if p not in parts})
        if strangers:
            raise CohortError(
                f"{len(strangers)} patients are not in the splits: {', '.join(strangers[:_SHOWN])}.",
                fix="The cohort has changed since the splits were made; make them again in another output folder.",
            )
        return np.array([parts[p] for p in patients], dtype=np.str_)

    def write(self, path: str | Path) -> None:
        """Write splits.csv."""
        with atomic_path(path) as scratch:
            self.table.to_csv(scratch, index=False)

    @classmethod
    def read(cls, path: str | Path) -> Splits:
        """Read splits.csv."""
        if not Path(path).is_file():
            raise CohortError(f"{path}: no such file of splits.")
        return cls(pd.read_csv(path, dtype=str, keep_default_na=False))

    def _name(self, fold: int | str) -> str:
        name = fold if isinstance(fold, str) else self.names[fold]
        if name not in self.names:
            raise CohortError(f"there is no fold {fold!r}; there are {', '.join(self.names)}.")
        return name


def make_folds(
    patients: Sequence[str], labels: Sequence[Any] | None = None, *, num_folds: int = 5, seed: int = 0
) -> Splits:
    """Deal patients to folds: grouped by patient, stratified by label, the same whatever the order of the rows.

    Args:
        patients: patient of every slide.
        labels: label of every slide; None, NaN and "" mean unlabelled. A patient with several labels is dealt as one of
            its rarest, where the others are fewest. Patients without a label are dealt too, last. None: no labels.
        num_folds: at least 3, one each for training, validation and testing.
        seed: of the order in which patients are dealt.

    The number of patients of a class differs by at most 1 between folds if every patient has one label; so does the
    number of all patients.

    Raises:
        ConfigError: fewer than 3 folds.
        CohortError: a class has fewer patients than there are folds.
    """
    _require_three(num_folds)
    labels_of = _labels_of(patients, labels)
    check_class_sizes(patients, labels, num_folds)
    rng = np.random.default_rng(derive_seed(seed, "folds", num_folds))
    return _rotate(_deal(labels_of, Counter(map(str, patients)), num_folds, rng), num_folds)


def make_group_folds(
    patients: Sequence[str],
    groups: Sequence[Any],
    labels: Sequence[Any] | None = None,
    *,
    column: str = "site",
    num_folds: int = 5,
    seed: int = 0,
) -> Splits:
    """Deal whole groups of patients to folds: as many folds as sites test each site by models that never saw it.

    A site's stain and scanner tell its patients apart from others', and often their outcome; folds that mix sites
    reward a model for knowing them (Howard et al., Nature Communications 12:4423, 2021).

    Args:
        patients: patient of every slide.
        groups: group of every slide; one for each patient.
        labels: as for `make_folds`; spread as evenly as whole groups allow.
        column: what groups are called in messages.
        num_folds: at least 3, and at most the number of groups.
        seed: of the order in which groups are dealt.

    Raises:
        ConfigError: fewer than 3 folds.
        CohortError: a slide has no group, a patient has two, or there are fewer groups than folds.
    """
    _require_three(num_folds)
    lacking = [patient for patient, group in zip(patients, groups, strict=True) if _missing(group)]
    if lacking:
        raise CohortError(
            f"{len(lacking)} slides have nothing in column {column}; the first is of patient {lacking[0]}.",
            fix="Fill the column, or leave folds.group out.",
        )
    group_of = _constant(patients, [str(group) for group in groups], column)
    count = len(set(group_of.values()))
    if count < num_folds:
        raise CohortError(
            f"column {column} has {count} values, fewer than the {num_folds} folds.",
            fix=f"Set folds.num_folds to {count}." if count >= 3 else "Leave folds.group out: 3 groups are needed.",
        )
    rng = np.random.default_rng(derive_seed(seed, "folds of groups", num_folds))
    fold_of = _deal(_labels_of(list(map(str, groups)), labels), Counter(map(str, groups)), num_folds, rng)
    return _rotate({patient: fold_of[group] for patient, group in group_of.items()}, num_folds)


def thinned(
    splits: Splits, patients: Sequence[str], labels: Sequence[Any] | None = None, *, train_patients: int, seed: int = 0
) -> Splits:
    """Leave all but `train_patients` training patients out of every fold, and of validation patients the same share.

    Who stays is drawn by label, whoever tests is left alone, and who stays among few stays among more: curves over the
    number of patients do not mix its effect with that of other patients.

    Args:
        splits: the folds.
        patients: patient of every slide.
        labels: label of every slide, as for `make_folds`.
        train_patients: how many; folds that have no more keep all.
        seed: of who stays.
    """
    labels_of = _labels_of(patients, labels)
    table = splits.table.copy()
    for name in splits.names:
        train = splits.patients(name, "train")
        share = min(1.0, train_patients / max(1, len(train)))
        for part in ("train", "val"):
            here = splits.patients(name, part)
            num_kept = min(len(here), max(1, round(share * len(here))))
            rng = np.random.default_rng(derive_seed(seed, "thinned", name, part))
            kept = set(_label_by_label(here, labels_of, rng)[:num_kept])
            table.loc[table["patient_id"].isin(set(here) - kept), name] = UNUSED
    return Splits(table)


def final_split(
    patients: Sequence[str], labels: Sequence[Any] | None = None, *, num_folds: int = 5, seed: int = 0
) -> Splits:
    """Return the split of the deployed model: one in `num_folds` patients validates, the rest trains, none tests.

    The validation patients are dealt like a fold; of the folds dealt, the first is taken that shows the most classes
    without leaving training short of one.
    """
    labels_of = _labels_of(patients, labels)
    rng = np.random.default_rng(derive_seed(seed, FINAL, num_folds))
    fold_of = _deal(labels_of, Counter(map(str, patients)), num_folds, rng)
    inside: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for patient, fold in fold_of.items():
        for label in labels_of[patient]:
            inside[label][fold] += 1
    used_up = [sum(len(c) == 1 and k in c for c in inside.values()) for k in range(num_folds)]
    shown = [sum(k in c for c in inside.values()) for k in range(num_folds)]
    chosen = min(range(num_folds), key=lambda k: (used_up[k], -shown[k]))
    names = sorted(fold_of)
    return Splits(
        pd.DataFrame({"patient_id": names, FINAL: ["val" if fold_of[p] == chosen else "train" for p in names]})
    )


def folds_from_numbers(patients: Sequence[str], folds: Sequence[Any]) -> Splits:
    """Use a fold number, 0 to n-1, given for every slide. Slides without one are left out of every fold.

    Raises:
        CohortError: a patient is in two folds, a number is missing in between, or there are fewer than 3 folds.
    """
    given = _constant(patients, [UNUSED if _missing(f) else str(f).strip() for f in folds], "fold")
    numbers = {p: _fold_number(p, f) for p, f in given.items() if f != UNUSED}
    used = sorted(set(numbers.values()))
    if used != list(range(len(used))) or len(used) < 3:
        raise CohortError(
            f"the fold column holds {', '.join(map(str, used[:_SHOWN])) or 'no number'}.",
            fix="Folds are numbered 0, 1, 2, ... without a gap, at least three of them.",
        )
    splits = _rotate(numbers, len(used))
    left_out = pd.DataFrame({"patient_id": sorted(set(given) - set(numbers))})
    table = pd.concat([splits.table, left_out]).fillna(UNUSED).sort_values("patient_id", ignore_index=True)
    return Splits(table)


def folds_from_parts(patients: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Splits:
    """Use parts given for every slide: columns like `fold_1` .. `fold_5`, in numerical order, become `fold_0` ...

    Raises:
        CohortError: a patient is in two parts of a fold, or a value is none of train, val, test.
    """
    names = sorted(set(map(str, patients)))
    table = pd.DataFrame({"patient_id": names})
    for k, column in enumerate(sorted(columns, key=_number_in)):
        parts = [_part(column, p, value) for p, value in zip(patients, columns[column], strict=True)]
        given = _constant(patients, parts, column)
        table[f"fold_{k}"] = [given[p] for p in names]
    return Splits(table)


def folds_for(table: pd.DataFrame, task: str = "label", *, num_folds: int = 5, seed: int = 0) -> Splits:
    """Return the folds that a cohort table brings (`fold`, or `fold_1` ...), or make `num_folds` of them.

    `table` has `patient_id` and the label column `task`, one row a slide.
    """
    patients = list(table["patient_id"])
    columns = fold_columns(table)
    if "fold" in table:
        return folds_from_numbers(patients, list(table["fold"]))
    if columns:
        return folds_from_parts(patients, {c: list(table[c]) for c in columns})
    return make_folds(patients, list(table[task]), num_folds=num_folds, seed=seed)


def fold_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns named `fold_<number>`, in numerical order."""
    return sorted((str(c) for c in table.columns if re.fullmatch(r"fold_\d+", str(c))), key=_number_in)


def check_class_sizes(patients: Sequence[str], labels: Sequence[Any] | None, num_folds: int) -> None:
    """Raise `CohortError` if a class has fewer patients than there are folds."""
    sizes = Counter(label for own in _labels_of(patients, labels).values() for label in own)
    small = [f"{label!r} has {n}" for label, n in sorted(sizes.items(), key=lambda item: str(item[0])) if n < num_folds]
    if small:
        raise CohortError(
            f"fewer patients than the {num_folds} folds: {', '.join(small)}.",
            fix="Use fewer folds, add patients, or join or leave out the class: a fold without it cannot be scored.",
        )


def _require_three(num_folds: int) -> None:
    if num_folds < 3:
        raise ConfigError(f"num_folds={num_folds}: training, validation and testing need at least 3.")


def _label_by_label(
    patients: Sequence[str], labels_of: Mapping[str, frozenset[Hashable]], rng: np.random.Generator
) -> list[str]:
    """Shuffle patients so that every beginning of the list has the labels in about the shares of the whole.

    The first of every label come first, so that as many patients as labels show them all.
    """
    sizes = Counter(label for patient in patients for label in labels_of[patient])
    strata: dict[Hashable, list[str]] = defaultdict(list)
    for patient in sorted(patients):
        own = labels_of[patient]
        strata[min(own, key=lambda c: (sizes[c], str(c))) if own else None].append(patient)
    placed: list[tuple[float, int, str]] = []
    for members in strata.values():
        order = rng.permutation(len(members))
        placed += [(place / len(members), len(members), members[i]) for place, i in enumerate(order)]
    return [patient for _, _, patient in sorted(placed)]


def _deal(
    labels_of: Mapping[str, frozenset[Hashable]],
    slides_of: Mapping[str, int],
    num_folds: int,
    rng: np.random.Generator,
) -> dict[str, int]:
    """Give each patient to the fold that has the fewest of its rarest label; ties by its other labels, then by size."""
    sizes = Counter(label for own in labels_of.values() for label in own)
    rarest_first = sorted(sizes, key=lambda label: (sizes[label], str(label)))
    strata: dict[Hashable, list[str]] = defaultdict(list)
    for patient in sorted(labels_of):
        strata[next((c for c in rarest_first if c in labels_of[patient]), None)].append(patient)

    have: dict[Hashable, npt.NDArray[np.int64]] = defaultdict(lambda: np.zeros(num_folds, np.int64))
    num_patients, num_slides = np.zeros(num_folds, np.int64), np.zeros(num_folds, np.int64)
    lot = rng.permutation(num_folds)
    fold_of: dict[str, int] = {}
    for stratum in [*rarest_first, None]:
        for patient in _order(strata[stratum], slides_of, num_folds, rng):
            own = labels_of[patient] or {None}
            others = sum((have[c] for c in own if c != stratum), np.zeros(num_folds, np.int64))
            fold = int(np.lexsort((lot, num_slides, num_patients, others, have[stratum]))[0])
            fold_of[patient] = fold
            for label in own:
                have[label][fold] += 1
            num_patients[fold] += 1
            num_slides[fold] += slides_of[patient]
    return fold_of


def _order(
    members: Sequence[str], slides_of: Mapping[str, int], num_folds: int, rng: np.random.Generator
) -> Iterator[str]:
    """Shuffled; of those dealt in one round, one to a fold, whoever has most slides chooses first."""
    shuffled = [members[i] for i in rng.permutation(len(members))]
    for start in range(0, len(shuffled), num_folds):
        yield from sorted(shuffled[start : start + num_folds], key=lambda p: -slides_of[p])


def _rotate(fold_of: Mapping[str, int], num_folds: int) -> Splits:
    """Test = fold k, validation = fold k+1, training = the rest."""
    names = sorted(fold_of)
    fold = np.array([fold_of[p] for p in names], dtype=np.int64)
    table = pd.DataFrame({"patient_id": names})
    for k in range(num_folds):
        table[f"fold_{k}"] = np.select([fold == k, fold == (k + 1) % num_folds], ["test", "val"], "train")
    return Splits(table)


def _labels_of(patients: Sequence[str], labels: Sequence[Any] | None) -> dict[str, frozenset[Hashable]]:
    if labels is not None and len(labels) != len(patients):
        raise ConfigError(f"{len(patients)} patients and {len(labels)} labels; there must be one of each for a slide.")
    if not len(patients):
        raise CohortError("there are no slides to split.")
    found: dict[str, set[Hashable]] = {}
    for i, patient in enumerate(patients):
        own = found.setdefault(str(patient), set())
        if labels is not None and not _missing(labels[i]):
            own.add(labels[i])
    return {patient: frozenset(own) for patient, own in found.items()}


def _constant(patients: Sequence[str], values: Sequence[str], column: str) -> dict[str, str]:
    """One value for each patient, or an error: slides of one patient must stay together."""
    found: dict[str, str] = {}
    for patient, value in zip(map(str, patients), values, strict=True):
        if found.setdefault(patient, value) != value:
            raise CohortError(
                f"patient {patient} has {found[patient]!r} and {value!r} in column {column}.",
                fix="All slides of a patient belong to one part, or the test has seen the patient before.",
            )
    return found


def _fold_number(patient: str, value: str) -> int:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if number < 0 or number != int(number):
        raise CohortError(f"fold of patient {patient} is {value!r}.", fix="Folds are numbered 0, 1, 2, ...")
    return int(number)


def _part(column: str, patient: Any, value: Any) -> str:
    text = UNUSED if _missing(value) else str(value).strip().lower()
    if text not in _SPELLINGS:
        raise CohortError(f"{column} of patient {patient} is {value!r}.", fix="Write train, val or test.")
    return _SPELLINGS[text]


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or value == "" or value != value


def _number_in(name: str) -> int:
    found = re.search(r"\d+", name)
    return int(found.group()) if found else 0
