"""The config: every problem in one line, nothing guessed, nothing that depends on where a run is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lrmil.errors import ConfigError
from lrmil.geometry import GridSettings
from lrmil.pipeline.config import RunSettings, load_config, parse_config, save_config
from lrmil.pipeline.overrides import apply_overrides, validated
from lrmil.pipeline.starter import write_starter


def problem(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({"cohort": {"table": "c.csv"}, "out": "o", **changes}, "x.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"studnt": {}}, "studnt is no setting (did you mean student?)"),
        ({"student": {"loss": {"lamda_bag": 1}}}, "did you mean student.loss.lambda_bag?"),
        ({"hard_k": 4}, "hard_k is no setting (there is student.loss.hard_k)"),
        ({"learning_rate": 1}, "stage1.learning_rate and teacher.learning_rate and student.learning_rate"),
        ({"zzz": 4}, "zzz is no setting."),
        ({"stage1": {"epochs": 0}}, "stage1.epochs: Input should be greater than or equal to 1 (got 0)"),
        ({"grid": {"lr_mpp": 1.7}}, "grid: lr_mpp / hr_mpp must be a whole number"),
        ({"folds": {"num_folds": 2}}, "folds.num_folds: Input should be greater than or equal to 3 (got 2)"),
        ({"evaluation": {"baselines": ["magic"]}}, "evaluation.baselines.0: Input should be 'majority'"),
        ({"cohort": {}}, "cohort.table is missing"),
        ({"encoder": {"weights": "w.bin", "random_seed": 1}}, "weights and random_seed exclude each other"),
        ({"cohort": {"table": "c.csv", "classes": [True, False]}}, 'put quotes around them, like "yes"'),
    ],
)
def test_a_wrong_field_is_named_with_what_to_do(changes: dict[str, Any], message: str) -> None:
    found = problem(**changes)
    assert message in found
    assert found.startswith("x.yaml: ")
    assert "\n" not in found


def test_all_problems_are_listed_at_once() -> None:
    found = problem(seed="a", studnt={}, stage1={"epochs": 0})
    assert found.count("; ") == 2
    assert all(word in found for word in ("seed", "studnt", "stage1.epochs"))


def test_numbers_as_labels_are_text(tmp_path: Path) -> None:
    settings = parse_config({"cohort": {"table": "c.csv", "classes": [1, 0]}, "out": "o"})
    assert settings.cohort.classes == ["1", "0"]


def test_paths_count_from_the_config_and_become_absolute(lab: Any, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "enc").symlink_to(lab.encoder)
    raw = {
        "cohort": {"table": "c.csv", "slides_dir": "../slides"},
        "out": "runs/a",
        "encoder": {"name": "enc", "weights": None},
    }
    (folder / "x.yaml").write_text(yaml.safe_dump(raw))
    settings = load_config(folder / "x.yaml", ["encoder.weights=w/a.bin"])
    assert settings.out == str(folder / "runs" / "a")
    assert settings.cohort.table == str(folder / "c.csv")
    assert settings.cohort.slides_dir == str(tmp_path / "slides")
    assert settings.encoder.weights == str(folder / "w" / "a.bin")
    assert settings.encoder.name == str(lab.encoder), "a saved encoder is named by its folder"
    (folder / "y.yaml").write_text(yaml.safe_dump(raw | {"encoder": {"name": "conch_v1"}, "out": "~/o"}))
    elsewhere = load_config(folder / "y.yaml")
    assert elsewhere.encoder.name == "conch_v1"
    assert elsewhere.out == str(Path.home() / "o")


def test_a_saved_config_gives_the_same_settings(lab: Any, tmp_path: Path) -> None:
    settings = lab.settings(tmp_path / "a", stage1={"loss": {"layers": [0, 2]}}, cohort={"classes": ["a", "b"]})
    save_config(settings, tmp_path / "x.yaml")
    assert load_config(tmp_path / "x.yaml") == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cohort: [", "not valid YAML"),
        ("- a\n- b", "a config is a mapping of sections, not a list"),
        ("\xff\xfe", "not valid YAML"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "x.yaml")


def test_a_missing_config_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file\..*lrmil init"):
        load_config(tmp_path / "x.yaml")


def test_the_cohort_may_be_given_as_a_path_alone(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("cohort: c.csv\nout: o\n")
    assert load_config(tmp_path / "x.yaml", ["cohort.task=grade"]).cohort.task == "grade"


def test_overrides_change_one_field_each() -> None:
    raw: dict[str, Any] = {"a": {"b": 1, "c": 2}, "empty": None}
    apply_overrides(raw, ["a.b=3", "new.deep.field=[1, 2]", "empty.x=yes", "top = text", "a.two-words=1"])
    assert raw == {
        "a": {"b": 3, "c": 2, "two_words": 1},
        "empty": {"x": True},
        "new": {"deep": {"field": [1, 2]}},
        "top": "text",
    }


@pytest.mark.parametrize("override", ["a", "=1", "a..b=1", ".a=1", "a.b.c=1", "a=[1"])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({"a": {"b": 1}}, [override])


def test_settings_of_any_room_are_validated_in_the_same_words() -> None:
    assert validated(GridSettings, {"lr_mpp": 4.0}, "x").ratio == 8
    with pytest.raises(ConfigError, match=r"x: hr_mp is no setting \(did you mean hr_mpp\?\)"):
        validated(GridSettings, {"hr_mp": 1}, "x")


def test_every_setting_is_described() -> None:
    """The tree is the documentation: `Field(description=...)` on all that is no section."""

    def check(model: Any) -> None:
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation)
            else:
                assert field.description or name in ("out",), f"{model.__name__}.{name}"

    check(RunSettings)


@pytest.mark.parametrize("labels", [("0", "1"), ("yes", "no"), ("a: b", "c, d"), ("null", "1e5")])
def test_the_first_config_of_any_cohort_loads(tmp_path: Path, labels: tuple[str, str]) -> None:
    """Labels, folder and file names may hold what YAML understands otherwise."""
    folder = tmp_path / "my: study #1"
    folder.mkdir()
    rows = ["slide_id,patient_id,label,path"]
    for i in range(10):
        (folder / f"{i}.svs").write_text("a slide")
        rows.append(f'S{i},P{i},"{labels[i % 2]}",{i}.svs')
    (folder / "c.csv").write_text("\n".join(rows))
    said = write_starter(folder / "c.csv", folder / "x.yaml", encoder="lrmil-small", task="label", out="runs/a")
    settings = load_config(folder / "x.yaml")
    assert set(settings.cohort.classes or []) == set(labels)
    assert settings.cohort.table == str(folder / "c.csv")
    assert settings.out == str(folder / "runs" / "a")
    assert settings.encoder.name == "lrmil-small"
    assert settings.stage1.restore_spread, "what docs/evidence recommends"
    assert settings.grid.patch_px % settings.grid.ratio == 0
    assert any("10 slides" in line for line in said)
    with pytest.raises(ConfigError, match="exists"):
        write_starter(folder / "c.csv", folder / "x.yaml", encoder="lrmil-small", task="label", out="runs/a")
