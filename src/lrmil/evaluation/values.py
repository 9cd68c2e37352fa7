"""Numbers and risks of one method on the test folds: the sibling of `Predictions` for regression and survival."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.errors import ConfigError
from lrmil.evaluation.predictions import Predictions
from lrmil.evaluation.scored import FloatArray, IntArray, Scored, row_columns, row_keys
from lrmil.tasks import TaskKind

_COLUMNS: dict[TaskKind, tuple[str, ...]] = {
    "regression": ("target", "predicted"),
    "survival": ("time", "event", "risk"),
}


@dataclass(frozen=True)
class Values(Scored):
    """What one method says of a number or of survival: see `Scored` for whose the rows are."""

    targets: FloatArray
    """Regression: (n,) the number in the unit of the table. Survival: (n, 2) time (positive) and event (1 seen, 0
    censored)"""
    predicted: FloatArray
    """(n,) Regression: the number. Survival: a risk, the higher the earlier the event; only its order counts"""

    @classmethod
    def of(
        cls,
        *,
        slide_ids: Sequence[Any],
        targets: npt.ArrayLike,
        predicted: npt.ArrayLike,
        patient_ids: Sequence[Any] | None = None,
        folds: npt.ArrayLike | None = None,
        seeds: npt.ArrayLike | None = None,
    ) -> Values:
        """Build and check. Targets (n,) make it regression, (n, 2) survival.

        Raises:
            ConfigError: lengths or shapes differ, a number is not finite, a time is not positive, an event is neither 0
                nor 1, or a slide comes twice within one fold and seed.
        """
        target_array = np.asarray(targets, dtype=np.float64)
        predicted_array = np.asarray(predicted, dtype=np.float64)
        columns = row_columns(slide_ids, patient_ids, folds, seeds, target=target_array, predicted=predicted_array)
        slides = columns["slide_ids"]
        if target_array.shape not in ((len(slides),), (len(slides), 2)) or predicted_array.ndim != 1:
            raise ConfigError(
                f"targets have shape {target_array.shape} and predictions {predicted_array.shape} for {len(slides)} "
                "slides.",
                fix="Give one number for each slide; for survival a time and an event, and one risk.",
            )
        checks = [(~np.isfinite(predicted_array), predicted_array, "the prediction {} is no number")]
        if target_array.ndim == 1:
            checks.append((~np.isfinite(target_array), target_array, "the target {} is no number"))
        else:
            time, event = target_array.T
            checks.append((~(np.isfinite(time) & (time > 0)), time, "the time {} is not positive"))
            checks.append((~np.isin(event, (0.0, 1.0)), event, "the event {} is neither 1 (seen) nor 0 (censored)"))
        for wrong, values, problem in checks:
            if wrong.any():
                raise ConfigError(
                    f"slide {slides[wrong][0]}: {problem.format(values[wrong][0])}.",
                    fix="Leave out slides without a target, and find the cause of NaN.",
                )
        return cls(**columns, targets=target_array, predicted=predicted_array)

    @property
    def kind(self) -> TaskKind:
        """Regression or survival."""
        return "regression" if self.targets.ndim == 1 else "survival"

    @property
    def meaning(self) -> tuple[str, ...]:
        """Names of the columns that hold target and answer."""
        return _COLUMNS[self.kind]

    @property
    def truth(self) -> FloatArray:
        """(n,) or (n, 2) the targets."""
        return self.targets

    @property
    def answers(self) -> FloatArray:
        """(n,) the predicted numbers or risks."""
        return self.predicted

    @property
    def strata(self) -> IntArray:
        """(n,) survival: whether the event was seen; regression: all in one."""
        return self.event.astype(np.int64) if self.kind == "survival" else np.zeros(len(self), np.int64)

    @property
    def time(self) -> FloatArray:
        """(n,) time until event or censoring.

        Raises:
            ConfigError: this is not survival.
        """
        self.require_survival()
        return self.targets[:, 0]

    @property
    def event(self) -> FloatArray:
        """(n,) 1 where the event was seen, 0 where censored.

        Raises:
            ConfigError: this is not survival.
        """
        self.require_survival()
        return self.targets[:, 1]

    def require_survival(self) -> None:
        """Raise `ConfigError` if this is regression."""
        if self.kind != "survival":
            raise ConfigError("these are predictions of a number.", fix="Give predictions of survival.")

    def _with(self, truth: FloatArray, answers: FloatArray) -> dict[str, Any]:
        return {"targets": truth[:, 0] if self.targets.ndim == 1 else truth, "predicted": answers[:, 0]}

    def to_frame(self) -> pd.DataFrame:
        """Tidy table: seed, fold, slide_id, patient_id, then target and predicted, or time, event and risk."""
        frame = self.keys_frame()
        for name, column in zip(_COLUMNS[self.kind], np.column_stack([self.targets, self.predicted]).T, strict=True):
            frame[name] = column.astype(np.int64) if name == "event" else column
        return frame

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Values:
        """Inverse of `to_frame`."""
        *target, predicted = _COLUMNS["survival" if "risk" in frame else "regression"]
        targets = frame[target].to_numpy(dtype=np.float64)
        return cls.of(
            **row_keys(frame),
            targets=targets[:, 0] if len(target) == 1 else targets,
            predicted=frame[predicted].to_numpy(dtype=np.float64),
        )

    @classmethod
    def number_columns(cls, columns: Sequence[str]) -> list[str]:
        """Targets and answers of either task."""
        return [c for own in _COLUMNS.values() for c in own if c in columns]


def read_predictions(path: str | os.PathLike[str]) -> Predictions | Values:
    """Read what `write_csv` of either wrote; the columns say which.

    Raises:
        ConfigError: the file is neither.
    """
    columns = list(pd.read_csv(Path(path), nrows=0).columns)
    if any(c.startswith("p_") for c in columns):
        return Predictions.read_csv(path)
    if any(set(own) <= set(columns) for own in _COLUMNS.values()):
        return Values.read_csv(path)
    raise ConfigError(
        f"{path}: no predictions (its columns are {', '.join(columns)}).", fix="Give a file that write_csv wrote."
    )
