"""The one config tree: the YAML file, the command-line overrides, and what is written beside every output."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from lrmil.encoders.cards import Embedding
from lrmil.encoders.settings import EncoderSettings
from lrmil.encoders.store import is_saved_encoder
from lrmil.errors import ConfigError
from lrmil.files import write_text
from lrmil.geometry import GridSettings
from lrmil.inference.prepare import TileSettings
from lrmil.pipeline.overrides import apply_overrides, validated
from lrmil.settings import Settings
from lrmil.tasks import TaskKind
from lrmil.tissue import TissueSettings
from lrmil.training.objectives import ObjectiveSettings
from lrmil.training.stage1 import Stage1Settings
from lrmil.training.stage2 import StudentSettings, TeacherSettings

PAPER_METHODS = (
    *("max_pool", "mean_pool", "abmil", "clam_mb", "clam_sb", "dsmil", "transmil", "dtfd"),
    *("zoommil", "hdmil"),
)
"""The ten methods that the paper compares LRMIL with"""


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
    task: str = Field("label", description="the label column; for survival a name")
    kind: TaskKind = Field("classification", description="what is asked: a class, a number, or survival")
    time: str = Field("time", description="survival: column of the time until the event or the end of observation")
    event: str = Field("event", description="survival: column that says whether the event was seen")
    tasks: dict[str, TaskKind] = Field(
        default_factory=dict,
        description="all tasks of the cohort and their kinds, the main one first; they share patient folds and stage "
        "1, and each has its heads and results in tasks/<task>/. `task` says which is run. Empty: it is the only one",
    )
    classes: list[str] | None = Field(None, description="labels in the order of the outputs; default sorted")
    slides_dir: str | None = Field(None, description="where slides lie if the table has no path column")
    features_dir: str | None = Field(
        None, description="where feature files lie if the table has no features column; for `lrmil compare` alone"
    )
    label_level: Literal["slide", "patient"] = Field(
        "slide", description="patient: two labels of one patient are an error"
    )

    @model_validator(mode="before")
    @classmethod
    def _kind_of_task(cls, values: Any) -> Any:
        """Where all tasks are listed with their kinds, the kind need not be said again."""
        if not isinstance(values, dict) or not isinstance(values.get("tasks"), dict) or not values["tasks"]:
            return values
        task = values.get("task", "label")
        if task not in values["tasks"]:
            raise ValueError(f"task {task!r} is not among tasks ({', '.join(map(str, values['tasks']))})")
        kind = values["tasks"][task]
        if values.get("kind", kind) != kind:
            raise ValueError(f"kind is {values['kind']!r}, but tasks say that {task!r} is {kind!r}: leave kind out")
        return {**values, "kind": kind}

    @field_validator("classes", mode="before")
    @classmethod
    def _as_text(cls, values: object) -> object:
        """Labels are text in a table, but YAML reads 0 and 1 as numbers, and yes and no as true and false."""
        if not isinstance(values, list):
            return values
        if any(isinstance(value, bool) for value in values):
            raise ValueError('YAML reads yes, no, on and off as true and false: put quotes around them, like "yes"')
        return [str(value) if isinstance(value, int | float) else value for value in values]


class FoldSettings(Settings):
    """Cross-validation, grouped by patient, stratified by label."""

    num_folds: int = Field(5, ge=3, description="test = fold k, validation = fold k+1, training = the rest")
    seed: int = Field(0, description="seed of the split")
    clam_splits: str | None = Field(
        None, description="folder of CLAM's splits_0.csv, splits_1.csv, ...: these folds are taken instead"
    )
    group: str | None = Field(
        None,
        description="column of the cohort, such as site, whose groups stay whole: each is tested by models that saw "
        "none of it. As many groups as num_folds, or more",
    )
    train_patients: int | None = Field(
        None,
        ge=2,
        description="training patients kept in each fold, drawn by label, with the same share of validation patients; "
        "tests stay as they are. To see what fewer would have brought. null: all",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.group is not None and self.clam_splits is not None:
            raise ValueError("group and clam_splits both say how patients are dealt: leave one out")
        return self


class EvaluationSettings(Settings):
    """How sure to be, and what to compare with."""

    bootstrap: int = Field(2000, ge=100, description="resamples of patients for an interval")
    seed: int = Field(0, description="seed of the resampling")
    baselines: list[Literal["majority", "colour_histogram", "random_encoder", "lr_only"]] = Field(
        ["majority", "lr_only"], description="what LRMIL is shown beside, on the same folds"
    )
    timed_slides: int = Field(5, ge=0, description="slides on which seconds per slide are measured from the file")
    heatmap_slides: int = Field(4, ge=0, description="test slides shown side by side in the report")


class CompareSettings(Settings):
    """What `lrmil compare` does."""

    methods: list[str] = Field(
        ["majority", *PAPER_METHODS, "lr_only", "lrmil"], description="rows of the tables; torchmil:CLASS works, too"
    )
    reference: str | None = Field(
        None, description="method that the others are compared with; null: lrmil, or abmil where features are all"
    )
    recipe: Literal["paper", "original"] = Field(
        "paper",
        description="how baselines are trained. paper: all like the teacher; original: each as its own program does",
    )
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="options of a method's head, such as dtfd: {groups: 8}"
    )
    seeds: list[int] = Field([], description="training seeds, averaged in the tables; empty: the run's seed alone")
    jobs: int = Field(0, ge=0, description="heads trained at a time; 0: one a core, one on a GPU")

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("name each seed once")
        return seeds


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
    objective: ObjectiveSettings = ObjectiveSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    compare: CompareSettings = CompareSettings()
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


def decisive_settings(settings: RunSettings, leave_out: Set[str]) -> dict[str, Any]:
    """Return the tree as plain data without some of its sections, and without what has no bearing on its task.

    Where classes are asked for, nothing that only other tasks know is told.
    """
    tree = settings.model_dump(mode="json", exclude=set(leave_out))
    if settings.cohort.kind != "survival":
        for column in ("time", "event"):
            tree.get("cohort", {}).pop(column, None)
    if settings.cohort.kind == "classification":
        tree.get("cohort", {}).pop("kind", None)
        tree.pop("objective", None)
    if settings.stage1.student is None:
        tree.get("stage1", {}).pop("student", None)
    for name in ("group", "train_patients"):
        if tree.get("folds", {}).get(name, 0) is None:
            del tree["folds"][name]
    return tree


def load_config(path: str | Path, overrides: Sequence[str] | None = None) -> RunSettings:
    """Read a YAML config; `overrides` are `section.field=value` strings, values in YAML.

    Relative paths count from the folder of the config, those in overrides too.

    Raises:
        ConfigError: no such file, not YAML, or a field is unknown or out of range; all problems are listed at once.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file.", fix="`lrmil init COHORT.csv` writes a config to start from.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}", fix="Check the indentation near that line.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, not a {type(raw).__name__}.")
    if isinstance(raw.get("cohort"), str):
        raw["cohort"] = {"table": raw["cohort"]}
    apply_overrides(raw, overrides or [])
    return parse_config(raw, str(path), base=path.parent)


