"""What answers to any task have in common: whose they are, which fold and seed gave them, what is true.

Metrics, intervals, tests and tables know only this; `Predictions` (classes) and `Values` (numbers, survival) fill it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.errors import ConfigError
from lrmil.files import atomic_path
from lrmil.tasks import TaskKind

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scored(ABC):
    """One row for each slide and seed, answered by the model of the fold in which the slide was a test slide.

    Folds that are no cross-validation (repeated random splits) may test a slide more than once: a row for each of them.

    A fold's answers come from that fold's model alone, so answers of different folds are never compared with each
    other: metrics are taken within a fold (and seed) and then averaged.
    """

    slide_ids: npt.NDArray[np.object_]
    """(n,) strings"""
    patient_ids: npt.NDArray[np.object_]
    """(n,) strings; what intervals resample and tests swap"""
    folds: IntArray
    """(n,) the fold that tested the slide"""
    seeds: IntArray
    """(n,) the seed of the run"""

    @property
    @abstractmethod
    def kind(self) -> TaskKind:
        """Of the task."""

    @property
    @abstractmethod
    def meaning(self) -> tuple[str, ...]:
        """What the answers stand for (names of classes, say); only methods that agree in it can be compared."""

    @property
    @abstractmethod
    def truth(self) -> npt.NDArray[Any]:
        """(n,) or (n, k): what metrics compare with."""

    @property
    @abstractmethod
    def answers(self) -> FloatArray:
        """(n,) or (n, C): what a method says."""

    @property
    @abstractmethod
    def strata(self) -> IntArray:
        """(n,): groups whose sizes within a fold a resample keeps, because folds are dealt that way."""

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """Tidy table, a row for each slide and seed: seed, fold, slide_id, patient_id, then truth and answers."""

    @classmethod
    @abstractmethod
    def from_frame(cls, frame: pd.DataFrame) -> Self:
        """Inverse of `to_frame`."""

    @classmethod
    @abstractmethod
    def number_columns(cls, columns: Sequence[str]) -> list[str]:
        """Return the columns of `to_frame` that hold numbers which are not whole."""

    @abstractmethod
    def _with(self, truth: FloatArray, answers: FloatArray) -> dict[str, Any]:
        """Fields that hold the truth (n, k) and answers (n, C) given."""

    def __len__(self) -> int:
        return len(self.slide_ids)

    def take(self, rows: npt.NDArray[Any]) -> Self:
        """Keep the given rows (indices or a mask)."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: v[rows] for n, v in columns.items() if isinstance(v, np.ndarray)})

    def cells(self) -> Iterator[tuple[int, int, IntArray]]:
        """Yield (fold, seed, rows): the units within which answers may be compared, in order of fold, then seed."""
        pairs = np.stack([self.folds, self.seeds], axis=1)
        for fold, seed in np.unique(pairs, axis=0):
            yield int(fold), int(seed), np.flatnonzero((self.folds == fold) & (self.seeds == seed))

    def by_patient(self) -> Self:
        """Return one row for each patient and seed: the mean answer over the patient's slides.

        A patient whose slides have different truths has no truth of its own and is left out here (`mixed_patients`
        counts them); all its slides stay in the slide-level numbers.

        Raises:
            ConfigError: no patient is left.
        """
        mixed = set(self.mixed_patients())
        keys = pd.DataFrame({"seed": self.seeds, "fold": self.folds, "patient": self.patient_ids})
        kept = ~keys["patient"].isin(mixed)
        if not kept.any():
            raise ConfigError(
                "no patient has one label for all of its slides, so there are no patient-level numbers.",
                fix="Report the slide level only.",
            )
        by = list(keys.columns)
        truth, answers = (pd.DataFrame(_as_table(v)) for v in (self.truth, self.answers))
        grouped_truth = truth[kept].groupby([keys[kept][c] for c in by], sort=True).first()
        grouped_answers = answers[kept].groupby([keys[kept][c] for c in by], sort=True).mean()
        found = grouped_truth.index.to_frame(index=False)
        patients = found["patient"].to_numpy(dtype=object)
        return replace(
            self,
            slide_ids=patients,
            patient_ids=patients,
            folds=found["fold"].to_numpy(dtype=np.int64),
            seeds=found["seed"].to_numpy(dtype=np.int64),
            **self._with(grouped_truth.to_numpy(np.float64), grouped_answers.to_numpy(np.float64)),
        )

    def mixed_patients(self) -> list[str]:
        """Patients whose slides differ in what is true of them, sorted."""
        distinct = pd.DataFrame(_as_table(self.truth)).groupby(pd.Series(self.patient_ids)).nunique().max(axis=1)
        return sorted(str(p) for p in distinct.index[distinct > 1])

    def one_slide_per_patient(self) -> bool:
        """True if no patient has two slides."""
        pairs = {(p, s) for p, s in zip(self.patient_ids, self.slide_ids, strict=True)}
        return len(pairs) == len(set(self.patient_ids))

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `to_frame` as CSV, atomically, with all digits."""
        with atomic_path(path) as scratch:
            self.to_frame().to_csv(scratch, index=False)

    @classmethod
    def read_csv(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `write_csv` wrote. Ids that look like numbers stay as they were written."""
        # Numbers are parsed by Python, which gives back every digit whatever the version of pandas.
        frame = pd.read_csv(Path(path), dtype=str, keep_default_na=False)
        numbers = dict.fromkeys(cls.number_columns(list(frame.columns)), float)
        return cls.from_frame(frame.astype({"seed": int, "fold": int, **numbers}))

    def keys_frame(self) -> pd.DataFrame:
        """The columns with which every table of answers begins."""
        return pd.DataFrame(
            {"seed": self.seeds, "fold": self.folds, "slide_id": self.slide_ids, "patient_id": self.patient_ids}
        )


