from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from lrmil.errors import ConfigError
from lrmil.evaluation import Predictions, constant_answer, fold_scores, score
from lrmil.evaluation.metrics import metric, metrics_of, weighted_calibration_error

Case = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]


@st.composite
def cases(draw: st.DrawFn, min_classes: int = 2, max_classes: int = 5) -> Case:
    """Labels in which every class occurs, and probabilities coarse enough for many ties."""
    classes = draw(st.integers(min_classes, max_classes))
    extra = draw(st.lists(st.integers(0, classes - 1), max_size=25))
    labels = np.array([*range(classes), *extra])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    raw = rng.integers(1, draw(st.sampled_from([3, 6, 1000])), size=(len(labels), classes)).astype(np.float64)
    return labels, raw / raw.sum(axis=1, keepdims=True)


@given(case=cases())
@settings(deadline=None, max_examples=60)
def test_every_metric_equals_scikit_learn(case: Case) -> None:
    labels, p = case
    classes = p.shape[1]
    called = p.argmax(axis=1)
    scores = score(labels, p, [str(c) for c in range(classes)])
    assert scores["acc"] == pytest.approx(reference.accuracy_score(labels, called))
    assert scores["balanced_acc"] == pytest.approx(reference.balanced_accuracy_score(labels, called))
    assert scores["f1"] == pytest.approx(reference.f1_score(labels, called, average="weighted", zero_division=0))
    auc = (
        reference.roc_auc_score(labels, p[:, 1])
        if classes == 2
        else reference.roc_auc_score(labels, p, multi_class="ovr", average="macro")
    )
    assert scores["auc"] == pytest.approx(auc)
    brier = ((p - np.eye(classes)[labels]) ** 2).sum(axis=1).mean()
    if classes == 2:
        assert scores["brier"] == pytest.approx(reference.brier_score_loss(labels, p[:, 1]))
    else:
        assert scores["brier"] == pytest.approx(brier)
    np.testing.assert_array_equal(scores.confusion, reference.confusion_matrix(labels, called, labels=range(classes)))
    assert not scores.reasons


@given(case=cases(), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_whole_weights_mean_repeated_slides(case: Case, seed: int) -> None:
    labels, p = case
    weights = np.random.default_rng(seed).integers(0, 4, size=(3, len(labels)))
    for m in metrics_of("classification"):
        values = m.function(labels, p, weights.astype(np.float64))
        for row, value in zip(weights, values, strict=True):
            index = np.repeat(np.arange(len(labels)), row)
            alone = m.function(labels[index], p[index], np.ones((1, len(index))))[0] if len(index) else float("nan")
            np.testing.assert_allclose(value, alone, atol=1e-12, err_msg=m.name)


@given(case=cases(max_classes=2))
@settings(deadline=None, max_examples=30)
def test_auc_counts_pairs_and_ties_as_half(case: Case) -> None:
    labels, p = case
    pos, neg = p[labels == 1, 1], p[labels == 0, 1]
    won = (pos[:, None] > neg[None]).mean() + 0.5 * (pos[:, None] == neg[None]).mean()
    assert score(labels, p, "ab")["auc"] == pytest.approx(won)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_auc_of_one_class_is_undefined_with_a_reason(labels: list[int]) -> None:
    scores = score(labels, [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]], ["alive", "dead"])
    assert np.isnan(scores["auc"])
    missing = "dead" if labels[0] == 0 else "alive"
    assert repr(missing) in scores.reasons["auc"]
    assert np.isfinite(scores["acc"])


def test_macro_auc_without_one_class_is_undefined_but_the_other_classes_have_theirs() -> None:
    p = [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.1, 0.6, 0.3]]
    scores = score([0, 1, 0, 1], p, ["A", "B", "C"])
    assert np.isnan(scores["auc"])
    assert "'C'" in scores.reasons["auc"]
    assert scores.per_class[0].auc == 1.0
    assert np.isnan(scores.per_class[2].auc)
    assert scores.per_class[2].support == 0
    assert np.isnan(scores.per_class[2].recall)


def test_calibration_error_by_hand() -> None:
    # Two bins are used: confidence 0.9 (accuracy 1/2, gap 0.4, half of the slides), 0.6 (accuracy 1, gap 0.4).
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    value = weighted_calibration_error(np.array([0, 1, 1, 1]), p, np.ones((1, 4)))
    assert value[0] == pytest.approx(0.4)
    perfect = weighted_calibration_error(np.array([0, 1]), np.eye(2), np.ones((1, 2)))
    assert perfect[0] == 0


def test_per_class_scores_by_hand() -> None:
    p = np.eye(2)[[0, 0, 1, 1, 1]]
    first, second = score([0, 1, 1, 1, 0], p, ["neg", "pos"]).per_class
    assert (first.support, second.support) == (2, 3)
    assert (first.recall, first.precision) == (0.5, 0.5)
    assert second.recall == pytest.approx(2 / 3)
    assert second.f1 == pytest.approx(2 / 3)


def _answered(train_labels: list[int], test: Predictions) -> Predictions:
    answer = constant_answer("classification", train_labels, test.num_classes)
    return replace(test, probabilities=np.tile(answer, (len(test), 1)))


def test_majority_line_has_the_majority_share_and_no_discrimination() -> None:
    test = Predictions.of(
        slide_ids=range(5), labels=[0, 1, 1, 1, 0], probabilities=[[0.5, 0.5]] * 5, class_names=["dead", "alive"]
    )
    line = _answered([1, 1, 1, 0], test)
    np.testing.assert_allclose(line.probabilities, [[0.25, 0.75]] * 5)
    scores = score(line.labels, line.probabilities, line.class_names)
    assert (scores["acc"], scores["auc"], scores["balanced_acc"]) == (0.6, 0.5, 0.5)
    # The majority is that of the training slides, even where the test slides have another.
    assert score(test.labels, _answered([0, 0, 1], test).probabilities, "ab")["acc"] == 0.4


def test_fold_scores_are_per_fold_and_per_level() -> None:
    p = Predictions.of(
        slide_ids=["a", "b", "c", "d", "e"],
        patient_ids=["p", "p", "q", "r", "s"],
        labels=[1, 1, 0, 1, 1],
        probabilities=[[0.8, 0.2], [0.1, 0.9], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]],
        class_names=["neg", "pos"],
        folds=[0, 0, 0, 1, 1],
    )
    table = fold_scores(p).set_index(["level", "fold", "metric"])
    assert table.loc[("slide", 0, "acc"), "value"] == pytest.approx(2 / 3)
    assert table.loc[("patient", 0, "acc"), "value"] == 1.0
    assert table.loc[("slide", 0, "auc"), "value"] == 0.5
    assert np.isnan(table.loc[("slide", 1, "auc"), "value"])
    assert "no 'neg'" in table.loc[("slide", 1, "auc"), "reason"]
    assert table.loc[("patient", 0, "auc"), "count"] == 2


def test_unknown_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="Choose from: acc, auc"):
        metric("accuracy")


def test_fold_scores_without_a_patient_of_one_label_keep_the_slide_level() -> None:
    mixed = Predictions.of(
        slide_ids=["a1", "a2", "b1", "b2"],
        patient_ids=["a", "a", "b", "b"],
        labels=[0, 1, 0, 1],
        probabilities=[[0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.4, 0.6]],
        class_names=["negative", "positive"],
    )
    tidy = fold_scores(mixed)
    assert set(tidy["level"]) == {"slide"}
    assert tidy.loc[tidy["metric"] == "auc", "value"].tolist() == [1.0]
