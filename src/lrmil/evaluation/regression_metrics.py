"""Metrics of predicted numbers. Signature and meaning of the weights as in `metrics`: (n,), (n,), (B, n) -> (B,)."""

from __future__ import annotations

import numpy as np

from lrmil.evaluation.scored import FloatArray

_TINY = 1e-12
"""Share of the largest deviation below which a spread is rounding, not spread"""


def weighted_mae(targets: FloatArray, predicted: FloatArray, weights: FloatArray) -> FloatArray:
    """Mean absolute error, in the unit of the target."""
    return _ratio(weights @ np.abs(predicted - targets), weights.sum(axis=1))


def weighted_rmse(targets: FloatArray, predicted: FloatArray, weights: FloatArray) -> FloatArray:
    """Root of the mean squared error, in the unit of the target."""
    return np.sqrt(_ratio(weights @ (predicted - targets) ** 2, weights.sum(axis=1)))


def weighted_r2(targets: FloatArray, predicted: FloatArray, weights: FloatArray) -> FloatArray:
    """1 - squared error / squared deviation of the targets from their own mean; negative where the mean is better.

    nan where the targets do not vary.
    """
    spread = _spread(np.broadcast_to(targets, weights.shape), weights)
    return 1.0 - _ratio(weights @ (predicted - targets) ** 2, spread)


def weighted_pearson(targets: FloatArray, predicted: FloatArray, weights: FloatArray) -> FloatArray:
    """Linear correlation; nan where either does not vary."""
    shape = weights.shape
    return _correlation(np.broadcast_to(targets, shape), np.broadcast_to(predicted, shape), weights)


def weighted_spearman(targets: FloatArray, predicted: FloatArray, weights: FloatArray) -> FloatArray:
    """Correlation of midranks, which are those of each resample; nan where either does not vary."""
    return _correlation(_ranks(targets, weights), _ranks(predicted, weights), weights)


def _ranks(values: FloatArray, weights: FloatArray) -> FloatArray:
    """(B, n) midranks, up to a constant, where each value stands as often as its weight says."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) > 0])
    inside = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(inside, axis=1) - 0.5 * inside)[:, group]


def _correlation(x: FloatArray, y: FloatArray, weights: FloatArray) -> FloatArray:
    dx, dy = _centred(x, weights), _centred(y, weights)
    below = np.sqrt(_spread(x, weights) * _spread(y, weights))
    return np.clip(_ratio((weights * dx * dy).sum(axis=1), below), -1.0, 1.0)


def _spread(values: FloatArray, weights: FloatArray) -> FloatArray:
    """(B,) weighted sum of squared deviations; exactly 0 where all that counts is equal."""
    deviations = _centred(values, weights)
    total = (weights * deviations**2).sum(axis=1)
    size = np.abs(np.where(weights > 0, values, 0.0)).max(axis=1)
    return np.where(total <= (_TINY * size) ** 2 * weights.sum(axis=1), 0.0, total)


def _centred(values: FloatArray, weights: FloatArray) -> FloatArray:
    mean = _ratio((weights * values).sum(axis=1), weights.sum(axis=1))
    return np.where(weights > 0, values - np.nan_to_num(mean)[:, None], 0.0)


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
