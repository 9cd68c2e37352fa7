"""Survival of a TCGA project: status as the paper uses it, time and event as survival analysis needs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrmil.cohorts.builders.account import Account, BuiltCohort
from lrmil.cohorts.builders.build import Sources, build_survival
from lrmil.cohorts.builders.gdc import Patient, read_clinical, survival_of
from lrmil.cohorts.table import load_cohort

CLINICAL = """\
cases.submitter_id\tproject.project_id\tdemographic.vital_status\tdemographic.days_to_death\tdiagnoses.days_to_last_follow_up
TCGA-05-0001\tTCGA-LUAD\tAlive\t'--\t300
TCGA-05-0001\tTCGA-LUAD\tAlive\t'--\t120
TCGA-05-0002\tTCGA-LUAD\tDead\t80\t95
TCGA-05-0003\tTCGA-LUAD\tDead\t'--\t200
TCGA-05-0004\tTCGA-LUAD\tAlive\t'--\t'--
TCGA-05-0005\tTCGA-LUAD\tNot Reported\t'--\t50
TCGA-05-0006\tTCGA-LUSC\tAlive\t'--\t50
TCGA-05-0007\tTCGA-LUAD\tAlive\t'--\t-3
TCGA-05-0008\tTCGA-LUAD\tAlive\t'--\t0
"""
FOLLOW_UP = """\
cases.submitter_id\tfollow_ups.days_to_follow_up\tfollow_ups.timepoint_category
TCGA-05-0001\t900\tLast Contact
TCGA-05-0004\t410\tLast Contact
TCGA-05-0004\t35\tFollow-up
TCGA-05-0002\t60\tFollow-up
"""


def build(folder: Path, *, follow_up: bool = False, need_time: bool = False) -> BuiltCohort:
    slides = folder / "slides"
    slides.mkdir(exist_ok=True)
    for number in range(1, 9):
        (slides / f"TCGA-05-000{number}-01Z-00-DX1.AAAA.svs").write_bytes(b"")
    (folder / "clinical.tsv").write_text(CLINICAL)
    (folder / "follow_up.tsv").write_text(FOLLOW_UP)
    more = [folder / "follow_up.tsv"] if follow_up else []
    return build_survival("tcga-luad", Sources([folder / "clinical.tsv"], more, slides_dir=slides), need_time=need_time)


def rows(built: BuiltCohort) -> dict[str, tuple[object, object, object]]:
    table = built.table
    return {
        p[-1]: (s, t, e)
        for p, s, t, e in zip(table["patient_id"], table["survival"], table["time"], table["event"], strict=True)
    }


def test_status_time_and_event(tmp_path: Path) -> None:
    built = build(tmp_path)
    assert rows(built) == {
        "1": ("alive", "300", 0),
        "2": ("dead", "80", 1),
        "3": ("dead", None, None),
        "4": ("alive", None, None),
        "7": ("alive", None, None),
        "8": ("alive", None, None),
    }
    gone = built.account.left_out
    assert gone["patients of whom neither alive nor dead is stated"] == ["TCGA-05-0005"]
    assert gone["patients of TCGA-LUSC, not of TCGA-LUAD"] == ["TCGA-05-0006"]
    empty = {reason.split("since ")[1]: names for reason, names in built.account.emptied.items()}
    assert empty == {
        "they are dead without a day of death": ["TCGA-05-0003"],
        "they are alive without a follow-up": ["TCGA-05-0004"],
        "the days are not positive": ["TCGA-05-0007", "TCGA-05-0008"],
    }


def test_the_latest_follow_up_counts_and_never_moves_a_death(tmp_path: Path) -> None:
    found = rows(build(tmp_path, follow_up=True))
    assert found["1"] == ("alive", "900", 0)
    assert found["4"] == ("alive", "410", 0)
    assert found["2"] == ("dead", "80", 1)


def test_patients_without_time_can_be_left_out(tmp_path: Path) -> None:
    built = build(tmp_path, need_time=True)
    assert set(rows(built)) == {"1", "2"}
    assert len(built.account.left_out["patients without a time"]) == 4
    assert not built.account.emptied, "they are counted once"


def test_the_table_is_read_again(tmp_path: Path) -> None:
    build(tmp_path, need_time=True).write(tmp_path / "cohort.csv")
    cohort = load_cohort(tmp_path / "cohort.csv", task="survival")
    assert cohort.classes == ("alive", "dead")
    assert cohort.table["time"].tolist() == [300.0, 80.0]
    assert cohort.table["event"].tolist() == [0.0, 1.0]


def test_a_death_in_a_later_row_counts(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(
        "bcr_patient_barcode\tvital_status\tdays_to_last_followup\tdays_to_death\n"
        "TCGA-05-0001\tAlive\t209\t[Not Applicable]\nTCGA-05-0001\tDead\t[Not Available]\t550\n"
    )
    patient = read_clinical([tmp_path / "a.tsv"], Account())["TCGA-05-0001"]
    assert survival_of(patient).status == "dead"
    assert survival_of(patient).time_days == 550


@pytest.mark.parametrize(
    ("patient", "status", "time"),
    [
        (Patient(), None, None),
        (Patient(follow_up_days={5.0}), None, None),
        (Patient(status={"dead"}, follow_up_days={5.0}), "dead", None),
        (Patient(status={"alive"}, follow_up_days={5.0, 9.0}), "alive", 9.0),
    ],
)
def test_rules_of_survival(patient: Patient, status: str | None, time: float | None) -> None:
    found = survival_of(patient)
    assert (found.status, found.time_days) == (status, time)
