"""Every metric by its name, and those of class probabilities. Resampling patients is a matrix product, not a loop.

Every metric has one implementation, `f(truth (n, ...), answers (n, ...), weights (B, n)) -> (B,)`: row b of the weights
says how often each slide counts in resample b; all ones gives the plain metric. What cannot be computed is nan, with a
reason beside it, and never 0, 1/2 or 1. Those of numbers are in `regression_metrics`, of survival in
`survival_metrics`.

Accuracy is plain accuracy of the argmax. AUC is that of P(class 1) for two classes and the one-vs-rest mean over
classes for more (as the LRMIL paper and its code report). No threshold is chosen on test data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.errors import ConfigError
from lrmil.evaluation.predictions import Predictions
from lrmil.evaluation.regression_metrics import (
    weighted_mae,
    weighted_pearson,
    weighted_r2,
    weighted_rmse,
    weighted_spearman,
)
from lrmil.evaluation.scored import FloatArray, IntArray, Scored
from lrmil.evaluation.survival_metrics import undefined_c_index, weighted_c_index
from lrmil.tasks import TaskKind

WeightedMetric = Callable[[npt.NDArray[Any], FloatArray, FloatArray], FloatArray]
IntervalForm = Literal["percentile", "basic", "none"]
Exchange = Literal["as_is", "ranks", "standardised"]

CALIBRATION_BINS = 10


def weighted_accuracy(labels: IntArray, probabilities: FloatArray, weights: FloatArray) -> FloatArray:
    """Share of slides whose most probable class is the true one; the first of equally probable classes is taken."""
    return _mean((probabilities.argmax(axis=1) == labels).astype(np.float64), weights)


def weighted_balanced_accuracy(labels: IntArray, probabilities: FloatArray, weights: FloatArray) -> FloatArray:
    """Mean recall over the classes that occur."""
    confusion = weighted_confusion(labels, probabilities, weights)
    support = confusion.sum(axis=2)
    hits = np.einsum("bcc->bc", confusion)
    recall = np.divide(hits, support, out=np.zeros_like(hits), where=support > 0)
    return _ratio(recall.sum(axis=1), (support > 0).sum(axis=1).astype(np.float64))


def weighted_f1(labels: IntArray, probabilities: FloatArray, weights: FloatArray) -> FloatArray:
    """F1 of each class, averaged with the class sizes as weights; a class without true positives has F1 0."""
    confusion = weighted_confusion(labels, probabilities, weights)
    hits = np.einsum("bcc->bc", confusion)
    support, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    f1 = np.divide(2 * hits, support + predicted, out=np.zeros_like(hits), where=support + predicted > 0)
    return _ratio((f1 * support).sum(axis=1), support.sum(axis=1))


def weighted_auc(labels: IntArray, probabilities: FloatArray, weights: FloatArray) -> FloatArray:
    """Area under the ROC curve; two classes: of P(class 1); more: mean over classes of one class against the rest.

    nan where a class has no slide, or no slide outside it.
    """
    classes = probabilities.shape[1]
    if classes == 2:
        return weighted_binary_auc(labels == 1, probabilities[:, 1], weights)
    each = [weighted_binary_auc(labels == c, probabilities[:, c], weights) for c in range(classes)]
    return np.mean(each, axis=0)


def weighted_binary_auc(positive: npt.NDArray[np.bool_], scores: FloatArray, weights: FloatArray) -> FloatArray:
    """P(score of a positive > score of a negative) + half of P(equal), for each row of weights.

    Sorting is done once, for all rows.
    """
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    ranked_weights = weights[:, order]
    of_positives = np.add.reduceat(ranked_weights * positive[order], starts, axis=1)
    of_negatives = np.add.reduceat(ranked_weights * ~positive[order], starts, axis=1)
    below = np.cumsum(of_negatives, axis=1) - of_negatives
    won = (of_positives * (below + 0.5 * of_negatives)).sum(axis=1)
    return _ratio(won, of_positives.sum(axis=1) * of_negatives.sum(axis=1))


def weighted_brier(labels: IntArray, probabilities: FloatArray, weights: FloatArray) -> FloatArray:
    """Mean squared error of the probabilities: two classes (p1 - y)**2 in 0..1; more: summed over classes, in 0..2."""
    classes = probabilities.shape[1]
    squared = ((probabilities - np.eye(classes)[labels]) ** 2).sum(axis=1)
    return _mean(squared / 2 if classes == 2 else squared, weights)


def weighted_calibration_error(
    labels: IntArray, probabilities: FloatArray, weights: FloatArray, bins: int = CALIBRATION_BINS
) -> FloatArray:
    """Expected calibration error of the predicted class: sum over bins of |accuracy - confidence| x share of slides.

    Equal-width bins of the highest probability (Guo et al. 2017). Biased upwards when bins hold few slides.
    """
    confidence = probabilities.max(axis=1)
    correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    member = np.eye(bins)[np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)]
    gap = np.abs(weights @ (member * (correct - confidence)[:, None]))
    return _ratio(gap.sum(axis=1), weights.sum(axis=1))


def weighted_confusion(labels: IntArray, probabilities: FloatArray, weights: FloatArray) -> FloatArray:
    """(B, C, C): weight of slides of true class (row) that were called class (column)."""
    classes = probabilities.shape[1]
    cell = np.eye(classes * classes)[labels * classes + probabilities.argmax(axis=1)]
    return (weights @ cell).reshape(-1, classes, classes)


@dataclass(frozen=True)
class Metric:
    """A named metric."""

    name: str
    """Column name in tables and files"""
    title: str
    """Heading for people"""
    function: WeightedMetric
    kind: TaskKind = "classification"
    """Of the tasks that it is for"""
    higher_is_better: bool = True
    exchange: Exchange = "as_is"
    """What of the answers two methods may trade, since the metric sees no more: their ranks within a fold, their
    standardised values, or the answers as they are"""
    percent: bool = True
    """True if tables print it times 100, as the paper does"""
    in_unit: bool = False
    """True if it has the unit of the target, so that its size says nothing about how many decimals to print"""
    interval: IntervalForm = "percentile"
    """How its interval is read off the resamples: their percentiles; "basic", these mirrored at the value, for metrics
    whose resamples are off to one side; "none" for those that are so far off that any interval would mislead"""


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("acc", "Accuracy", weighted_accuracy),
        Metric("auc", "AUC", weighted_auc, exchange="ranks"),
        Metric("balanced_acc", "Balanced accuracy", weighted_balanced_accuracy),
        Metric("f1", "Weighted F1", weighted_f1),
        Metric("brier", "Brier score", weighted_brier, higher_is_better=False, percent=False),
        Metric(
            "ece",
            "Calibration error",
            weighted_calibration_error,
            higher_is_better=False,
            percent=False,
            interval="none",
        ),
        Metric("mae", "MAE", weighted_mae, "regression", higher_is_better=False, percent=False, in_unit=True),
        Metric(
            "rmse",
            "RMSE",
            weighted_rmse,
            "regression",
            higher_is_better=False,
            percent=False,
            in_unit=True,
            interval="basic",
        ),
        # The spread of the targets in a resample of a small fold is far below that of the fold: no interval covers.
        Metric("r2", "R²", weighted_r2, "regression", percent=False, interval="none"),
        Metric("pearson", "Pearson r", weighted_pearson, "regression", exchange="standardised", percent=False),
        Metric("spearman", "Spearman ρ", weighted_spearman, "regression", exchange="ranks", percent=False),
        Metric("c_index", "C-index", weighted_c_index, "survival", exchange="ranks", percent=False),
    )
}

SHOWN: dict[TaskKind, tuple[str, ...]] = {
    "classification": ("acc", "balanced_acc", "auc"),
    "regression": ("mae", "rmse", "r2", "pearson", "spearman"),
    "survival": ("c_index",),
}
"""Metrics of the tables and tests of a comparison"""
MAIN: dict[TaskKind, str] = {"classification": "auc", "regression": "mae", "survival": "c_index"}
"""The metric of headlines and plots"""


def metric(name: str) -> Metric:
    """Look up a metric by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in METRICS:
        raise ConfigError(f"there is no metric called {name!r}.", fix=f"Choose from: {', '.join(METRICS)}.")
    return METRICS[name]


