"""Tests of one method against another on the same patients: permutation, DeLong, and Holm's correction.

No test treats folds as independent samples. The permutation test swaps whole patients. DeLong's applies where the task
is binary and every patient has one slide; it works within folds, whose test patients are disjoint, so that variances of
fold AUCs add up. Both, like the bootstrap, are about new patients for these trained models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from lrmil.errors import ConfigError
from lrmil.evaluation.intervals import RESAMPLES, check_paired, paired_bootstrap, seeds_of, unlike_folds
from lrmil.evaluation.metrics import Metric, metric, undefined_reason
from lrmil.evaluation.predictions import Predictions
from lrmil.evaluation.scored import AnyScored, FloatArray, Scored

PERMUTATIONS = 10_000
_CHUNK_VALUES = 4_000_000


@dataclass(frozen=True)
class TestResult:
    """Outcome of a paired test; nan with a reason where it cannot be done."""

    __test__ = False  # not a test case, whatever its name

    difference: float
    p_value: float
    reason: str = ""


def permutation_test(
    first: Scored, second: Scored, name: str, *, seed: int, permutations: int = PERMUTATIONS
) -> TestResult:
    """Two-sided test of metric(first) - metric(second) = 0, averaged over seeds and folds.

    Under the null the two methods are interchangeable: for each patient, with probability 1/2, the predictions of the
    two methods for all slides (and seeds) of that patient trade places. For AUC, C-index and rank correlation the
    answers are first replaced by their ranks within fold and method (for the linear correlation, standardised), which
    leaves each metric as it is and makes methods of different calibration interchangeable. p = (1 + number at least as
    extreme) / (1 + permutations), where a permutation without a value counts as extreme.

    Raises:
        ConfigError: the two differ in slides, folds or number of seeds.
    """
    check_paired(first, second)
    pairs = _pair_seeds(first, second)
    of = metric(name)
    patients = np.unique(first.patient_ids.astype(str))
    rng = np.random.default_rng(seed)
    swapped = np.vstack([np.zeros((1, len(patients))), rng.integers(0, 2, size=(permutations, len(patients)))])
    by_fold: dict[int, list[FloatArray]] = {}
    without = unlike_folds(first, second, name)
    for a, b in pairs:
        for fold in np.unique(a.folds):
            rows_a, rows_b = (p.take(p.folds == fold) for p in (a, b))
            if fold in without or undefined_reason(name, rows_a) is not None:
                continue
            # Both methods' rows below each other: weight 1 on the rows that a (permuted) method owns, 0 on the others.
            truth = np.concatenate([rows_a.truth, rows_b.truth])
            stacked = np.concatenate([_exchangeable(p.answers, of) for p in (rows_a, rows_b)])
            column = np.searchsorted(patients, rows_a.patient_ids.astype(str))
            step = max(1, _CHUNK_VALUES // len(stacked))
            differences = []
            for start in range(0, len(swapped), step):
                swap = swapped[start : start + step][:, column]
                owned = np.hstack([1 - swap, swap])
                differences.append(of.function(truth, stacked, owned) - of.function(truth, stacked, 1 - owned))
            by_fold.setdefault(int(fold), []).append(np.concatenate(differences))
    if not by_fold:
        return TestResult(float("nan"), float("nan"), "undefined in every fold")
    values = np.mean([np.mean(seeds, axis=0) for seeds in by_fold.values()], axis=0)
    extreme = ~(np.abs(values[1:]) < abs(values[0]) - 1e-12)
    return TestResult(float(values[0]), float((1 + extreme.sum()) / (1 + permutations)))


@dataclass(frozen=True)
class DeLong:
    """AUCs of two scores on the same cases, or averages of them over folds, with the variance of their difference."""

    auc_first: float
    auc_second: float
    difference: float
    se: float
    """Standard error of the difference"""
    low: float
    high: float
    p_value: float
    reason: str = ""


def placements(positive: npt.NDArray[np.bool_], scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Share of negatives below each positive (m,), and of positives above each negative (n,); equal scores count half.

    The mean of either is the AUC. Computed from midranks (Sun and Xu 2014): n log n, no m x n table.
    """
    above, below = scores[positive], scores[~positive]
    ranks = stats.rankdata(np.concatenate([above, below]))
    of_positives = (ranks[: len(above)] - stats.rankdata(above)) / len(below)
    of_negatives = 1.0 - (ranks[len(above) :] - stats.rankdata(below)) / len(above)
    return of_positives, of_negatives


def delong(positive: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike, *, level: float = 0.95) -> DeLong:
    """Paired test of two AUCs on the same cases (DeLong, DeLong and Clarke-Pearson 1988).

    Args:
        positive: (n,) which cases are positive.
        first: (n,) scores of one method.
        second: (n,) scores of the other.
        level: of the interval of the difference.
    """
    y = np.asarray(positive).astype(bool)
    columns = [np.asarray(s, dtype=np.float64) for s in (first, second)]
    return _combine([_fold_components(y, [columns[0]], [columns[1]])], level)


