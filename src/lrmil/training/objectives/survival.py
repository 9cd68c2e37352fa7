"""What both survival objectives share: targets (S, 2) of time and event, bins of time, and the concordance index."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lrmil.errors import ConfigError
from lrmil.geometry import IntArray
from lrmil.mil.base import Head
from lrmil.mil.recipe import SelectBy
from lrmil.training.loop import Validation
from lrmil.training.objectives.base import FittedObjective, Objective, Targets, numbers
from lrmil.training.objectives.quantile_bins import bin_of
from lrmil.training.slide_bags import SlideBag

FloatArray = npt.NDArray[np.floating]
NO_PAIRS = "no two validation slides can be put in order of their survival, so the C-index is undefined"


class Survival(Objective, ABC):
    """An objective that learns from `SlideBag.target` (time, event)."""

    def targets(self, bags: Sequence[SlideBag], split: str) -> Targets:
        """Return time and event (S, 2)."""
        return times_and_events(bags, split)


@dataclass(frozen=True)
class FittedSurvival(FittedObjective, ABC):
    """An objective of time and event that knows bins of the events' times in its training split."""

    score_name: ClassVar[str] = "c_index"
    edges: tuple[float, ...]
    """inner edges of the bins, ascending"""

    def labels(self, targets: Targets) -> list[int | None]:
        """The bin of the event; unknown for most that are censored."""
        return known_bins(targets, self.edges)

    def strata(self, targets: Targets) -> IntArray:
        """Whether there was an event."""
        return targets[:, 1].astype(np.int64)

    def validation(self, head: Head, logits: Tensor, targets: Targets, select_by: SelectBy) -> Validation:
        """The loss of the whole split at once; C-index of the risk that the readout gives."""
        risk = self.readout.read(head, logits).value
        assert risk is not None
        loss = self.loss(logits.double().cpu(), self.tensor(targets))
        return Validation(float(loss), concordance(risk, targets), self.score_name, undefined=NO_PAIRS)


def times_and_events(bags: Sequence[SlideBag], split: str) -> FloatArray:
    """Return (S, 2) time and event of bags.

    Raises:
        ConfigError: a time is not positive, or an event is neither 0 nor 1.
    """
    wanted = "(time, event) with a positive time, and 1 for an event or 0 for a censored one"
    found = numbers(bags, split, (2,), wanted)
    wrong = (found[:, 0] <= 0) | ~np.isin(found[:, 1], (0.0, 1.0))
    if wrong.any():
        row = int(wrong.argmax())
        raise ConfigError(
            f"{split} slide {bags[row].slide_id} has target {found[row].tolist()}; wanted {wanted}.",
            fix="Check the time and event columns of the cohort table.",
        )
    return found


def known_bins(targets: FloatArray, edges: tuple[float, ...]) -> list[int | None]:
    """Return the bin of each slide's event; None if censored, unless that was in the last bin, which has no end."""
    last = len(edges)
    bins = bin_of(targets[:, 0], edges)
    return [int(b) if seen or b == last else None for b, seen in zip(bins, targets[:, 1] > 0, strict=True)]


def concordance(risk: FloatArray, targets: FloatArray) -> float:
    """Return Harrell's C: of the pairs whose order is known, the share in which the earlier event had the higher risk.

    The order is known where the one with the shorter time had an event, and where of two equal times one is an event
    and the other censored (which lasted longer). Equal risks count half. NaN if there is no such pair, or a risk is
    NaN. Memory is S x S bytes.

    Harrell, Califf, Pryor, Lee, Rosati: Evaluating the yield of medical tests, JAMA 247, 1982.
    """
    time, event = targets[:, 0], targets[:, 1] > 0
    earlier = (time[:, None] < time) | ((time[:, None] == time) & ~event)
    known = earlier & event[:, None]
    pairs = int(known.sum())
    if pairs == 0 or not np.isfinite(risk).all():
        return math.nan
    higher, equal = risk[:, None] > risk, risk[:, None] == risk
    return float(((known & higher).sum() + 0.5 * (known & equal).sum()) / pairs)
