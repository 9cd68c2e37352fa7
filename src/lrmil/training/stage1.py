"""Stage 1: distil the frozen HR encoder into the student, region by region (Eqs. 1 and 2).

The student starts from the teacher's weights and looks at LR regions; its targets are the CLS tokens of the regions'
children. It is trained in place: give a fresh one for every fold, and regions of that fold's training patients only.

It may be another network, narrower or shallower. Where the widths differ, a linear map for each distilled layer, begun
by least squares and trained along, compares the two; it is thrown away afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from lrmil.distill import (
    Stage1LossSettings,
    attention_feature_loss,
    map_layers,
    patch_distillation_loss,
    pool_token_blocks,
)
from lrmil.encoders.settings import ShapedEncoderSettings
from lrmil.errors import ConfigError, TrainingError
from lrmil.geometry import IntArray, check_token_grid
from lrmil.training.alignment import Alignment, TeacherShape
from lrmil.training.loop import FitResult, LoopSettings, OnEpoch, OnStep, Validation, fit, run_epoch

if TYPE_CHECKING:
    from lrmil.encoders import Encoder, EncoderOutput

_BEGIN_WITH = 256  # regions that maps to the teacher's width are fitted to before training


class OwnStudentSettings(ShapedEncoderSettings):
    """A student that is another network than the teacher, as a rule a smaller one."""

    layer_pairs: tuple[tuple[int, int], ...] = Field(
        (), description="[teacher's block, student's block] that go together; others by their relative depth"
    )


class Stage1Settings(LoopSettings):
    """How the student encoder is trained."""

    loss: Stage1LossSettings = Stage1LossSettings()
    student: OwnStudentSettings | None = Field(
        None, description="what the student encoder begins as; null: the HR encoder, with its weights"
    )
    batch_size: int = Field(32, ge=1, description="regions a step")
    micro_batch: int | None = Field(
        None, ge=1, description="regions at a time within a step, same result; smaller takes less memory"
    )
    augment: bool = Field(False, description="turn and mirror regions at random, slots with them; the paper does not")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto is bfloat16 on a CUDA GPU, float32 elsewhere"
    )
    prefetch: bool = Field(True, description="load the next batch on a thread while the encoder works")
    restore_spread: bool = Field(
        False,
        description="afterwards, give each dimension of the embedding the mean and spread over training regions that "
        "it had before; for heads that learn too slowly from a student whose class token has come to vary little. Not "
        "part of training: changed later, no stage 1 is trained again",
    )

    # Left out where nothing is broken, so that such runs have the keys and files they would have without this field.
    children: Literal["own", "foreign"] = Field(
        "own",
        exclude_if=lambda value: value == "own",
        description="foreign: a negative control, each region is taught with the children of a region of another slide",
    )

    @model_validator(mode="after")
    def _has_a_before(self) -> Self:
        if self.restore_spread and self.student is not None:
            raise ValueError("restore_spread needs a student that begins as the HR encoder: leave out student")
        return self


@dataclass(frozen=True)
class RegionBatch:
    """B regions of P x P pixels, and the M children that the teacher saw inside them."""

    images: npt.NDArray[np.uint8]
    """(B, P, P, 3)"""
    teacher_cls: Mapping[int, npt.NDArray[np.floating]]
    """{block: (M, W)}, raw CLS after that block, float16 or float32; blocks counted from 0"""
    region: IntArray
    """(M,) row 0..B-1 of each child's region in this batch"""
    slot: IntArray
    """(M,) ratio * row + column of each child in its region"""
    teacher_embedding: npt.NDArray[np.floating] | None = None
    """(M, E), only for `lambda_attention_feature`"""
    teacher_attention: npt.NDArray[np.floating] | None = None
    """(M,), softmaxed over the slide, only for `lambda_attention_feature`"""


class RegionBatches(Protocol):
    """Regions to train with or to validate on. Targets may be cached, or computed when asked for."""

    def __len__(self) -> int:
        """Return the number of regions; those without any child teach nothing and are best left out."""
        ...

    def batch(self, indices: IntArray) -> RegionBatch:
        """Return these regions, in this order. With `prefetch`, it is called from one other thread."""
        ...


