"""PAM50 calls of TCGA-BRCA: LumA, LumB, Basal, Her2. Normal-like is left out, as in the paper's BRCA*."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from lrmil.cohorts.builders.account import Account
from lrmil.cohorts.builders.sheets import find_columns, need_column, read_sheet, value
from lrmil.cohorts.builders.tcga import patient_of, sample_type_of

SAMPLE = (
    *("pan.samplesID", "Sample ID", "SAMPLE_ID", "sampleID", "sample", "barcode", "Complete TCGA ID"),
    *(
        "bcr_patient_barcode",
        "cases.submitter_id",
        "case_submitter_id",
        "patient",
        "patient_id",
        "PATIENT_ID",
        "Patient ID",
    ),
)
CALL = (
    *("BRCA_Subtype_PAM50", "paper_BRCA_Subtype_PAM50", "PAM50", "PAM50 mRNA", "PAM50_mRNA", "PAM50Call_RNAseq"),
    *("PAM50_mRNA_nature2012", "PAM50Call", "Subtype_mRNA", "Subtype_Selected", "SUBTYPE", "Subtype"),
)
CLASSES = ("LumA", "LumB", "Basal", "Her2")
_CALLS = {
    **{"luma": "LumA", "luminala": "LumA", "lumb": "LumB", "luminalb": "LumB", "basal": "Basal", "basallike": "Basal"},
    **{"her2": "Her2", "her2e": "Her2", "her2enriched": "Her2", "normal": "Normal", "normallike": "Normal"},
}
_FIX = "Give a table with a TCGA barcode and a PAM50 call in each row."


def read_pam50(path: Path, account: Account) -> dict[str, str]:
    """Return the call of each patient.

    Calls of other samples than primary tumours (01) are left out, and so are patients whose calls differ.

    Raises:
        CohortError: no column of barcodes, or of calls.
    """
    table = read_sheet(path, [SAMPLE, CALL])
    sample = need_column(path, table, "the sample or patient", SAMPLE, _FIX)
    sample = next((c for c in find_columns(table, SAMPLE) if any(patient_of(value(v)) for v in table[c])), sample)
    call = need_column(path, table, "the PAM50 call", CALL, _FIX)
    account.found.append(f"{path}: {len(table)} rows, samples by column {sample}, calls by column {call}")
    calls: dict[str, set[str]] = defaultdict(set)
    for text, cell in zip(table[sample], table[call], strict=True):
        patient, said = patient_of(value(text)), value(cell)
        if patient is None:
            account.leave_out("rows of PAM50 calls without a TCGA barcode", str(text))
        elif sample_type_of(str(text)) not in (None, "01"):
            account.leave_out("PAM50 calls of samples that are not primary tumours (01)", str(text))
        elif said is None:
            account.leave_out("rows without a PAM50 call", str(text))
        else:
            calls[patient].add(_CALLS.get(re.sub(r"[^a-z0-9]", "", re.sub(r"(?i)^brca[._]", "", said).lower()), said))
    found = {}
    for patient, own in calls.items():
        if len(own) > 1:
            account.leave_out("patients with different PAM50 calls", patient)
        elif own == {"Normal"}:
            account.leave_out("patients called Normal-like", patient)
        elif not own <= set(CLASSES):
            account.leave_out(f"patients called {next(iter(own))!r}, which is no PAM50 class", patient)
        else:
            found[patient] = own.pop()
    return found
