from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.cohorts.strata import joint_strata, number_strata, survival_strata
from lrmil.cohorts.table import load_cohort
from lrmil.cohorts.targets import TaskSpec
from lrmil.errors import CohortError
from lrmil.training.folds import make_folds


def _patients(count: int) -> list[str]:
    return [f"p{i}" for i in range(count)]


def test_numbers_fall_into_quantile_bins_of_patients():
    values = np.arange(50.0)
    found = number_strata(_patients(50), values, num_folds=5)
    assert Counter(found) == {f"quantile {i} of 5": 10 for i in range(1, 6)}
    assert found[0] == "quantile 1 of 5"
    assert found[-1] == "quantile 5 of 5"
    # Fewer patients make coarser bins, none of which is too rare for the folds.
    assert set(number_strata(_patients(12), values[:12], num_folds=5)) == {"quantile 1 of 2", "quantile 2 of 2"}
    assert set(number_strata(_patients(6), values[:6], num_folds=5)) == {"quantile 1 of 1"}


def test_all_slides_of_a_patient_are_in_one_bin_and_unlabelled_ones_in_none():
    patients = ["a", "a", *_patients(20)]
    values = np.r_[0.0, 19.0, np.arange(20.0)]
    values[4] = np.nan
    found = number_strata(patients, values, num_folds=3)
    assert found[0] == found[1] is not None
    assert found[4] is None


def test_equal_numbers_share_a_bin():
    values = np.r_[np.zeros(30), np.arange(1.0, 11.0)]
    found = number_strata(_patients(40), values, num_folds=5)
    assert len(set(found[:30])) == 1
    assert min(Counter(found).values()) >= 5


def _targets(events: int, censored: int) -> np.ndarray:
    time = np.r_[np.arange(1.0, events + 1), np.arange(1.5, censored + 1)]
    return np.stack([time, np.repeat([1.0, 0.0], [events, censored])], axis=1)


@pytest.mark.parametrize(
    ("events", "censored", "wanted"),
    [
        (15, 15, {f"{s}, time {i} of 3": 5 for s in ("event", "censored") for i in (1, 2, 3)}),
        (12, 20, {"event, time 1 of 2": 6, "event, time 2 of 2": 6, "censored, time 1 of 2": 10}),
        (6, 20, {"event": 6, "censored": 20}),
        (15, 2, {f"survival, time {i} of 3": n for i, n in ((1, 6), (2, 5), (3, 6))}),
        (3, 20, {"event": 3, "censored": 20}),
    ],
)
def test_survival_is_stratified_by_event_and_tertile_as_far_as_numbers_allow(events, censored, wanted):
    found = Counter(survival_strata(_patients(events + censored), _targets(events, censored), num_folds=5))
    assert wanted.items() <= found.items()
    assert sum(found.values()) == events + censored


def test_unlabelled_survival_has_no_stratum():
    targets = _targets(15, 15)
    targets[3] = np.nan
    assert survival_strata(_patients(30), targets, num_folds=5)[3] is None


def test_rare_combinations_are_joined_and_the_main_task_never_mixes():
    main = ["A"] * 20 + ["B"] * 10
    second = ["x"] * 12 + ["y"] * 6 + ["z"] * 2 + ["x"] * 4 + ["y"] * 3 + ["z"] * 3
    found = joint_strata(_patients(30), [main, second], num_folds=5)
    assert Counter(found) == {
        "A | x": 12,
        "A | y or other": 8,  # two of A and z join the smallest that is common enough
        "B | other": 10,  # three rare ones make one
    }


def test_a_rare_class_of_the_main_task_stays_for_all_to_see():
    found = joint_strata(_patients(23), [["A"] * 20 + ["B"] * 3, ["x"] * 23], num_folds=5)
    assert Counter(found) == {"A | x": 20, "B | other": 3}
    with pytest.raises(CohortError, match=r"'B \| other' has 3"):
        make_folds(_patients(23), found, num_folds=5)


def test_slides_without_the_main_label_are_dealt_by_the_others_if_there_are_enough():
    main = ["A"] * 10 + [None] * 9
    second = ["x"] * 10 + ["x"] * 7 + ["y", None]
    found = joint_strata(_patients(19), [main, second], num_folds=5)
    assert Counter(found) == {"A | x": 10, "– | x or other": 8, None: 1}
    assert joint_strata(_patients(12), [main[:10] + [None] * 2, ["x"] * 12], num_folds=5)[-1] is None


@given(seed=st.integers(0, 10_000), patients=st.integers(25, 120))
@settings(deadline=None, max_examples=40)
def test_folds_of_joint_strata_are_even_in_every_task(seed, patients):
    rng = np.random.default_rng(seed)
    main = rng.choice(["A", "B"], p=[0.7, 0.3], size=patients)
    second = rng.choice(["x", "y", "z"], p=[0.5, 0.3, 0.2], size=patients)
    third = [None if rng.uniform() < 0.2 else "t" for _ in range(patients)]
    if Counter(main)["B"] < 5:
        return
    found = joint_strata(_patients(patients), [list(main), list(second), third], num_folds=5)
    counts = Counter(found)
    assert min(counts.values()) >= 5
    splits = make_folds(_patients(patients), found, num_folds=5, seed=seed)
    tested = [set(splits.patients(k, "test")) for k in range(5)]
    per_fold = [[sum(main[int(p[1:])] == c for p in fold) for fold in tested] for c in "AB"]
    # A class of the main task spreads over a few joint strata, each dealt evenly to within one.
    for c, own in zip("AB", per_fold, strict=True):
        strata = len({f for f, m in zip(found, main, strict=True) if m == c})
        assert max(own) - min(own) <= strata
        assert min(own) >= 1


def test_cohort_gives_strata_for_folds_that_several_tasks_share(tmp_path: Path):
    rng = np.random.default_rng(0)
    lines = ["slide_id,patient_id,label,age,time,event"]
    for i in range(60):
        event = int(rng.uniform() < 0.5)
        lines.append(f"s{i},p{i // 2},{'IDC' if i // 2 % 3 else 'ILC'},{40 + i // 2},{1 + i // 2},{event}")
    path = tmp_path / "cohort.csv"
    path.write_text("\n".join(lines) + "\n")
    tasks = ["label", TaskSpec("age", "regression"), TaskSpec("os", "survival")]
    cohort = load_cohort(path, task=tasks, check_files=False)
    assert set(cohort.strata()) == {"IDC", "ILC"}
    assert cohort.strata("age").str.startswith("quantile").all()
    joint = cohort.joint_strata(num_folds=3)
    assert joint.index.equals(cohort.table.index)
    splits = make_folds(list(cohort.table["patient_id"]), list(joint), num_folds=3)
    for fold in range(3):
        inside = cohort.table["patient_id"].isin(splits.patients(fold, "test"))
        assert Counter(cohort.table["label"][inside]) == {"IDC": 14, "ILC": 6} or inside.sum() == 20
        ages = cohort.table["age"][inside]
        assert abs(ages.mean() - cohort.table["age"].mean()) < 5
        assert cohort.targets("os")[inside, 1].any()
    assert set(cohort.joint_strata(["label"])) == {"IDC", "ILC"}
