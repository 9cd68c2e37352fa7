from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from lrmil.errors import ConfigError
from lrmil.evaluation import (
    Predictions,
    compare_methods,
    concatenate,
    delong,
    delong_test,
    holm,
    paired_bootstrap,
    permutation_test,
)
from lrmil.evaluation.paired import placements

Simulate = Callable[..., Predictions]
Floats = npt.NDArray[np.float64]


def _two_scores(seed: int, count: int = 40, levels: int | None = None) -> tuple[npt.NDArray[np.bool_], Floats, Floats]:
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 3 == 0
    common = rng.normal(size=count) + y
    a, b = common + 0.5 * rng.normal(size=count), 0.3 * common + rng.normal(size=count)
    return (y, a, b) if levels is None else (y, np.round(a * levels) / levels, np.round(b * levels) / levels)


def _brute_delong(y: npt.NDArray[np.bool_], a: Floats, b: Floats) -> tuple[float, float]:
    """Difference and its variance from the full table of pairs."""

    def table(s: Floats) -> Floats:
        pos, neg = s[y][:, None], s[~y][None]
        return (pos > neg) + 0.5 * (pos == neg)

    d = table(a) - table(b)
    m, n = d.shape
    return d.mean(), d.mean(axis=1).var(ddof=1) / m + d.mean(axis=0).var(ddof=1) / n


@given(seed=st.integers(0, 10_000), levels=st.sampled_from([None, 1, 2]))
@settings(deadline=None, max_examples=40)
def test_delong_equals_the_full_table_of_pairs_ties_included(seed: int, levels: int | None) -> None:
    y, a, b = _two_scores(seed, levels=levels)
    difference, variance = _brute_delong(y, a, b)
    got = delong(y, a, b)
    assert got.auc_first == pytest.approx(roc_auc_score(y, a))
    assert got.auc_second == pytest.approx(roc_auc_score(y, b))
    assert got.difference == pytest.approx(difference)
    assert got.se == pytest.approx(np.sqrt(variance))
    assert got.p_value == pytest.approx(2 * stats.norm.sf(abs(difference) / np.sqrt(variance)))


def test_delong_agrees_with_the_jackknife() -> None:
    y, a, b = _two_scores(3, count=240)

    def difference(keep: npt.NDArray[np.intp]) -> float:
        return _brute_delong(y[keep], a[keep], b[keep])[0]

    variance = 0.0
    for group in (np.flatnonzero(y), np.flatnonzero(~y)):
        left_out = np.array([difference(np.setdiff1d(np.arange(len(y)), [i])) for i in group])
        variance += (len(group) - 1) / len(group) * ((left_out - left_out.mean()) ** 2).sum()
    assert delong(y, a, b).se == pytest.approx(np.sqrt(variance), rel=0.02)


def test_placements_average_to_the_auc() -> None:
    y, a, _ = _two_scores(1, levels=1)
    of_positives, of_negatives = placements(y, a)
    assert (len(of_positives), len(of_negatives)) == (y.sum(), (~y).sum())
    assert of_positives.mean() == pytest.approx(roc_auc_score(y, a))
    assert of_negatives.mean() == pytest.approx(roc_auc_score(y, a))


def test_delong_of_one_score_against_itself_and_of_perfect_scores() -> None:
    y, a, _ = _two_scores(1)
    same = delong(y, a, a)
    assert (same.difference, same.se, same.p_value) == (0, 0, 1)
    extreme = delong(y, y.astype(float), 1 - y.astype(float))
    assert extreme.difference == 1
    assert np.isnan(extreme.p_value)
    assert extreme.reason
    lonely = delong([1, 0, 0], [0.5, 0.1, 0.2], [0.1, 0.2, 0.3])
    assert np.isnan(lonely.p_value)
    assert "two patients" in lonely.reason