def distil_encoder(
    student: Encoder,
    train: RegionBatches,
    val: RegionBatches,
    settings: Stage1Settings,
    *,
    ratio: int,
    seed: int,
    teacher: TeacherShape | None = None,
    device: torch.device | str = "cpu",
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
) -> FitResult:
    """Train all parameters of `student` by Eq. (2); the epoch of the lowest validation loss is kept.

    Each epoch's record holds train_loss and val_loss, train_layer<l> and val_layer<l> for every distilled block l of
    the teacher, with `lambda_attention_feature` also *_attention_feature, and the seconds spent loading, in steps and
    in validation.

    Args:
        student: changed in place; afterwards on `device`, in eval mode, with the best epoch's weights.
        train: regions of the fold's training patients.
        val: regions of its validation patients.
        settings: see there.
        ratio: children along one side of a region.
        seed: of order and augmentation.
        teacher: of a student of another architecture, the sizes of its teacher.
        device: where to train.
        on_epoch: called with each epoch's record.
        on_step: called after each step of an epoch with (regions done, regions in all).

    Raises:
        ConfigError: a split is empty, or the layers do not exist.
        GridMismatch: the token grid cannot be cut into the children's blocks.
        TrainingError: a batch does not fit the student, or a loss is not finite.
    """
    for split, name in ((train, "training"), (val, "validation")):
        if len(split) == 0:
            raise ConfigError(
                f"the {name} split has no region with children.",
                fix="Stage 1 needs slides that reach hr_mpp in the training and in the validation split.",
            )
    check_token_grid(student.token_grid_side, ratio)
    layers = student_layers(settings, teacher.depth if teacher else student.depth, student.depth)
    device = torch.device(device)
    notes = _idle_blocks(set(layers.values()), student.depth, settings)
    student.to(device)
    step = _Step(student, layers, settings, ratio, device, teacher)
    step.begin(train)
    optimizer = torch.optim.Adam(
        [p for p in (*student.parameters(), *step.alignment.parameters()) if p.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )

    def train_epoch(generator: torch.Generator) -> Mapping[str, float]:
        def load(indices: IntArray) -> RegionBatch:
            return train.batch(indices)

        def learn(batch: RegionBatch) -> Mapping[str, Tensor]:
            if settings.augment:
                batch = transformed(batch, torch.randint(8, (len(batch.images),), generator=generator).numpy(), ratio)
            return step.learn(batch)

        return run_epoch(
            len(train),
            settings.batch_size,
            load=load,
            step=learn,
            optimizer=optimizer,
            generator=generator,
            name=lambda indices: f"the batch of regions {indices[:4].tolist()}...",
            prefetch=settings.prefetch,
            on_step=on_step,
        )

    def validate() -> Validation:
        sums: dict[str, float] = {}
        count = len(val)
        for start in range(0, count, settings.batch_size):
            indices = np.arange(start, min(start + settings.batch_size, count))
            for key, value in step.measure(val.batch(indices)).items():
                sums[key] = sums.get(key, 0.0) + value * len(indices) / count
        return Validation(loss=sums.pop("loss"), details=sums)

    return fit(
        student,
        train=train_epoch,
        validate=validate,
        recipe=settings.paper_recipe("loss"),
        seed=seed,
        notes=notes,
        on_epoch=on_epoch,
    )


class _Step:
    """Forward, loss and backward of one batch."""

    def __init__(
        self,
        student: Encoder,
        layers: Mapping[int, int],
        settings: Stage1Settings,
        ratio: int,
        device: torch.device,
        teacher: TeacherShape | None = None,
    ) -> None:
        self.student = student
        self.layers = layers
        """{block of the teacher: block of the student}"""
        self.extra = bool(settings.loss.lambda_attention_feature)
        self.alignment = Alignment()
        if teacher:
            self.alignment = Alignment.between(student, teacher, layers, with_embedding=self.extra).to(device)
        self.settings = settings
        self.ratio = ratio
        self.device = device
        wanted = settings.precision
        self.bfloat16 = wanted == "bfloat16" or (wanted == "auto" and device.type == "cuda")

    def begin(self, regions: RegionBatches) -> None:
        """Fit the maps to the teacher's width by least squares, to what the untrained student says about regions."""
        if not self.alignment.is_needed:
            return
        chosen = np.unique(np.linspace(0, len(regions) - 1, min(len(regions), _BEGIN_WITH)).round().astype(np.int64))
        seen: list[tuple[dict[int, Tensor], Tensor | None]] = []
        told: list[tuple[dict[int, Tensor], Tensor | None]] = []
        self.student.eval()
        with torch.inference_mode():
            for start in range(0, len(chosen), self.settings.batch_size):
                for part, _ in self._parts(regions.batch(chosen[start : start + self.settings.batch_size])):
                    output, region, slot = self._output(part), self._tensor(part.region), self._tensor(part.slot)
                    pooled = {
                        own: pool_token_blocks(output.tokens[learner].float(), self.ratio)[region, slot]
                        for own, learner in self.layers.items()
                    }
                    seen.append((pooled, output.embedding[region] if self.extra else None))
                    told.append(self._targets(part))
        self.alignment.fit(seen, told)

    def learn(self, batch: RegionBatch) -> dict[str, Tensor]:
        """Add the gradients of a batch; return its detached loss terms."""
        sums: dict[str, Tensor] = {}
        for part, share in self._parts(batch):
            terms = self._terms(part)
            (terms["loss"] * share).backward()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + value.detach() * share
        return sums

    def measure(self, batch: RegionBatch) -> dict[str, float]:
        """Return the loss terms of a batch."""
        sums: dict[str, float] = {}
        for part, share in self._parts(batch):
            terms = self._terms(part)
            # Fetched together: each fetch waits for the GPU.
            for key, value in zip(terms, torch.stack(list(terms.values())).tolist(), strict=True):
                sums[key] = sums.get(key, 0.0) + value * share
        return sums

    def _parts(self, batch: RegionBatch) -> Iterator[tuple[RegionBatch, float]]:
        """Cut a batch into micro batches, each with its share of the regions that have children."""
        _check(batch, tuple(self.layers), self.ratio)
        size, regions = self.settings.micro_batch or len(batch.images), len(batch.images)
        if size >= regions:
            yield batch, 1.0
            return
        total = max(1, len(np.unique(batch.region)))
        for start in range(0, regions, size):
            own = (batch.region >= start) & (batch.region < start + size)
            part = RegionBatch(
                images=batch.images[start : start + size],
                teacher_cls={layer: rows[own] for layer, rows in batch.teacher_cls.items()},
                region=batch.region[own] - start,
                slot=batch.slot[own],
                teacher_embedding=None if batch.teacher_embedding is None else batch.teacher_embedding[own],
                teacher_attention=None if batch.teacher_attention is None else batch.teacher_attention[own],
            )
            yield part, len(np.unique(part.region)) / total

    def _terms(self, batch: RegionBatch) -> dict[str, Tensor]:
        loss = self.settings.loss
        region = self._tensor(batch.region)
        output = self._output(batch)
        targets, embedding = self._targets(batch)
        patch = patch_distillation_loss(
            {own: output.tokens[learner] for own, learner in self.layers.items()},
            targets,
            region,
            self._tensor(batch.slot),
            ratio=self.ratio,
            layer_aggregation=loss.layer_aggregation,
            layer_norm_targets=loss.layer_norm_targets,
            projections=self.alignment.of_layers,
        )
        total = patch.total
        terms = {f"layer{layer}": value for layer, value in patch.per_layer.items()}
        if embedding is not None and batch.teacher_attention is not None:
            terms["attention_feature"] = attention_feature_loss(
                self.alignment.of_embedding(output.embedding.float()),
                embedding,
                self._tensor(batch.teacher_attention),
                region,
            )
            total = total + loss.lambda_attention_feature * terms["attention_feature"]
        return {"loss": total, **terms}

    def _output(self, batch: RegionBatch) -> EncoderOutput:
        images = self.student.normalise(self._tensor(batch.images))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            # Without the extra loss nobody looks at the embedding, nor at the blocks above the last distilled one.
            return self.student(images, token_layers=tuple(set(self.layers.values())), with_embedding=self.extra)

    def _targets(self, batch: RegionBatch) -> tuple[dict[int, Tensor], Tensor | None]:
        """Return the class tokens of the children, and their embeddings where the extra loss needs them."""
        cls = {layer: self._tensor(batch.teacher_cls[layer]) for layer in self.layers}
        if not self.extra:
            return cls, None
        if batch.teacher_embedding is None or batch.teacher_attention is None:
            raise TrainingError(
                "lambda_attention_feature is on, but the regions lack the teacher's embedding or attention.",
                fix="Train the teacher head first (stage 2.1), or set lambda_attention_feature to 0.",
            )
        return cls, self._tensor(batch.teacher_embedding)

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.device, non_blocking=True)


