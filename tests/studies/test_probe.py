"""A whole study in small: every arm, resumed, changed, published; and the command."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from tests.studies.conftest import PATCH_PX, RATIO, TINY
from typer.testing import CliRunner

from lrmil.cli.app import app
from lrmil.errors import ConfigError
from lrmil.pipeline.reporting import Reporter
from lrmil.studies import probe
from lrmil.studies.arms import TAKEN
from lrmil.studies.probe import Cell, ProbeStudy
from lrmil.studies.run import run_probe
from lrmil.studies.settings import ProbeSettings, load_study
from lrmil.studies.taught import Teacher

CONFIG = f"""
fields: {{crchisto: tissue}}
encoder: {{name: {TINY}, random_seed: 1}}
patch_px: {PATCH_PX}
ratio: {RATIO}
targets: [inflammatory_share, log_count]
num_folds: 3
train_views: 8
val_views: 4
resamples: 100
recipes:
  - {{name: paper, layers: [0, 1], epochs: 1}}
  - {{name: foreign, layers: [], epochs: 1, children: foreign}}
ceiling: {{epochs: 1}}
"""
ARMS = {"hr", "lr", "random", "colour", "paper", "foreign", "ceiling"}


@pytest.fixture(scope="module")
def settings(tissue: Path, tmp_path_factory: pytest.TempPathFactory) -> ProbeSettings:
    folder = tmp_path_factory.mktemp("studies")
    (folder / "small.yaml").write_text(CONFIG)
    return load_study(folder / "small.yaml", [f"fields.crchisto={tissue}"])


@pytest.fixture(scope="module")
def finished(settings: ProbeSettings) -> list[Path]:
    return run_probe(settings, Reporter(quiet=True))


def test_every_arm_answers_every_target_in_every_fold(settings: ProbeSettings, finished: list[Path]) -> None:
    assert settings.out is not None
    assert Path(settings.out).name == "small"
    assert Path(settings.out).parent.name == "out"
    cells = pd.read_csv(next(p for p in finished if p.name == "small_cells.csv"))
    assert set(cells["arm"]) == ARMS
    assert (cells.groupby(["arm", "embedding", "target"])["fold"].nunique() == 3).all()
    paper = cells[cells["arm"] == "paper"]
    assert np.isfinite(paper[["train_layer0", "val_layer1", "retrieval_layer1", "r2"]].to_numpy()).all()
    results = pd.read_csv(next(p for p in finished if p.name == "small_results.csv"))
    assert set(results["embedding"]) == {"cls", "token_mean", "both", "direct", "colours"}
    assert all(path.is_file() for path in finished)
    assert {p.suffix for p in finished} == {".csv", ".json", ".md", ".png"}


def test_no_image_is_on_both_sides(settings: ProbeSettings, finished: list[Path]) -> None:
    study = ProbeStudy.begin(settings, Reporter(quiet=True))
    seen = []
    for fold in range(3):
        cell = Cell("reference", fold, 0)
        groups = [field.group for field in study.fields]
        dealt = study.splits[0].part_of(fold, groups)
        parts = {p: {g for g, part in zip(groups, dealt, strict=True) if part == p} for p in ("train", "val", "test")}
        assert len(set.union(*parts.values())) == sum(map(len, parts.values())) == 12
        told = study.taught(cell, "train", settings.train_views)
        assert {study.fields[i].group for i in told.field} <= parts["train"]
        seen += sorted(parts["test"])
        stored = study.stored(cell)
        assert stored is not None
        assert {study.groups[view] for view in stored["views"]} == parts["test"]
    assert len(seen) == len(set(seen)) == 12


def test_a_finished_cell_is_never_done_again(
    settings: ProbeSettings, finished: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[str] = []
    real = ProbeStudy.do

    def counted(self: ProbeStudy, cell: Cell) -> dict[str, Any]:
        done.append(cell.path)
        return real(self, cell)

    monkeypatch.setattr(ProbeStudy, "do", counted)
    published = run_probe(settings, Reporter(quiet=True), publish=tmp_path / "docs")
    assert done == []
    assert {p.name for p in published} == {p.name for p in finished}
    assert all(p.parent == tmp_path / "docs" for p in published)
    assert settings.out is not None
    (Path(settings.out) / "cells" / "paper" / "seed0_fold1.json").unlink()
    run_probe(settings, Reporter(quiet=True))
    assert done == ["paper/seed0_fold1.json"]
    done.clear()
    longer = settings.recipes[1].model_copy(update={"learning_rate": 2e-4})
    changed = settings.model_copy(update={"recipes": (settings.recipes[0], longer)})
    run_probe(changed, Reporter(quiet=True))
    assert done == [f"foreign/seed0_fold{fold}.json" for fold in range(3)], "only what depends on the change"


def test_another_number_of_folds_begins_anew(settings: ProbeSettings, finished: list[Path], tmp_path: Path) -> None:
    """The images of fold 0 of 3 are not those of fold 0 of 4: together they would count some images twice."""
    assert settings.out is not None
    shutil.copytree(settings.out, tmp_path / "four")
    changed = {"out": str(tmp_path / "four"), "num_folds": 4, "recipes": (), "ceiling": None}
    study = ProbeStudy.begin(settings.model_copy(update=changed), Reporter(quiet=True))
    cells = list(study.cells())
    assert [study.stored(cell) for cell in cells] == [None] * 4
    seen = np.concatenate([study.do(cell)["views"] for cell in cells])
    assert np.sort(seen).tolist() == list(range(len(study.probe))), "each region once"


@pytest.mark.parametrize("change", ["position_embedding", "mean"])
def test_an_encoder_that_sees_otherwise_with_the_same_weights_begins_anew(
    settings: ProbeSettings, finished: list[Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    class Asked(Exception):
        pass

    def ask(*_: Any) -> Any:
        raise Asked

    before = ProbeStudy.begin(settings, Reporter(quiet=True))
    if change == "position_embedding":
        encoder = settings.encoder.model_copy(update={"position_embedding": "legacy_slice"})
        settings = settings.model_copy(update={"encoder": encoder})
    else:
        shifted = copy.deepcopy(before.encoder)
        shifted.card = shifted.card.model_copy(update={"mean": (0.1, 0.2, 0.3)})
        monkeypatch.setattr(probe, "build_encoder", lambda *_: shifted)
    after = ProbeStudy.begin(settings, Reporter(quiet=True))
    assert after.encoder.weights_sha256 == before.encoder.weights_sha256
    cells = [cell for cell in before.cells() if cell.arm == "reference"]
    assert all(before.stored(cell) is not None for cell in cells)
    assert [after.stored(cell) for cell in cells] == [None] * len(cells)
    monkeypatch.setattr(Teacher, "_ask", ask)
    assert len(before.probe) == len(before.fields) * 4, "what the teacher said is kept"
    with pytest.raises(Asked):
        _ = after.probe


def test_the_command_shows_what_is_finished_and_trains_nothing(
    settings: ProbeSettings, finished: list[Path], tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG)
    monkeypatch.setattr(ProbeStudy, "do", lambda *_: pytest.fail("a cell was done"))
    call = ["study", "probe", str(config), "--set", f"fields.crchisto={tissue}", "--no-train", "--quiet"]
    result = CliRunner().invoke(app, [*call, "--set", f"out={settings.out}"])
    assert result.exit_code == 0, result.output
    assert "small_table.md" in result.output
    result = CliRunner().invoke(app, [*call, "--set", f"out={tmp_path / 'new'}"])
    assert isinstance(result.exception, ConfigError)


def test_no_recipe_can_have_the_name_of_an_arm_that_is_none(settings: ProbeSettings, finished: list[Path]) -> None:
    study = ProbeStudy.begin(settings, Reporter(quiet=True))
    trained = {recipe.name for recipe in settings.recipes}
    cells = [study.stored(cell) for cell in study.cells() if cell.recipe is None]
    told = {answer["arm"] for found in cells if found is not None for answer in found["answers"]}
    assert told | ({cell.arm for cell in study.cells()} - trained) == TAKEN


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("fields.simulated={}", "either crchisto or simulated"),
        ("encoder.embedding=cls", "both probed"),
        ("recipes=[{name: a}, {name: b}, {name: a}]", "several of a"),
        *((f"recipes=[{{name: {arm}}}]", f"names of their own; {arm}: ") for arm in sorted(TAKEN)),
        ("recipes=[{name: a, children: lost}]", "children"),
        ("patch=3", "patch"),
    ],
)
def test_impossible_studies_are_refused(tmp_path: Path, change: str, problem: str) -> None:
    (tmp_path / "s.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError, match=problem):
        load_study(tmp_path / "s.yaml", [change])


def test_the_committed_configs_are_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "evidence"
    found = {
        path.stem: load_study(path)
        for path in sorted([*folder.glob("probe-*.yaml"), *folder.glob("visibility-*.yaml")])
    }
    assert {"probe-tissue", "visibility-000", "visibility-050", "visibility-100"} <= set(found)
    for study in found.values():
        assert study.recipes[0].layers == (0, 1, 11), "a recipe with the paper's layers comes first"
        assert {"own", "foreign"} <= {recipe.children for recipe in study.recipes}, (
            "each study breaks what it trains on"
        )
    for name in ("probe-tissue", "visibility-100"):
        assert {"own", "transposed", "shuffled", "foreign"} == {recipe.children for recipe in found[name].recipes}


def test_the_cohorts_of_the_recovery_curve_differ_in_visibility_only() -> None:
    folder = Path(__file__).resolve().parents[2] / "evidence"
    texts = [path.read_text().replace(path.stem, "") for path in sorted(folder.glob("visibility-*.yaml"))]
    fields = [yaml.safe_load(text)["fields"]["simulated"] for text in texts]
    assert [field["nuclei"].pop("visibility") for field in fields] == [0.0, 0.5, 1.0]
    assert fields[0] == fields[1] == fields[2]


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("probe", ("CONFIG", "--set", "--publish", "--no-train", "Resumes", "different images", "results.csv")),
        ("controls", ("CONFIG", "--set", "--publish", "Resumes", "shuffled labels", "summary.json")),
    ],
)
def test_help_teaches(verb: str, words: tuple[str, ...]) -> None:
    shown = " ".join(re.sub(r"[│╭╮╰╯─]+", " ", CliRunner().invoke(app, ["study", verb, "--help"]).output).split())
    for word in words:
        assert word.lower() in shown.lower(), word
