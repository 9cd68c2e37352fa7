"""Survival by the relative risk of slides that are looked at together: Cox's partial likelihood.

    L = -(1/E) sum over i with an event ( y_i - log sum over j with t_j >= t_i of exp(y_j) )

The one logit y is the log-risk, E the number of events. Equal times are handled as by Breslow: each event sees all that
have reached its time. Of one slide alone L is 0, so slides step together, 32 at least; splits into steps are made so
that none has fewer, unless the training split has. A step without an event has loss 0.

    L_bag = ( (y_LR - m) / s - (y_HR - m) / s )^2 = (y_LR - y_HR)^2 / s^2         m, s: of y_HR over the training split

A log-risk has no zero: adding a number to all changes nothing. L_bag gives the student that of its teacher.

Cox: Regression models and life-tables, J R Stat Soc B 34, 1972; Breslow: Covariance analysis of censored survival data,
Biometrics 30, 1974; Katzman et al.: DeepSurv, BMC Med Res Methodol 18, 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lrmil.distill import Stage2LossSettings
from lrmil.errors import ConfigError
from lrmil.mil.readout import Readout
from lrmil.training.objectives.base import BagDistance, Targets, without_temperature
from lrmil.training.objectives.quantile_bins import quantile_edges
from lrmil.training.objectives.survival import NO_PAIRS, FittedSurvival, Survival, concordance


@dataclass(frozen=True)
class Cox(Survival):
    """Log-risk, from `SlideBag.target` (time, event)."""

    name = "cox"
    bags_per_step: int = 32
    label_bins: int = 4

    @property
    def outputs(self) -> int:
        """The log-risk."""
        return 1

    @property
    def label_classes(self) -> int:
        """The bins of time."""
        return self.label_bins

    def fit(self, targets: Targets) -> FittedCox:
        """Take the bins of the events' times."""
        if np.isnan(concordance(np.zeros(len(targets)), targets)):
            raise ConfigError(
                f"the {int(targets[:, 1].sum())} events of {len(targets)} training slides put no two of them in order.",
                fix="Use fewer folds, or folds with events in each.",
            )
        seen = targets[targets[:, 1] > 0, 0]
        return FittedCox(quantile_edges(seen, self.label_bins), self.bags_per_step)


@dataclass(frozen=True)
class FittedCox(FittedSurvival):
    """See `FittedObjective`; the bins of time serve parts of heads that need classes."""

    loss_name: ClassVar[str] = "cox"
    joint: ClassVar[bool] = True
    slides_together: int

    @property
    def bags_per_step(self) -> int:
        """As many as were asked for."""
        return self.slides_together

    @property
    def outputs(self) -> int:
        """The log-risk."""
        return 1

    @property
    def label_classes(self) -> int:
        """The bins of time."""
        return len(self.edges) + 1

    @property
    def readout(self) -> Readout:
        """The log-risk."""
        return Readout(meaning="cox")

    def tensor(self, targets: Targets) -> Tensor:
        """Time and event (S, 2) float64: equal times stay equal, and others different."""
        return torch.from_numpy(targets)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Negative log partial likelihood, over events."""
        return cox_loss(logits[:, 0], target[:, 0], target[:, 1])

    def bag_distance(self, teacher_logits: Tensor, loss: Stage2LossSettings) -> BagDistance:
        """Squared error of log-risks, in standard deviations of the teacher's."""
        without_temperature(loss, "cox")
        spread = float(teacher_logits.detach().double().std(correction=0))
        variance = spread**2 if spread > 1e-6 else 1.0
        return lambda teacher, student: (student.float() - teacher.detach().float()).square().mean() / variance

    def check_validation(self, targets: Targets) -> None:
        """Neither the partial likelihood nor the C-index says anything without a pair in order."""
        if np.isnan(concordance(np.zeros(len(targets)), targets)):
            raise ConfigError(f"{NO_PAIRS}.", fix="Use fewer folds, folds with events in each, or survival: hazards.")


def cox_loss(risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Return the mean negative log partial likelihood (Breslow) over events; 0 where there are none.

    Args:
        risk: (S,) log-risk.
        time: (S,) in any unit.
        event: (S,), 1 seen, 0 censored.
    """
    order = torch.argsort(time, descending=True)
    risk, time, seen = risk[order], time[order], event[order] > 0
    reached = torch.logcumsumexp(risk, dim=0)
    # All that share a time are at risk at it: take the sum up to the last of them.
    last = torch.searchsorted(-time, -time, side="right") - 1
    return torch.where(seen, reached[last] - risk, 0.0).sum() / seen.sum().clamp(min=1)
