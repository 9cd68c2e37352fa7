"""The share of a gap that a method covers, against numbers made to be known."""

from __future__ import annotations

import numpy as np
import pytest
from tests.evaluation.conftest import answers

from lrmil.errors import ConfigError
from lrmil.evaluation import Interval, Values, bootstrap, paired_bootstrap, recovered_share
from lrmil.evaluation.recovery import share_of_gap


def numbers(error: float, seed: int, patients: int = 90) -> Values:
    rng = np.random.default_rng(seed)
    truth, ids = np.linspace(0, 10, patients), [f"p{i}" for i in range(patients)]
    return Values.of(
        targets=truth,
        predicted=truth + rng.choice([-1, 1], patients) * error * rng.uniform(0.5, 1.5, patients),
        slide_ids=ids,
        patient_ids=ids,
        folds=np.arange(patients) % 3,
        seeds=np.zeros(patients, int),
    )


def test_the_share_is_that_of_the_fold_averaged_metrics() -> None:
    upper, method, lower = answers(0.3, 1), answers(1.5, 2), answers(20.0, 3)
    found = recovered_share(method, upper, lower, "auc", seed=0)
    values = [bootstrap(scored, "auc", seed=0, resamples=100).value for scored in (method, upper, lower)]
    assert found.share is not None
    assert found.share.value == pytest.approx((values[0] - values[2]) / (values[1] - values[2]))
    assert found.share.low < found.share.value < found.share.high
    assert found.gap == paired_bootstrap(upper, lower, "auc", seed=0)


def test_ends_are_all_and_nothing_and_beyond_is_not_clipped() -> None:
    upper, lower = answers(0.5, 1), answers(20.0, 3)
    whole, none = (recovered_share(m, upper, lower, "auc", seed=0).share for m in (upper, lower))
    assert whole is not None
    assert none is not None
    assert (whole.value, whole.low, whole.high) == pytest.approx((1, 1, 1))
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, 0))
    middle = answers(1.5, 2)
    beyond = recovered_share(upper, middle, lower, "auc", seed=0).share
    assert beyond is not None
    assert beyond.value > 1


def test_no_share_of_a_gap_that_may_be_none_or_that_is_the_wrong_way_round() -> None:
    same, other = answers(20.0, 4), answers(20.0, 5)
    assert recovered_share(answers(0.5, 1), same, other, "auc", seed=0).share is None
    worse = recovered_share(answers(1.5, 2), answers(20.0, 3), answers(0.3, 1), "auc", seed=0)
    assert worse.gap.high < 0
    assert worse.share is None


def test_where_smaller_is_better_the_gap_is_negative() -> None:
    found = recovered_share(numbers(2.0, 1), numbers(1.0, 2), numbers(3.0, 3), "mae", seed=0)
    assert found.gap.high < 0
    assert found.share is not None
    assert found.share.value == pytest.approx(0.5, abs=0.2)


def test_resamples_without_a_gap_lie_outside_on_either_side_in_turn() -> None:
    """Of 1000, 20 have no gap: 10 lie below all shares and 10 above, so the ends move out by so many."""
    rng = np.random.default_rng(0)
    share = rng.permutation(np.linspace(0.2, 0.8, 980))
    distance = np.concatenate([np.full(10, -1e-3), np.zeros(5), np.full(5, np.nan), rng.uniform(0.5, 1.5, 980)])
    covered = np.concatenate([np.full(20, 0.5), share * distance[20:]])
    gap = Interval(1.0, 0.5, 1.5, 0.95, 1000, 40)
    order = rng.permutation(1000)
    for sign in (1, -1):
        method, upper, lower = (0.5, covered), (1.0, distance), (0.0, np.zeros(1000))
        turned = [(sign * value, sign * drawn[order]) for value, drawn in (method, upper, lower)]
        own = Interval(sign * 1.0, min(sign * 0.5, sign * 1.5), max(sign * 0.5, sign * 1.5), 0.95, 1000, 40)
        found = share_of_gap(own, *turned, higher_is_better=sign > 0)
        assert found is not None
        assert found.value == 0.5
        ordered = np.sort(share)
        assert (found.low, found.high) == pytest.approx((ordered[25 - 10], ordered[-1 - (25 - 10)]), abs=1e-3)
    assert share_of_gap(gap, *turned, higher_is_better=False) is None, "the wrong way round"
    many = [(value, np.where(np.arange(1000) < 60, np.nan, drawn)) for value, drawn in (method, upper, lower)]
    open_ended = share_of_gap(gap, *many)
    assert open_ended is not None
    assert (open_ended.low, open_ended.high) == (-np.inf, np.inf), "wider, never narrower"


def test_other_patients_are_refused() -> None:
    with pytest.raises(ConfigError, match="differ in their test design"):
        recovered_share(answers(1, 1, offset=5), answers(1, 1), answers(2, 2), "auc", seed=0)
