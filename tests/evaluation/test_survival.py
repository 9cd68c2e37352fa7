from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lrmil.errors import ConfigError
from lrmil.evaluation import Values
from lrmil.evaluation.survival import censoring_curve, kaplan_meier, log_rank, median_follow_up, risk_groups
from lrmil.evaluation.survival_metrics import (
    brier_curve,
    censoring_scores,
    integrated_brier,
    uno_c_index,
    weighted_c_index,
)

SimulateValues = Callable[..., Values]
Floats = npt.NDArray[np.float64]

# A small case with ties of every kind, and what lifelines 0.30.3 says of it.
TIME = np.array([5, 8, 8, 12, 12, 15, 20, 20, 20, 26, 30, 31, 34, 40, 42, 42], float)
EVENT = np.array([1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0], float)
RISK = np.array([2.1, 0.4, 1.0, 1.7, -0.3, 0.9, 1.0, 0.2, 0.2, -0.5, 1.1, -0.1, -1.2, 0.3, -0.9, -1.5])
GROUP = np.array([0, 1, 2, 0, 1, 0, 0, 2, 1, 2, 0, 1, 2, 1, 2, 2])
CASE = np.stack([TIME, EVENT], axis=1)
LIFELINES_C = 0.7345679012345679
LIFELINES_SURVIVAL = {5: 0.9375, 12: 0.7403846153846154, 26: 0.5076923076923076, 42: 0.1523076923076923}
LIFELINES_INTERVAL = {
    5: (0.6323454417389031, 0.9909531417446664),
    20: (0.3047867393395115, 0.793852327071219),
    42: (0.010974194863967194, 0.4561919773953641),
}
LIFELINES_THREE_GROUPS = (1.652284318951488, 0.43773474395187484)
LIFELINES_TWO_GROUPS = (1.3198411391506564, 0.25062056322768217)


