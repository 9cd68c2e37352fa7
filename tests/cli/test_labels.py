"""`lrmil labels`: each cohort by one call, whose output says what was left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lrmil.cohorts.table import load_cohort

TAUGHT = {
    "tcga-brca": ("--clinical", "GDC portal", "IDC", "ILC", "clinical.tsv", "TCGA-BRCA"),
    "tcga-nsclc": ("--clinical", "GDC portal", "LUAD", "LUSC", "project"),
    "tcga-rcc": ("--clinical", "GDC portal", "KIRP", "KIRC", "KICH"),
    "brca-molecular": ("--pam50", "TCGAbiolinks", "cBioPortal", "Normal-like", "GDC portal"),
    "survival": ("--project", "--clinical", "--need-time", "follow_up.tsv", "event"),
    "bracs": ("--spreadsheet", "BRACS.xlsx", "--split", "registration"),
}


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    for number in range(1, 7):
        (folder / f"TCGA-A1-000{number}-01Z-00-DX1.AAAA.svs").write_bytes(b"")
    (folder / "TCGA-A1-0001-01A-01-TS1.AAAA.svs").write_bytes(b"")
    return folder


def table(path: Path, head: str, *rows: str) -> Path:
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


@pytest.mark.parametrize("cohort", TAUGHT)
def test_help_teaches_where_each_file_comes_from(call: Any, cohort: str) -> None:
    answer = call("labels", cohort, "--help")
    assert answer.code == 0
    shown = re.sub(r"[\s│╭╮╰╯─]+", " ", answer.out).lower()
    for word in (*TAUGHT[cohort], "--slides-dir", "--out"):
        assert word.lower() in shown, word


def test_the_first_page_lists_all_cohorts(call: Any) -> None:
    shown = call("labels", "--help").out
    assert all(cohort in shown for cohort in TAUGHT)
    assert "labels" in call("--help").out


def test_a_cohort_in_one_call(call: Any, tmp_path: Path, slides: Path) -> None:
    clinical = table(
        tmp_path / "clinical.tsv",
        "cases.submitter_id\tdiagnoses.primary_diagnosis\tdemographic.vital_status\tdemographic.days_to_death",
        "TCGA-A1-0001\tInfiltrating duct carcinoma, NOS\tAlive\t'--",
        "TCGA-A1-0002\tLobular carcinoma, NOS\tDead\t30",
        "TCGA-A1-0003\tMedullary carcinoma, NOS\tAlive\t'--",
    )
    out = tmp_path / "study" / "cohort.csv"
    answer = call("labels", "tcga-brca", "--clinical", clinical, "--slides_dir", slides, "--out", out)
    assert answer.code == 0, answer.err
    assert "kept: 2 slides of 2 patients" in answer.out
    assert "left out: 1 frozen sections" in answer.out
    assert "Medullary carcinoma, NOS, which is neither IDC nor ILC alone (TCGA-A1-0003)" in answer.out
    assert "looked for diagnoses.days_to_last_follow_up" in answer.out
    assert answer.out.rstrip().endswith(f"wrote {out}")
    assert load_cohort(out).classes == ("IDC", "ILC")


def test_the_other_cohorts(call: Any, tmp_path: Path, slides: Path) -> None:
    out = tmp_path / "cohort.csv"
    one = table(tmp_path / "1.tsv", "case_submitter_id\tproject_id", "TCGA-A1-0001\tTCGA-LUAD")
    two = table(tmp_path / "2.tsv", "case_submitter_id\tproject_id", "TCGA-A1-0002\tTCGA-LUSC")
    assert (
        call("labels", "tcga-nsclc", "--clinical", one, "--clinical", two, "--slides-dir", slides, "--out", out).code
        == 0
    )
    assert load_cohort(out).classes == ("LUAD", "LUSC")
    kidney = table(
        tmp_path / "3.tsv", "case_submitter_id\tproject_id", "TCGA-A1-0001\tTCGA-KIRP", "TCGA-A1-0002\tTCGA-KICH"
    )
    assert call("labels", "tcga-rcc", "--clinical", kidney, "--slides-dir", slides, "--out", out).code == 0
    assert load_cohort(out).classes == ("KICH", "KIRP")
    pam50 = table(tmp_path / "4.csv", "patient,PAM50", "TCGA-A1-0001,LumA", "TCGA-A1-0002,Basal", "TCGA-A1-0003,Normal")
    answer = call("labels", "brca-molecular", "--pam50", pam50, "--slides-dir", slides, "--out", out)
    assert "left out: 1 patients called Normal-like (TCGA-A1-0003)" in answer.out
    assert load_cohort(out).classes == ("Basal", "LumA")
    status = table(
        tmp_path / "5.tsv",
        "case_submitter_id\tvital_status\tdays_to_death\tdays_to_last_follow_up",
        "TCGA-A1-0001\tAlive\t'--\t100",
        "TCGA-A1-0002\tDead\t9\t'--",
        "TCGA-A1-0003\tDead\t'--\t'--",
    )
    words = ("--project", "TCGA-KIRC", "--clinical", status, "--slides-dir", slides, "--out", out)
    assert "kept: 3 slides" in call("labels", "survival", *words).out
    assert "kept: 2 slides" in call("labels", "survival", *words, "--need-time").out
    assert load_cohort(out, task="survival").table["event"].tolist() == [0.0, 1.0]
    bracs = table(
        tmp_path / "6.csv", "WSI Filename,Patient Id,RoI,WSI label,Set", "B1,1,No,N,Training", "B2,2,No,IC,Testing"
    )
    assert call("labels", "bracs", "--spreadsheet", bracs, "--out", out).code == 0
    assert load_cohort(out, check_files=False).table["fold"].tolist() == ["train", "test"]
    assert call("labels", "bracs", "--spreadsheet", bracs, "--split", "cross-validation", "--out", out).code == 0
    assert "fold" not in load_cohort(out, check_files=False).table


def test_wrong_files_are_refused_in_one_line(call: Any, tmp_path: Path, slides: Path) -> None:
    wrong = table(tmp_path / "wrong.tsv", "a\tb", "1\t2")
    line = call("labels", "tcga-rcc", "--clinical", wrong, "--slides-dir", slides).refused()
    assert "looked for cases.submitter_id" in line
    assert "clinical.tsv" in line
    assert not (tmp_path / "cohort.csv").exists()
    assert "no such table" in call("labels", "tcga-rcc", "--clinical", tmp_path / "none.tsv").refused()
