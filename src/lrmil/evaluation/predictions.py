"""Predictions of one method on the test folds: what every metric, interval and table is computed from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.errors import ConfigError
from lrmil.files import atomic_path

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """One row for each slide and seed, scored by the model of the fold in which the slide was a test slide.

    Folds that are no cross-validation (repeated random splits) may test a slide more than once: a row for each of them.

    A fold's probabilities come from that fold's model alone, so scores of different folds are never compared with
    each other: metrics are taken within a fold (and seed) and then averaged.
    """

    slide_ids: npt.NDArray[np.object_]
    """(n,) strings"""
    patient_ids: npt.NDArray[np.object_]
    """(n,) strings; what intervals resample and tests swap"""
    labels: IntArray
    """(n,) 0..C-1, positions in `class_names`"""
    probabilities: FloatArray
    """(n, C), rows sum to 1"""
    folds: IntArray
    """(n,) the fold that tested the slide"""
    seeds: IntArray
    """(n,) the seed of the run"""
    class_names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        *,
        slide_ids: Sequence[Any],
        labels: npt.ArrayLike,
        probabilities: npt.ArrayLike,
        class_names: Sequence[str],
        patient_ids: Sequence[Any] | None = None,
        folds: npt.ArrayLike | None = None,
        seeds: npt.ArrayLike | None = None,
    ) -> Predictions:
        """Build and check. Patients default to the slides, folds and seeds to 0.

        Raises:
            ConfigError: lengths differ, a label is no class, a probability is not a number in 0..1, a row does not sum
                to 1 (sigmoid outputs have to be normalised first), or a slide comes twice within one fold and seed.
        """
        slides = np.asarray([str(s) for s in slide_ids], dtype=object)
        patients = slides if patient_ids is None else np.asarray([str(p) for p in patient_ids], dtype=object)
        count, classes = len(slides), len(class_names)
        label_array = np.asarray(labels)
        probability_array = np.asarray(probabilities, dtype=np.float64)
        fold_array = np.zeros(count, np.int64) if folds is None else np.asarray(folds)
        seed_array = np.zeros(count, np.int64) if seeds is None else np.asarray(seeds)
        lengths = {len(patients), len(label_array), len(probability_array), len(fold_array), len(seed_array)}
        if lengths != {count} or count == 0:
            raise ConfigError(
                f"predictions for {count} slides come with columns of length {sorted(lengths)}.",
                fix="Give one patient, label, row of probabilities, fold and seed for each slide.",
            )
        if probability_array.shape != (count, classes) or classes < 2:
            raise ConfigError(
                f"probabilities have shape {probability_array.shape} for {count} slides and {classes} classes.",
                fix="Give one column for each class, and at least two classes.",
            )
        wrong = ~np.isin(label_array, np.arange(classes))
        if wrong.any():
            raise ConfigError(
                f"slide {slides[wrong][0]}: label {label_array[wrong][0]} is none of 0..{classes - 1}.",
                fix="Labels are positions in class_names.",
            )
        bad = ~(np.isfinite(probability_array) & (probability_array >= 0) & (probability_array <= 1 + 1e-6)).all(axis=1)
        bad |= ~np.isclose(probability_array.sum(axis=1), 1.0, atol=1e-3)
        if bad.any():
            raise ConfigError(
                f"slide {slides[bad][0]}: {probability_array[bad][0].tolist()} are no class probabilities.",
                fix="They must be finite, in 0..1 and sum to 1; normalise sigmoid outputs, and find the cause of NaN.",
            )
        keys = pd.DataFrame({"seed": seed_array, "fold": fold_array, "slide": slides})
        if keys.duplicated().any():
            twice = keys[keys.duplicated()].iloc[0]
            raise ConfigError(
                f"slide {twice['slide']} is predicted twice in fold {twice['fold']} with seed {twice['seed']}.",
                fix="A fold has one answer to a slide; give answers of other models other folds or seeds.",
            )
        return cls(
            slide_ids=slides,
            patient_ids=patients,
            labels=label_array.astype(np.int64),
            probabilities=probability_array,
            folds=fold_array.astype(np.int64),
            seeds=seed_array.astype(np.int64),
            class_names=tuple(str(c) for c in class_names),
        )

    def __len__(self) -> int:
        return len(self.slide_ids)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def take(self, rows: npt.NDArray[Any]) -> Predictions:
        """Keep the given rows (indices or a mask)."""
        columns = ("slide_ids", "patient_ids", "labels", "probabilities", "folds", "seeds")
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})

    def cells(self) -> Iterator[tuple[int, int, IntArray]]:
        """Yield (fold, seed, rows): the units within which scores may be compared, in order of fold, then seed."""
        pairs = np.stack([self.folds, self.seeds], axis=1)
        for fold, seed in np.unique(pairs, axis=0):
            yield int(fold), int(seed), np.flatnonzero((self.folds == fold) & (self.seeds == seed))

    def by_patient(self) -> Predictions:
        """Return one row for each patient and seed: the mean probability over the patient's slides.

        A patient whose slides carry different labels has no label of its own and is left out here (`mixed_patients`
        counts them); all its slides stay in the slide-level numbers.
        """
        mixed = set(self.mixed_patients())
        frame = pd.DataFrame(
            {"seed": self.seeds, "fold": self.folds, "patient": self.patient_ids, "label": self.labels}
        ).join(pd.DataFrame(self.probabilities))
        frame = frame[~frame["patient"].isin(mixed)]
        if frame.empty:
            raise ConfigError(
                "no patient has one label for all of its slides, so there are no patient-level numbers.",
                fix="Report the slide level only.",
            )
        grouped = frame.groupby(["seed", "fold", "patient"], sort=True).mean().reset_index()
        return Predictions(
            slide_ids=grouped["patient"].to_numpy(dtype=object),
            patient_ids=grouped["patient"].to_numpy(dtype=object),
            labels=grouped["label"].to_numpy().astype(np.int64),
            probabilities=grouped[list(range(self.num_classes))].to_numpy(dtype=np.float64),
            folds=grouped["fold"].to_numpy(dtype=np.int64),
            seeds=grouped["seed"].to_numpy(dtype=np.int64),
            class_names=self.class_names,
        )

    def mixed_patients(self) -> list[str]:
        """Patients whose slides carry more than one label, sorted."""
        counts = pd.Series(self.labels).groupby(pd.Series(self.patient_ids)).nunique()
        return sorted(str(p) for p in counts.index[counts > 1])

    def one_slide_per_patient(self) -> bool:
        """True if no patient has two slides."""
        pairs = {(p, s) for p, s in zip(self.patient_ids, self.slide_ids, strict=True)}
        return len(pairs) == len(set(self.patient_ids))

    def to_frame(self) -> pd.DataFrame:
        """Tidy table: seed, fold, slide_id, patient_id, label (its name), then `p_<class>` for each class."""
        frame = pd.DataFrame(
            {
                "seed": self.seeds,
                "fold": self.folds,
                "slide_id": self.slide_ids,
                "patient_id": self.patient_ids,
                "label": np.asarray(self.class_names, dtype=object)[self.labels],
            }
        )
        for index, name in enumerate(self.class_names):
            frame[f"p_{name}"] = self.probabilities[:, index]
        return frame

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Predictions:
        """Inverse of `to_frame`; the order of the `p_` columns is the order of the classes."""
        names = [str(c)[2:] for c in frame.columns if str(c).startswith("p_")]
        position = {name: index for index, name in enumerate(names)}
        return cls.of(
            slide_ids=frame["slide_id"].tolist(),
            patient_ids=frame["patient_id"].tolist(),
            labels=[position.get(str(label), -1) for label in frame["label"]],
            probabilities=frame[[f"p_{n}" for n in names]].to_numpy(dtype=np.float64),
            class_names=names,
            folds=frame["fold"].to_numpy(),
            seeds=frame["seed"].to_numpy(),
        )

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `to_frame` as CSV, atomically, with all digits."""
        with atomic_path(path) as scratch:
            self.to_frame().to_csv(scratch, index=False)

    @classmethod
    def read_csv(cls, path: str | os.PathLike[str]) -> Predictions:
        """Read what `write_csv` wrote. Ids that look like numbers stay as they were written."""
        # Numbers are parsed by Python, which gives back every digit whatever the version of pandas.
        frame = pd.read_csv(Path(path), dtype=str, keep_default_na=False)
        numbers = {c: float for c in frame.columns if c.startswith("p_")}
        return cls.from_frame(frame.astype({"seed": int, "fold": int, **numbers}))


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Join folds and seeds of one method.

    Raises:
        ConfigError: the parts have different classes, or share a slide, fold and seed.
    """
    if len({part.class_names for part in parts}) != 1:
        raise ConfigError(
            "predictions with different classes, or classes in a different order, cannot be joined.",
            fix="Give all folds the same class_names.",
        )
    return Predictions.of(
        slide_ids=np.concatenate([p.slide_ids for p in parts]).tolist(),
        patient_ids=np.concatenate([p.patient_ids for p in parts]).tolist(),
        labels=np.concatenate([p.labels for p in parts]),
        probabilities=np.concatenate([p.probabilities for p in parts]),
        folds=np.concatenate([p.folds for p in parts]),
        seeds=np.concatenate([p.seeds for p in parts]),
        class_names=parts[0].class_names,
    )
