from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lrmil.cohorts.table import load_cohort
from lrmil.cohorts.targets import TaskSpec
from lrmil.errors import CohortError, ConfigError


def save(folder: Path, text: str, name: str = "cohort.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(line.strip() for line in text.strip().splitlines()) + "\n", encoding="utf-8")
    return path


AGE = """
    slide_id,patient_id,age
    s1,p1,40
    s2,p1,40.0
    s3,p2,61.5
    s4,p3,
    s5,p4,-3e1
"""

SURVIVAL = """
    slide_id,patient_id,time,event
    s1,p1,10.5,1
    s2,p1,10.5,TRUE
    s3,p2,20,alive
    s4,p3,,
    s5,p4,30,Dead
    s6,p5,40,false
"""


# A number


def test_a_number(tmp_path):
    cohort = load_cohort(save(tmp_path, AGE), task="age", kind="regression", check_files=False)
    assert (cohort.task().kind, cohort.classes) == ("regression", ())
    np.testing.assert_array_equal(cohort.targets(), [40, 40, 61.5, np.nan, -30])
    assert cohort.targets().dtype == np.float64
    assert cohort.labelled()["slide_id"].tolist() == ["s1", "s2", "s3", "s5"]
    assert cohort.target_of("s3") == 61.5
    # 40 and 40.0 are one number: the patient is not reported to have two labels.
    assert cohort.warnings == ("1 slides have no age and are left out of training (rows 5)",)
    assert "age: -30 to 61.5, quartiles 22.5, 40, 45.375; 4 slides of 3 patients; 1 without" in cohort.summary()
    with pytest.raises(CohortError, match="slide s4 has no age"):
        cohort.target_of("s4")
    with pytest.raises(CohortError, match="age is regression and has no classes"):
        cohort.label_of("s1")


def test_what_is_written_of_numbers_and_times_is_read_again(tmp_path):
    for text, task, kind in ((AGE, "age", "regression"), (SURVIVAL, "os", "survival")):
        cohort = load_cohort(save(tmp_path, text), task=task, kind=kind, check_files=False)
        cohort.write(tmp_path / "again.csv")
        again = load_cohort(tmp_path / "again.csv", task=task, kind=kind, check_files=False)
        assert again.table.equals(cohort.table)
        np.testing.assert_array_equal(again.targets(), cohort.targets())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("old", "row 4, column age: 'old' is no number"),
        ("61,5", "write a decimal point"),
        ("inf", "'inf' is no number"),
        ("1e999", "'1e999' is no number"),
    ],
)
def test_what_is_no_number_is_refused_by_cell(tmp_path, value, message):
    with pytest.raises(CohortError, match=message):
        load_cohort(save(tmp_path, AGE.replace("61.5", f'"{value}"')), task="age", kind="regression", check_files=False)


def test_numbers_that_do_not_differ_cannot_be_learnt(tmp_path):
    same = save(tmp_path, "slide_id,patient_id,age\ns1,p1,4\ns2,p2,4.0")
    with pytest.raises(CohortError, match="column age holds only the number 4"):
        load_cohort(same, task="age", kind="regression", check_files=False)
    none = save(tmp_path, "slide_id,patient_id,age\ns1,p1,\ns2,p2,NA")
    with pytest.raises(CohortError, match="column age holds no number"):
        load_cohort(none, task="age", kind="regression", check_files=False)


def test_slides_of_a_patient_with_two_numbers_are_reported(tmp_path):
    path = save(tmp_path, AGE.replace("s2,p1,40.0", "s2,p1,41"))
    cohort = load_cohort(path, task="age", kind="regression", check_files=False)
    assert any("1 patients have slides of more than one age (p1: 40.0, 41.0)" in w for w in cohort.warnings)
    with pytest.raises(CohortError, match="p1 stands in rows 2, 3"):
        load_cohort(path, task="age", kind="regression", check_files=False, label_level="patient")


# Survival


