"""Which class a TCGA patient belongs to: by the histology that was written down, or by the project."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lrmil.cohorts.builders.account import Account
from lrmil.cohorts.builders.gdc import Patient

Rule = Callable[[Patient], tuple[str | None, str]]
"""Returns the class, or None and the reason why there is none"""

_BREAST = {
    # GDC (ICD-O-3 names), BCR Biotab, cBioPortal
    "infiltrating duct carcinoma, nos": "IDC",
    "infiltrating duct carcinoma": "IDC",
    "infiltrating ductal carcinoma": "IDC",
    "invasive ductal carcinoma": "IDC",
    "breast invasive ductal carcinoma": "IDC",
    "lobular carcinoma, nos": "ILC",
    "infiltrating lobular carcinoma, nos": "ILC",
    "infiltrating lobular carcinoma": "ILC",
    "invasive lobular carcinoma": "ILC",
    "breast invasive lobular carcinoma": "ILC",
}
NSCLC = {"TCGA-LUAD": "LUAD", "TCGA-LUSC": "LUSC"}
RCC = {"TCGA-KIRP": "KIRP", "TCGA-KIRC": "KIRC", "TCGA-KICH": "KICH"}
_WORDS = {
    "LUAD": ("adenocarcinoma", "bronchiolo", "bronchio-alveolar", "acinar cell carcinoma", "mucinous carcinoma"),
    "LUSC": ("squamous",),
    "KIRP": ("papillary",),
    "KIRC": ("clear cell",),
    "KICH": ("chromophobe",),
}


def breast_class(patient: Patient) -> tuple[str | None, str]:
    """Return IDC or ILC; mixed and other histologies have no class."""
    if not patient.diagnoses:
        return None, "patients without a diagnosis"
    classes = {_BREAST.get(d.lower()) for d in patient.diagnoses}
    if len(classes) == 1 and None not in classes:
        return next(iter(classes)), ""
    return None, f"patients with {' and '.join(sorted(patient.diagnoses))}, which is neither IDC nor ILC alone"


def project_class(classes: Mapping[str, str]) -> Rule:
    """Return a rule that goes by the TCGA project, and by words of the diagnosis only where no project is stated.

    Args:
        classes: project: class, like {"TCGA-LUAD": "LUAD"}.
    """

    def rule(patient: Patient) -> tuple[str | None, str]:
        if patient.projects:
            found = {classes.get(p) for p in patient.projects}
            if len(found) == 1 and None not in found:
                return next(iter(found)), ""
            return None, f"patients of {' and '.join(sorted(patient.projects))}, which is no class of this cohort"
        texts = [d.lower() for d in patient.diagnoses]
        named = {c for c in classes.values() if any(word in t for t in texts for word in _WORDS.get(c, ()))}
        if len(named) == 1:
            return named.pop(), ""
        said = " and ".join(sorted(patient.diagnoses)) or "nothing"
        return None, f"patients without a project, whose diagnosis ({said}) names no one class"

    return rule


def classify(patients: Mapping[str, Patient], rule: Rule, account: Account) -> dict[str, str]:
    """Return the class of every patient that has one; the others are counted by reason."""
    found = {}
    for name, patient in patients.items():
        label, reason = rule(patient)
        if label is None:
            account.leave_out(reason, name)
        else:
            found[name] = label
    return found
