"""PAM50 calls, and the spreadsheet of BRACS."""

from __future__ import annotations

from pathlib import Path

import openpyxl
import pytest

from lrmil.cohorts.builders.account import Account
from lrmil.cohorts.builders.bracs import build_bracs
from lrmil.cohorts.builders.build import Sources, build_molecular
from lrmil.cohorts.builders.pam50 import read_pam50
from lrmil.cohorts.table import load_cohort
from lrmil.errors import CohortError

PAM50 = """\
pan.samplesID,cancer.type,Subtype_mRNA
TCGA-A1-A0S1-01A-11R-A084-07,BRCA,LumA
TCGA-A1-A0S2-01A-11R-A084-07,BRCA,LumB
TCGA-A1-A0S3-01A-11R-A084-07,BRCA,Basal
TCGA-A1-A0S4-01A-11R-A084-07,BRCA,Her2
TCGA-A1-A0S5-01A-11R-A084-07,BRCA,Normal
TCGA-A1-A0S1-11A-11R-A084-07,BRCA,Normal
TCGA-A1-A0S6-01A-11R-A084-07,BRCA,NA
TCGA-A1-A0S7-01A-11R-A084-07,BRCA,LumA
TCGA-A1-A0S7-01B-11R-A084-07,BRCA,LumB
TCGA-A1-A0S8-01A-11R-A084-07,BRCA,Claudin
HG-0001,BRCA,LumA
"""


def test_calls_become_four_classes_and_the_rest_is_counted(tmp_path: Path) -> None:
    (tmp_path / "pam50.csv").write_text(PAM50)
    account = Account()
    calls = read_pam50(tmp_path / "pam50.csv", account)
    assert calls == {"TCGA-A1-A0S1": "LumA", "TCGA-A1-A0S2": "LumB", "TCGA-A1-A0S3": "Basal", "TCGA-A1-A0S4": "Her2"}
    assert {reason: len(names) for reason, names in account.left_out.items()} == {
        "rows of PAM50 calls without a TCGA barcode": 1,
        "PAM50 calls of samples that are not primary tumours (01)": 1,
        "rows without a PAM50 call": 1,
        "patients with different PAM50 calls": 1,
        "patients called Normal-like": 1,
        "patients called 'Claudin', which is no PAM50 class": 1,
    }


@pytest.mark.parametrize(
    ("header", "calls"),
    [
        ("patient\tBRCA_Subtype_PAM50", ("LumA", "LumB", "Basal", "Her2", "Normal")),
        ("Patient ID\tSubtype", ("BRCA_LumA", "BRCA_LumB", "BRCA_Basal", "BRCA_Her2", "BRCA_Normal")),
        ("sampleID\tSubtype_Selected", ("BRCA.LumA", "BRCA.LumB", "BRCA.Basal", "BRCA.Her2", "BRCA.Normal")),
        (
            "Complete TCGA ID\tPAM50 mRNA",
            ("Luminal A", "Luminal B", "Basal-like", "HER2-enriched", "Normal-like"),
        ),
    ],
)
def test_calls_in_the_spellings_of_their_sources(tmp_path: Path, header: str, calls: tuple[str, ...]) -> None:
    rows = [f"TCGA-A1-A0S{i}\t{call}" for i, call in enumerate(calls)]
    (tmp_path / "calls.tsv").write_text("\n".join([header, *rows]) + "\n")
    account = Account()
    assert list(read_pam50(tmp_path / "calls.tsv", account).values()) == ["LumA", "LumB", "Basal", "Her2"]
    assert account.left_out == {"patients called Normal-like": ["TCGA-A1-A0S4"]}


def test_molecular_table_with_and_without_survival(tmp_path: Path) -> None:
    (tmp_path / "pam50.csv").write_text(PAM50)
    (tmp_path / "slides").mkdir()
    for number in range(1, 6):
        (tmp_path / "slides" / f"TCGA-A1-A0S{number}-01Z-00-DX1.AAAA.svs").write_bytes(b"")
    (tmp_path / "clinical.tsv").write_text("case_submitter_id\tvital_status\tdays_to_death\nTCGA-A1-A0S1\tDead\t12\n")
    plain = build_molecular(tmp_path / "pam50.csv", Sources(slides_dir=tmp_path / "slides"))
    assert list(plain.table["label"]) == ["LumA", "LumB", "Basal", "Her2"]
    assert "survival" not in plain.table
    assert plain.account.left_out["diagnostic slides of patients without a label"] == ["TCGA-A1-A0S5-01Z-00-DX1.AAAA"]
    rich = build_molecular(tmp_path / "pam50.csv", Sources([tmp_path / "clinical.tsv"], slides_dir=tmp_path / "slides"))
    assert rich.table["survival"].tolist()[0] == "dead"
    assert rich.table["survival"].isna().sum() == 3
    rich.write(tmp_path / "cohort.csv")
    assert load_cohort(tmp_path / "cohort.csv", classes=["LumA", "LumB", "Basal", "Her2"]).classes[0] == "LumA"


