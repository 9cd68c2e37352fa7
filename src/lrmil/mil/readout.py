"""What the logits of a head stand for: class probabilities, a number, or survival. Kept beside trained weights.

    classification   probabilities: the head's own way, a softmax for most; see `Head.class_shares`
    regression       value = mean + sd * y                 mean and sd of the training targets, in their unit
    cox              value = y                             log-risk: higher means earlier
    hazards          h_j = sigmoid(y_j): the share of those who come to interval j that have the event in it
                     S_j = product of (1 - h_i) over i <= j          survival to the end of interval j
                     value = -sum_j S_j                    higher means earlier

Interval j of the hazards goes from edge j-1 up to, not including, edge j; the first begins at 0, the last has no end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from lrmil.mil.base import Head
from lrmil.settings import Settings

FloatArray = npt.NDArray[np.floating]
Meaning = Literal["classification", "regression", "cox", "hazards"]
"""`cox` and `hazards` are both survival"""


@dataclass(frozen=True)
class Reading:
    """What the logits of one slide, or of S slides, say. All float64."""

    probabilities: FloatArray
    """(..., C) for classes; (..., 0) for other tasks"""
    value: FloatArray | None = None
    """(...), the number in its unit, or the risk, higher meaning earlier; None for classes"""
    survival: FloatArray | None = None
    """(..., T), probability of no event before each of `Readout.times`; only for hazards"""


class Readout(Settings):
    """How logits are read; plain data, ready for JSON."""

    meaning: Meaning = Field("classification", description="what the logits stand for")
    mean: float = Field(0.0, description="of the training targets of a regression")
    sd: float = Field(1.0, gt=0, description="of the training targets of a regression")
    edges: tuple[float, ...] = Field(
        (), description="times between the intervals of the hazards, ascending; equal ones have an empty interval"
    )

    @model_validator(mode="after")
    def _check(self) -> Readout:
        if (self.meaning == "hazards") != bool(self.edges) or list(self.edges) != sorted(self.edges):
            raise ValueError("hazards, and nothing else, have edges, in ascending order")
        return self

    @property
    def times(self) -> tuple[float, ...]:
        """Times (T,) at which survival is told, strictly ascending."""
        return tuple(self.edges[i] for i in self._last_of_equal())

    def _last_of_equal(self) -> list[int]:
        return [i for i, edge in enumerate(self.edges) if (edge,) != self.edges[i + 1 : i + 2]]

    def read(self, head: Head, logits: Tensor) -> Reading:
        """Read logits (..., C) of `head`, in float64: in float32 confident slides would tie."""
        logits = logits.detach().cpu().double()
        if self.meaning == "classification":
            return Reading(head.class_shares(logits).numpy())
        nothing = np.empty((*logits.shape[:-1], 0))
        if self.meaning == "hazards":
            survival = survival_curve(logits)
            return Reading(nothing, -survival.sum(-1).numpy(), survival[..., self._last_of_equal()].numpy())
        return Reading(nothing, self.mean + self.sd * logits[..., 0].numpy())


def survival_curve(logits: Tensor) -> Tensor:
    """Return S (..., B), the survival to the end of each interval, from the logits of hazards (..., B)."""
    # log(1 - sigmoid(y)) = log sigmoid(-y), which neither overflows nor loses digits.
    return torch.nn.functional.logsigmoid(-logits).cumsum(dim=-1).exp()
