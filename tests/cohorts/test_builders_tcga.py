"""Tables of the GDC, new and old, and slide files: what becomes a row, and that nothing is lost without a word."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from lrmil.cohorts.builders.account import Account, BuiltCohort
from lrmil.cohorts.builders.build import Sources, build_histology
from lrmil.cohorts.builders.gdc import read_clinical
from lrmil.cohorts.builders.tcga import find_slides, patient_of, sample_type_of
from lrmil.cohorts.table import load_cohort
from lrmil.errors import CohortError

UUID = "B34C267B-CAAA-4AB6-AD5C-276C26F997A1"

# As the portal writes it: one row a treatment, '-- for nothing; a second diagnosis of another tumour.
NEW_CLINICAL = """\
project.project_id\tcases.case_id\tcases.submitter_id\tdemographic.days_to_death\tdemographic.vital_status\t\
diagnoses.classification_of_tumor\tdiagnoses.days_to_last_follow_up\tdiagnoses.primary_diagnosis\ttreatments.treatment_type
TCGA-BRCA\tu1\tTCGA-A1-A0S1\t'--\tAlive\tprimary\t400.0\tInfiltrating duct carcinoma, NOS\tRadiation
TCGA-BRCA\tu1\tTCGA-A1-A0S1\t'--\tAlive\tprimary\t'--\tInfiltrating duct carcinoma, NOS\tPharmaceutical
TCGA-BRCA\tu1\tTCGA-A1-A0S1\t'--\tAlive\tPrior primary\t'--\tSquamous cell carcinoma, NOS\t'--
TCGA-BRCA\tu2\tTCGA-A2-A0S2\t250\tDead\tprimary\t100\tLobular carcinoma, NOS\t'--
TCGA-BRCA\tu3\tTCGA-A2-A0S3\t'--\tAlive\tprimary\t30\tInfiltrating duct and lobular carcinoma\t'--
TCGA-BRCA\tu4\tTCGA-A2-A0S4\t'--\tAlive\tprimary\t'--\tLobular carcinoma, NOS\t'--
TCGA-BRCA\tu5\tTCGA-A2-A0S5\t'--\tNot Reported\tprimary\t'--\tInfiltrating duct carcinoma, NOS\t'--
TCGA-BRCA\tu6\tTCGA-A2-A0S6\t'--\tAlive\tprimary\t10\t'--\t'--
TCGA-BRCA\tu7\tTCGA-A2-A0S7\t'--\tAlive\tprimary\t10\tMetaplastic carcinoma, NOS\t'--
"""
# The same patients as the Biotab files have them.
OLD_CLINICAL = """\
bcr_patient_uuid\tbcr_patient_barcode\thistological_type\tvital_status\tlast_contact_days_to\tdeath_days_to
bcr_patient_uuid\tbcr_patient_barcode\thistological_type\tvital_status\tdays_to_last_followup\tdays_to_death
CDE_ID:\tCDE_ID:2003301\tCDE_ID:3081934\tCDE_ID:5\tCDE_ID:3008273\tCDE_ID:3165475
x1\tTCGA-A1-A0S1\tInfiltrating Ductal Carcinoma\tAlive\t400\t[Not Applicable]
x2\tTCGA-A2-A0S2\tInfiltrating Lobular Carcinoma\tDead\t[Not Available]\t250
x3\tTCGA-A2-A0S3\tMixed Histology (please specify)\tAlive\t30\t[Not Applicable]
x4\tTCGA-A2-A0S4\tInfiltrating Lobular Carcinoma\tAlive\t[Not Available]\t[Not Applicable]
x5\tTCGA-A2-A0S5\tInfiltrating Ductal Carcinoma\t[Unknown]\t[Not Available]\t[Not Applicable]
x6\tTCGA-A2-A0S6\t[Not Available]\tAlive\t10\t[Not Applicable]
x7\tTCGA-A2-A0S7\tMetaplastic Carcinoma\tAlive\t10\t[Not Applicable]
"""
SLIDES = [
    "TCGA-A1-A0S1-01Z-00-DX1",
    "TCGA-A1-A0S1-01Z-00-DX2",
    "TCGA-A1-A0S1-01A-01-TSA",
    "TCGA-A1-A0S1-06Z-00-DX1",
    "TCGA-A2-A0S2-01Z-00-DX1",
    "TCGA-A2-A0S3-01Z-00-DX1",
    "TCGA-A2-A0S4-01Z-00-DX1",
    "TCGA-A2-A0S5-01Z-00-DX1",
    "TCGA-ZZ-ZZZZ-01Z-00-DX1",
    "control",
]


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    for place, name in enumerate(SLIDES):
        file = folder / f"download-{place}" / (f"{name}.{UUID}.svs" if "-" in name else f"{name}.svs")
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        (file.parent / "annotations.txt").write_text("x")
    return folder


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(params=["new", "old"])
def built(request: pytest.FixtureRequest, tmp_path: Path, slides: Path) -> BuiltCohort:
    text = {"new": NEW_CLINICAL, "old": OLD_CLINICAL}[request.param]
    return build_histology("tcga-brca", Sources([write(tmp_path / "clinical.tsv", text)], slides_dir=slides))


def test_both_spellings_give_the_same_table(built: BuiltCohort, tmp_path: Path) -> None:
    built.write(tmp_path / "cohort.csv")
    cohort = load_cohort(tmp_path / "cohort.csv", task=["label", "survival"])
    rows = cohort.table
    assert list(rows["slide_id"]) == [
        f"{name}.{UUID}"
        for name in (
            "TCGA-A1-A0S1-01Z-00-DX1",
            "TCGA-A1-A0S1-01Z-00-DX2",
            "TCGA-A2-A0S2-01Z-00-DX1",
            "TCGA-A2-A0S4-01Z-00-DX1",
            "TCGA-A2-A0S5-01Z-00-DX1",
        )
    ]
    assert list(rows["patient_id"]) == ["TCGA-A1-A0S1"] * 2 + ["TCGA-A2-A0S2", "TCGA-A2-A0S4", "TCGA-A2-A0S5"]
    assert all(len(p) == 12 for p in rows["patient_id"])
    assert list(rows["label"]) == ["IDC", "IDC", "ILC", "ILC", "IDC"]
    assert rows["survival"].tolist()[:4] == ["alive", "alive", "dead", "alive"]
    assert rows["survival"].isna().tolist() == [False] * 4 + [True]
    assert rows["time"].tolist()[:3] == [400.0, 400.0, 250.0]
    assert rows["event"].tolist()[:3] == [0.0, 0.0, 1.0]
    assert rows["time"].isna().tolist() == rows["event"].isna().tolist() == [False] * 3 + [True] * 2
    assert list(rows["site"]) == ["A1", "A1", "A2", "A2", "A2"]
    assert all(Path(p).is_file() for p in rows["path"])


def test_everything_left_out_is_counted_with_its_reason(built: BuiltCohort) -> None:
    gone = built.account.left_out
    counts = {reason: len(names) for reason, names in gone.items()}
    assert counts["slides whose names are no TCGA slide barcodes"] == 1
    assert counts["frozen sections (TS, BS or MS; only DX slides are diagnostic)"] == 1
    assert counts["slides of sample type 06, not of a primary tumour (01)"] == 1
    assert counts["diagnostic slides of patients without a label"] == 2  # mixed histology, and not in the table
    assert counts["patients without a diagnosis"] == 1
    assert sum(n for reason, n in counts.items() if "neither IDC nor ILC" in reason) == 2
    seen = len(built.table) + sum(n for reason, n in counts.items() if "slides" in reason or "frozen" in reason)
    assert seen == len(SLIDES), "every slide file is a row or is counted"
    empty = built.account.emptied
    assert [len(v) for k, v in empty.items() if "alive without a follow-up" in k] == [1]
    assert [len(v) for k, v in empty.items() if "neither alive nor dead" in k] == [1]
    lines = "\n".join(built.lines())
    assert "kept: 5 slides of 4 patients" in lines
    assert "label: IDC 3 (2), ILC 2 (2); slides (patients)" in lines
    assert "left out: 1 frozen sections" in lines


def test_rows_of_the_older_header_are_counted_too(tmp_path: Path) -> None:
    account = Account()
    patients = read_clinical([write(tmp_path / "clinical.txt", OLD_CLINICAL)], account)
    assert len(patients) == 7
    assert account.left_out["rows of clinical tables without a TCGA patient"] == [
        "row 2 of clinical.txt",
        "row 3 of clinical.txt",
    ]


def test_another_tumour_of_a_patient_is_not_the_diagnosis(tmp_path: Path) -> None:
    patients = read_clinical([write(tmp_path / "clinical.tsv", NEW_CLINICAL)], Account())
    assert patients["TCGA-A1-A0S1"].diagnoses == {"Infiltrating duct carcinoma, NOS"}


def test_two_diagnoses_that_disagree_give_no_label(tmp_path: Path, slides: Path) -> None:
    text = NEW_CLINICAL.replace("Prior primary", "primary")
    built = build_histology("tcga-brca", Sources([write(tmp_path / "clinical.tsv", text)], slides_dir=slides))
    assert "TCGA-A1-A0S1" not in set(built.table["patient_id"])
    (reason,) = (r for r, names in built.account.left_out.items() if "TCGA-A1-A0S1" in names)
    assert "Infiltrating duct carcinoma, NOS and Squamous cell carcinoma, NOS" in reason


def test_missing_columns_are_named_with_what_was_looked_for(tmp_path: Path, slides: Path) -> None:
    table = write(tmp_path / "clinical.tsv", "who\twhat\nTCGA-A1-A0S1\tIDC\n")
    with pytest.raises(CohortError, match=r"no column for the patient; looked for cases\.submitter_id, .*there is who"):
        read_clinical([table], Account())
    table = write(tmp_path / "clinical.tsv", "case_id\tvital_status\nuuid-1\tAlive\n")
    with pytest.raises(CohortError, match=r"column case_id holds no TCGA barcode .*'uuid-1'"):
        read_clinical([table], Account())
    table = write(
        tmp_path / "clinical.tsv", "case_submitter_id\tprimary_diagnosis\nTCGA-A1-A0S1\tLobular carcinoma, NOS\n"
    )
    built = build_histology("tcga-brca", Sources([table], slides_dir=slides))
    lines = "\n".join(built.lines())
    assert "nothing on follow-up; looked for diagnoses.days_to_last_follow_up, days_to_last_follow_up" in lines
    assert "nothing on status; looked for demographic.vital_status" in lines
    assert set(built.table["label"]) == {"ILC"}
    assert "time" not in built.table


def test_uuids_and_barcodes_side_by_side(tmp_path: Path) -> None:
    table = write(tmp_path / "clinical.tsv", "case_id\tcase_submitter_id\tproject_id\nu-1\tTCGA-A1-A0S1\tTCGA-LUAD\n")
    assert list(read_clinical([table], Account())) == ["TCGA-A1-A0S1"]


@pytest.mark.parametrize(
    ("cohort", "rows", "expected"),
    [
        (
            "tcga-nsclc",
            "TCGA-A1-A0S1\tTCGA-LUAD\tAdenocarcinoma, NOS\nTCGA-A2-A0S2\tTCGA-LUSC\tAdenocarcinoma, NOS\n",
            ["LUAD", "LUAD", "LUSC"],
        ),
        (
            "tcga-rcc",
            "TCGA-A1-A0S1\tTCGA-KIRP\tPapillary adenocarcinoma, NOS\nTCGA-A2-A0S2\tTCGA-KIRC\tClear cell "
            "adenocarcinoma, NOS\nTCGA-A2-A0S4\tTCGA-KICH\tRenal cell carcinoma, chromophobe type\n"
            "TCGA-A2-A0S5\tTCGA-BRCA\tLobular carcinoma, NOS\n",
            ["KIRP", "KIRP", "KIRC", "KICH"],
        ),
    ],
)
def test_classes_by_project_and_by_words_without_one(
    tmp_path: Path, slides: Path, cohort: str, rows: str, expected: list[str]
) -> None:
    """The project decides, even over the diagnosis; where the column is not there, the words do."""
    text = "case_submitter_id\tproject_id\tprimary_diagnosis\n" + rows
    built = build_histology(cohort, Sources([write(tmp_path / "a.tsv", text)], slides_dir=slides))
    assert list(built.table["label"]) == expected
    if cohort == "tcga-rcc":
        assert built.account.left_out["patients of TCGA-BRCA, which is no class of this cohort"] == ["TCGA-A2-A0S5"]
        words = text.replace("project_id", "nothing")
        built = build_histology(cohort, Sources([write(tmp_path / "b.tsv", words)], slides_dir=slides))
        assert list(built.table["label"]) == expected


def test_a_cohort_of_several_downloads(tmp_path: Path, slides: Path) -> None:
    head = "cases.submitter_id\tproject.project_id\n"
    one = write(tmp_path / "luad.tsv", head + "TCGA-A1-A0S1\tTCGA-LUAD\n")
    two = write(tmp_path / "lusc.tsv", head + "TCGA-A2-A0S2\tTCGA-LUSC\n")
    assert list(build_histology("tcga-nsclc", Sources([one, two], slides_dir=slides)).table["label"]) == [
        "LUAD",
        "LUAD",
        "LUSC",
    ]


def test_a_slide_sheet_says_which_files_to_use(tmp_path: Path, slides: Path) -> None:
    sheet = write(
        tmp_path / "sheet.tsv",
        "File ID\tFile Name\tData Type\tCase ID\n"
        f"f1\tTCGA-A1-A0S1-01Z-00-DX2.{UUID}.svs\tSlide Image\tTCGA-A1-A0S1\n"
        f"f1\tTCGA-A1-A0S1-01Z-00-DX2.{UUID}.svs\tSlide Image\tTCGA-A1-A0S1\n"
        f"f2\tTCGA-A9-A9A9-01Z-00-DX1.{UUID}.svs\tSlide Image\tTCGA-A9-A9A9\n"
        "f3\tcounts.tsv\tGene Expression Quantification\tTCGA-A1-A0S1\n",
    )
    account = Account()
    found = find_slides(slides, sheet, account)
    assert list(found) == [f"TCGA-A1-A0S1-01Z-00-DX2.{UUID}"]
    assert found[f"TCGA-A1-A0S1-01Z-00-DX2.{UUID}"].path is not None
    assert account.left_out["slides of the sheet without a file"] == [f"TCGA-A9-A9A9-01Z-00-DX1.{UUID}"]
    assert len(account.left_out["slide files that the sheet does not list"]) == len(SLIDES) - 1
    assert account.left_out["rows of the sheet that are not slide images"] == ["counts.tsv"]
    assert len(account.left_out["rows of the sheet that name a slide again"]) == 1
    without = find_slides(None, sheet, Account())
    assert [s.path for s in without.values()] == [None, None]


def test_the_biospecimen_table_names_slides_without_uuid(tmp_path: Path, slides: Path) -> None:
    sheet = write(
        tmp_path / "slide.tsv", "cases.submitter_id\tslides.submitter_id\nTCGA-A2-A0S2\tTCGA-A2-A0S2-01Z-00-DX1\n"
    )
    found = find_slides(slides, sheet, Account())
    assert list(found) == [f"TCGA-A2-A0S2-01Z-00-DX1.{UUID}"]


def test_slides_that_are_none_are_refused(tmp_path: Path, slides: Path) -> None:
    with pytest.raises(CohortError, match=r"--slides-dir, --slide-sheet, or both"):
        find_slides(None, None, Account())
    with pytest.raises(CohortError, match="no such folder"):
        find_slides(tmp_path / "none", None, Account())
    for file in list(slides.rglob("*DX*.svs")):
        file.unlink()
    with pytest.raises(CohortError, match="no diagnostic slide of a primary tumour among 2"):
        find_slides(slides, None, Account())
    table = write(tmp_path / "clinical.tsv", "case_submitter_id\tproject_id\nTCGA-XX-XXXX\tTCGA-LUAD\n")
    (slides / f"TCGA-A1-A0S1-01Z-00-DX1.{UUID}.svs").write_bytes(b"")
    with pytest.raises(CohortError, match="none of 1 slides is of one of the 1 patients"):
        build_histology("tcga-nsclc", Sources([table], slides_dir=slides))


def test_a_slide_downloaded_twice_counts_once(slides: Path) -> None:
    twin = slides / "again" / f"TCGA-A2-A0S2-01Z-00-DX1.{UUID}.svs"
    twin.parent.mkdir()
    twin.write_bytes(b"")
    account = Account()
    assert f"TCGA-A2-A0S2-01Z-00-DX1.{UUID}" in find_slides(slides, None, account)
    assert len(account.left_out["files of a name that another folder has too"]) == 1


def test_barcodes() -> None:
    assert patient_of("TCGA-3C-AAAU-01A-11R-A41B-07") == "TCGA-3C-AAAU"
    assert patient_of("tcga-3c-aaau") == "TCGA-3C-AAAU"
    assert patient_of("TCGA-3C-AAAUX") is None
    assert patient_of("3C-AAAU") is None
    assert sample_type_of("TCGA-3C-AAAU-11A") == "11"
    assert sample_type_of("TCGA-3C-AAAU") is None


def test_tables_have_no_index_and_no_empty_columns(built: BuiltCohort, tmp_path: Path) -> None:
    built.write(tmp_path / "cohort.csv")
    read = pd.read_csv(tmp_path / "cohort.csv")
    assert list(read.columns) == ["slide_id", "patient_id", "label", "survival", "time", "event", "path", "site"]
