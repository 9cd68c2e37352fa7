"""Screens of recipes ask validation slides alone, and say what each change brings."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from lrmil.pipeline.context import Split
from lrmil.studies import screen


def test_only_validation_slides_are_asked() -> None:
    split = Split("0", "fold 1", train=("a",), val=("b", "c"), test=("d",))
    asked = screen._asked_of_validation(split)
    assert asked.test == asked.val == ("b", "c")
    assert asked.train == split.train


@pytest.mark.parametrize("name", ["screen-stage1", "screen-stage2"])
def test_committed_screens_load_and_share_their_slides(name: str) -> None:
    folder = Path(__file__).parents[2] / "evidence"
    found = screen.load_screen(folder / f"{name}.yaml")
    assert found.simulated == screen.load_screen(folder / "screen-stage1.yaml").simulated
    assert found.factors


def test_table_leaves_the_gain_of_the_recipe_itself_empty() -> None:
    row = {"factor": "", "recipe": "as it is", "metric": "auc", "value": 0.5, "value_low": 0.4, "value_high": 0.6}
    none = dict.fromkeys(("gain", "gain_low", "gain_high"), float("nan"))
    more = {"factor": "k", "recipe": "1", "gain": 0.1, "gain_low": 0.0, "gain_high": 0.2}
    lines = screen.to_markdown(pd.DataFrame([row | none, row | more])).splitlines()
    assert lines[2].endswith("|  |")
    assert "+0.100 [+0.000, +0.200]" in lines[3]