def test_delong_over_folds_averages_differences_and_adds_variances(simulate: Simulate) -> None:
    rng = np.random.default_rng(0)
    a, b = (simulate(rng, 60, separation=s) for s in (1.5, 0.5))
    folds = [_brute_delong(a.labels[r] == 1, a.probabilities[r, 1], b.probabilities[r, 1]) for _, _, r in a.cells()]
    got = delong_test(a, b)
    assert got.difference == pytest.approx(np.mean([d for d, _ in folds]))
    assert got.se == pytest.approx(np.sqrt(np.sum([v for _, v in folds])) / 5)


def test_delong_with_a_repeated_seed_gains_nothing(simulate: Simulate) -> None:
    rng = np.random.default_rng(0)
    a, b = (simulate(rng, 60, separation=s) for s in (1.5, 0.5))
    one, two = delong_test(a, b), delong_test(_twice(a), _twice(b))
    assert (two.difference, two.se, two.p_value) == pytest.approx((one.difference, one.se, one.p_value))


def test_delong_says_where_it_does_not_apply(simulate: Simulate) -> None:
    many = simulate(np.random.default_rng(0), 20, slides_per_patient=2)
    assert "several slides" in delong_test(many, many).reason
    p = np.full((3, 3), 1 / 3)
    three = Predictions.of(slide_ids="abc", labels=[0, 1, 2], probabilities=p, class_names="xyz")
    assert "two classes" in delong_test(three, three).reason
    assert np.isnan(delong_test(three, three).p_value)


@pytest.mark.parametrize("name", ["auc", "acc"])
def test_permutation_p_values_are_uniform_under_the_null(simulate: Simulate, name: str) -> None:
    rng = np.random.default_rng(7)
    p = []
    for k in range(200):
        a, b = simulate(rng, 40, folds=2), simulate(rng, 40, folds=2)
        p.append(permutation_test(a, b, name, seed=k, permutations=99).p_value)
    values = np.array(p)
    for threshold in (0.05, 0.1, 0.25, 0.5):
        # Discrete metrics make the test conservative, never liberal (three standard errors).
        assert (values <= threshold).mean() <= threshold + 3 * np.sqrt(threshold * (1 - threshold) / 200)
    if name == "auc":
        assert 0.42 < values.mean() < 0.6


def test_permutation_finds_a_real_difference_and_its_value_is_that_of_the_folds(simulate: Simulate) -> None:
    rng = np.random.default_rng(1)
    a, b = simulate(rng, 80, separation=3.0, seeds=2), simulate(rng, 80, separation=0.0, seeds=2)
    got = permutation_test(a, b, "auc", seed=0, permutations=999)
    cells = [
        roc_auc_score(a.labels[r], a.probabilities[r, 1]) - roc_auc_score(b.labels[r], b.probabilities[r, 1])
        for _, _, r in a.cells()
    ]
    assert got.difference == pytest.approx(np.mean(cells))
    assert got.p_value == 0.001


def test_permutation_of_all_swaps_by_hand() -> None:
    # Two patients with one slide each and accuracy differences 1 and 1: of the 4 swaps, 2 are as extreme as 1.
    common = {"slide_ids": ["s", "t"], "labels": [0, 1], "class_names": ["n", "p"]}
    right = Predictions.of(**common, probabilities=[[0.9, 0.1], [0.1, 0.9]])
    wrong = Predictions.of(**common, probabilities=[[0.1, 0.9], [0.9, 0.1]])
    got = permutation_test(right, wrong, "acc", seed=0, permutations=20_000)
    assert got.difference == 1
    assert got.p_value == pytest.approx(0.5, abs=0.02)


def test_permutation_swaps_all_slides_and_seeds_of_a_patient_together() -> None:
    # The methods differ on one patient's ten slides only: swapping that patient as a whole turns the sign and nothing
    # else, so that every arrangement is as extreme. Slides or seeds swapped one by one would look significant.
    patients = ["p", "q", *["r"] * 10]
    count = len(patients)
    common = {
        "slide_ids": [f"s{i}" for i in range(count)] * 2,
        "patient_ids": patients * 2,
        "labels": [0, 1] * count,
        "class_names": ["n", "p"],
        "seeds": [0] * count + [1] * count,
    }
    truth = np.array([[0.9, 0.1], [0.1, 0.9]] * count)
    differs = (np.array(patients * 2) == "r")[:, None]
    right = Predictions.of(**common, probabilities=truth)
    wrong = Predictions.of(**common, probabilities=np.where(differs, 1 - truth, truth))
    for name in ("acc", "auc"):
        assert permutation_test(right, wrong, name, seed=0, permutations=200).p_value == 1.0