def test_survival(tmp_path):
    cohort = load_cohort(save(tmp_path, SURVIVAL), task="os", kind="survival", check_files=False)
    assert cohort.task().kind == "survival"
    wanted = [[10.5, 1], [10.5, 1], [20, 0], [np.nan, np.nan], [30, 1], [40, 0]]
    np.testing.assert_array_equal(cohort.targets(), wanted)
    assert cohort.table["event"].dtype == np.float64
    assert cohort.labelled()["slide_id"].tolist() == ["s1", "s2", "s3", "s5", "s6"]
    np.testing.assert_array_equal(cohort.target_of("s5"), [30, 1])
    with pytest.raises(CohortError, match="slide s4 has no os"):
        cohort.target_of("s4")
    # Two of four patients died; of the others one was followed for 20, one for 40.
    said = "os: 2 patients with event, 2 censored; median follow-up 40; 5 slides of 4 patients; 1 without"
    assert said in cohort.summary()


@pytest.mark.parametrize(
    ("event", "number"),
    [
        *[(w, 1.0) for w in ("1", "1.0", "true", "DEAD", "Deceased", "1:DECEASED", "1: deceased")],
        *[(w, 0.0) for w in ("0", "0.0", "FALSE", "Alive", "living", "0:LIVING")],
    ],
)
def test_ways_to_write_an_event(tmp_path, event, number):
    path = save(tmp_path, SURVIVAL.replace("alive", event))
    cohort = load_cohort(path, task="os", kind="survival", check_files=False)
    assert cohort.target_of("s3")[1] == number


@pytest.mark.parametrize("event", ["2", "yes", "no", "censored?", "Not Reported", "-1", "0.5"])
def test_an_event_that_is_not_clear_is_refused_by_cell(tmp_path, event):
    path = save(tmp_path, SURVIVAL.replace("alive", event))
    with pytest.raises(CohortError, match=f"row 4, column event: '{event}' does not say".replace("?", r"\?")):
        load_cohort(path, task="os", kind="survival", check_files=False)


@pytest.mark.parametrize("time", ["0", "-1", "long", "inf"])
def test_a_time_that_is_not_positive_is_refused_by_cell(tmp_path, time):
    path = save(tmp_path, SURVIVAL.replace("20,alive", f"{time},alive"))
    with pytest.raises(CohortError, match=f"row 4, column time: '{time}' is not a positive time"):
        load_cohort(path, task="os", kind="survival", check_files=False)


def test_half_a_label_is_none_and_is_told(tmp_path):
    path = save(tmp_path, SURVIVAL.replace("20,alive", "20,").replace("40,false", ",false"))
    cohort = load_cohort(path, task="os", kind="survival", check_files=False)
    assert cohort.labelled()["slide_id"].tolist() == ["s1", "s2", "s5"]
    assert np.isnan(cohort.targets()[[2, 5]]).all()
    assert any("2 slides have only one of time and event of os" in w and "rows 4, 7" in w for w in cohort.warnings)


def test_without_an_event_there_is_nothing_to_learn(tmp_path):
    path = save(tmp_path, "slide_id,patient_id,time,event\ns1,p1,5,0\ns2,p2,6,alive")
    with pytest.raises(CohortError, match="no event of os was seen, all 2 slides are censored"):
        load_cohort(path, task="os", kind="survival", check_files=False)
    empty = save(tmp_path, "slide_id,patient_id,time,event\ns1,p1,5,\ns2,p2,,1")
    with pytest.raises(CohortError, match="no slide has both a time and an event"):
        load_cohort(empty, task="os", kind="survival", check_files=False)


def test_columns_of_other_names(tmp_path):
    path = save(tmp_path, SURVIVAL.replace("time,event", "OS_MONTHS,OS_STATUS"))
    cohort = load_cohort(
        path, task="os", kind="survival", time="OS_MONTHS", event="os_status", check_files=False, strict=True
    )
    np.testing.assert_array_equal(cohort.target_of("s5"), [30, 1])
    assert cohort.table["os_status"].dtype == np.float64
    with pytest.raises(CohortError, match=r"no column 'time' \(there is .*OS_MONTHS"):
        load_cohort(path, task="os", kind="survival", event="OS_STATUS", check_files=False)


