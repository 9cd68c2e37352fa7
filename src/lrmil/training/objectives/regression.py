"""One number: squared error of standardised targets.

    z = (target - mean) / sd, of the training split         L = (y - z)^2         L_bag = (y_LR - y_HR)^2

The one logit y is the prediction in standardised units, so L_bag is the squared error of predictions standardised on
the training split, and a head's first weights fit targets of any unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrmil.distill import Stage2LossSettings
from lrmil.errors import ConfigError
from lrmil.geometry import IntArray
from lrmil.mil.base import Head
from lrmil.mil.readout import Readout
from lrmil.mil.recipe import SelectBy
from lrmil.training.loop import Validation
from lrmil.training.objectives.base import (
    BagDistance,
    FittedObjective,
    Objective,
    Targets,
    numbers,
    without_temperature,
)
from lrmil.training.objectives.quantile_bins import bin_of, quantile_edges
from lrmil.training.slide_bags import SlideBag


@dataclass(frozen=True)
class Regression(Objective):
    """A number, from `SlideBag.target`; `label_bins` quantile bins of it are the classes of parts that need some."""

    name = "regression"
    label_bins: int = 4

    @property
    def outputs(self) -> int:
        """The number."""
        return 1

    @property
    def label_classes(self) -> int:
        """The bins."""
        return self.label_bins

    def targets(self, bags: Sequence[SlideBag], split: str) -> Targets:
        """Return the numbers (S,)."""
        return numbers(bags, split, (), "a finite number")

    def fit(self, targets: Targets) -> FittedRegression:
        """Take mean, sd (of the sample: divided by S) and bins."""
        mean, sd = float(targets.mean()), float(targets.std())
        if not sd > 1e-9 * max(1e-30, abs(mean)):
            raise ConfigError(
                f"all {len(targets)} training slides have the target {mean:g}: there is nothing to learn.",
                fix="Check the cohort table, or use fewer folds.",
            )
        return FittedRegression(mean, sd, quantile_edges(targets, self.label_bins))


@dataclass(frozen=True)
class FittedRegression(FittedObjective):
    """See `FittedObjective`."""

    loss_name: ClassVar[str] = "mse"
    score_name: ClassVar[str] = "r2"
    mean: float
    sd: float
    edges: tuple[float, ...]

    @property
    def outputs(self) -> int:
        """The number."""
        return 1

    @property
    def label_classes(self) -> int:
        """The bins."""
        return len(self.edges) + 1

    @property
    def readout(self) -> Readout:
        """The number in its own unit."""
        return Readout(meaning="regression", mean=self.mean, sd=self.sd)

    def tensor(self, targets: Targets) -> Tensor:
        """Standardised targets (S,) float32."""
        return torch.from_numpy((targets - self.mean) / self.sd).float()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean squared error, standardised."""
        return F.mse_loss(logits[:, 0], target)

    def bag_distance(self, teacher_logits: Tensor, loss: Stage2LossSettings) -> BagDistance:
        """Squared error of standardised predictions."""
        without_temperature(loss, "regression")
        return lambda teacher, student: F.mse_loss(student.float(), teacher.detach().float())

    def labels(self, targets: Targets) -> list[int | None]:
        """Quantile bins of the training split."""
        return [int(b) for b in bin_of(targets, self.edges)]

    def strata(self, targets: Targets) -> IntArray:
        """Quantile bins of the training split."""
        return bin_of(targets, self.edges)

    def validation(self, head: Head, logits: Tensor, targets: Targets, select_by: SelectBy) -> Validation:
        """Standardised MSE; R2, and the root mean squared error in the targets' unit."""
        value = self.readout.read(head, logits).value
        assert value is not None
        squared = float(np.square(value - targets).mean())
        spread = float(np.var(targets))
        return Validation(
            loss=squared / self.sd**2,
            score=1 - squared / spread if spread > 0 else math.nan,
            name=self.score_name,
            details={"rmse": math.sqrt(squared)},
            undefined="all validation slides have the same target, so R2 is undefined",
        )
