from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from lrmil.errors import ConfigError
from lrmil.evaluation import Predictions, bootstrap, concatenate, paired_bootstrap
from lrmil.evaluation.intervals import resample_patients

Simulate = Callable[..., Predictions]


def test_the_slides_of_a_patient_always_share_one_weight(simulate: Simulate) -> None:
    p = simulate(np.random.default_rng(0), 30, slides_per_patient=3)
    drawn = resample_patients(p, 50, seed=1)
    rows = drawn.for_rows(p.patient_ids, slice(0, 50))
    assert rows.shape == (50, 90)
    grouped = rows.reshape(50, 30, 3)
    assert (grouped == grouped[:, :, :1]).all()
    assert rows.std(axis=0).min() > 0


@pytest.mark.parametrize("rescale", [True, False])
def test_each_stratum_keeps_its_size_and_weights_average_to_one(simulate: Simulate, rescale: bool) -> None:
    p = simulate(np.random.default_rng(0), 40)
    drawn = resample_patients(p, 4000, seed=1, rescale=rescale)
    order = np.searchsorted(drawn.patients.astype(str), p.patient_ids.astype(str))
    weights = drawn.weights[:, order]
    for fold in range(5):
        for label in (0, 1):
            inside = weights[:, (p.folds == fold) & (p.labels == label)]
            np.testing.assert_allclose(inside.sum(axis=1), 4)
            # Variance of a stratum mean of n is s2/n: reached with the rescaling, (n - 1)/n of it without.
            value = np.array([0.0, 1.0, 5.0, 2.0])
            wanted = value.var(ddof=1) / 4 * (1 if rescale else 0.75)
            assert (inside @ value / 4).var() == pytest.approx(wanted, rel=0.12)


def test_value_is_the_mean_of_fold_aucs_never_the_pooled_auc(simulate: Simulate) -> None:
    p = simulate(np.random.default_rng(3), 60, seeds=2)
    # Shift the scores of each fold's model: folds keep their own AUC, the pooled one changes.
    shifted = p.probabilities[:, 1] * 0.1 + 0.18 * p.folds
    q = Predictions.of(
        slide_ids=p.slide_ids.tolist(),
        labels=p.labels,
        probabilities=np.stack([1 - shifted, shifted], axis=1),
        class_names=p.class_names,
        folds=p.folds,
        seeds=p.seeds,
    )
    cells = [roc_auc_score(q.labels[r], q.probabilities[r, 1]) for _, _, r in q.cells()]
    assert bootstrap(q, "auc", seed=0, resamples=50).value == pytest.approx(np.mean(cells))
    assert bootstrap(p, "auc", seed=0, resamples=50).value == pytest.approx(np.mean(cells))
    assert abs(roc_auc_score(q.labels, q.probabilities[:, 1]) - np.mean(cells)) > 0.05


def test_seeds_are_averaged_first_and_share_the_drawn_patients(simulate: Simulate) -> None:
    one = simulate(np.random.default_rng(5), 40)
    again = Predictions.of(
        slide_ids=one.slide_ids.tolist(),
        labels=one.labels,
        patient_ids=one.patient_ids.tolist(),
        probabilities=one.probabilities,
        class_names=one.class_names,
        folds=one.folds,
        seeds=one.seeds + 7,
    )
    # A second seed with the same answers adds no information: the interval must not shrink.
    single, double = (bootstrap(p, "auc", seed=2, resamples=500) for p in (one, concatenate([one, again])))
    assert (single.low, single.high, single.value) == pytest.approx((double.low, double.high, double.value))


@pytest.mark.parametrize(("name", "truth"), [("auc", norm.cdf(1 / np.sqrt(2))), ("acc", norm.cdf(0.5))])
def test_interval_covers_the_known_truth(simulate: Simulate, name: str, truth: float) -> None:
    rng = np.random.default_rng(11)
    repeats, hits = 200, 0
    for k in range(repeats):
        i = bootstrap(simulate(rng, 60), name, seed=k, resamples=300)
        hits += i.low - 1e-9 <= truth <= i.high + 1e-9
    assert 0.91 <= hits / repeats <= 0.99


def test_resampling_slides_of_few_patients_would_be_too_sure(simulate: Simulate) -> None:
    # Five identical slides of each patient: treating slides as patients shrinks the interval, whole patients do not.
    base = simulate(np.random.default_rng(2), 40)
    index = np.repeat(np.arange(len(base)), 5)
    common = {
        "slide_ids": [f"s{i}" for i in range(len(index))],
        "labels": base.labels[index],
        "probabilities": base.probabilities[index],
        "class_names": base.class_names,
        "folds": base.folds[index],
    }
    whole = bootstrap(Predictions.of(**common, patient_ids=base.patient_ids[index].tolist()), "auc", seed=0)
    loose = bootstrap(Predictions.of(**common), "auc", seed=0)
    alone = bootstrap(base, "auc", seed=0)
    assert (whole.low, whole.high) == pytest.approx((alone.low, alone.high))
    assert loose.high - loose.low < 0.7 * (whole.high - whole.low)


