from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrmil.errors import ConfigError
from lrmil.evaluation import (
    Predictions,
    Values,
    bootstrap,
    compare_methods,
    concatenate,
    constant_answer,
    fold_scores,
    paired_bootstrap,
    permutation_test,
    read_predictions,
    result_row,
)
from lrmil.evaluation.intervals import fold_average, resample_patients
from lrmil.evaluation.metrics import metric, metrics_of, undefined_reason

SimulateValues = Callable[..., Values]


def _of(**changes: Any) -> Values:
    given: dict[str, Any] = {
        "slide_ids": ["a", "b", "c"],
        "patient_ids": ["p", "p", "q"],
        "targets": [1.0, 1.0, 3.0],
        "predicted": [0.5, 1.5, 2.0],
        "folds": [0, 0, 1],
    }
    return Values.of(**(given | changes))


SURVIVAL = {"targets": [[5.0, 1], [5.0, 1], [7.5, 0]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": [1.0, float("nan"), 3.0]}, "slide b: the target nan is no number"),
        ({"predicted": [1.0, 2.0, float("inf")]}, "slide c: the prediction inf is no number"),
        ({"targets": [[5, 1], [0, 1], [7, 0]]}, "slide b: the time 0.0 is not positive"),
        ({"targets": [[5, 1], [6, 2], [7, 0]]}, "slide b: the event 2.0 is neither 1"),
        ({"targets": [[5], [6], [7]]}, "targets have shape"),
        ({"predicted": [[1, 2], [1, 2], [1, 2]]}, "targets have shape"),
        ({"targets": [1.0, 2.0]}, "columns of length"),
        ({"slide_ids": ["a", "b", "a"], "folds": [0, 1, 0]}, "slide a is predicted twice in fold 0"),
    ],
)
def test_wrong_input_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _of(**changes)


@pytest.mark.parametrize("changes", [{}, SURVIVAL])
def test_csv_round_trip_keeps_every_digit_and_the_kind(changes: dict[str, Any], tmp_path: Path) -> None:
    before = _of(slide_ids=["007", "NA", "1e5"], predicted=[1 / 3, 0.1, 1e-17], **changes)
    before.write_csv(tmp_path / "values.csv")
    after = read_predictions(tmp_path / "values.csv")
    assert isinstance(after, Values)
    assert after.kind == before.kind
    assert after.slide_ids.tolist() == ["007", "NA", "1e5"]
    for column in ("targets", "predicted", "folds", "seeds"):
        np.testing.assert_array_equal(getattr(after, column), getattr(before, column))


def test_read_predictions_tells_classes_from_values(tmp_path: Path) -> None:
    p = Predictions.of(slide_ids="ab", labels=[0, 1], probabilities=np.eye(2), class_names="xy")
    p.write_csv(tmp_path / "classes.csv")
    assert isinstance(read_predictions(tmp_path / "classes.csv"), Predictions)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"no predictions \(its columns are a, b\)"):
        read_predictions(tmp_path / "other.csv")


@pytest.mark.parametrize("changes", [{}, SURVIVAL])
def test_patient_level_is_the_mean_answer(changes: dict[str, Any]) -> None:
    patients = _of(**changes).by_patient()
    assert patients.patient_ids.tolist() == ["p", "q"]
    assert patients.predicted.tolist() == [1.0, 2.0]
    assert patients.targets.shape == (2, *np.shape(patients.targets)[1:])
    np.testing.assert_array_equal(patients.targets[0], _of(**changes).targets[0])


def test_patient_with_two_truths_is_left_out_of_the_patient_level() -> None:
    mixed = _of(targets=[[5.0, 1], [5.0, 0], [7.5, 0]])
    assert mixed.mixed_patients() == ["p"]
    assert mixed.by_patient().patient_ids.tolist() == ["q"]


def test_time_and_event_belong_to_survival_only() -> None:
    assert _of(**SURVIVAL).event.tolist() == [1, 1, 0]
    with pytest.raises(ConfigError, match="predictions of a number"):
        _ = _of().time