def delong_test(first: Predictions, second: Predictions, *, level: float = 0.95) -> DeLong:
    """DeLong within each test fold; seeds are averaged first, fold differences are averaged, their variances added.

    Without a value (nan and a reason) where the task is not binary, a patient has several slides, or folds share test
    patients; folds without both classes are left out, as in the averages beside which this is reported.
    """
    check_paired(first, second)
    if first.num_classes != 2:
        return _no_delong("DeLong compares AUCs of two classes")
    if not first.one_slide_per_patient():
        return _no_delong("DeLong needs independent cases, and some patients have several slides")
    pairs = _pair_seeds(first, second)
    if any(len(set(a.patient_ids)) < len(a) for a, _ in pairs):
        return _no_delong("DeLong adds up variances of folds, and some patients are tested in several")
    folds = []
    for fold in np.unique(first.folds):
        inside = [(a.take(a.folds == fold), b.take(b.folds == fold)) for a, b in pairs]
        labels = inside[0][0].labels
        if any(len(a) != len(labels) or (a.slide_ids != inside[0][0].slide_ids).any() for a, _ in inside):
            return _no_delong("seeds deal the slides into different folds")
        if undefined_reason("auc", inside[0][0]) is not None:
            continue
        a_scores, b_scores = ([pair[i].probabilities[:, 1] for pair in inside] for i in (0, 1))
        folds.append(_fold_components(labels == 1, a_scores, b_scores))
    if not folds:
        return _no_delong("AUC undefined in every fold")
    return _combine(folds, level)


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Holm's step-down adjustment: (n,) p-values to (n,) adjusted ones; nan stays nan and is not counted.

    The i-th smallest of n (from 0) is multiplied by n - i; results are made non-decreasing and at most 1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return adjusted


def compare_methods(
    ours: Scored,
    others: Mapping[str, Scored],
    name: str,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
) -> pd.DataFrame:
    """Compare one method with several: a row each, Holm over the rows.

    Columns: method, metric, difference (ours - other), low, high (95 % paired bootstrap), p_permutation, p_holm,
    p_delong (AUC only), note.
    """
    rows = []
    for method, other in others.items():
        interval = paired_bootstrap(ours, other, name, seed=seed, resamples=resamples)
        test = permutation_test(ours, other, name, seed=seed, permutations=permutations)
        parametric = _no_delong("")
        if name == "auc" and isinstance(ours, Predictions) and isinstance(other, Predictions):
            parametric = delong_test(ours, other)
        notes = [*interval.notes, *(n for n in (test.reason, parametric.reason) if n)]
        rows.append(
            {
                "method": method,
                "metric": name,
                "difference": interval.value,
                "low": interval.low,
                "high": interval.high,
                "p_permutation": test.p_value,
                "p_delong": parametric.p_value,
                "note": "; ".join(notes),
            }
        )
    columns = ["method", "metric", "difference", "low", "high", "p_permutation", "p_delong", "note"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.insert(6, "p_holm", holm(frame["p_permutation"].to_numpy(dtype=np.float64)))
    return frame


@dataclass(frozen=True)
class _Components:
    auc_first: float
    auc_second: float
    variance: float


def _fold_components(positive: npt.NDArray[np.bool_], first: list[FloatArray], second: list[FloatArray]) -> _Components:
    """AUCs and the variance of their difference; several seeds of one method are averaged placement by placement."""
    a = [placements(positive, s) for s in first]
    b = [placements(positive, s) for s in second]
    a_pos, a_neg = (np.mean([p[i] for p in a], axis=0) for i in (0, 1))
    b_pos, b_neg = (np.mean([p[i] for p in b], axis=0) for i in (0, 1))
    d_pos, d_neg = a_pos - b_pos, a_neg - b_neg
    variance = float("nan")
    if len(d_pos) > 1 and len(d_neg) > 1:
        variance = d_pos.var(ddof=1) / len(d_pos) + d_neg.var(ddof=1) / len(d_neg)
    return _Components(float(a_pos.mean()), float(b_pos.mean()), float(variance))


def _combine(folds: list[_Components], level: float) -> DeLong:
    auc_first, auc_second = (float(np.mean([getattr(f, n) for f in folds])) for n in ("auc_first", "auc_second"))
    difference = auc_first - auc_second
    se = float(np.sqrt(np.sum([f.variance for f in folds])) / len(folds))
    if not np.isfinite(se):
        nan = float("nan")
        reason = "DeLong needs two patients of each class in every fold"
        return DeLong(auc_first, auc_second, difference, nan, nan, nan, nan, reason)
    reach = float(stats.norm.ppf(0.5 + level / 2)) * se
    if se < 1e-12:
        same = abs(difference) < 1e-12
        p_value, reason = (1.0, "") if same else (float("nan"), "no variation between patients to judge by")
    else:
        p_value, reason = float(2 * stats.norm.sf(abs(difference) / se)), ""
    return DeLong(auc_first, auc_second, difference, se, difference - reach, difference + reach, p_value, reason)


def _no_delong(reason: str) -> DeLong:
    nan = float("nan")
    return DeLong(nan, nan, nan, nan, nan, nan, nan, reason)


def _pair_seeds(first: AnyScored, second: AnyScored) -> list[tuple[AnyScored, AnyScored]]:
    """The n-th seed of one method with the n-th of the other, rows of both sorted by fold and slide."""
    seeds_a, seeds_b = seeds_of(first), seeds_of(second)
    if len(seeds_a) != len(seeds_b):
        raise ConfigError(
            f"one method has {len(seeds_a)} seeds, the other {len(seeds_b)}.",
            fix="Run both with the same number of seeds.",
        )
    pairs = []
    for seed_a, seed_b in zip(seeds_a, seeds_b, strict=True):
        a, b = (_sorted(p.take(p.seeds == s)) for p, s in ((first, seed_a), (second, seed_b)))
        check_paired(a, b)
        pairs.append((a, b))
    return pairs


def _sorted(predictions: AnyScored) -> AnyScored:
    return predictions.take(np.lexsort((predictions.slide_ids.astype(str), predictions.folds)))


def _exchangeable(answers: FloatArray, of: Metric) -> FloatArray:
    """What of the answers of one method in one fold may trade places with those of another."""
    if of.exchange == "ranks":
        return np.asarray(stats.rankdata(answers, axis=0), dtype=np.float64)
    if of.exchange == "standardised":
        return (answers - answers.mean(axis=0)) / answers.std(axis=0)
    return answers
