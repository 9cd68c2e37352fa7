"""The one config tree: the YAML file, the command-line overrides, and what is written beside every output."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from lrmil.encoders.cards import Embedding
from lrmil.encoders.settings import EncoderSettings
from lrmil.errors import ConfigError
from lrmil.files import write_text
from lrmil.geometry import GridSettings
from lrmil.inference.prepare import TileSettings
from lrmil.settings import Settings
from lrmil.tissue import TissueSettings
from lrmil.training.stage1 import Stage1Settings
from lrmil.training.stage2 import StudentSettings, TeacherSettings


class HREncoderSettings(EncoderSettings):
    """The frozen high-resolution encoder, which is also what the student starts from."""

    input_px: int | None = Field(None, description="side of the patches it sees; null: grid.patch_px")
    student_embedding: Embedding | None = Field(
        "cls", description="the student's output for a region; null: the card's"
    )
    stream_batch: int = Field(64, ge=1, description="patches that readers put together for the encoder")


class CohortSettings(Settings):
    """Which slides, and what is asked of them."""

    table: str = Field(..., description="CSV or XLSX with slide_id, patient_id, a label column, path")
    task: str = Field("label", description="the label column")
    classes: list[str] | None = Field(None, description="labels in the order of the outputs; default sorted")
    slides_dir: str | None = Field(None, description="where slides lie if the table has no path column")
    label_level: Literal["slide", "patient"] = Field(
        "slide", description="patient: two labels of one patient are an error"
    )


class FoldSettings(Settings):
    """Cross-validation, grouped by patient, stratified by label."""

    num_folds: int = Field(5, ge=3, description="test = fold k, validation = fold k+1, training = the rest")
    seed: int = Field(0, description="seed of the split")


class EvaluationSettings(Settings):
    """How sure to be, and what to compare with."""

    bootstrap: int = Field(2000, ge=100, description="resamples of patients for an interval")
    seed: int = Field(0, description="seed of the resampling")
    baselines: list[Literal["majority", "colour_histogram", "random_encoder", "lr_only"]] = Field(
        ["majority", "lr_only"], description="what LRMIL is shown beside, on the same folds"
    )
    timed_slides: int = Field(5, ge=0, description="slides on which seconds per slide are measured from the file")
    heatmap_slides: int = Field(4, ge=0, description="test slides shown side by side in the report")


class RunSettings(Settings):
    """Everything that a run depends on."""

    cohort: CohortSettings
    out: str = Field(..., description="output folder; a second run with the same config resumes there")
    grid: GridSettings = GridSettings()
    tissue: TissueSettings = TissueSettings()
    tiles: TileSettings = TileSettings()
    encoder: HREncoderSettings = HREncoderSettings()
    folds: FoldSettings = FoldSettings()
    stage1: Stage1Settings = Stage1Settings()
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    targets: Literal["cached", "on_the_fly"] = Field(
        "cached",
        description="stage 1's targets: CLS of the distilled layers kept in float16 beside the 20x features, "
        "or computed from the slides in every epoch, where disk is short",
    )
    deploy: bool = Field(True, description="after cross-validation, train model/ on everything")
    seed: int = Field(0, description="seed of all training")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int = Field(2, ge=1, description="reader threads")
    memory_gb: float = Field(
        4.0, gt=0, description="pixels of regions are kept in memory up to this size, beyond it in files"
    )


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunSettings:
    """Read a YAML config; `overrides` are `section.field=value` strings, values in YAML.

    Relative paths count from the folder of the config.

    Raises:
        ConfigError: no such file, not YAML, or a field is unknown or out of range; all problems are listed at once.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file.", fix="`lrmil run --help` shows a config to start from.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}", fix="Check the indentation near that line.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, not a {type(raw).__name__}.")
    if isinstance(raw.get("cohort"), str):
        raw["cohort"] = {"table": raw["cohort"]}
    for override in overrides or []:
        _apply(raw, override)
    base = path.resolve().parent
    _anchor(raw, base)
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], source: str = "config") -> RunSettings:
    """Validate a config tree, with one message that lists every problem."""
    try:
        return RunSettings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(e) for e in error.errors()) + ".") from error


def save_config(settings: RunSettings, path: Path) -> None:
    """Write the whole tree, defaults included, so that the file alone says what was done."""
    write_text(path, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} is not of the form section.field=value.")
    *parents, leaf = key.strip().split(".")
    place = raw
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {override!r}: {parent} is not a section.")
    place[leaf] = yaml.safe_load(value)


def _anchor(raw: dict[str, Any], base: Path) -> None:
    """Make relative paths absolute, from the config's folder: a run must not depend on where it is started."""
    cohort = raw.get("cohort")
    places = [(raw, "out"), (cohort, "table"), (cohort, "slides_dir"), (raw.get("encoder"), "weights")]
    for section, field in places:
        if isinstance(section, dict) and isinstance(section.get(field), str):
            section[field] = str((base / Path(section[field]).expanduser()).resolve())


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), _field_names(problem["loc"][:-1]), n=1)
        return f"{where} is no setting" + (f" (did you mean {near[0]}?)" if near else "")
    if problem["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})"


def _field_names(loc: tuple[Any, ...]) -> list[str]:
    model: Any = RunSettings
    for part in loc:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))