def test_parts_of_different_tasks_are_not_joined() -> None:
    whole = _of()
    parts = [whole.take(whole.folds == k) for k in (0, 1)]
    np.testing.assert_array_equal(concatenate(parts).predicted, whole.predicted)
    with pytest.raises(ConfigError, match="cannot be joined"):
        concatenate([parts[0], _of(**SURVIVAL).take(np.array([2]))])
    with pytest.raises(ConfigError, match="predicted twice"):
        concatenate([parts[0], parts[0]])


@pytest.mark.parametrize("kind", ["regression", "survival"])
def test_every_function_of_classes_takes_values(simulate_values: SimulateValues, kind: str) -> None:
    rng = np.random.default_rng(0)
    good, bad = (simulate_values(rng, kind, noise=n, seeds=2) for n in (0.1, 3.0))
    for m in metrics_of(good.kind):
        tidy = fold_scores(good)
        mean = tidy[tidy["metric"] == m.name].groupby("fold")["value"].mean().mean()
        interval = bootstrap(good, m.name, seed=0, resamples=100)
        assert interval.value == pytest.approx(mean)
        difference = paired_bootstrap(good, bad, m.name, seed=0, resamples=100)
        test = permutation_test(good, bad, m.name, seed=0, permutations=199)
        assert test.difference == pytest.approx(difference.value)
        assert (difference.value > 0) == m.higher_is_better
        assert test.p_value < 0.05
        frame = compare_methods(good, {"bad": bad}, m.name, seed=0, resamples=50, permutations=99)
        assert np.isnan(frame["p_delong"]).all()
    row = result_row(good, dataset="d", task="t", method="m", group="g", seed=0, resamples=50)
    assert {m.name for m in metrics_of(good.kind)} <= set(row)


@pytest.mark.parametrize(("kind", "name"), [("regression", "mae"), ("regression", "spearman"), ("survival", "c_index")])
def test_methods_that_do_not_differ_get_uniform_p_values(simulate_values: SimulateValues, kind: str, name: str) -> None:
    rng = np.random.default_rng(3)
    p = [
        permutation_test(
            simulate_values(rng, kind, 30, noise=1.0),
            simulate_values(rng, kind, 30, noise=1.0),
            name,
            seed=k,
            permutations=99,
        ).p_value
        for k in range(80)
    ]
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.09)
    assert 0.38 < np.mean(p) < 0.62


def test_resamples_of_survival_keep_the_events_of_each_fold(simulate_values: SimulateValues) -> None:
    values = simulate_values(np.random.default_rng(0), "survival")
    drawn = resample_patients(values, 200, seed=1)
    weights = drawn.for_rows(values.patient_ids, slice(0, 200))
    for fold in range(5):
        for event in (0, 1):
            inside = (values.folds == fold) & (values.event == event)
            np.testing.assert_allclose(weights[:, inside].sum(axis=1), inside.sum())


def test_permutation_of_correlations_is_blind_to_scale(simulate_values: SimulateValues) -> None:
    a, b = (simulate_values(np.random.default_rng(s), noise=1.0) for s in (0, 1))
    stretched = Values.of(
        slide_ids=b.slide_ids.tolist(),
        patient_ids=b.patient_ids.tolist(),
        targets=b.targets,
        predicted=1000 * b.predicted - 7,
        folds=b.folds,
    )
    for name in ("pearson", "spearman"):
        one, other = (permutation_test(a, x, name, seed=0, permutations=499) for x in (b, stretched))
        assert one.p_value == pytest.approx(other.p_value)
    # The error is not blind to it: a method in another unit is worse.
    assert permutation_test(a, stretched, "mae", seed=0, permutations=499).p_value < 0.01


