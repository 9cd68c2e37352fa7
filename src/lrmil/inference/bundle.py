"""The bundle: everything that answers a slide, in one folder of JSON and safetensors.

    model/
      bundle.json             what it is, how to prepare a slide, labels, licence, metrics, checksums
      encoder.safetensors     the student encoder, looks at LR regions
      encoder.json            its architecture and preprocessing
      head.safetensors        the student head
      README.md               the same for people; the only file that may be edited

Nothing in it is code and nothing is unpickled. Loading needs neither the training rooms nor the HR encoder. Checksums
tell a bundle that was damaged or edited, bundle.json included, from the one that was written; they are no signature.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file

from lrmil._version import __version__
from lrmil.encoders import Encoder, load_encoder, save_encoder
from lrmil.errors import BundleAltered, BundleError, HeadError
from lrmil.files import read_json, sha256, write_json, write_tensors, write_text
from lrmil.geometry import GridSettings
from lrmil.inference.prepare import TileSettings
from lrmil.mil import MILHead, create_head
from lrmil.mil.readout import Readout
from lrmil.settings import Settings, fingerprint
from lrmil.tissue import TissueSettings

FORMAT: Literal["lrmil-bundle/1"] = "lrmil-bundle/1"
MANIFEST_FILE = "bundle.json"
HEAD_FILE = "head.safetensors"
CHECKED_FILES = ("encoder.json", "encoder.safetensors", HEAD_FILE)


class HeadSpec(Settings):
    """A head that can be built again: `create_head(name, in_dim, num_classes, **options)`."""

    name: str
    in_dim: int
    num_classes: int
    options: dict[str, Any] = Field(default_factory=dict)


class TrainedOn(Settings):
    """What the model was trained on, as far as a reader of its answers should know."""

    cohort: str
    slides: int
    patients: int
    slides_per_class: dict[str, int]
    regions_per_slide: tuple[float, float, float]
    """5th, 50th and 95th percentile of the number of LR regions of a training slide"""


class BundleManifest(Settings):
    """The content of bundle.json."""

    format: Literal["lrmil-bundle/1"] = FORMAT
    lrmil_version: str = __version__
    created: str
    task: str
    classes: list[str]
    """in the order of the probabilities; empty for tasks without classes"""
    readout: Readout | None = None
    """what the logits stand for where there are no classes; None: class probabilities"""
    median_risk: float | None = None
    """survival: of the training patients; where high and low risk are divided"""
    grid: GridSettings
    tissue: TissueSettings
    tiles: TileSettings
    head: HeadSpec
    encoder_origin: dict[str, Any]
    """description of the HR encoder that the student encoder was distilled from, with its licence"""
    licence_note: str
    trained_on: TrainedOn
    cross_validation: dict[str, Any]
    """metrics with intervals of the folds; the deployed model itself was not tested, its fold siblings were"""
    recipe: dict[str, Any]
    """the config of the run"""
    software: dict[str, str]
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each of `CHECKED_FILES`; filled when the bundle is written"""
    checksum: str = ""
    """fingerprint of all other fields of this file as they are in it, and so the identity of the model"""

    @property
    def unused(self) -> set[str]:
        """Fields that bundle.json does not have, since they say nothing about this task."""
        return {name for name in ("readout", "median_risk") if getattr(self, name) is None}

    @property
    def outputs(self) -> int:
        """How many logits the head gives."""
        if self.readout is None:
            return len(self.classes)
        return len(self.readout.edges) + 1 if self.readout.meaning == "hazards" else 1


def save_bundle(folder: Path, manifest: BundleManifest, encoder: Encoder, head: MILHead) -> BundleManifest:
    """Write a bundle; return its manifest with the checksums. bundle.json comes last, so a half-written one is none.

    Raises:
        BundleError: manifest, encoder and head do not belong together.
        OutputError: the folder cannot be written.
    """
    _check_fit(folder, manifest, encoder, head)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    save_encoder(encoder, folder)
    write_tensors(folder / HEAD_FILE, head.state_dict())
    write_text(folder / "README.md", _model_card(manifest, encoder))
    manifest = manifest.model_copy(update={"files": {name: sha256(folder / name) for name in CHECKED_FILES}})
    # As JSON reads it back: numbers that are not finite become null.
    content = json.loads(manifest.model_dump_json(exclude={"checksum", *manifest.unused}))
    checksum = fingerprint(content)
    write_json(folder / MANIFEST_FILE, content | {"checksum": checksum})
    return manifest.model_copy(update={"checksum": checksum})


