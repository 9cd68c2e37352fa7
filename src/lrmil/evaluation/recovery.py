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
from lrmil.evaluation.scored import Scored


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


def recovered_share(
    method: Scored, upper: Scored, lower: Scored, name: str, *, seed: int, resamples: int = RESAMPLES
) -> Recovery:
    """Return (metric(method) - metric(lower)) / (metric(upper) - metric(lower)) with its 95 % interval.

    Each resample of patients scores all three. Resamples in which the gap is not positive have no share, and count as
    infinitely far out on either side in turn, so that they widen the interval and never narrow it.

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
    sign = 1 if of.higher_is_better else -1
    if not (gap.excludes_zero() and sign * gap.value > 0):
        return Recovery(gap, None)
    drawn = resample_patients(method, resamples, seed)
    points, values = (
        [fold_average(scored, of, patients)[0] for scored in (method, upper, lower)] for patients in (None, drawn)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (values[0] - values[2]) / (values[1] - values[2])
    lost = ~(sign * (values[1] - values[2]) > 0)
    shares[lost] = np.where(np.arange(lost.sum()) % 2, np.inf, -np.inf)
    # No interpolation: between a number and infinity there is nothing.
    low, high = (float(np.quantile(shares, q, method="nearest")) for q in (0.025, 0.975))
    value = float((points[0] - points[2])[0] / (points[1] - points[2])[0])
    return Recovery(gap, Interval(value, low, high, 0.95, resamples, gap.patients, gap.notes))