def metrics_of(kind: TaskKind) -> tuple[Metric, ...]:
    """Return the metrics that a kind of task has."""
    return tuple(m for m in METRICS.values() if m.kind == kind)


def undefined_reason(name: str, part: Scored) -> str | None:
    """Say why a metric has no value on these slides (of one fold and seed), or None if it has one.

    Raises:
        ConfigError: the metric is for tasks of another kind.
    """
    of = metric(name)
    if of.kind != part.kind:
        fitting = ", ".join(m.name for m in metrics_of(part.kind))
        raise ConfigError(f"{of.title} is no metric of {part.kind}.", fix=f"Choose from: {fitting}.")
    if isinstance(part, Predictions):
        return _without_class(part.labels, part.class_names) if name == "auc" else None
    if name == "c_index":
        return undefined_c_index(part.truth, part.answers)
    if name in ("mae", "rmse"):
        return None
    if len(part) < 2:
        return f"{of.title} undefined: one slide does not vary"
    if len(np.unique(part.truth)) < 2:
        return f"{of.title} undefined: the target is the same for all {len(part)} scored"
    if name != "r2" and len(np.unique(part.answers)) < 2:
        return f"{of.title} undefined: the prediction is the same for all {len(part)} scored"
    return None


def _without_class(labels: IntArray, class_names: Sequence[str]) -> str | None:
    missing = [class_names[c] for c in range(len(class_names)) if not (labels == c).any()]
    if not missing:
        return None
    return f"AUC undefined: no {' and no '.join(repr(m) for m in missing)} among the {len(labels)} scored"


