"""`lrmil assemble`, `import`, `export`, `encoders`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lrmil.bags import read_bag


def test_assemble_composes_slides_from_real_tissue(call: Any, shared_data: Path, tmp_path: Path) -> None:
    words = ("--groups", 3, "--slides_per_group", 2, "--seed", 4, "--set", "fields=[2, 3]")
    answer = call("assemble", shared_data / "crchisto", tmp_path / "c", "--task", "epithelium", *words)
    assert answer.code == 0, answer.err
    assert answer.out == f"wrote {tmp_path / 'c' / 'cohort.csv'}\n"
    table = pd.read_csv(tmp_path / "c" / "cohort.csv")
    assert table["label"].value_counts().to_dict() == {"negative": 3, "positive": 3}
    assert table["patient_id"].nunique() == 3
    said = json.loads((tmp_path / "c" / "assembled.json").read_text())["settings"]
    assert (said["task"], said["seed"], said["fields"]) == ("epithelium", 4, [2, 3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slides-per-group", "3"], "slides_per_group must be even"),
        (["--groups", "1"], "groups: Input should be greater than or equal to 2 (got 1)"),
        (["--set", "field=[1, 2]"], "field is no setting (did you mean fields?)"),
        ([], "none"),
    ],
)
def test_assemble_refuses(call: Any, tmp_path: Path, words: list[str], message: str) -> None:
    assert message in call("assemble", tmp_path / "none", tmp_path / "c", *words).refused()
    assert not (tmp_path / "c").exists()


def test_features_go_out_and_come_in_again(call: Any, study: Any, tmp_path: Path) -> None:
    features = study.out / "features" / "lrmil-small_0.5mpp"
    out = call("export", features, tmp_path / "trident")
    assert (out.code, out.out) == (0, f"9 files written to {tmp_path / 'trident'}\n")
    back = call("import", tmp_path / "trident", tmp_path / "back", "--mpp", 0.5)
    assert (back.code, back.err) == (0, "")
    for path in features.glob("*.h5"):
        assert (read_bag(tmp_path / "back" / path.name).features == read_bag(path, layers=()).features).all()


def test_import_says_which_files_could_not_be_used(call: Any, shared_data: Path, tmp_path: Path) -> None:
    source = next((shared_data / "features").glob("*/features.h5"))
    answer = call("import", source, tmp_path / "out")
    assert "does not say what unit" in answer.refused(code=1)
    assert answer.out.startswith("0 files written")
    assert call("import", source, tmp_path / "out", "--coords_unit", "px_l0").code == 0
    assert "no .h5 or .pt file" in call("import", tmp_path / "empty", tmp_path / "out").refused()


def test_encoders_are_listed_with_licence_and_access(call: Any) -> None:
    shown = call("encoders").out
    assert "lrmil-small" in shown
    assert "gated" in shown
    cards = {card["name"]: card for card in json.loads(call("encoders", "--json").out)}
    assert cards["lrmil-small"]["licence"] == "Apache-2.0"
    assert all(card["licence"] for card in cards.values())
