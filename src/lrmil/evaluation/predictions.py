"""Class probabilities of one method on the test folds: what every metric, interval and table is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.errors import ConfigError
from lrmil.evaluation.scored import FloatArray, IntArray, Scored, row_columns, row_keys
from lrmil.tasks import TaskKind


@dataclass(frozen=True)
class Predictions(Scored):
    """What one method says of classes: see `Scored` for whose the rows are."""

    labels: IntArray
    """(n,) 0..C-1, positions in `class_names`"""
    probabilities: FloatArray
    """(n, C), rows sum to 1"""
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
        label_array = np.asarray(labels)
        probability_array = np.asarray(probabilities, dtype=np.float64)
        columns = row_columns(slide_ids, patient_ids, folds, seeds, label=label_array, probabilities=probability_array)
        slides, classes = columns["slide_ids"], len(class_names)
        if probability_array.shape != (len(slides), classes) or classes < 2:
            raise ConfigError(
                f"probabilities have shape {probability_array.shape} for {len(slides)} slides and {classes} classes.",
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
        return cls(
            **columns,
            labels=label_array.astype(np.int64),
            probabilities=probability_array,
            class_names=tuple(str(c) for c in class_names),
        )

    @property
    def kind(self) -> TaskKind:
        """Classification."""
        return "classification"

    @property
    def meaning(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.class_names

    @property
    def truth(self) -> IntArray:
        """(n,) the labels."""
        return self.labels

    @property
    def answers(self) -> FloatArray:
        """(n, C) the probabilities."""
        return self.probabilities

    @property
    def strata(self) -> IntArray:
        """(n,) the labels."""
        return self.labels

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def _with(self, truth: FloatArray, answers: FloatArray) -> dict[str, Any]:
        return {"labels": truth[:, 0].astype(np.int64), "probabilities": answers}

    def to_frame(self) -> pd.DataFrame:
        """Tidy table: seed, fold, slide_id, patient_id, label (its name), then `p_<class>` for each class."""
        frame = self.keys_frame()
        frame["label"] = np.asarray(self.class_names, dtype=object)[self.labels]
        for index, name in enumerate(self.class_names):
            frame[f"p_{name}"] = self.probabilities[:, index]
        return frame

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Predictions:
        """Inverse of `to_frame`; the order of the `p_` columns is the order of the classes."""
        names = [str(c)[2:] for c in frame.columns if str(c).startswith("p_")]
        position = {name: index for index, name in enumerate(names)}
        return cls.of(
            **row_keys(frame),
            labels=[position.get(str(label), -1) for label in frame["label"]],
            probabilities=frame[[f"p_{n}" for n in names]].to_numpy(dtype=np.float64),
            class_names=names,
        )

    @classmethod
    def number_columns(cls, columns: Sequence[str]) -> list[str]:
        """The probabilities."""
        return [c for c in columns if c.startswith("p_")]