def test_time_of_a_cohort_that_is_not_asked_for_survival_stays_as_it_was(tmp_path):
    path = save(tmp_path, "slide_id,patient_id,label,time,event\ns1,p1,a,0,1\ns2,p2,b,,")
    assert load_cohort(path, check_files=False).table["time"][0] == 0


# Several tasks of one table

MANY = """
    slide_id,patient_id,label,age,time,event,pfs
    s1,p1,IDC,40,10,dead,4
    s2,p2,ILC,50,20,alive,5
    s3,p3,IDC,,30,dead,
    s4,p4,,60,40,alive,7
"""


def test_tasks_of_three_kinds_and_a_status_that_is_a_label_too(tmp_path):
    tasks = [
        "label",
        TaskSpec("event", classes=["dead", "alive"]),
        TaskSpec("age", "regression"),
        TaskSpec("os", "survival"),
        TaskSpec("pfs_survival", "survival", time="pfs"),
    ]
    cohort = load_cohort(save(tmp_path, MANY), task=tasks, check_files=False)
    assert [t.kind for t in cohort.tasks] == ["classification", "classification", *["regression"], *["survival"] * 2]
    assert cohort.task("event").classes == ("dead", "alive")
    assert cohort.targets("event").tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(cohort.targets("os")[:, 1], [1, 0, 1, 0])
    np.testing.assert_array_equal(cohort.targets("pfs_survival")[:, 0], [4, 5, np.nan, 7])
    assert np.isnan(cohort.targets("pfs_survival")[2]).all()
    for task, count in (("label", 3), ("event", 4), ("age", 3), ("os", 4), ("pfs_survival", 3)):
        assert len(cohort.labelled(task)) == count
    assert len(cohort.summary().splitlines()) == 6 + len(cohort.warnings)


def test_kinds_by_name(tmp_path):
    cohort = load_cohort(save(tmp_path, MANY), task=["label", "age"], kind={"age": "regression"}, check_files=False)
    assert [t.kind for t in cohort.tasks] == ["classification", "regression"]
    with pytest.raises(ConfigError, match="a kind is given for aeg, which is no task"):
        load_cohort(save(tmp_path, MANY), task=["label", "age"], kind={"aeg": "regression"}, check_files=False)
    with pytest.raises(ConfigError, match="age is regression and has no classes"):
        load_cohort(save(tmp_path, MANY), task="age", kind="regression", classes=["a", "b"], check_files=False)
    with pytest.raises(ConfigError, match="two have one name"):
        load_cohort(save(tmp_path, MANY), task=["age", "age"], check_files=False)


def test_fewer_patients_than_folds(tmp_path):
    path = save(tmp_path, SURVIVAL)
    with pytest.raises(CohortError, match="column os: fewer patients than the 3 folds: 'event' has 2"):
        load_cohort(path, task="os", kind="survival", num_folds=3, check_files=False)
    with pytest.raises(CohortError, match="column age: fewer patients than the 5 folds: 'a number' has 3"):
        load_cohort(save(tmp_path, AGE), task="age", kind="regression", num_folds=5, check_files=False)
    # Censored patients need not be in every fold.
    enough = save(tmp_path, "slide_id,patient_id,time,event\n" + "\n".join(f"s{i},p{i},{i},1" for i in range(1, 4)))
    assert load_cohort(enough, task="os", kind="survival", num_folds=3, check_files=False).labelled().shape[0] == 3


def test_a_message_names_a_few_numbers_and_counts_the_rest(tmp_path):
    rows = [f"s{p}_{i},p{p},{10 * p + i}" for p in range(1, 6) for i in range(7)]
    path = save(tmp_path, "\n".join(["slide_id,patient_id,age", *rows]))
    (told,) = load_cohort(path, task="age", kind="regression", check_files=False).warnings
    assert "5 patients" in told
    assert (
        "(p1: 10.0, 11.0, 12.0 and 4 more; p2: 20.0, 21.0, 22.0 and 4 more; p3: 30.0, 31.0, 32.0 and 4 more; ...)"
        in told
    )
