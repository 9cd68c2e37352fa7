"""Survival curves, the log-rank test and groups of risk, with censoring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from lrmil.errors import ConfigError
from lrmil.evaluation.scored import FloatArray, IntArray
from lrmil.evaluation.values import Values

Thresholds = Mapping[int, float] | Mapping[tuple[int, int], float]
"""A limit of risk for each fold, or for each (fold, seed)"""


@dataclass(frozen=True)
class SurvivalCurve:
    """A Kaplan-Meier curve: a step down at each time with an event. Arrays (T,) at the distinct times seen."""

    times: FloatArray
    """Distinct times, events or not, increasing"""
    survival: FloatArray
    """Just after each time"""
    low: FloatArray
    """End of the interval, log-log of Greenwood's variance; nan where there is none (before the first event, at 0)"""
    high: FloatArray
    at_risk: IntArray
    """Just before each time"""
    events: IntArray
    censored: IntArray

    def at(self, times: npt.ArrayLike) -> FloatArray:
        """Probability to live beyond each time: 1 before the first, the last value after the last."""
        return self._step(np.searchsorted(self.times, times, side="right"))

    def before(self, times: npt.ArrayLike) -> FloatArray:
        """Probability to live until each time (left limit)."""
        return self._step(np.searchsorted(self.times, times, side="left"))

    def risk_set(self, times: npt.ArrayLike) -> IntArray:
        """How many are at risk at each time."""
        place = np.searchsorted(self.times, times, side="left")
        return np.r_[self.at_risk, 0][place].astype(np.int64)

    def median(self) -> float:
        """First time at which survival is 1/2 or less; nan if it never is."""
        reached = np.flatnonzero(self.survival <= 0.5 + 1e-12)
        return float(self.times[reached[0]]) if len(reached) else float("nan")

    def _step(self, place: npt.NDArray[np.intp]) -> FloatArray:
        return np.r_[1.0, self.survival][place]


def kaplan_meier(time: npt.ArrayLike, event: npt.ArrayLike, *, level: float = 0.95) -> SurvivalCurve:
    """Kaplan-Meier curve; who is censored at a time with an event was still at risk of it.

    Args:
        time: (n,) positive.
        event: (n,) 1 seen, 0 censored.
        level: of the interval.

    Raises:
        ConfigError: there is nobody.
    """
    t, seen = np.asarray(time, dtype=np.float64), np.asarray(event, dtype=np.float64) == 1
    if not len(t):
        raise ConfigError("nobody to draw a survival curve of.")
    times, at_risk, events, censored = _counts(t, seen)
    return _product_limit(times, at_risk, events, censored, level)


def censoring_curve(targets: FloatArray, *, level: float = 0.95) -> SurvivalCurve:
    """Kaplan-Meier curve of censoring: probability to be still observed. (n, 2) time and event.

    Who dies at a time is not at risk of being censored at that time, since events come first.
    """
    times, at_risk, events, censored = _counts(targets[:, 0], targets[:, 1] == 1)
    return _product_limit(times, at_risk - events, censored, events, level)


def median_follow_up(targets: FloatArray) -> float:
    """Median time of observation had nobody died (reverse Kaplan-Meier); nan if more than half died under observation.

    Schemper and Smith 1996. (n, 2) time and event.
    """
    return censoring_curve(targets).median()


@dataclass(frozen=True)
class LogRank:
    """Outcome of a log-rank test; nan with a reason where it cannot be done."""

    statistic: float
    """Chi-square with (groups - 1) degrees of freedom"""
    p_value: float
    observed: FloatArray
    """(G,) events in each group"""
    expected: FloatArray
    """(G,) events if all groups had one hazard"""
    reason: str = ""