@dataclass(frozen=True)
class ClassScores:
    """How one class fares against the rest; nan where undefined (no slide of it, or none called it)."""

    name: str
    support: int
    recall: float
    precision: float
    f1: float
    auc: float


@dataclass(frozen=True)
class Scores:
    """All metrics of one set of slides (one fold, one seed)."""

    values: dict[str, float]
    """By metric name; nan where undefined"""
    reasons: dict[str, str]
    """By metric name, only where undefined"""
    per_class: tuple[ClassScores, ...]
    confusion: IntArray
    """(C, C), true class in rows, predicted class in columns"""
    count: int

    def __getitem__(self, name: str) -> float:
        return self.values[name]


def score(labels: npt.ArrayLike, probabilities: npt.ArrayLike, class_names: Sequence[str]) -> Scores:
    """Compute every metric of classes on one set of slides. Never call it on scores pooled over folds."""
    y = np.asarray(labels, dtype=np.int64)
    p = np.asarray(probabilities, dtype=np.float64)
    one = np.ones((1, len(y)))
    values = {m.name: float(m.function(y, p, one)[0]) for m in metrics_of("classification")}
    without = _without_class(y, class_names)
    reasons = {} if without is None else {"auc": without}
    confusion = weighted_confusion(y, p, one)[0]
    per_class = []
    for c, name in enumerate(class_names):
        hits, support, called = confusion[c, c], confusion[c].sum(), confusion[:, c].sum()
        per_class.append(
            ClassScores(
                name=name,
                support=int(support),
                recall=hits / support if support else float("nan"),
                precision=hits / called if called else float("nan"),
                f1=2 * hits / (support + called) if support + called else float("nan"),
                auc=float(weighted_binary_auc(y == c, p[:, c], one)[0]),
            )
        )
    return Scores(values, reasons, tuple(per_class), np.rint(confusion).astype(np.int64), len(y))


def fold_scores(predictions: Scored) -> pd.DataFrame:
    """Tidy table, a row for each fold, seed, level ("slide", "patient") and metric: value, count, reason if undefined.

    Patient level is left out where every patient has one slide, since it would repeat the slide level, and where no
    patient has one truth, since there is none to compare with.
    """
    levels = {"slide": predictions}
    unmixed = set(predictions.patient_ids) - set(predictions.mixed_patients())
    if unmixed and not predictions.one_slide_per_patient():
        levels["patient"] = predictions.by_patient()
    rows = []
    for level, at_level in levels.items():
        for fold, seed, index in at_level.cells():
            part = at_level.take(index)
            for m in metrics_of(part.kind):
                reason = undefined_reason(m.name, part)
                # What has a reason has no value, even where rounding would give one.
                value = float("nan") if reason else float(m.function(part.truth, part.answers, _once(part))[0])
                where = {"fold": fold, "seed": seed, "level": level, "metric": m.name}
                rows.append({**where, "value": value, "count": len(part), "reason": reason or ""})
    return pd.DataFrame(rows)


def reliability_bins(predictions: Predictions, bins: int = 5) -> pd.DataFrame:
    """Accuracy against stated confidence, in bins of equally many slides over all test folds and seeds.

    Columns: bin (from 0, by confidence), confidence (mean highest probability), accuracy, count. Calls are made within
    a fold, so that counting them over folds compares no scores.
    """
    confidence = predictions.probabilities.max(axis=1)
    correct = predictions.probabilities.argmax(axis=1) == predictions.labels
    parts = [part for part in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(part)]
    return pd.DataFrame(
        [
            {
                "bin": i,
                "confidence": float(confidence[part].mean()),
                "accuracy": float(correct[part].mean()),
                "count": len(part),
            }
            for i, part in enumerate(parts)
        ]
    )


def _once(part: Scored) -> FloatArray:
    return np.ones((1, len(part)))


def _mean(values: FloatArray, weights: FloatArray) -> FloatArray:
    return _ratio(weights @ values, weights.sum(axis=1))


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
