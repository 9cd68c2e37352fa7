"""How much of the distance between two methods a third one covers: of 20x - 5x, what distillation recovers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lrmil.evaluation.intervals import (
    RESAMPLES,
    Interval,
    check_paired,
    fold_average,
    interval_columns,
    paired_bootstrap,
    resample_patients,
)
from lrmil.evaluation.metrics import metric
from lrmil.evaluation.scored import FloatArray, Scored

Resampled = tuple[float, FloatArray]
"""A value, and what it is in each resample (B,)"""


@dataclass(frozen=True)
class Recovery:
    """A gap between two methods, and the share of it that a third covers."""

    gap: Interval
    """upper - lower"""
    share: Interval | None
    """(method - lower) / gap, never clipped; None where the gap's interval holds 0 or `upper` is worse"""

    def columns(self) -> dict[str, float]:
        """Return gap and recovered, each with _low and _high, for a table; nan where there is no share."""
        return interval_columns("gap", self.gap) | interval_columns("recovered", self.share)


def share_of_gap(
    gap: Interval, method: Resampled, upper: Resampled, lower: Resampled, *, higher_is_better: bool = True
) -> Interval | None:
    """Return (method - lower) / (upper - lower), never clipped, with its 95 % interval.

    Resamples in which the gap is not positive have no share: its sign would turn, and what lies far above look as if it
    lay far below. They, and those in which something is undefined, count as infinitely far out on either side in turn,
    so that they widen the interval and never narrow it.

    Args:
        gap: upper - lower.
        method: what may have recovered something; resampled together with the others.
        upper: what is better.
        lower: what the method begins at.
        higher_is_better: False: a gap is negative.

    Returns:
        None unless the whole interval of the gap lies on the side where `upper` is better.
    """
    sign = 1 if higher_is_better else -1
    if not (gap.excludes_zero() and sign * gap.value > 0):
        return None
    distance = upper[1] - lower[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (method[1] - lower[1]) / distance
    lost = ~(sign * distance > 0) | np.isnan(shares)
    shares[lost] = np.where(np.arange(lost.sum()) % 2, np.inf, -np.inf)
    # No interpolation: between a number and infinity there is nothing.
    low, high = (float(np.quantile(shares, q, method="nearest")) for q in (0.025, 0.975))
    value = float((method[0] - lower[0]) / (upper[0] - lower[0]))
    return Interval(value, low, high, 0.95, len(shares), gap.patients, gap.notes)


def recovered_share(
    method: Scored, upper: Scored, lower: Scored, name: str, *, seed: int, resamples: int = RESAMPLES
) -> Recovery:
    """Return (metric(method) - metric(lower)) / (metric(upper) - metric(lower)) with its 95 % interval.

    Each resample of patients scores all three; see `share_of_gap`.

    Args:
        method: what may have recovered something, such as LRMIL.
        upper: what is better, such as the 20x teacher.
        lower: what the method begins at, such as 5x without distillation.
        name: the metric; where smaller is better, a gap is negative.
        seed: of the resampling.
        resamples: how many.

    Raises:
        ConfigError: they do not score the same slides in the same folds.
    """
    check_paired(method, upper)
    gap = paired_bootstrap(upper, lower, name, seed=seed, resamples=resamples)
    of = metric(name)
    drawn = resample_patients(method, resamples, seed)
    scored = [(float(fold_average(s, of)[0][0]), fold_average(s, of, drawn)[0]) for s in (method, upper, lower)]
    return Recovery(gap, share_of_gap(gap, *scored, higher_is_better=of.higher_is_better))
