"""The clinical tables of TCGA, by patient: diagnosis, project, and how long each was followed.

Understood are the clinical.tsv of the GDC portal (new names such as cases.submitter_id, old ones such as
case_submitter_id), its follow_up.tsv, the older BCR Biotab files (bcr_patient_barcode, two more header rows) and what
TCGAbiolinks writes. A patient may have many rows, one a treatment, diagnosis or follow-up: they are joined.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from lrmil.cohorts.builders.account import Account
from lrmil.cohorts.builders.sheets import find_columns, need_column, number, value
from lrmil.cohorts.builders.tcga import patient_of
from lrmil.cohorts.reading import read_table
from lrmil.errors import CohortError

PATIENT = (
    *("cases.submitter_id", "case_submitter_id", "bcr_patient_barcode", "submitter_id", "Case ID", "case_id"),
    *("patient_id", "patient", "PATIENT_ID"),
)
DIAGNOSIS = (
    *("diagnoses.primary_diagnosis", "primary_diagnosis", "histological_type", "histologic_diagnosis"),
    "paper_histological_type",
)
PROJECT = ("project.project_id", "cases.project.project_id", "project_id", "Project ID", "project", "disease_code")
STATUS = ("demographic.vital_status", "vital_status", "OS_STATUS")
DEATH = ("demographic.days_to_death", "days_to_death", "death_days_to")
FOLLOW_UP = (
    *("diagnoses.days_to_last_follow_up", "days_to_last_follow_up", "days_to_last_followup", "last_contact_days_to"),
    *("follow_ups.days_to_follow_up", "days_to_follow_up", "days_to_last_known_alive"),
)
_MAIN = ("diagnoses.diagnosis_is_primary_disease", "diagnosis_is_primary_disease")
_TUMOUR = ("diagnoses.classification_of_tumor", "classification_of_tumor")
_WHERE = "Download the clinical data (TSV) of the cohort from the GDC portal, and give clinical.tsv."
_PROJECT = re.compile(r"(TCGA-)?([A-Z]{2,8})")
_STATUS = {
    "alive": "alive",
    "living": "alive",
    "0:living": "alive",
    "dead": "dead",
    "deceased": "dead",
    "1:deceased": "dead",
}


@dataclass
class Patient:
    """What the tables say about one patient; sets hold more than one entry where rows disagree."""

    diagnoses: set[str] = field(default_factory=set)
    """Of the primary tumour, where the table says which that is"""
    projects: set[str] = field(default_factory=set)
    """Like TCGA-LUAD"""
    status: set[str] = field(default_factory=set)
    """"alive" and "dead"; somebody who is dead in a later row is dead"""
    death_days: set[float] = field(default_factory=set)
    follow_up_days: set[float] = field(default_factory=set)


@dataclass(frozen=True)
class Survival:
    """Overall survival of one patient."""

    status: str | None
    """"alive", "dead", or None where it is not known"""
    time_days: float | None
    """To death, or to the last sign of life; None where it is not known"""


def read_clinical(paths: Sequence[Path], account: Account, *, follow_ups: Sequence[Path] = ()) -> dict[str, Patient]:
    """Read clinical tables, and tables of further follow-up.

    Raises:
        CohortError: no tables, or one without a column of patients, or without TCGA patients.
    """
    if not paths:
        raise CohortError("no clinical table is given.", fix=f"{_WHERE}")
    patients: dict[str, Patient] = defaultdict(Patient)
    for path in paths:
        _read(path, patients, account, wanted=("diagnosis", "project", "status", "death", "follow-up"))
    for path in follow_ups:
        _read(path, patients, account, wanted=("follow-up", "status", "death"))
    return dict(patients)


def survival_of(patient: Patient) -> Survival:
    """Return status and time: days to death of the dead, the latest follow-up of the living.

    Somebody dead without a day of death has a status and no time: the last follow-up is not when it happened.
    """
    status = "dead" if "dead" in patient.status else "alive" if patient.status else None
    days = {"dead": patient.death_days, "alive": patient.follow_up_days}.get(status or "", set())
    return Survival(status, max(days) if days else None)


def survival_columns(patients: Mapping[str, Patient], account: Account) -> pd.DataFrame:
    """Return survival (alive, dead), time (days) and event (0, 1), with the patient as index; empty where unknown."""
    rows: dict[str, tuple[str | None, str | None, int | None]] = {}
    for name, patient in patients.items():
        found = survival_of(patient)
        time = found.time_days
        if found.status is None:
            account.leave_empty("patients: survival, since neither alive nor dead is stated", name)
        elif time is None:
            what = "day of death" if found.status == "dead" else "follow-up"
            account.leave_empty(f"patients: time and event, since they are {found.status} without a {what}", name)
        elif time <= 0:
            account.leave_empty("patients: time and event, since the days are not positive", name)
            time = None
        event = None if time is None or found.status is None else int(found.status == "dead")
        rows[name] = (found.status, None if event is None else f"{time:.10g}", event)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["survival", "time", "event"], dtype=object)


def _read(path: Path, patients: dict[str, Patient], account: Account, wanted: Sequence[str]) -> None:
    table = read_table(path)
    key = need_column(path, table, "the patient", PATIENT, _WHERE)
    if not any(patient_of(value(v)) for v in table[key]):
        # Some tables have UUIDs in one column of that meaning and barcodes in another.
        key = next((c for c in find_columns(table, PATIENT) if any(patient_of(value(v)) for v in table[c])), key)
    names = {"diagnosis": DIAGNOSIS, "project": PROJECT, "status": STATUS, "death": DEATH, "follow-up": FOLLOW_UP}
    columns = {what: find_columns(table, names[what]) for what in wanted}
    used = "; ".join(f"{what}: {', '.join(found)}" for what, found in columns.items() if found)
    account.found.append(f"{path}: {len(table)} rows, patients by column {key}; {used or 'nothing else'}")
    for what, found in columns.items():
        if not found:
            account.found.append(f"{path}: nothing on {what}; looked for {', '.join(names[what])}")
    known = 0
    for row, cells in _rows(table):
        name = patient_of(value(cells[key]))
        if name is None:
            # The Biotab files repeat their header twice below it.
            account.leave_out("rows of clinical tables without a TCGA patient", f"row {row} of {path.name}")
            continue
        known += 1
        _add(patients[name], cells, columns)
    if not known:
        raise CohortError(
            f"{path}: column {key} holds no TCGA barcode (its first cell: {table[key].iloc[0]!r}).", fix=_WHERE
        )


def _rows(table: pd.DataFrame) -> Iterator[tuple[int, dict[str, object]]]:
    main, tumour = find_columns(table, _MAIN), find_columns(table, _TUMOUR)
    for row, cells in zip(table.index, table.to_dict("records"), strict=True):
        own = {str(k): v for k, v in cells.items()}
        other = any((value(own[c]) or "true").lower() == "false" for c in main)
        other |= any((value(own[c]) or "primary").lower() != "primary" for c in tumour)
        own["__other_tumour"] = other
        yield int(row), own


def _add(patient: Patient, cells: Mapping[str, object], columns: Mapping[str, Sequence[str]]) -> None:
    def texts(what: str) -> Iterator[str]:
        yield from (text for c in columns.get(what, ()) if (text := value(cells[c])) is not None)

    if not cells["__other_tumour"]:
        # The first column that says anything: later ones are coarser names of the same.
        patient.diagnoses |= set(list(texts("diagnosis"))[:1])
    patient.projects |= {f"TCGA-{code[2]}" for p in texts("project") if (code := _PROJECT.fullmatch(p.upper()))}
    patient.status |= {_STATUS[s.lower()] for s in texts("status") if s.lower() in _STATUS}
    for what, days in (("death", patient.death_days), ("follow-up", patient.follow_up_days)):
        days |= {found for text in texts(what) if (found := number(text)) is not None}