def log_rank(
    time: npt.ArrayLike, event: npt.ArrayLike, group: npt.ArrayLike, *, strata: npt.ArrayLike | None = None
) -> LogRank:
    """Test whether groups differ in survival (Mantel 1966); with `strata`, groups are compared within strata only.

    Args:
        time: (n,).
        event: (n,) 1 seen, 0 censored.
        group: (n,) any labels.
        strata: (n,) any labels.
    """
    t, seen = np.asarray(time, dtype=np.float64), np.asarray(event, dtype=np.float64) == 1
    names, member = np.unique(np.asarray(group), return_inverse=True)
    _, stratum = np.unique(np.zeros(len(t)) if strata is None else np.asarray(strata), return_inverse=True)
    observed, expected = np.zeros(len(names)), np.zeros(len(names))
    covariance = np.zeros((len(names), len(names)))
    for s in np.unique(stratum):
        inside = stratum == s
        for moment in np.unique(t[inside & seen]):
            risk = np.bincount(member[inside & (t >= moment)], minlength=len(names)).astype(np.float64)
            died = np.bincount(member[inside & seen & (t == moment)], minlength=len(names)).astype(np.float64)
            n, d = risk.sum(), died.sum()
            share = risk / n
            observed += died
            expected += d * share
            if n > 1:
                covariance += d * (n - d) / (n - 1) * (np.diag(share) - np.outer(share, share))
    nan = float("nan")
    if len(names) < 2:
        return LogRank(nan, nan, observed, expected, "all are in one group")
    if not seen.any():
        return LogRank(nan, nan, observed, expected, "no event")
    rank = int(np.linalg.matrix_rank(covariance))
    if rank < len(names) - 1:
        return LogRank(nan, nan, observed, expected, "a group is never at risk beside another when an event is seen")
    difference = (observed - expected)[:-1]
    statistic = float(difference @ np.linalg.solve(covariance[:-1, :-1], difference))
    return LogRank(statistic, float(stats.chi2.sf(statistic, len(names) - 1)), observed, expected)


def risk_groups(values: Values, thresholds: Thresholds) -> tuple[Values, npt.NDArray[np.bool_]]:
    """Divide patients into high and low risk, by a threshold that each fold's training split gave.

    Risks of different models have no common scale, so each has its own threshold: the median risk that it gives its
    training patients, never those tested. Several slides of a patient are averaged first; with several seeds most
    votes count, and a tie is low.

    Args:
        values: of survival.
        thresholds: for each fold, or, where there are several seeds, for each (fold, seed).

    Returns:
        one row for each patient (and fold, if folds test a patient again), of the first seed; high (n,).

    Raises:
        ConfigError: a model has no threshold, or this is not survival.
    """
    values.require_survival()
    patients = values.by_patient()
    given: dict[object, float] = dict(thresholds.items())
    several = len(np.unique(patients.seeds)) > 1
    limit = np.empty(len(patients))
    for fold, seed, rows in patients.cells():
        key = (fold, seed) if (fold, seed) in given or several else fold
        if key not in given:
            raise ConfigError(
                f"fold {fold}{f', seed {seed}' if several else ''} has no threshold of risk.",
                fix="Give the median risk in the training split of each fold (of each fold and seed if there are "
                "several).",
            )
        limit[rows] = given[key]
    above = patients.predicted > limit
    keys = np.array([f"{fold} {patient}" for fold, patient in zip(patients.folds, patients.patient_ids, strict=True)])
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    votes = np.bincount(place, weights=above) / np.bincount(place)
    return patients.take(first), votes > 0.5


def _counts(t: FloatArray, seen: npt.NDArray[np.bool_]) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Distinct times; at each: at risk just before, events, censored."""
    times, place = np.unique(t, return_inverse=True)
    events = np.bincount(place, weights=seen, minlength=len(times)).astype(np.float64)
    censored = np.bincount(place, weights=~seen, minlength=len(times)).astype(np.float64)
    left = np.cumsum(events + censored)
    return times, len(t) - np.r_[0.0, left[:-1]], events, censored


def _product_limit(
    times: FloatArray, at_risk: FloatArray, events: FloatArray, censored: FloatArray, level: float
) -> SurvivalCurve:
    with np.errstate(divide="ignore", invalid="ignore"):
        step = np.where(events > 0, 1.0 - events / at_risk, 1.0)
        survival: FloatArray = np.cumprod(step, dtype=np.float64)
        variance = np.cumsum(np.where(events > 0, events / (at_risk * (at_risk - events)), 0.0))
        # Interval of log(-log S), which stays in 0..1; there is none where S is 1 or 0.
        centre = np.log(-np.log(survival))
        reach = stats.norm.ppf(0.5 + level / 2) * np.sqrt(variance) / np.log(survival)
        low, high = np.exp(-np.exp(centre - reach)), np.exp(-np.exp(centre + reach))
    known = (survival > 0) & (survival < 1)
    return SurvivalCurve(
        times=times,
        survival=survival,
        low=np.where(known, low, np.nan),
        high=np.where(known, high, np.nan),
        at_risk=np.rint(at_risk).astype(np.int64),
        events=np.rint(events).astype(np.int64),
        censored=np.rint(censored).astype(np.int64),
    )
