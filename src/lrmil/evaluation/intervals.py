"""Bootstrap intervals that respect how the scores were made: patients are resampled whole, within their test fold.

A metric is taken within each fold and seed, averaged over seeds, then over folds; scores of different folds come from
different models and are never pooled. The interval answers "what if other patients had been tested on these trained
models?". It does not hold the variation of training on other patients, which the sd over folds and seeds hints at; the
folds share training patients, so that sd is no basis for a test.

Patients are drawn within strata of fold and label (survival: whether the event was seen; numbers: the fold only),
because the folds were dealt that way: each resample keeps the class sizes of each fold. Strata are small (a test fold
may hold five positives), where the ordinary bootstrap understates variance by (n - 1) / n; drawing n - 1 of n and
weighting them by n / (n - 1) removes this bias (Rao and Wu 1988).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lrmil.errors import ConfigError
from lrmil.evaluation.metrics import Metric, metric, undefined_reason
from lrmil.evaluation.scored import FloatArray, IntArray, Scored

RESAMPLES = 2000
_CHUNK_VALUES = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A value with a percentile bootstrap interval. All nan where the metric is undefined."""

    value: float
    low: float
    high: float
    level: float
    resamples: int
    """How many resamples the interval rests on, those without a value left out"""
    patients: int
    notes: tuple[str, ...] = ()
    """What a reader has to know: folds without a value, strata too small to vary"""

    def excludes_zero(self) -> bool:
        """True if the whole interval lies on one side of 0; False if it is undefined."""
        return bool(self.low > 0 or self.high < 0)