def test_paired_difference_is_sharper_than_two_single_intervals(simulate: Simulate) -> None:
    a = simulate(np.random.default_rng(4), 60, separation=1.5)
    noise = np.random.default_rng(5).normal(scale=0.02, size=len(a))
    second = np.clip(a.probabilities[:, 1] + noise, 0, 1)
    b = Predictions.of(
        slide_ids=a.slide_ids.tolist(),
        patient_ids=a.patient_ids.tolist(),
        labels=a.labels,
        probabilities=np.stack([1 - second, second], axis=1),
        class_names=a.class_names,
        folds=a.folds,
    )
    difference = paired_bootstrap(a, b, "auc", seed=0)
    single = bootstrap(a, "auc", seed=0)
    assert difference.value == pytest.approx(single.value - bootstrap(b, "auc", seed=0).value)
    assert difference.high - difference.low < 0.5 * (single.high - single.low)
    assert difference.low <= difference.value <= difference.high
    same = paired_bootstrap(a, a, "auc", seed=0)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert not same.excludes_zero()


def test_methods_tested_on_other_slides_or_folds_are_not_compared(simulate: Simulate) -> None:
    a = simulate(np.random.default_rng(0), 20)
    with pytest.raises(ConfigError, match="test design"):
        paired_bootstrap(a, a.take(np.arange(19)), "auc", seed=0)
    moved = Predictions.of(
        slide_ids=a.slide_ids.tolist(),
        patient_ids=a.patient_ids.tolist(),
        labels=a.labels,
        probabilities=a.probabilities,
        class_names=a.class_names,
        folds=(a.folds + 1) % 5,
    )
    with pytest.raises(ConfigError, match="test design"):
        paired_bootstrap(a, moved, "auc", seed=0)


def test_fold_without_a_class_is_left_out_and_named(simulate: Simulate) -> None:
    p = simulate(np.random.default_rng(0), 40)
    kept = p.take(~((p.folds == 3) & (p.labels == 1)))
    interval = bootstrap(kept, "auc", seed=0)
    others = bootstrap(p.take(p.folds != 3), "auc", seed=0)
    assert interval.value == pytest.approx(others.value)
    assert any("fold 3" in n and "'positive'" in n for n in interval.notes)
    only = bootstrap(kept.take(kept.folds == 3), "auc", seed=0)
    assert np.isnan([only.value, only.low, only.high]).all()


def test_same_seed_same_interval_and_other_seed_another(simulate: Simulate) -> None:
    p = simulate(np.random.default_rng(0), 40)
    assert bootstrap(p, "brier", seed=1) == bootstrap(p, "brier", seed=1)
    assert bootstrap(p, "brier", seed=1) != bootstrap(p, "brier", seed=2)


def test_strata_of_one_patient_and_perfect_scores_are_pointed_out() -> None:
    p = Predictions.of(
        slide_ids=range(6),
        labels=[0, 0, 0, 1, 0, 1],
        probabilities=[[0.9, 0.1]] * 3 + [[0.2, 0.8]] + [[0.9, 0.1]] + [[0.2, 0.8]],
        class_names=["n", "p"],
        folds=[0, 0, 0, 0, 1, 1],
    )
    interval = bootstrap(p, "auc", seed=0)
    assert interval.value == 1
    assert any("3 of its strata" in n for n in interval.notes)
    assert any("no certainty" in n for n in interval.notes)
    lonely = bootstrap(p.take(p.folds == 1), "auc", seed=0)
    assert lonely.value == 1
    assert np.isnan(lonely.low)


def test_calibration_error_has_no_interval(simulate: Simulate) -> None:
    interval = bootstrap(simulate(np.random.default_rng(0), 40), "ece", seed=0, resamples=50)
    assert np.isfinite(interval.value)
    assert np.isnan(interval.low)
    assert any("biases" in n for n in interval.notes)


def test_seeds_that_deal_other_folds_still_resample_whole_patients(simulate: Simulate) -> None:
    p = simulate(np.random.default_rng(0), 60, seeds=2)
    redealt = np.where(p.seeds == 1, (p.folds + 2 * (p.labels == 1)) % 5, p.folds)
    q = Predictions.of(
        slide_ids=p.slide_ids.tolist(),
        patient_ids=p.patient_ids.tolist(),
        labels=p.labels,
        probabilities=p.probabilities,
        class_names=p.class_names,
        folds=redealt,
        seeds=p.seeds,
    )
    drawn = resample_patients(q, 20, seed=0)
    assert drawn.frozen_strata == 0
    np.testing.assert_allclose(drawn.weights.sum(axis=1), 60)
    interval = bootstrap(q, "auc", seed=0, resamples=400)
    assert interval.low < interval.value < interval.high
