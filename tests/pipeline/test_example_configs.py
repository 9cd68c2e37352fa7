"""The ready configs: each is read as it is, and says what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrmil.encoders import resolve_card
from lrmil.geometry import check_token_grid
from lrmil.mil import create_head
from lrmil.pipeline.config import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"
CLASSES = {
    "tcga-brca": ["IDC", "ILC"],
    "tcga-nsclc": ["LUAD", "LUSC"],
    "tcga-rcc": ["KIRP", "KIRC", "KICH"],
    "bracs": ["N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC"],
    "brca-molecular": ["LumA", "LumB", "Basal", "Her2"],
    "survival": ["alive", "dead"],
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/config.yaml")), ids=lambda p: p.parent.name)
def test_every_example_is_a_valid_config(path: Path) -> None:
    assert load_config(path).out == str(path.parent / "run")


@pytest.mark.parametrize("name", CLASSES)
def test_the_papers_cohorts_are_set_up_as_the_paper_says(name: str) -> None:
    run = load_config(EXAMPLES / name / "config.yaml")
    assert run.cohort.classes == CLASSES[name]
    assert run.cohort.task == ("survival" if name == "survival" else "label")
    assert run.cohort.table == str(EXAMPLES / name / "cohort.csv")
    assert (run.grid.lr_mpp, run.grid.hr_mpp, run.grid.patch_px, run.grid.ratio) == (2.0, 0.5, 256, 4)
    card = resolve_card(run.encoder.name)
    assert card.name == run.encoder.name == "conch-v1"
    check_token_grid(run.grid.patch_px // card.token_px, run.grid.ratio)
    assert run.folds.num_folds == 5
    assert run.stage1.loss.layers == (0, 1, -1)
    assert run.teacher.patience == run.student.patience == 20
    assert run.teacher.learning_rate == run.student.learning_rate == run.stage1.learning_rate
    create_head(run.student.head.name, card.embed_dim(), len(CLASSES[name]), **run.student.head.options)


def test_the_table_of_each_builder_fits_its_config() -> None:
    """The classes that the builders write are those that the configs name."""
    from lrmil.cohorts.builders import bracs, histology, pam50

    assert list(bracs.CLASSES) == CLASSES["bracs"]
    assert list(pam50.CLASSES) == CLASSES["brca-molecular"]
    assert list(histology.NSCLC.values()) == CLASSES["tcga-nsclc"]
    assert list(histology.RCC.values()) == CLASSES["tcga-rcc"]
    assert set(histology._BREAST.values()) == set(CLASSES["tcga-brca"])


@pytest.mark.parametrize("name", CLASSES)
def test_the_document_and_the_config_give_the_same_call(name: str) -> None:
    document = (EXAMPLES.parent / "docs" / "paper-cohorts.md").read_text(encoding="utf-8")
    assert f"examples/{name}" in document
    assert f"lrmil labels {name}" in document
