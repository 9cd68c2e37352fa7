"""The paper's TCGA cohorts, each from the files that a user downloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lrmil.cohorts.builders.account import Account, BuiltCohort
from lrmil.cohorts.builders.gdc import Patient, read_clinical, survival_columns
from lrmil.cohorts.builders.histology import NSCLC, RCC, Rule, breast_class, classify, project_class
from lrmil.cohorts.builders.pam50 import read_pam50
from lrmil.cohorts.builders.tcga import find_slides, slide_table
from lrmil.errors import CohortError

_RULES: Mapping[str, Rule] = {
    "tcga-brca": breast_class,
    "tcga-nsclc": project_class(NSCLC),
    "tcga-rcc": project_class(RCC),
}
SURVIVAL_PROJECTS = ("TCGA-BRCA", "TCGA-LUAD", "TCGA-LUSC", "TCGA-KIRP", "TCGA-KIRC")


@dataclass(frozen=True)
class Sources:
    """Where the slides of a TCGA cohort and what is known of its patients are."""

    clinical: Sequence[Path] = ()
    """clinical.tsv of the GDC, or older tables; several where a cohort is made of several projects"""
    follow_up: Sequence[Path] = ()
    """follow_up.tsv of the GDC, or tables of later follow-up"""
    slides_dir: Path | None = None
    slide_sheet: Path | None = None
    """Sample sheet, manifest or slide.tsv of the GDC"""


def build_histology(cohort: str, sources: Sources) -> BuiltCohort:
    """Make the table of tcga-brca (IDC, ILC), tcga-nsclc (LUAD, LUSC) or tcga-rcc (KIRP, KIRC, KICH).

    Column label is the class; survival, time and event are there as further tasks.
    """
    account = Account()
    patients = read_clinical(sources.clinical, account, follow_ups=sources.follow_up)
    labels = classify(patients, _RULES[cohort], account)
    return _join(labels, patients, sources, account)


def build_molecular(pam50: Path, sources: Sources) -> BuiltCohort:
    """Make the table of BRCA* (LumA, LumB, Basal, Her2). Clinical tables may be given, for survival as further task."""
    account = Account()
    labels = read_pam50(pam50, account)
    patients = read_clinical(sources.clinical, account, follow_ups=sources.follow_up) if sources.clinical else {}
    return _join(labels, patients, sources, account)


def build_survival(project: str, sources: Sources, *, need_time: bool = False) -> BuiltCohort:
    """Make the table of survival of one project, any histology: survival (alive, dead), time (days), event (0, 1).

    Args:
        project: like TCGA-LUAD; patients of other projects are left out where the table says the project.
        sources: see there.
        need_time: leave out patients without time too, which survival analysis needs and the paper's status does not.
    """
    account = Account()
    project = project.upper()
    patients = {}
    for name, patient in read_clinical(sources.clinical, account, follow_ups=sources.follow_up).items():
        if patient.projects and patient.projects != {project}:
            account.leave_out(f"patients of {' and '.join(sorted(patient.projects))}, not of {project}", name)
        else:
            patients[name] = patient
    columns = survival_columns(patients, account)
    for reason, column, wanted in (
        ("patients of whom neither alive nor dead is stated", "survival", True),
        ("patients without a time", "time", need_time),
    ):
        if wanted:
            for name in columns.index[columns[column].isna()]:
                account.leave_out(reason, str(name))
            columns = columns[columns[column].notna()]
    # What is left out is no longer a row with an empty cell.
    account.emptied = {
        reason: kept for reason, names in account.emptied.items() if (kept := [n for n in names if n in columns.index])
    }
    return _with_slides(columns, ("survival",), sources, account)


def _join(
    labels: Mapping[str, str], patients: Mapping[str, Patient], sources: Sources, account: Account
) -> BuiltCohort:
    table = pd.DataFrame({"label": dict(labels)}, dtype=object)
    tasks = ["label"]
    if patients:
        known = {name: patients.get(name, Patient()) for name in labels}
        table = table.join(survival_columns(known, account))
        tasks.append("survival")
    return _with_slides(table, tuple(tasks), sources, account)


def _with_slides(labels: pd.DataFrame, tasks: tuple[str, ...], sources: Sources, account: Account) -> BuiltCohort:
    slides = find_slides(sources.slides_dir, sources.slide_sheet, account)
    owned = {slide.patient_id for slide in slides.values()}
    for name in labels.index:
        if name not in owned:
            account.leave_out("patients with a label and no diagnostic slide", str(name))
    for name, slide in slides.items():
        if slide.patient_id not in labels.index:
            account.leave_out("diagnostic slides of patients without a label", name)
    table = slide_table(slides, labels)
    if table.empty:
        raise CohortError(
            f"none of {len(slides)} slides is of one of the {len(labels)} patients with a label.",
            fix="Are tables and slides of the same project? " + "; ".join(account.lines()[:4]),
        )
    table = table.dropna(axis="columns", how="all")
    return BuiltCohort(table, tuple(task for task in tasks if task in table), account)
