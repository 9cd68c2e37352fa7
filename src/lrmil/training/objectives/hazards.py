"""Survival in discrete time: one hazard an interval, so that a single slide can make a step.

B intervals: their inner edges are the quantiles 1/B, 2/B, ... of the times of the training split's events. Of a slide
whose time lies in interval Y, with h_j = sigmoid(y_j) and S_j = product of (1 - h_i) over i <= j

    event       L = -log h_Y - log S_{Y-1}          it came to Y, and had its event there
    censored    L = -log S_Y                        it came through Y

L_bag is the mean over intervals of KL( h_HR || h_LR ), each hazard a coin, softened by the temperature as Eq. (3) is.

Zadeh, Schmid: Bias in cross-entropy-based training of deep survival networks, IEEE TPAMI 43, 2021, whose convention for
censored times is used; Gensheimer, Narasimhan: A scalable discrete-time survival model for neural networks, PeerJ 7,
2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrmil.distill import Stage2LossSettings
from lrmil.errors import ConfigError
from lrmil.mil.readout import Readout
from lrmil.training.objectives.base import BagDistance, Targets
from lrmil.training.objectives.quantile_bins import bin_of, quantile_edges
from lrmil.training.objectives.survival import FittedSurvival, Survival


@dataclass(frozen=True)
class Hazards(Survival):
    """Hazards of `intervals` intervals, from `SlideBag.target` (time, event)."""

    name = "hazards"
    intervals: int = 4

    @property
    def outputs(self) -> int:
        """One logit an interval."""
        return self.intervals

    def fit(self, targets: Targets) -> FittedHazards:
        """Take the edges of the intervals."""
        seen = targets[targets[:, 1] > 0, 0]
        if len(seen) < self.intervals:
            raise ConfigError(
                f"the training split has {len(seen)} events, too few for {self.intervals} intervals of time.",
                fix="Use fewer intervals, fewer folds, or folds with events in each.",
            )
        return FittedHazards(quantile_edges(seen, self.intervals))


@dataclass(frozen=True)
class FittedHazards(FittedSurvival):
    """See `FittedObjective`; the bins are the intervals."""

    loss_name: ClassVar[str] = "nll"

    @property
    def outputs(self) -> int:
        """One logit an interval."""
        return len(self.edges) + 1

    @property
    def readout(self) -> Readout:
        """Survival, and a risk from it."""
        return Readout(meaning="hazards", edges=self.edges)

    def tensor(self, targets: Targets) -> Tensor:
        """Interval and event (S, 2) int64."""
        return torch.from_numpy(np.stack([bin_of(targets[:, 0], self.edges), targets[:, 1].astype(np.int64)], axis=1))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Negative log likelihood, averaged over slides."""
        return hazards_loss(logits, target[:, 0], target[:, 1])

    def bag_distance(self, teacher_logits: Tensor, loss: Stage2LossSettings) -> BagDistance:
        """Mean over intervals of the KL between two coins, the teacher's as reference."""
        t = loss.bag_temperature
        scale = t**2 if loss.temperature_squared else 1.0
        return lambda teacher, student: scale * hazard_divergence(teacher / t, student / t)


def hazards_loss(logits: Tensor, interval: Tensor, event: Tensor) -> Tensor:
    """Return the mean negative log likelihood.

    Args:
        logits: (S, B), of the hazards.
        interval: (S,) int64 in 0..B-1, where the time lies.
        event: (S,), 1 seen, 0 censored.
    """
    places = torch.arange(logits.shape[1], device=logits.device)
    ends_here = (places == interval[:, None]) & (event[:, None] > 0)
    counts = places <= interval[:, None]
    # -log h = softplus(-y) where the event is, -log(1 - h) = softplus(y) where it is not, nothing afterwards.
    terms = F.softplus(torch.where(ends_here, -logits, logits))
    return torch.where(counts, terms, 0.0).sum(dim=1).mean()


def hazard_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return the mean over intervals of KL( h_teacher || h_student ), from logits (B,) of both."""
    t, s = teacher_logits.detach().float(), student_logits.float()
    yes = torch.sigmoid(t) * (F.logsigmoid(t) - F.logsigmoid(s))
    no = torch.sigmoid(-t) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return (yes + no).mean()