def transformed(batch: RegionBatch, symmetry: IntArray, ratio: int) -> RegionBatch:
    """Turn and mirror each region, and move its children to the slots where they then lie.

    Symmetry s of the square, 0..7: turn counter-clockwise s % 4 times by 90 degrees, then mirror left to right if
    s >= 4. The targets stay those of the children as the teacher saw them, which is an approximation: an encoder is
    not invariant to turning.

    Args:
        batch: any.
        symmetry: (B,), one for each region.
        ratio: children along one side.
    """
    images = np.empty_like(batch.images)
    for s in np.unique(symmetry):
        images[symmetry == s] = _turn(batch.images[symmetry == s], int(s), axes=(1, 2))
    slots = slot_permutations(ratio)[symmetry[batch.region], batch.slot]
    return RegionBatch(images, batch.teacher_cls, batch.region, slots, batch.teacher_embedding, batch.teacher_attention)


def slot_permutations(ratio: int) -> IntArray:
    """Return (8, ratio**2): where each slot goes under each symmetry of `transformed`."""
    slots = np.arange(ratio * ratio).reshape(ratio, ratio)
    moved = np.stack([_turn(slots, s, axes=(0, 1)).ravel() for s in range(8)])
    # moved[s, new] = old; its inverse is wanted.
    return np.argsort(moved, axis=1)


