"""Screens of recipes ask validation slides alone, and say what each change brings."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest
import torch

from lrmil.encoders import Encoder, EncoderCard, save_encoder
from lrmil.encoders.vit import build_trunk
from lrmil.errors import ConfigError
from lrmil.pipeline.context import Split
from lrmil.pipeline.reporting import Reporter
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


CONFIG = """
title: tiny screen
simulated: {{seed: 6, slides: 12, patients: 12, slide_px: 768, sites: 2, nuclei: {{visibility: 1.0, shapes: 8}}}}
run:
  grid: {{patch_px: 32}}
  encoder: {{name: {encoder}}}
  folds: {{num_folds: 3}}
  stage1: {{epochs: 1, learning_rate: 0.001, restore_spread: true}}
  teacher: {{epochs: 2}}
  student: {{epochs: 2}}
  deploy: false
  device: cpu
  threads: 1
num_folds: 2
factors:
  steps:
    smaller: {{stage1: {{learning_rate: 0.0001}}}}
  L_soft:
    absent: {{student: {{loss: {{lambda_soft: 0.0}}}}}}
resamples: 100
"""


@pytest.fixture
def config(tmp_path: Path, tiny_card: EncoderCard) -> Path:
    torch.manual_seed(0)
    encoder = Encoder(tiny_card, build_trunk(tiny_card), input_px=32, embedding="cls", weights_source="drawn at random")
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(encoder=save_encoder(encoder, tmp_path / "encoder")))
    return path


def quiet() -> Reporter:
    return Reporter(quiet=True, stream=io.StringIO())


def test_a_screen_trains_recipes_on_some_folds_publishes_and_resumes(config: Path, tmp_path: Path) -> None:
    settings = screen.load_screen(config)
    written = screen.run_screen(settings, quiet(), publish=tmp_path / "docs")
    assert [path.name for path in written] == ["tiny.csv", "tiny.md", "tiny.png", "tiny_settings.json"]
    assert all(path.is_file() and path.parent == tmp_path / "docs" for path in written)

    run = tmp_path / "out" / "tiny" / "run"
    found = pd.read_csv(written[0])
    assert list(found["recipe"]) == ["as it is", "smaller", "absent"]
    splits = pd.read_csv(run / "splits.csv")
    asked = (splits[["fold_0", "fold_1"]] == "val").to_numpy().sum()
    assert found["slides"].eq(asked).all(), "validation slides of two folds, no test slide"
    models = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    stage1 = [path.relative_to(run).parts for path in models if "stage1" in path.parts]
    assert sum("variants" not in parts for parts in stage1) == 2, "the run's own, of two folds"
    assert len({parts[1] for parts in stage1 if "variants" in parts}) == 1, "what changes stage 2 alone shares stage 1"
    assert not any("2" in path.parts for path in models)

    assert screen.run_screen(settings, quiet(), publish=tmp_path / "docs") == written
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == models, "nothing is trained twice"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_folds=4", "num_folds is 4"),
        ("factors={field: {wide: {grid: {patch_px: 64}}}}", "wide: a recipe changes how is trained"),
        ("factors={blocks: {late: {stage1: {loss: {layers: [0, 7]}}}}}", "late: .*7"),
        ("factors={steps: {none: {stage1: {learning_rate: 0}}}}", "none.*learning_rate"),
    ],
)
def test_impossible_recipes_are_refused_before_anything_is_trained(
    config: Path, tmp_path: Path, override: str, message: str
) -> None:
    settings = screen.load_screen(config, [override])
    with pytest.raises(ConfigError, match=message):
        screen.run_screen(settings, quiet(), publish=tmp_path / "docs")
    assert not list((tmp_path / "out" / "tiny" / "run").rglob("*.safetensors"))