def read_manifest(folder: Path) -> BundleManifest:
    """Read and check bundle.json and the checksums of all files.

    Raises:
        BundleError: no bundle there, or one of another format.
        BundleAltered: a file is missing or is not the one that was written.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise BundleError(
            f"{folder}: no {MANIFEST_FILE} there.",
            fix="Give the folder that `lrmil run` wrote as model/, or a copy of it.",
        )
    try:
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise BundleError(
                f"{folder}: format {content.get('format')!r}; this version of lrmil reads {FORMAT!r}.",
                fix="Load it with the lrmil version that wrote it.",
            )
        # Over the file as it is, not over the model: a later version may add fields with defaults.
        intact = fingerprint({k: v for k, v in content.items() if k != "checksum"}) == content.get("checksum")
        if not intact:
            raise _altered(folder, MANIFEST_FILE)
        manifest = BundleManifest.model_validate(content)
    except (ValueError, AttributeError) as error:
        raise BundleError(f"{path}: not a valid bundle description: {error}", fix="Copy the bundle again.") from error
    if set(manifest.files) != set(CHECKED_FILES):
        raise BundleError(
            f"{path}: it lists other files than {', '.join(CHECKED_FILES)}.", fix="Copy the bundle again."
        )
    for name in CHECKED_FILES:
        if not (folder / name).is_file():
            raise BundleAltered(f"{folder}: {name} is missing.", fix="Copy the whole folder again.")
        if sha256(folder / name) != manifest.files[name]:
            raise _altered(folder, name)
    return manifest


def load_parts(folder: Path) -> tuple[BundleManifest, Encoder, MILHead]:
    """Load a bundle's manifest, encoder and head (float32, CPU, eval mode), after checking the checksums.

    Raises:
        BundleError: see `read_manifest`; or its parts do not belong together.
    """
    manifest = read_manifest(folder)
    encoder = load_encoder(folder)
    spec = manifest.head
    try:
        head = create_head(spec.name, spec.in_dim, spec.num_classes, **spec.options)
        head.load_state_dict(load_file(folder / HEAD_FILE))
    except (HeadError, SafetensorError, RuntimeError) as error:
        raise BundleError(
            f"{folder}: its head cannot be built: {error}", fix="Load it with the lrmil version that wrote it."
        ) from error
    _check_fit(folder, manifest, encoder, head)
    return manifest, encoder, head.eval()


def _check_fit(folder: Path, manifest: BundleManifest, encoder: Encoder, head: MILHead) -> None:
    if head.in_dim != encoder.embed_dim or head.num_classes != manifest.outputs:
        classes, outputs = f"there are {len(manifest.classes)} classes", f"the task takes {manifest.outputs} outputs"
        wanted = classes if manifest.readout is None else outputs
        raise BundleError(
            f"{folder}: the encoder gives {encoder.embed_dim} numbers a region and {wanted}, but the head takes "
            f"{head.in_dim} and gives {head.num_classes}.",
            fix="Write the bundle again from parts that were trained together.",
        )


def _altered(folder: Path, name: str) -> BundleAltered:
    return BundleAltered(
        f"{folder}: {name} is not the file that was written (its checksum differs).",
        fix="Copy the bundle again from where it was trained; do not edit its files.",
    )


def _asked(m: BundleManifest) -> tuple[str, str, str]:
    """Say for people what the model tells, what its answer means, and what it knows of."""
    if m.readout is None:
        classes = ", ".join(f"{name} ({m.trained_on.slides_per_class.get(name, 0)} slides)" for name in m.classes)
        return (
            " / ".join(m.classes),
            f"- **Classes**, in the order of the probabilities: {classes}.",
            "the classes above",
        )
    if m.readout.meaning == "regression":
        return "a number", f"- **Answer**: {m.task}, in the unit of the training table.", "this number"
    told = "- **Answer**: a risk, higher meaning an earlier event; only its order counts."
    if m.median_risk is not None:
        told += f" The median of the training patients was {m.median_risk:.4g}."
    if m.readout.times:
        told += (
            f"\n- **Survival** is told at {', '.join(f'{t:g}' for t in m.readout.times)}, in the table's unit of time."
        )
    return "survival", told, "this event"


def _model_card(manifest: BundleManifest, encoder: Encoder) -> str:
    m = manifest
    origin = m.encoder_origin.get("name", "an HR encoder")
    shape = "" if origin == encoder.card.name else f"{encoder.card.name}, width {encoder.trunk_width}, "
    low, middle, high = m.trained_on.regions_per_slide
    metrics = "\n".join(f"| {name} | {value} |" for name, value in m.cross_validation.items())
    subject, answer, limit = _asked(m)
    return f"""# {m.task}: {subject}, from {m.grid.lr_mpp:g} um/px only

    lrmil predict SLIDE --model THIS_FOLDER --out answers

{answer}
- **Trained on** {m.trained_on.slides} slides of {m.trained_on.patients} patients ({m.trained_on.cohort});
  5th, 50th and 95th percentile of regions a slide: {low:.0f}, {middle:.0f}, {high:.0f}.
- **Looks at** {m.grid.patch_px}-px regions at {m.grid.lr_mpp:g} um/px. It never asks for finer pixels.
- **Encoder** {shape}distilled from {origin} at {m.grid.hr_mpp:g} um/px.
- **Licence**: {m.licence_note}
- Not a medical device. It knows only {limit} and slides like those it was trained on.

Cross-validation (of models trained the same way on part of the cohort; this one saw all of it):

| measure | value |
|---|---|
{metrics}
"""
