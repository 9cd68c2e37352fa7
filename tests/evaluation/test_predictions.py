from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrmil.errors import ConfigError
from lrmil.evaluation import Predictions, concatenate

NAMES = ["benign", "malignant"]


def _of(**changes: Any) -> Predictions:
    given: dict[str, Any] = {
        "slide_ids": ["a", "b", "c"],
        "patient_ids": ["p", "p", "q"],
        "labels": [0, 0, 1],
        "probabilities": [[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]],
        "class_names": NAMES,
        "folds": [0, 0, 1],
    }
    return Predictions.of(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [0, 0, 2]}, "slide c: label 2"),
        ({"labels": [0, 1]}, "columns of length"),
        ({"probabilities": [[0.9, 0.1], [0.5, float("nan")], [0.2, 0.8]]}, "slide b"),
        ({"probabilities": [[0.9, 0.1], [0.7, 0.7], [0.2, 0.8]]}, "slide b.*sum to 1"),
        ({"probabilities": [[0.9, 0.1, 0.0]] * 3}, "shape"),
        ({"slide_ids": ["a", "b", "a"], "folds": [0, 1, 0]}, "slide a is predicted twice in fold 0"),
    ],
)
def test_wrong_input_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _of(**changes)


def test_folds_that_are_no_cross_validation_may_test_a_slide_again() -> None:
    repeated = _of(slide_ids=["a", "b", "a"], patient_ids=["p", "q", "p"], folds=[0, 0, 1])
    assert [(fold, rows.tolist()) for fold, _, rows in repeated.cells()] == [(0, [0, 1]), (1, [2])]


def test_patient_level_is_the_mean_probability_over_slides() -> None:
    patients = _of().by_patient()
    assert patients.patient_ids.tolist() == ["p", "q"]
    np.testing.assert_allclose(patients.probabilities, [[0.7, 0.3], [0.2, 0.8]])
    assert patients.labels.tolist() == [0, 1]


def test_patient_with_two_labels_is_left_out_of_the_patient_level_and_counted() -> None:
    mixed = _of(labels=[0, 1, 1])
    assert mixed.mixed_patients() == ["p"]
    assert mixed.by_patient().patient_ids.tolist() == ["q"]
    with pytest.raises(ConfigError, match="no patient has one label"):
        mixed.take(np.array([0, 1])).by_patient()


def test_csv_round_trip_keeps_every_digit_and_ids_that_look_like_numbers(tmp_path: Path) -> None:
    before = _of(slide_ids=["007", "NA", "1e5"], probabilities=[[1 / 3, 2 / 3], [0.1, 0.9], [1, 0]], seeds=[4, 4, 4])
    before.write_csv(tmp_path / "predictions.csv")
    after = Predictions.read_csv(tmp_path / "predictions.csv")
    assert after.slide_ids.tolist() == ["007", "NA", "1e5"]
    assert after.class_names == before.class_names
    for column in ("labels", "probabilities", "folds", "seeds"):
        np.testing.assert_array_equal(getattr(after, column), getattr(before, column))


def test_concatenate_joins_folds_and_refuses_other_classes() -> None:
    whole = _of()
    parts = [whole.take(whole.folds == 0), whole.take(whole.folds == 1)]
    np.testing.assert_array_equal(concatenate(parts).probabilities, whole.probabilities)
    with pytest.raises(ConfigError, match="different classes"):
        concatenate(
            [parts[0], Predictions.of(slide_ids=["z"], labels=[0], probabilities=[[1, 0]], class_names=["x", "y"])]
        )
    with pytest.raises(ConfigError, match="predicted twice"):
        concatenate([parts[0], parts[0]])