def interval_columns(name: str, found: Interval | None) -> dict[str, float]:
    """Return `name`, `name`_low and `name`_high for a row of a table; nan where nothing was found."""
    values = (math.nan,) * 3 if found is None else (found.value, found.low, found.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


@dataclass(frozen=True)
class PatientResamples:
    """Weights of patients in each resample. `weights[b, i]` is how often patient i counts in resample b."""

    patients: npt.NDArray[np.object_]
    """(P,) sorted"""
    weights: FloatArray
    """(B, P)"""
    frozen_strata: int
    """Strata of one patient, which cannot vary"""

    def for_rows(self, patient_ids: npt.NDArray[np.object_], chunk: slice) -> FloatArray:
        """(b, n): the weight of the patient of each row, so that all slides of a patient share one weight."""
        return self.weights[chunk][:, np.searchsorted(self.patients, patient_ids)]


def resample_patients(
    predictions: Scored, resamples: int, seed: int, *, stratify: bool = True, rescale: bool = True
) -> PatientResamples:
    """Draw whole patients with replacement, within strata.

    Args:
        predictions: whose patients, folds and `Scored.strata` (labels, events) define the strata. Where seeds deal
            the patients into different folds, strata are labels only.
        resamples: B.
        seed: of the random generator.
        stratify: by fold and label; False: by fold only.
        rescale: draw n - 1 of n, weighted by n / (n - 1); False: the ordinary bootstrap, n of n.
    """
    patients, row_patient = np.unique(predictions.patient_ids.astype(str), return_inverse=True)
    # A patient with slides of several labels belongs to the one it has most of (the lowest if equal).
    kinds, row_kind = np.unique(predictions.strata, return_inverse=True)
    votes = np.zeros((len(patients), len(kinds)))
    np.add.at(votes, (row_patient, row_kind), 1.0)
    label = votes.argmax(axis=1)
    first_fold = np.full(len(patients), np.iinfo(np.int64).max)
    last_fold = np.full(len(patients), np.iinfo(np.int64).min)
    np.minimum.at(first_fold, row_patient, predictions.folds)
    np.maximum.at(last_fold, row_patient, predictions.folds)
    fold = first_fold if (first_fold == last_fold).all() else np.zeros(len(patients), np.int64)
    strata = np.stack([fold, label if stratify else np.zeros_like(label)], axis=1)

    rng = np.random.default_rng(seed)
    weights = np.ones((resamples, len(patients)))
    frozen = 0
    for stratum in np.unique(strata, axis=0):
        members = np.flatnonzero((strata == stratum).all(axis=1))
        size = len(members)
        if size == 1:
            frozen += 1
            continue
        draws = size - 1 if rescale else size
        counts = rng.multinomial(draws, np.full(size, 1.0 / size), size=resamples)
        weights[:, members] = counts * (size / draws)
    return PatientResamples(patients.astype(object), weights, frozen)


def fold_average(
    predictions: Scored, of: Metric, patients: PatientResamples | None = None, without: Collection[int] = ()
) -> tuple[FloatArray, tuple[str, ...]]:
    """Metric within each fold and seed, averaged over seeds, then over folds, for every resample.

    Folds in which the metric is undefined on the real data (a class is absent) are left out and named in the notes; a
    resample in which another fold becomes undefined is nan.

    Args:
        predictions: of all folds and seeds.
        of: the metric.
        patients: the resamples; None for the plain value.
        without: folds to leave out, see `unlike_folds`.

    Returns:
        values (B,), or (1,) without resamples; notes.
    """
    count = 1 if patients is None else len(patients.weights)
    by_fold: dict[int, list[FloatArray]] = {}
    left_out: dict[str, dict[int, None]] = {}
    for fold, _, rows in predictions.cells():
        part = predictions.take(rows)
        reason = undefined_reason(of.name, part)
        if reason is not None:
            left_out.setdefault(reason, {})[fold] = None
            continue
        if fold in without:
            continue
        if patients is None:
            values = of.function(part.truth, part.answers, np.ones((1, len(rows))))
        else:
            step = max(1, _CHUNK_VALUES // len(rows))
            ids = part.patient_ids
            values = np.concatenate(
                [
                    of.function(part.truth, part.answers, patients.for_rows(ids, slice(start, start + step)))
                    for start in range(0, count, step)
                ]
            )
        by_fold.setdefault(fold, []).append(values)
    total = len(np.unique(predictions.folds))
    notes = tuple(f"{_folds_text(list(folds), total)} left out: {reason}" for reason, folds in left_out.items())
    if not by_fold:
        return np.full(count, np.nan), notes
    return np.mean([np.mean(seeds, axis=0) for seeds in by_fold.values()], axis=0), notes


def _folds_text(folds: list[int], total: int) -> str:
    if len(folds) == total > 1:
        return "every fold"
    return ("folds " if len(folds) > 1 else "fold ") + ", ".join(map(str, folds))


def bootstrap(
    predictions: Scored,
    name: str,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    stratify: bool = True,
    rescale: bool = True,
) -> Interval:
    """Fold-averaged metric `name` with its percentile interval over patients (see the top of this file)."""
    of = metric(name)
    drawn = resample_patients(predictions, resamples, seed, stratify=stratify, rescale=rescale)
    point, notes = fold_average(predictions, of)
    values, _ = fold_average(predictions, of, drawn)
    return _percentile(float(point[0]), values, level, drawn, notes, of)


def paired_bootstrap(
    first: Scored,
    second: Scored,
    name: str,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    stratify: bool = True,
    rescale: bool = True,
) -> Interval:
    """Interval of metric(first) - metric(second) over the same patients: each resample scores both methods.

    The two may have different numbers of seeds; these are averaged before the difference is taken.

    Raises:
        ConfigError: they do not score the same slides in the same folds.
    """
    check_paired(first, second)
    of = metric(name)
    drawn = resample_patients(first, resamples, seed, stratify=stratify, rescale=rescale)
    without = unlike_folds(first, second, name)
    (point_a, notes), (point_b, others) = (fold_average(p, of, None, without) for p in (first, second))
    notes = tuple(dict.fromkeys((*notes, *others)))
    values = fold_average(first, of, drawn, without)[0] - fold_average(second, of, drawn, without)[0]
    return _percentile(float(point_a[0] - point_b[0]), values, level, drawn, notes, of)


def unlike_folds(first: Scored, second: Scored, name: str) -> frozenset[int]:
    """Folds in which a metric is undefined for one of two methods only: neither may count there.

    It is so where a metric needs answers that vary. What the truth makes undefined, is so for both.
    """
    undefined: list[set[int]] = []
    for predictions in (first, second):
        cells = predictions.cells()
        undefined.append({f for f, _, rows in cells if undefined_reason(name, predictions.take(rows)) is not None})
    return frozenset(undefined[0] | undefined[1] if undefined[0] != undefined[1] else ())


def check_paired(first: Scored, second: Scored) -> None:
    """Raise `ConfigError` unless both score the same slides, in the same folds, with the same truth and patients."""
    if (first.kind, first.meaning) != (second.kind, second.meaning):
        raise ConfigError(
            f"{_task(first)} and {_task(second)} cannot be compared.",
            fix="Compare methods trained on one task.",
        )
    one, other = _design(first), _design(second)
    if one != other:
        odd = sorted(one ^ other)[0]
        raise ConfigError(
            f"two methods differ in their test design, for example at fold {odd[0]}, slide {odd[1]} "
            f"({len(one ^ other)} differences).",
            fix="Compare methods on the same slides, labels and folds only.",
        )


def _task(predictions: Scored) -> str:
    return f"{predictions.kind} of {', '.join(predictions.meaning)}"


def _design(predictions: Scored) -> set[tuple[int, str, str, tuple[float, ...]]]:
    truth = predictions.truth.reshape(len(predictions), -1).tolist()
    columns = (predictions.folds, predictions.slide_ids, predictions.patient_ids, truth)
    return {(int(f), str(s), str(p), tuple(y)) for f, s, p, y in zip(*columns, strict=True)}


def _percentile(
    point: float, values: FloatArray, level: float, drawn: PatientResamples, notes: tuple[str, ...], of: Metric
) -> Interval:
    defined = values[np.isfinite(values)]
    extra: list[str] = []
    if len(defined) < len(values) and np.isfinite(point):
        extra.append(
            f"{len(values) - len(defined)} of {len(values)} resamples have no value in some fold and are left out"
        )
    if drawn.frozen_strata:
        extra.append(
            f"interval too narrow: {drawn.frozen_strata} of its strata (one label within a fold) hold a single patient"
        )
    low = high = float("nan")
    if of.interval == "none":
        extra.append(f"{of.title} has no interval: resampling biases it")
    elif np.isfinite(point) and len(defined) and drawn.weights.std() > 0:
        tail = (1 - level) / 2
        low, high = (float(q) for q in np.quantile(defined, [tail, 1 - tail]))
        if of.interval == "basic":
            low, high = 2 * point - high, 2 * point - low
        if low == high:
            extra.append("interval without width: every resample gives the same value, which is no certainty")
    return Interval(point, low, high, level, len(defined), len(drawn.patients), (*notes, *extra))


def seeds_of(predictions: Scored) -> IntArray:
    """The seeds, sorted."""
    return np.unique(predictions.seeds)