@st.composite
def cases(draw: st.DrawFn, least: int = 2) -> tuple[Floats, Floats]:
    """Times with many ties, events, and risks with ties."""
    count = draw(st.integers(least, 25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    times = rng.integers(1, draw(st.sampled_from([4, 30])), size=count).astype(np.float64)
    events = (rng.uniform(size=count) < draw(st.sampled_from([0.2, 0.7, 1.0]))).astype(np.float64)
    return np.stack([times, events], axis=1), rng.integers(0, draw(st.sampled_from([2, 5, 100])), count).astype(float)


def _brute_c(targets: Floats, risk: Floats, factor: Floats | None = None) -> float:
    won = known = told = 0.0
    for i, (ti, di) in enumerate(targets):
        for j, (tj, dj) in enumerate(targets):
            if di == 1 and (ti < tj or (ti == tj and dj == 0)):
                f = 1.0 if factor is None else factor[i]
                known += f
                won += f * (1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0)
                told += f * (risk[i] != risk[j])
    return won / known if told else float("nan")


@given(case=cases())
@settings(deadline=None, max_examples=80)
def test_c_index_counts_pairs(case: tuple[Floats, Floats]) -> None:
    targets, risk = case
    got = weighted_c_index(targets, risk, np.ones((1, len(risk))))[0]
    np.testing.assert_allclose(got, _brute_c(targets, risk), atol=1e-12)


def test_c_index_equals_that_of_lifelines() -> None:
    assert weighted_c_index(CASE, RISK, np.ones((1, 16)))[0] == pytest.approx(LIFELINES_C, abs=1e-12)


def test_c_index_without_censoring_and_ties_is_kendalls_tau() -> None:
    rng = np.random.default_rng(0)
    times, risk = rng.permutation(40) + 1.0, rng.normal(size=40)
    tau = stats.kendalltau(-risk, times).statistic
    got = weighted_c_index(np.stack([times, np.ones(40)], axis=1), risk, np.ones((1, 40)))[0]
    assert got == pytest.approx((tau + 1) / 2)


@given(case=cases(), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_whole_weights_mean_repeated_slides(case: tuple[Floats, Floats], seed: int) -> None:
    targets, risk = case
    weights = np.random.default_rng(seed).integers(0, 3, size=(4, len(risk)))
    values = weighted_c_index(targets, risk, weights.astype(np.float64))
    for row, value in zip(weights, values, strict=True):
        index = np.repeat(np.arange(len(risk)), row)
        np.testing.assert_allclose(value, _brute_c(targets[index], risk[index]), atol=1e-12)


def test_blocks_of_pairs_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(0).uniform(size=(3, 16))
    whole = weighted_c_index(CASE, RISK, weights)
    monkeypatch.setattr("lrmil.evaluation.survival_metrics._BLOCK_VALUES", 33)
    np.testing.assert_allclose(weighted_c_index(CASE, RISK, weights), whole)


@given(case=cases(least=4), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_kaplan_meier_equals_scipy(case: tuple[Floats, Floats], seed: int) -> None:
    (time, event), _ = case[0].T, seed
    curve = kaplan_meier(time, event)
    sample = stats.CensoredData(uncensored=time[event == 1], right=time[event == 0])
    sf = stats.ecdf(sample).sf
    np.testing.assert_allclose(curve.at(sf.quantiles), sf.probabilities, atol=1e-12)
    assert (curve.at_risk[0], curve.events.sum(), curve.censored.sum()) == (len(time), event.sum(), (1 - event).sum())


def test_kaplan_meier_and_its_interval_equal_those_of_lifelines() -> None:
    curve = kaplan_meier(TIME, EVENT)
    for time, value in LIFELINES_SURVIVAL.items():
        assert curve.at(time) == pytest.approx(value)
    for time, ends in LIFELINES_INTERVAL.items():
        place = int(np.flatnonzero(curve.times == time)[0])
        assert (curve.low[place], curve.high[place]) == pytest.approx(ends)
    assert curve.median() == 31.0
    assert curve.at([0, 4.99]).tolist() == [1, 1]
    assert curve.before(5) == 1
    assert curve.risk_set([0, 5, 5.1, 12, 100]).tolist() == [16, 16, 15, 13, 0]


def test_curve_that_falls_to_zero_has_no_interval_there() -> None:
    curve = kaplan_meier([1, 2, 3], [1, 1, 1])
    assert curve.survival[-1] == 0
    assert np.isnan(curve.low[-1])
    assert np.isfinite(curve.low[0])
    with pytest.raises(ConfigError, match="nobody"):
        kaplan_meier([], [])


def test_median_follow_up_turns_events_and_censoring_round() -> None:
    assert median_follow_up(np.array([[1.0, 0], [2, 0], [3, 0], [4, 0]])) == 2.0
    # Early deaths leave nobody less observed: with them, those who stayed still stayed for long.
    with_deaths = np.array([[0.5, 1], [0.6, 1], [10, 0], [20, 0], [30, 0]])
    assert median_follow_up(with_deaths) == 20.0
    assert np.isnan(median_follow_up(np.array([[1.0, 1], [2, 1]])))


def test_who_dies_at_a_time_is_not_at_risk_of_being_censored_then() -> None:
    # At time 2 one dies and one is censored; of two still at risk of censoring (one, after the death), one leaves.
    curve = censoring_curve(np.array([[2.0, 1], [2.0, 0], [5.0, 0]]))
    assert curve.at(2) == pytest.approx(0.5)


def test_log_rank_equals_lifelines_and_scipy() -> None:
    three = log_rank(TIME, EVENT, GROUP)
    assert (three.statistic, three.p_value) == pytest.approx(LIFELINES_THREE_GROUPS)
    two = log_rank(TIME, EVENT, GROUP > 0)
    assert (two.statistic, two.p_value) == pytest.approx(LIFELINES_TWO_GROUPS)
    samples = [
        stats.CensoredData(uncensored=TIME[inside & (EVENT == 1)], right=TIME[inside & (EVENT == 0)])
        for inside in (GROUP > 0, GROUP == 0)
    ]
    assert two.p_value == pytest.approx(stats.logrank(*samples).pvalue)
    assert two.observed.sum() == pytest.approx(two.expected.sum()) == EVENT.sum()


def test_log_rank_within_strata_does_not_see_what_lies_between_them() -> None:
    rng = np.random.default_rng(0)
    stratum = np.repeat([0, 1], 100)
    group = np.where(rng.uniform(size=200) < np.where(stratum == 0, 0.8, 0.2), "high", "low")
    time = rng.exponential(np.where(stratum == 0, 1.0, 20.0))
    event = np.ones(200)
    assert log_rank(time, event, group).p_value < 0.01
    assert log_rank(time, event, group, strata=stratum).p_value > 0.05
    one = log_rank(time, event, group, strata=np.zeros(200))
    assert one.p_value == pytest.approx(log_rank(time, event, group).p_value)


@pytest.mark.parametrize(
    ("time", "event", "group", "reason"),
    [
        ([1, 2, 3], [1, 1, 0], [1, 1, 1], "one group"),
        ([1, 2, 3], [0, 0, 0], [0, 1, 1], "no event"),
        ([1, 2, 3, 4], [0, 0, 1, 1], [0, 0, 1, 1], "never at risk"),
    ],
)
def test_log_rank_that_cannot_be_done_says_why(
    time: list[float], event: list[float], group: list[int], reason: str
) -> None:
    test = log_rank(time, event, group)
    assert np.isnan(test.p_value)
    assert reason in test.reason


def test_uno_weighs_pairs_by_censoring() -> None:
    train = np.stack([TIME + 1, EVENT], axis=1)
    alive = censoring_curve(train).before(TIME)
    factor = np.where(alive > 0, 1 / np.maximum(alive, 1e-9) ** 2, 0)
    assert uno_c_index(CASE, RISK, train)[0] == pytest.approx(_brute_c(CASE, RISK, factor))
    early = np.where(TIME < 25, factor, 0)
    assert uno_c_index(CASE, RISK, train, tau=25)[0] == pytest.approx(_brute_c(CASE, RISK, early))
    # Where nobody was censored it is Harrell's.
    everyone = np.stack([TIME, np.ones(16)], axis=1)
    harrell = weighted_c_index(everyone, RISK, np.ones((1, 16)))
    assert uno_c_index(everyone, RISK, everyone) == pytest.approx(harrell)


def test_brier_without_censoring_is_the_mean_squared_error() -> None:
    rng = np.random.default_rng(0)
    targets = np.stack([rng.uniform(1, 10, size=30), np.ones(30)], axis=1)
    times = np.array([2.0, 4.0, 7.0])
    survival = np.sort(rng.uniform(size=(30, 3)), axis=1)[:, ::-1]
    wanted = ((survival - (targets[:, :1] > times)) ** 2).mean(axis=0)
    got = brier_curve(targets, survival, times, targets)
    np.testing.assert_allclose(got, wanted)
    area = (2 * (wanted[0] + wanted[1]) / 2 + 3 * (wanted[1] + wanted[2]) / 2) / 5
    assert integrated_brier(targets, survival, times, targets) == pytest.approx(area)
    perfect = (targets[:, :1] > times).astype(float)
    assert integrated_brier(targets, perfect, times, targets) == 0


def test_scores_that_need_the_training_split_s_censoring() -> None:
    train = np.stack([TIME + 1, EVENT], axis=1)
    times = (10.0, 20.0, 25.0)
    survival = np.sort(np.random.default_rng(0).uniform(size=(16, 3)), axis=1)[:, ::-1]
    both = censoring_scores(CASE, RISK, train, survival, times)
    assert both["uno_c"] == uno_c_index(CASE, RISK, train)[0]
    assert both["ibs"] == integrated_brier(CASE, survival, np.array(times), train)
    assert np.isfinite(list(both.values())).all()
    alone = censoring_scores(CASE, RISK, train)
    assert alone["uno_c"] == both["uno_c"]
    assert np.isnan(alone["ibs"])


def test_brier_weighs_for_censoring_by_hand() -> None:
    # Of four, one is censored at 2: G is 1 before and 2/3 from then on (three at risk after the death at 1).
    targets = np.array([[1.0, 1], [2.0, 0], [4.0, 1], [6.0, 1]])
    survival = np.array([[0.2], [0.6], [0.7], [0.9]])
    wanted = (0.2**2 / 1 + 0 + (0.3**2 + 0.1**2) / (2 / 3)) / 4
    assert brier_curve(targets, survival, np.array([3.0]), targets)[0] == pytest.approx(wanted)


def test_brier_beyond_all_observation_is_undefined() -> None:
    targets = np.array([[1.0, 1], [2.0, 0]])
    times = np.array([1.5, 3.0])
    survival = np.full((2, 2), 0.5)
    curve = brier_curve(targets, survival, times, targets)
    assert np.isfinite(curve[0])
    assert np.isnan(curve[1])
    assert np.isnan(integrated_brier(targets, survival, times, targets))
    with pytest.raises(ConfigError, match="times increasing"):
        brier_curve(targets, survival, times[::-1], targets)
    with pytest.raises(ConfigError, match="no probability"):
        brier_curve(targets, survival + 1, times, targets)


def test_groups_of_risk_come_from_the_thresholds_of_their_own_model() -> None:
    values = Values.of(
        slide_ids=["a1", "a2", "b", "c", "d"],
        patient_ids=["a", "a", "b", "c", "d"],
        targets=[[1, 1], [1, 1], [2, 0], [3, 1], [4, 1]],
        predicted=[0.0, 3.0, 1.0, 11.0, 14.0],
        folds=[0, 0, 0, 1, 1],
    )
    patients, high = risk_groups(values, {0: 1.2, 1: 12.0})
    assert dict(zip(patients.patient_ids, high, strict=True)) == {"a": True, "b": False, "c": False, "d": True}
    with pytest.raises(ConfigError, match="fold 1 has no threshold"):
        risk_groups(values, {0: 1.0})


def test_seeds_vote_each_by_its_own_threshold(simulate_values: SimulateValues) -> None:
    rng = np.random.default_rng(0)
    three = simulate_values(rng, "survival", 20, seeds=3)
    limits = {(fold, seed): 0.1 * fold - 0.05 * seed for fold in range(5) for seed in range(3)}
    patients, high = risk_groups(three, limits)
    assert len(patients) == 20
    for patient, said in zip(patients.patient_ids, high, strict=True):
        rows = np.flatnonzero(three.patient_ids == patient)
        votes = [three.predicted[r] > limits[(int(three.folds[r]), int(three.seeds[r]))] for r in rows]
        assert said == (sum(votes) >= 2)
    with pytest.raises(ConfigError, match="fold 0, seed 0 has no threshold"):
        risk_groups(three, dict.fromkeys(range(5), 0.0))
