"""A study of slides from its config to what it publishes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lrmil.encoders import Encoder, EncoderCard, save_encoder
from lrmil.encoders.vit import build_trunk
from lrmil.errors import ConfigError
from lrmil.pipeline.config import RunSettings
from lrmil.pipeline.folder import RunFolder
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.run import Outcome
from lrmil.pipeline.variants import recipes_plan
from lrmil.slides import write_pyramid
from lrmil.studies import slides
from lrmil.studies.on_slides import prepared_run
from lrmil.studies.slides import load_slide_study, run_slide_study

CONFIG = """
title: tiny
simulated: {{seed: 6, slides: 12, patients: 12, slide_px: 768, sites: 2, nuclei: {{visibility: 1.0, shapes: 8}}}}
run:
  grid: {{patch_px: 32}}
  encoder: {{name: {encoder}}}
  folds: {{num_folds: 3}}
  stage1: {{epochs: 1, learning_rate: 0.001}}
  teacher: {{epochs: 2}}
  student: {{epochs: 2}}
  evaluation: {{bootstrap: 100, timed_slides: 0, heatmap_slides: 0}}
  deploy: false
  device: cpu
  threads: 1
recipes:
  smaller steps: {{stage1: {{learning_rate: 0.0001}}}}
parts: [ablation, controls, localisation, recipes]
"""


def quiet() -> Reporter:
    return Reporter(quiet=True, stream=io.StringIO())


def test_a_study_of_slides_publishes_its_parts_and_resumes(tmp_path: Path, tiny_card: EncoderCard) -> None:
    torch.manual_seed(0)
    encoder = Encoder(tiny_card, build_trunk(tiny_card), input_px=32, embedding="cls", weights_source="drawn at random")
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(encoder=save_encoder(encoder, tmp_path / "encoder")))
    settings = load_slide_study(config)
    written = run_slide_study(settings, quiet(), publish=tmp_path / "docs")
    names = {path.name for path in written}
    assert {"tiny_run_results.csv", "tiny_ablation_table3.md", "tiny_ablation_differences.csv"} <= names
    assert {
        "tiny_localisation.csv",
        "tiny_localisation_slides.csv",
        "tiny_localisation.md",
        "tiny_heatmap.png",
    } <= names
    assert all(path.is_file() and path.parent == tmp_path / "docs" for path in written)

    recipes = pd.read_csv(tmp_path / "docs" / "tiny_recipes_results.csv").set_index("method")["auc"]
    assert list(recipes.index) == ["HR teacher", "LR without distillation", "as it is", "smaller steps"]
    losses = pd.read_csv(tmp_path / "docs" / "tiny_ablation_results.csv").set_index("method")["auc"]
    assert recipes["LR without distillation"] == losses["none"]
    assert recipes["as it is"] == losses["patch + bag + soft + hard"]

    of_losses = pd.read_csv(tmp_path / "docs" / "tiny_ablation_pairs.csv").set_index(["method", "less"])["difference"]
    assert len(of_losses) == 15, "every two of six rows"
    assert of_losses["none", "patch"] == pytest.approx(losses["none"] - losses["patch"], abs=1e-5)

    own = pd.read_csv(tmp_path / "docs" / "tiny_run_results.csv").set_index("method")["auc"]
    assert recipes["HR teacher"] == own["HR teacher"], "the run's own teacher"
    less = pd.read_csv(tmp_path / "docs" / "tiny_run_differences.csv").set_index("less")
    assert set(less.index) == set(own.index) - {"LRMIL"}, "LRMIL beside every other row"
    for other, row in less.iterrows():
        assert row["difference"] == pytest.approx(own["LRMIL"] - own[str(other)], abs=1e-5)
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    pairs = pd.read_csv(tmp_path / "docs" / "tiny_recipes_pairs.csv")
    assert len(pairs) == 6
    for row in pairs.to_dict("records"):
        assert row["difference"] == pytest.approx(recipes[row["method"]] - recipes[row["less"]], abs=1e-5)
    assert list(pd.read_csv(tmp_path / "docs" / "tiny_recipes_recovery.csv")["method"]) == ["as it is", "smaller steps"]

    controls = pd.read_csv(tmp_path / "docs" / "tiny_controls_results.csv").set_index("arm")
    assert controls.loc["zero", "auc"] == controls.loc["labels", "auc"]
    assert pd.read_csv(tmp_path / "docs" / "tiny_controls_cells.csv")["zero_equals_labels"].tolist() == [True] * 3

    found = pd.read_csv(tmp_path / "docs" / "tiny_localisation_slides.csv")
    table = pd.read_csv(tmp_path / "out" / "tiny" / "cohort" / "cohort.csv")
    positive = set(table[table["label"] == "positive"]["slide_id"])
    assert set(found["slide_id"]) <= positive, "a slide without evidence cannot be scored"
    methods = {"teacher", "lr_only", "lrmil", "epithelial_nuclei"}
    assert found.groupby("slide_id")["method"].agg(set).eq(methods).all(), "every model answers for every slide"
    assert found.groupby("slide_id")["regions"].nunique().eq(1).all(), "of the same regions"

    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    again = run_slide_study(settings, quiet(), publish=tmp_path / "docs")
    assert again == written
    assert {path: path.stat().st_mtime_ns for path in models} == models, "nothing is trained twice"


@pytest.mark.parametrize(("told", "expected"), [(None, [0, 1]), ([0], [0])])
def test_recipes_can_have_fewer_seeds_than_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[int] | None, expected: list[int]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(encoder="lrmil-small"))
    own = "null" if told is None else str(told)
    settings = load_slide_study(config, ["parts=[recipes]", "run.compare.seeds=[0, 1]", f"recipe_seeds={own}"])
    run = RunFolder(tmp_path / "run")
    run.tables.mkdir(parents=True)
    for name in ("results.csv", "results.md", "differences.csv"):
        (run.tables / name).touch()
    asked: list[list[int]] = []

    class Ended(Exception):
        pass

    def recipes(own: RunSettings, reporter: Reporter, changes: Any) -> None:
        asked.append(own.compare.seeds)
        raise Ended

    monkeypatch.setattr(slides, "run_all", lambda *args, **kwargs: Outcome(run, [], []))
    monkeypatch.setattr(slides, "compare_recipes", recipes)
    with pytest.raises(Ended):
        run_slide_study(settings, quiet())
    assert asked == [expected]


def test_localisation_goes_on_without_a_slide_that_failed(
    tmp_path: Path, tiny_card: EncoderCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    encoder = Encoder(tiny_card, build_trunk(tiny_card), input_px=32, embedding="cls", weights_source="drawn at random")
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(encoder=save_encoder(encoder, tmp_path / "encoder")))
    settings = load_slide_study(config, ["parts=[localisation]", "run.evaluation.bootstrap=130"])
    table = pd.read_csv(prepared_run(settings, quiet()).cohort.table)
    positive = table[table["label"] == "positive"]
    broken = positive.iloc[0]
    glass = np.full((768, 768, 3), 243, np.uint8)
    write_pyramid(tmp_path / "out" / "tiny" / "cohort" / str(broken["path"]), glass, 0.5)
    asked: list[int] = []
    real = slides.summarise

    def watched(*args: Any, resamples: int, **kwargs: Any) -> pd.DataFrame:
        asked.append(resamples)
        return real(*args, resamples=resamples, **kwargs)

    monkeypatch.setattr(slides, "summarise", watched)
    told = io.StringIO()
    run_slide_study(settings, Reporter(stream=told), publish=tmp_path / "docs")
    assert asked == [130], "as many resamples as everywhere in the run"
    assert f"leaves out 1 of {len(table)} slides" in told.getvalue()
    found = pd.read_csv(tmp_path / "docs" / "tiny_localisation_slides.csv")
    assert 0 < found["slide_id"].nunique() < len(positive)
    assert broken["slide_id"] not in set(found["slide_id"])


def test_other_ways_of_splitting_train_anew_and_leave_the_run_alone(tmp_path: Path, tiny_card: EncoderCard) -> None:
    torch.manual_seed(0)
    encoder = Encoder(tiny_card, build_trunk(tiny_card), input_px=32, embedding="cls", weights_source="drawn at random")
    config = tmp_path / "tiny.yaml"
    config.write_text(
        CONFIG.format(encoder=save_encoder(encoder, tmp_path / "encoder")).replace("sites: 2", "sites: 3")
    )
    ways = "folds={four: {train_patients: 4}, all: {}, new site: {group: site}}"
    settings = load_slide_study(config, ["parts=[folds]", ways])
    written = run_slide_study(settings, quiet(), publish=tmp_path / "docs")
    assert {f"tiny_folds{end}" for end in (".csv", ".md", ".png")} <= {path.name for path in written}

    run = tmp_path / "out" / "tiny" / "run"
    found = pd.read_csv(tmp_path / "docs" / "tiny_folds.csv")
    assert list(dict.fromkeys(found["split"])) == ["four", "all", "new site"]
    told = pd.read_csv(run / "tables" / "results.csv").set_index("method")["auc"]
    own = found[found["split"] == "all"].set_index("method")["value"]
    assert own.to_dict() == pytest.approx(told[own.index].to_dict(), abs=1e-5), "the run's own folds are the run's"
    assert found.loc[found["split"] == "four", "train_patients"].eq(4).all()

    table = pd.read_csv(tmp_path / "out" / "tiny" / "cohort" / "cohort.csv").drop_duplicates("patient_id")
    sites = table.set_index("patient_id")["site"]
    splits = [pd.read_csv(path).set_index("patient_id") for path in sorted((run / "variants").glob("*/splits.csv"))]
    whole = [all(set(sites[s.index[s[f] == "test"]]) == {x} for f, x in _site_tested(s, sites)) for s in splits]
    assert sorted(whole) == [False, True], "one way tests whole sites"
    few = splits[whole.index(False)]
    assert (few == "train").sum().eq(4).all()

    models = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert sum("variants" in path.parts and "stage1" in path.parts for path in models) == 2 * 3, "stage 1 of each fold"
    run_slide_study(settings, quiet(), publish=tmp_path / "docs")
    assert {path: path.stat().st_mtime_ns for path in models} == models, "nothing is trained twice"


def _site_tested(splits: pd.DataFrame, sites: pd.Series) -> list[tuple[str, str]]:
    return [(fold, sites[splits.index[splits[fold] == "test"]].iloc[0]) for fold in splits]


def test_paths_of_the_run_count_from_the_config_too(
    tmp_path: Path, tiny_card: EncoderCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    encoder = Encoder(tiny_card, build_trunk(tiny_card), input_px=32, embedding="cls", weights_source="drawn at random")
    save_encoder(encoder, tmp_path / "study" / "encoder")
    config = tmp_path / "study" / "s.yaml"
    config.write_text(
        "simulated: {}\nrun: {encoder: {name: encoder}, folds: {clam_splits: splits}, "
        "stage1: {student: {name: encoder, weights: w.safetensors}}}\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = load_slide_study(config).run
    assert run["encoder"]["name"] == str(tmp_path / "study" / "encoder")
    assert run["folds"]["clam_splits"] == str(tmp_path / "study" / "splits")
    assert run["stage1"]["student"]["name"] == run["encoder"]["name"]
    assert run["stage1"]["student"]["weights"] == str(tmp_path / "study" / "w.safetensors")
    run = load_slide_study(config, ["run.encoder={name: lrmil-small, weights: w.safetensors}"]).run
    assert run["encoder"] == {"name": "lrmil-small", "weights": str(elsewhere / "w.safetensors")}


def test_impossible_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config"):
        load_slide_study(tmp_path / "none.yaml")
    config = tmp_path / "s.yaml"
    config.write_text(CONFIG.format(encoder="lrmil-small"))
    with pytest.raises(ConfigError, match="parts"):
        load_slide_study(config, ["parts=[guess]"])
    with pytest.raises(ConfigError, match="ways of splitting"):
        load_slide_study(config, ["parts=[folds]"])
    with pytest.raises(ConfigError, match="needs others under `recipes`"):
        load_slide_study(config, ["parts=[recipes]", "recipes={}"])
    with pytest.raises(ConfigError, match="visibility"):
        load_slide_study(config, ["simulated.nuclei.visibility=2"])


@pytest.mark.parametrize("title", ["as it is", "HR teacher", "LR without distillation"])
def test_a_recipe_cannot_have_the_name_of_another_row(title: str) -> None:
    settings = RunSettings.model_validate({"cohort": {"table": "cohort.csv", "task": "label"}, "out": "run"})
    with pytest.raises(ConfigError, match=title):
        recipes_plan(settings, {title: {"stage1": {"epochs": 3}}})


def test_the_committed_config_is_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "evidence"
    for path in sorted(folder.glob("slides-*.yaml")):
        assert "localisation" in load_slide_study(path).parts
    seeds = [load_slide_study(path).made_of.seed for path in folder.glob("slides-*.yaml")]
    for name in ("confirmation", "survival-status"):
        settings = load_slide_study(folder / f"{name}.yaml")
        assert settings.made_of.seed not in seeds, "other slides than those on which the recipe was chosen"
        assert settings.run["stage1"]["learning_rate"] == 1e-4