def test_constant_prediction_has_no_correlation_and_no_order(simulate_values: SimulateValues) -> None:
    number = simulate_values(np.random.default_rng(0))
    number = replace(number, predicted=np.full(len(number), constant_answer("regression", [40.0, 60.0])))
    assert set(number.predicted) == {50.0}
    for name in ("pearson", "spearman"):
        assert np.isnan(bootstrap(number, name, seed=0, resamples=20).value)
        assert "the prediction is the same for all" in str(undefined_reason(name, number))
    assert np.isfinite(bootstrap(number, "mae", seed=0, resamples=20).low)
    survival = simulate_values(np.random.default_rng(0), "survival")
    risk = np.full(60, constant_answer("survival", [1.0]))
    flat = Values.of(slide_ids=survival.slide_ids.tolist(), targets=survival.targets, predicted=risk)
    assert "one risk for all" in str(undefined_reason("c_index", flat))
    scores = fold_scores(flat)
    assert scores["value"].isna().all()


@pytest.mark.parametrize(
    ("values", "name", "reason"),
    [
        (_of(**SURVIVAL).take(np.array([0])), "c_index", "one slide has no order"),
        (_of(targets=[[5, 0], [6, 0], [7, 0]]), "c_index", "no event among the 3 scored"),
        (_of(targets=[[5, 1], [5, 1], [5, 1]]), "c_index", "no two of different risk whose order is known"),
        (_of().take(np.array([2])), "r2", "one slide does not vary"),
        (_of().take(np.array([0, 1])), "r2", "the target is the same for all 2"),
        (_of().take(np.array([0, 1])), "spearman", "the target is the same for all 2"),
    ],
)
def test_undefined_says_why_and_has_no_value(values: Values, name: str, reason: str) -> None:
    assert reason in str(undefined_reason(name, values))
    once = np.ones((1, len(values)))
    assert np.isnan(metric(name).function(values.truth, values.answers, once)).all()
    assert np.isnan(bootstrap(values, name, seed=0, resamples=20).value)


def test_metric_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"AUC is no metric of regression. Choose from: mae"):
        bootstrap(_of(), "auc", seed=0, resamples=10)
    with pytest.raises(ConfigError, match="regression of target, predicted and survival"):
        paired_bootstrap(_of(), _of(**SURVIVAL), "mae", seed=0)


def test_fold_undefined_for_one_of_two_methods_counts_for_neither(simulate_values: SimulateValues) -> None:
    a, b = (simulate_values(np.random.default_rng(s), noise=1.0) for s in (0, 1))
    stuck = b.predicted.copy()
    stuck[b.folds == 2] = 1.0
    partly = Values.of(
        slide_ids=b.slide_ids.tolist(),
        patient_ids=b.patient_ids.tolist(),
        targets=b.targets,
        predicted=stuck,
        folds=b.folds,
    )
    kept = a.folds != 2
    wanted = fold_average(a.take(kept), metric("pearson"))[0] - fold_average(partly.take(kept), metric("pearson"))[0]
    interval = paired_bootstrap(a, partly, "pearson", seed=0, resamples=50)
    assert interval.value == pytest.approx(wanted[0])
    assert any("fold 2 left out" in note for note in interval.notes)
    assert permutation_test(a, partly, "pearson", seed=0, permutations=9).difference == pytest.approx(wanted[0])


@pytest.mark.parametrize(("name", "truth"), [("mae", 10 * np.sqrt(2 / np.pi)), ("rmse", 10.0), ("pearson", 0.5**0.5)])
def test_interval_covers_the_known_truth(name: str, truth: float) -> None:
    rng = np.random.default_rng(7)
    repeats, hits = 80, 0
    for k in range(repeats):
        target = rng.normal(size=100)
        values = Values.of(
            slide_ids=range(100),
            targets=10 * target,
            predicted=10 * (target + rng.normal(size=100)),
            folds=np.arange(100) % 5,
        )
        i = bootstrap(values, name, seed=k, resamples=150)
        hits += i.low <= truth <= i.high
    assert 0.87 <= hits / repeats <= 1


def test_r2_has_no_interval_since_none_would_cover(simulate_values: SimulateValues) -> None:
    interval = bootstrap(simulate_values(np.random.default_rng(0)), "r2", seed=0, resamples=50)
    assert np.isfinite(interval.value)
    assert np.isnan(interval.low)
    assert any("biases" in note for note in interval.notes)
