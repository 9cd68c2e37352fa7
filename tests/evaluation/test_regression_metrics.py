from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from lrmil.evaluation.metrics import metrics_of
from lrmil.evaluation.regression_metrics import (
    weighted_mae,
    weighted_pearson,
    weighted_r2,
    weighted_rmse,
    weighted_spearman,
)

Floats = npt.NDArray[np.float64]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Floats, Floats]:
    """Targets and predictions, with ties, of any offset."""
    count = draw(st.integers(3, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([3, 10, 1_000_000]))
    offset = draw(st.sampled_from([0.0, -5.0, 1e4]))
    target, predicted = rng.integers(0, levels, size=(2, count)).astype(np.float64)
    target[:2], predicted[:2] = (0, 1), (1, 0)
    return target + offset, predicted + offset


@given(case=cases())
@settings(deadline=None, max_examples=60)
def test_every_metric_equals_scikit_learn_or_scipy(case: tuple[Floats, Floats]) -> None:
    target, predicted = case
    one = np.ones((1, len(target)))
    wanted = {
        weighted_mae: reference.mean_absolute_error(target, predicted),
        weighted_rmse: reference.root_mean_squared_error(target, predicted),
        weighted_r2: reference.r2_score(target, predicted),
        weighted_pearson: stats.pearsonr(target, predicted).statistic,
        weighted_spearman: stats.spearmanr(target, predicted).statistic,
    }
    for function, value in wanted.items():
        assert function(target, predicted, one)[0] == pytest.approx(value, abs=1e-7, rel=1e-7), function.__name__


@given(case=cases(), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_weights_are_those_of_scikit_learn(case: tuple[Floats, Floats], seed: int) -> None:
    target, predicted = case
    weights = np.random.default_rng(seed).uniform(0.1, 3, size=(2, len(target)))
    for row in range(2):
        given_weights = {"sample_weight": weights[row]}
        assert weighted_r2(target, predicted, weights)[row] == pytest.approx(
            reference.r2_score(target, predicted, **given_weights), rel=1e-6
        )
        assert weighted_mae(target, predicted, weights)[row] == pytest.approx(
            reference.mean_absolute_error(target, predicted, **given_weights)
        )


@given(case=cases(), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_whole_weights_mean_repeated_slides(case: tuple[Floats, Floats], seed: int) -> None:
    target, predicted = case
    weights = np.random.default_rng(seed).integers(0, 3, size=(4, len(target)))
    weights[0, 1:] = 0  # one slide only
    for m in metrics_of("regression"):
        values = m.function(target, predicted, weights.astype(np.float64))
        for row, value in zip(weights, values, strict=True):
            index = np.repeat(np.arange(len(target)), row)
            alone = m.function(target[index], predicted[index], np.ones((1, len(index))))[0] if len(index) else np.nan
            np.testing.assert_allclose(value, alone, atol=1e-7, err_msg=m.name)


def test_spread_that_is_only_rounding_is_no_spread() -> None:
    target = np.full(5, 0.1) + 1e6
    weights = np.array([[1.0, 2.0, 0.5, 1.0, 1.0]])
    assert np.isnan(weighted_r2(target, target + 1, weights))[0]
    assert np.isnan(weighted_pearson(target, np.arange(5.0), weights))[0]
    # A small spread about a large mean is one.
    real = 1e6 + np.array([0.0, 0.001, 0.002, 0.003, 0.004])
    assert weighted_pearson(real, np.arange(5.0), weights)[0] == pytest.approx(1.0)


def test_r2_of_the_mean_is_zero_and_of_worse_is_negative() -> None:
    target = np.array([1.0, 2.0, 6.0])
    one = np.ones((1, 3))
    assert weighted_r2(target, np.full(3, 3.0), one)[0] == pytest.approx(0)
    assert weighted_r2(target, np.full(3, 9.0), one)[0] < -1