def _turn(array: npt.NDArray[Any], symmetry: int, axes: tuple[int, int]) -> npt.NDArray[Any]:
    turned = np.rot90(array, symmetry % 4, axes=axes)
    return np.flip(turned, axis=axes[1]) if symmetry >= 4 else turned


def student_layers(settings: Stage1Settings, depth: int, student_depth: int) -> dict[int, int]:
    """Return {block of the teacher: block of the student}; see `map_layers`.

    Raises:
        ConfigError: there is no such block, or blocks that began at random would stay so.
    """
    own = settings.student
    layers = map_layers(settings.loss.layers, depth, student_depth, own.layer_pairs if own else ())
    last = max(layers.values())
    taught = last == student_depth - 1 or settings.loss.lambda_attention_feature
    if own and own.random_seed is not None and not taught:
        raise ConfigError(
            f"stage1: blocks {list(layers)} of the teacher teach blocks {sorted(set(layers.values()))} of the student, "
            f"whose blocks above {last} would stay random.",
            fix="Add -1 to stage1.loss.layers, or pair a block with the student's last in stage1.student.layer_pairs.",
        )
    return layers


def _idle_blocks(layers: set[int], depth: int, settings: Stage1Settings) -> tuple[str, ...]:
    """Warn of blocks that Eq. (2) cannot train, as happens with layers 0, 1, 10 of 12."""
    last = max(layers)
    if last == depth - 1 or settings.loss.lambda_attention_feature:
        return ()
    idle = f"block {depth - 1}" if last == depth - 2 else f"blocks {last + 1} to {depth - 1}"
    note = (
        f"the last distilled block is {last} of 0 to {depth - 1}: {idle} and the final norm get no gradient from the "
        f"patch loss and keep the weights that they began with"
    )
    warnings.warn(note, UserWarning, stacklevel=3)
    return (note,)


def _check(batch: RegionBatch, layers: tuple[int, ...], ratio: int) -> None:
    """Catch what would otherwise be an index error on the GPU."""
    children = len(batch.region)
    problem = None
    if missing := [layer for layer in layers if layer not in batch.teacher_cls]:
        problem = f"no teacher targets of blocks {missing}"
    elif any(len(batch.teacher_cls[layer]) != children for layer in layers) or len(batch.slot) != children:
        problem = "targets, regions and slots of different lengths"
    elif children and not (batch.region.min() >= 0 and batch.region.max() < len(batch.images)):
        problem = f"children of regions that are not in it ({batch.region.min()} to {batch.region.max()})"
    elif children and not (batch.slot.min() >= 0 and batch.slot.max() < ratio * ratio):
        problem = f"slots from {batch.slot.min()} to {batch.slot.max()}, where 0 to {ratio * ratio - 1} exist"
    if problem:
        raise TrainingError(f"a batch of {len(batch.images)} regions has {problem}.", fix="Encode the teacher again.")