def test_calls_without_a_column_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("patient,er\nTCGA-A1-A0S1,positive\n")
    with pytest.raises(CohortError, match="no column for the PAM50 call; looked for BRCA_Subtype_PAM50"):
        read_pam50(tmp_path / "a.csv", Account())


BRACS = [
    ["WSI Filename", "Patient Id", "RoI", "WSI label", "Set"],
    ["BRACS_264", 2, "Yes", "N", "Testing"],
    ["BRACS_265.svs", 2, "Yes", "PB", "Testing"],
    ["BRACS_266", 3, "No", "UDH", "Training"],
    ["BRACS_267", 3, "No", "FEA", "Training"],
    ["BRACS_268", 4, "No", "Type_ADH", "Validation"],
    ["BRACS_269", 5, "No", "DCIS", "Training"],
    ["BRACS_270", 6, "No", "IC", "Validation"],
    ["BRACS_271", 7, "No", "??", "Training"],
    ["BRACS_272", None, "No", "IC", "Training"],
    ["BRACS_273", 8, "No", "IC", "Later"],
    ["BRACS_266", 3, "No", "UDH", "Training"],
]


def spreadsheet(path: Path, rows: list[list[object]], *, first: bool = True) -> Path:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    if not first:
        sheet.append(["Notes", "of the set"])
        sheet.append(["see", "the site"])
        sheet = book.create_sheet("WSI_Information")
    for row in rows:
        sheet.append(row)
    book.save(path)
    return path


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "BRACS_WSI"
    for row in BRACS[1:]:
        file = folder / str(row[4]) / f"{str(row[0]).removesuffix('.svs')}.svs"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    return folder


@pytest.mark.parametrize("first", [True, False])
def test_bracs_keeps_the_official_split(tmp_path: Path, slides: Path, first: bool) -> None:
    built = build_bracs(spreadsheet(tmp_path / "BRACS.xlsx", BRACS, first=first), slides)
    assert {reason: len(names) for reason, names in built.account.left_out.items()} == {
        "slides labelled '??', which is none of N, PB, UDH, FEA, ADH, DCIS, IC": 1,
        "slides without a patient": 1,
        "slides of no official set": 1,
        "rows of a slide that an earlier row has": 1,
    }
    built.write(tmp_path / "cohort.csv")
    cohort = load_cohort(tmp_path / "cohort.csv", classes=["N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC"])
    assert list(cohort.table["label"]) == ["N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC"]
    assert list(cohort.table["fold"]) == ["test", "test", "train", "train", "val", "train", "val"]
    assert list(cohort.table["patient_id"])[:3] == ["BRACS-P2", "BRACS-P2", "BRACS-P3"]
    assert cohort.table["slide_id"][1] == "BRACS_265"


def test_bracs_without_the_split_leaves_folds_to_the_run(tmp_path: Path, slides: Path) -> None:
    (slides / "Training" / "BRACS_269.svs").unlink()
    built = build_bracs(spreadsheet(tmp_path / "BRACS.xlsx", BRACS), slides, official_split=False)
    assert "fold" not in built.table
    assert built.account.left_out["slides without a file"] == ["BRACS_269"]
    assert "BRACS_273" in set(built.table["slide_id"]), "its set does not matter then"
    assert "path" not in build_bracs(tmp_path / "BRACS.xlsx", None).table


def test_bracs_refuses_a_split_that_tears_patients(tmp_path: Path) -> None:
    rows = [*BRACS[:6], ["BRACS_300", 3, "No", "IC", "Testing"]]
    with pytest.raises(CohortError, match=r"1 patients have slides in several official sets \(BRACS-P3\)"):
        build_bracs(spreadsheet(tmp_path / "BRACS.xlsx", rows), None)
    assert len(build_bracs(tmp_path / "BRACS.xlsx", None, official_split=False).table) == 6


def test_another_spreadsheet_is_refused(tmp_path: Path) -> None:
    path = spreadsheet(tmp_path / "x.xlsx", [["a", "b"], [1, 2]])
    with pytest.raises(CohortError, match=r"no column for the slide; looked for WSI Filename.*there is a, b"):
        build_bracs(path, None)
    path = spreadsheet(tmp_path / "y.xlsx", [BRACS[0], ["BRACS_1", 1, "No", "??", "Training"]])
    with pytest.raises(CohortError, match=r"no slide is left.*left out: 1 slides labelled"):
        build_bracs(path, None)