def parse_config(raw: dict[str, Any], source: str = "config", *, base: str | Path = ".") -> RunSettings:
    """Validate a config tree, with one message that lists every problem; relative paths count from `base`.

    They are made absolute: a run must not depend on where it is started, nor what is written beside its outputs.
    """
    settings = validated(RunSettings, raw, source)
    folder = Path(base).resolve()

    def anchored(path: str) -> str:
        return str((folder / Path(path).expanduser()).resolve())

    cohort, encoder = settings.cohort, settings.encoder

    def anchored_if(path: str | None) -> str | None:
        return None if path is None else anchored(path)

    folders = {"slides_dir": anchored_if(cohort.slides_dir), "features_dir": anchored_if(cohort.features_dir)}
    weights, clam_splits = anchored_if(encoder.weights), anchored_if(settings.folds.clam_splits)

    def named(encoder: str) -> str:
        """A saved encoder is named by its folder."""
        return anchored(encoder) if is_saved_encoder(folder / Path(encoder).expanduser()) else encoder

    stage1 = settings.stage1
    if (student := stage1.student) is not None:
        places = {"name": named(student.name), "weights": anchored_if(student.weights)}
        stage1 = stage1.model_copy(update={"student": student.model_copy(update=places)})
    return settings.model_copy(
        update={
            "out": anchored(settings.out),
            "cohort": cohort.model_copy(update={"table": anchored(cohort.table), **folders}),
            "folds": settings.folds.model_copy(update={"clam_splits": clam_splits}),
            "encoder": encoder.model_copy(update={"name": named(encoder.name), "weights": weights}),
            "stage1": stage1,
        }
    )


def save_config(settings: RunSettings, path: Path) -> None:
    """Write the whole tree, defaults included, so that the file alone says what was done.

    Only methods to compare that nobody named are left out: in a file they would count as asked for by name, and those
    that cannot learn its task would be refused.
    """
    tree = settings.model_dump(mode="json")
    if "methods" not in settings.compare.model_fields_set:
        del tree["compare"]["methods"]
    write_text(path, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