def test_auc_permutation_ignores_calibration(simulate: Simulate) -> None:
    a = simulate(np.random.default_rng(0), 60)
    squeezed = 0.5 + 1e-3 * (a.probabilities[:, 1] - 0.5)
    b = Predictions.of(
        slide_ids=a.slide_ids.tolist(),
        patient_ids=a.patient_ids.tolist(),
        labels=a.labels,
        probabilities=np.stack([1 - squeezed, squeezed], axis=1),
        class_names=a.class_names,
        folds=a.folds,
    )
    got = permutation_test(a, b, "auc", seed=0, permutations=99)
    assert (got.difference, got.p_value) == (0, 1)


def test_seed_counts_must_agree(simulate: Simulate) -> None:
    one = simulate(np.random.default_rng(0), 20)
    with pytest.raises(ConfigError, match="1 seeds, the other 2"):
        permutation_test(one, _twice(one), "auc", seed=0)


def test_a_fold_that_repeats_another_adds_no_certainty(simulate: Simulate) -> None:
    """Repeated random splits test a patient again and again: still one patient, and DeLong cannot add such folds."""
    rng = np.random.default_rng(3)
    a, b = (simulate(rng, 40, folds=1, separation=s) for s in (2.0, 1.0))
    once = paired_bootstrap(a, b, "auc", seed=0, resamples=300)
    again = [concatenate([p, replace(p, folds=p.folds + 1)]) for p in (a, b)]
    twice = paired_bootstrap(again[0], again[1], "auc", seed=0, resamples=300)
    assert (twice.value, twice.low, twice.high) == pytest.approx((once.value, once.low, once.high))
    p_values = [permutation_test(*pair, "auc", seed=0, permutations=99).p_value for pair in ((a, b), again)]
    assert p_values[0] == p_values[1]
    assert np.isfinite(delong_test(a, b).p_value)
    refused = delong_test(again[0], again[1])
    assert np.isnan(refused.p_value)
    assert "tested in several" in refused.reason


def test_holm_by_hand() -> None:
    # Sorted 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, then non-decreasing.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1.0, 1.0])


def test_holm_does_not_count_what_could_not_be_tested() -> None:
    np.testing.assert_allclose(holm([0.01, np.nan, 0.04]), [0.02, np.nan, 0.04])
    assert np.isnan(holm([np.nan])).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(deadline=None, max_examples=40)
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(p: list[float]) -> None:
    adjusted = holm(p)
    raw = np.array(p)
    assert (adjusted >= raw).all()
    assert (adjusted <= np.minimum(1, raw * len(p)) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(raw)]) >= 0).all()


def test_compare_methods_corrects_over_its_lines(simulate: Simulate) -> None:
    rng = np.random.default_rng(0)
    ours = simulate(rng, 60, separation=2.0)
    others = {f"m{i}": simulate(rng, 60, separation=s) for i, s in enumerate((0.0, 1.0, 2.0))}
    table = compare_methods(ours, others, "auc", seed=0, resamples=200, permutations=199)
    assert table["method"].tolist() == ["m0", "m1", "m2"]
    np.testing.assert_allclose(table["p_holm"], holm(table["p_permutation"]))
    assert table["p_delong"].notna().all()
    assert (table["low"] <= table["difference"]).all()
    assert compare_methods(ours, others, "acc", seed=0, resamples=50, permutations=49)["p_delong"].isna().all()


def _twice(p: Predictions) -> Predictions:
    again = Predictions.of(
        slide_ids=p.slide_ids.tolist(),
        patient_ids=p.patient_ids.tolist(),
        labels=p.labels,
        probabilities=p.probabilities,
        class_names=p.class_names,
        folds=p.folds,
        seeds=p.seeds + 1,
    )
    return concatenate([p, again])