def row_keys(frame: pd.DataFrame) -> dict[str, Any]:
    """Return the columns of `Scored.keys_frame`, as `Predictions.of` and `Values.of` take them."""
    return {
        "slide_ids": frame["slide_id"].tolist(),
        "patient_ids": frame["patient_id"].tolist(),
        "folds": frame["fold"].to_numpy(),
        "seeds": frame["seed"].to_numpy(),
    }


AnyScored = TypeVar("AnyScored", bound=Scored)


def concatenate(parts: Sequence[AnyScored]) -> AnyScored:
    """Join folds and seeds of one method.

    Raises:
        ConfigError: the parts are of different tasks or have different classes, or share a slide, fold and seed.
    """
    if len({(part.kind, part.meaning) for part in parts}) != 1:
        raise ConfigError(
            "predictions with different classes, or classes in a different order, cannot be joined.",
            fix="Give all folds the same task and class_names.",
        )
    names = [f.name for f in fields(parts[0]) if isinstance(getattr(parts[0], f.name), np.ndarray)]
    joined = replace(parts[0], **{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})
    check_once(joined.slide_ids, joined.folds, joined.seeds)
    return joined


def row_columns(
    slide_ids: Sequence[Any],
    patient_ids: Sequence[Any] | None,
    folds: npt.ArrayLike | None,
    seeds: npt.ArrayLike | None,
    **others: npt.NDArray[Any],
) -> dict[str, Any]:
    """Check and return the columns of `Scored`. Patients default to the slides, folds and seeds to 0.

    Raises:
        ConfigError: there is no slide, a column (`others` too) has another length, or a slide comes twice within one
            fold and seed.
    """
    slides = np.asarray([str(s) for s in slide_ids], dtype=object)
    count = len(slides)
    patients = slides if patient_ids is None else np.asarray([str(p) for p in patient_ids], dtype=object)
    fold_array = np.zeros(count, np.int64) if folds is None else np.asarray(folds)
    seed_array = np.zeros(count, np.int64) if seeds is None else np.asarray(seeds)
    lengths = {len(patients), len(fold_array), len(seed_array), *(len(o) for o in others.values())}
    if lengths != {count} or count == 0:
        raise ConfigError(
            f"predictions for {count} slides come with columns of length {sorted(lengths)}.",
            fix=f"Give one patient, fold, seed, {' and '.join(others)} for each slide.",
        )
    check_once(slides, fold_array, seed_array)
    return {
        "slide_ids": slides,
        "patient_ids": patients,
        "folds": fold_array.astype(np.int64),
        "seeds": seed_array.astype(np.int64),
    }


def check_once(slides: npt.NDArray[np.object_], folds: npt.NDArray[Any], seeds: npt.NDArray[Any]) -> None:
    """Raise `ConfigError` if a slide comes twice within one fold and seed."""
    keys = pd.DataFrame({"seed": seeds, "fold": folds, "slide": slides})
    if keys.duplicated().any():
        twice = keys[keys.duplicated()].iloc[0]
        raise ConfigError(
            f"slide {twice['slide']} is predicted twice in fold {twice['fold']} with seed {twice['seed']}.",
            fix="A fold has one answer to a slide; give answers of other models other folds or seeds.",
        )


def _as_table(values: npt.NDArray[Any]) -> FloatArray:
    return np.asarray(values, dtype=np.float64).reshape(len(values), -1)
