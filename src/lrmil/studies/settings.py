"""What a study of region probes is made of. One YAML file is one study; its hash decides what is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from lrmil.cohorts.simulated.settings import SimulatedSettings
from lrmil.distill import Stage1LossSettings
from lrmil.encoders.settings import EncoderSettings, Precision
from lrmil.settings import Settings
from lrmil.studies.arms import TAKEN
from lrmil.studies.configs import load_config

EmbeddingKind = Literal["cls", "token_mean", "both"]
EMBEDDINGS: tuple[EmbeddingKind, ...] = ("cls", "token_mean", "both")
Children = Literal["own", "transposed", "shuffled", "foreign"]
"""What stage 1 is shown as a region's children. `own`: the truth. The others are negative controls: slots transposed; a
permutation of the slots, fixed for each region; children of a region of another image."""


class FieldSettings(Settings):
    """Where fields of tissue with known nuclei come from: one of the two."""

    crchisto: str | None = Field(None, description="folder of CRCHistoPhenotypes; each image is a field and a group")
    simulated: SimulatedSettings | None = Field(None, description="a simulated cohort; a patient is a group")
    fields_per_slide: int = Field(4, ge=1, description="simulated: fields cut from each slide")
    max_fields: int | None = Field(None, ge=5, description="use the first so many only, to try things out")

    @model_validator(mode="after")
    def _check(self) -> FieldSettings:
        if (self.crchisto is None) == (self.simulated is None):
            raise ValueError("give either crchisto or simulated")
        return self


class Stage1Recipe(Settings):
    """One way to distil, a row of the tables."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$", description="name in tables and of a folder")
    title: str = Field("", description="in figures; default: the name")
    layers: tuple[int, ...] = Field((0, 1, -1), description="distilled blocks; empty: all")
    layer_norm_targets: bool = Field(False, description="see stage1.loss")
    layer_aggregation: Literal["mean", "sum"] = Field("mean", description="see stage1.loss")
    batch_size: int = Field(32, ge=1, description="regions a step")
    learning_rate: float = Field(1e-4, gt=0, description="Adam's")
    epochs: int = Field(6, ge=1, description="at most this many; the one of lowest validation loss is kept")
    seeds: int | None = Field(None, ge=1, description="do the first so many seeds only; null: all")
    folds: int | None = Field(None, ge=1, description="do the first so many folds only; null: all")
    children: Children = Field("own", description="own; or a negative control: transposed, shuffled, foreign")

    def loss(self, depth: int) -> Stage1LossSettings:
        """Return the loss of stage 1 for an encoder of `depth` blocks."""
        return Stage1LossSettings(
            layers=self.layers or tuple(range(depth)),
            layer_norm_targets=self.layer_norm_targets,
            layer_aggregation=self.layer_aggregation,
        )


class CeilingSettings(Settings):
    """The same network fine-tuned on the truth of the training regions, from the same low-resolution pixels."""

    learning_rate: float = Field(1e-4, gt=0, description="Adam's")
    batch_size: int = Field(32, ge=1, description="regions a step")
    epochs: int = Field(6, ge=1, description="at most this many; the one of lowest validation loss is kept")
    seeds: int | None = Field(None, ge=1, description="do the first so many seeds only; null: all")
    folds: int | None = Field(None, ge=1, description="do the first so many folds only; null: all")


class ProbeSettings(Settings):
    """A study of region probes: what a region's embedding tells of its nuclei, before and after stage 1."""

    title: str = Field("Region probes", description="heading of tables and figures")
    out: str | None = Field(None, description="output folder; null: out/<name of the config> beside the config")
    fields: FieldSettings = Field(description="tissue with known nuclei")
    encoder: EncoderSettings = Field(description="the frozen teacher, and what the student starts from")
    patch_px: int = Field(112, ge=8, description="side of a region and of a child as the encoder sees them")
    ratio: int = Field(4, ge=2, description="children along one side of a region")
    targets: tuple[str, ...] = Field(
        ("inflammatory_share", "epithelial_share", "log_count"), description="what is probed; the first is the main one"
    )
    min_nuclei: int = Field(5, ge=1, description="a region with fewer nuclei has no shares, and is left out there")
    num_folds: int = Field(5, ge=3, description="test = fold k, validation = fold k+1, training = the rest, by group")
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="each deals the groups to other folds, and trains anew"
    )
    views_seed: int = Field(0, description="of the training views, which all seeds share")
    train_views: int = Field(480, ge=1, description="regions that stage 1 sees in an epoch")
    val_views: int = Field(48, ge=1, description="regions of validation groups that choose its epoch")
    recipes: tuple[Stage1Recipe, ...] = Field((), description="ways to distil, done in this order")
    ceiling: CeilingSettings | None = Field(CeilingSettings(), description="null: leave it out")
    random_seed: int | None = Field(0, description="of the encoder with random weights; null: leave it out")
    precision: Precision = Field("auto", description="of all encoding without gradients")
    resamples: int = Field(2000, ge=100, description="of groups, for intervals")

    @model_validator(mode="after")
    def _check(self) -> ProbeSettings:
        names = [recipe.name for recipe in self.recipes]
        taken = sorted(TAKEN & set(names))
        if taken:
            raise ValueError(f"recipes need names of their own; {', '.join(taken)}: so are arms of every study called")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"recipes need names of their own; there are several of {', '.join(twice)}")
        if self.encoder.embedding not in (None, "cls+token_mean"):
            raise ValueError("leave encoder.embedding out: class token and token mean are both probed")
        return self


def load_study(path: Path, overrides: Sequence[str] | None = None) -> ProbeSettings:
    """Read the config of region probes; see `load_config`."""
    return load_config(ProbeSettings, path, overrides)
