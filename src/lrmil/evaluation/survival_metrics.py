"""How well risks order survival times, and how good predicted survival curves are, with censoring.

Targets are (n, 2), time and event. A pair i, j is comparable if the event of i was seen and j lived longer: t_i < t_j,
or t_i = t_j with j censored. Two events at one time have no order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lrmil.errors import ConfigError
from lrmil.evaluation.scored import FloatArray
from lrmil.evaluation.survival import censoring_curve

_BLOCK_VALUES = 4_000_000


def weighted_c_index(targets: FloatArray, risk: FloatArray, weights: FloatArray) -> FloatArray:
    """Harrell's C: share of comparable pairs in which the shorter-lived has the higher risk; equal risks count half.

    nan where no comparable pair differs in risk: without events, with one slide, or with one risk for all. (n,) pairs
    are weighed by the product of their weights; Harrell, Lee and Mark 1996.
    """
    return _concordance(targets, risk, weights, np.ones(len(targets)))


def uno_c_index(
    targets: FloatArray,
    risk: FloatArray,
    train_targets: FloatArray,
    *,
    tau: float | None = None,
    weights: FloatArray | None = None,
) -> FloatArray:
    """Uno's C: pairs weighed by 1 / G(t_i-)^2, so that it does not depend on how the slides were censored.

    Args:
        targets: (n, 2) time and event of the test slides.
        risk: (n,).
        train_targets: (m, 2), which give G, the Kaplan-Meier curve of censoring.
        tau: events at or after it do not count; None: all where G is above 0 count.
        weights: (B, n); None: all ones, once.

    Returns:
        (B,), nan where undefined. Uno et al. 2011.
    """
    uncensored = censoring_curve(train_targets).before(targets[:, 0])
    counts = (uncensored > 0) & (targets[:, 0] < (np.inf if tau is None else tau))
    inverse = np.divide(1.0, uncensored**2, out=np.zeros(len(targets)), where=counts)
    return _concordance(targets, risk, np.ones((1, len(targets))) if weights is None else weights, inverse)


def undefined_c_index(targets: FloatArray, risk: FloatArray) -> str | None:
    """Say why there is no C-index on these slides, or None if there is one."""
    if len(targets) < 2:
        return "C-index undefined: one slide has no order"
    if not targets[:, 1].any():
        return f"C-index undefined: no event among the {len(targets)} scored"
    if np.isfinite(weighted_c_index(targets, risk, np.ones((1, len(targets))))[0]):
        return None
    if len(np.unique(risk)) == 1:
        return "C-index undefined: one risk for all orders nobody"
    return "C-index undefined: no two of different risk whose order is known"


def brier_curve(targets: FloatArray, survival: FloatArray, times: FloatArray, train_targets: FloatArray) -> FloatArray:
    """Brier score of predicted survival at each time, weighed for censoring (Graf et al. 1999).

    Args:
        targets: (n, 2) time and event of the test slides.
        survival: (n, T) predicted probability to live beyond each time.
        times: (T,) increasing.
        train_targets: (m, 2), which give G, the Kaplan-Meier curve of censoring.

    Returns:
        (T,); nan where G is 0, so that nothing is known of those who would live so long.

    Raises:
        ConfigError: shapes do not fit, times do not increase, or a survival is no probability.
    """
    times = np.asarray(times, dtype=np.float64)
    if survival.shape != (len(targets), len(times)) or (np.diff(times) <= 0).any():
        raise ConfigError(
            f"survival of shape {survival.shape} for {len(targets)} slides and {len(times)} times.",
            fix="Give a row for each slide and a column for each time, times increasing.",
        )
    if not ((survival >= -1e-9) & (survival <= 1 + 1e-9)).all():
        raise ConfigError("survival curves hold what is no probability.", fix="Find the cause of NaN.")
    censoring = censoring_curve(train_targets)
    time, event = targets[:, :1], targets[:, 1:]
    at_event, at_time = censoring.before(time), censoring.at(times)
    with np.errstate(divide="ignore", invalid="ignore"):
        died = np.where((time <= times) & (event == 1), survival**2 / at_event, 0.0)
        lives = np.where(time > times, (1 - survival) ** 2 / at_time, 0.0)
        score = (died + lives).mean(axis=0)
    return np.where(np.isfinite(score) & (at_time > 0), score, np.nan)


def integrated_brier(targets: FloatArray, survival: FloatArray, times: FloatArray, train_targets: FloatArray) -> float:
    """Mean of `brier_curve` over the span of `times` (trapezoids); 0 is perfect, 0.25 says 1/2 everywhere.

    nan with fewer than two times, or where the curve is undefined at one of them.
    """
    if len(times) < 2:
        return float("nan")
    curve = brier_curve(targets, survival, times, train_targets)
    steps = np.diff(times)
    return float((0.5 * (curve[1:] + curve[:-1]) * steps).sum() / steps.sum())


def censoring_scores(
    targets: FloatArray,
    risk: FloatArray,
    train_targets: FloatArray,
    survival: FloatArray | None = None,
    times: Sequence[float] = (),
) -> dict[str, float]:
    """Return what the training split's censoring is needed for, of one fold and seed: `uno_c` and `ibs`.

    Args:
        targets: (n, 2) time and event of the test slides.
        risk: (n,).
        train_targets: (m, 2).
        survival: (n, T) predicted survival beyond each time; None for a method that gives a risk alone.
        times: (T,) increasing.

    Returns:
        `uno_c_index` and `integrated_brier`; nan where undefined.
    """
    brier = float("nan")
    if survival is not None:
        brier = integrated_brier(targets, survival, np.asarray(times, dtype=np.float64), train_targets)
    return {"uno_c": float(uno_c_index(targets, risk, train_targets)[0]), "ibs": brier}


def _concordance(targets: FloatArray, risk: FloatArray, weights: FloatArray, factor: FloatArray) -> FloatArray:
    """Weighted share of won comparable pairs, in blocks of rows so that memory stays bounded."""
    time, seen = targets[:, 0], targets[:, 1] == 1
    first = np.flatnonzero(seen & (factor > 0))
    won, known, told = (np.zeros(len(weights)) for _ in range(3))
    step = max(1, _BLOCK_VALUES // max(1, len(time)))
    for start in range(0, len(first), step):
        rows = first[start : start + step]
        comparable = (time[rows, None] < time) | ((time[rows, None] == time) & ~seen)
        higher = risk[rows, None] > risk
        equal = risk[rows, None] == risk
        own = weights[:, rows] * factor[rows]
        known += _sum_pairs(own, comparable, weights)
        told += _sum_pairs(own, comparable & ~equal, weights)
        won += _sum_pairs(own, comparable * (higher + 0.5 * equal), weights)
    return np.divide(won, known, out=np.full(len(weights), np.nan), where=told > 0)


def _sum_pairs(own: FloatArray, pairs: npt.NDArray[np.bool_] | FloatArray, weights: FloatArray) -> FloatArray:
    return ((weights @ pairs.T.astype(np.float64)) * own).sum(axis=1)
