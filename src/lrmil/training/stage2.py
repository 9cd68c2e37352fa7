"""Stage 2: train the HR teacher head on bag labels (2.1), then the LR student head on labels and teacher (2.2).

Everything is in memory: bags are arrays, one slide makes one step. The student without a teacher is the baseline
"LR without distillation"; with all lambdas 0 the two are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lrmil.distill import RegionScores, Stage2LossSettings, region_scores, student_loss
from lrmil.errors import ConfigError, CorruptBag, HeadError
from lrmil.geometry import IntArray
from lrmil.mil import HeadOutput, HeadSettings, MILHead, create_head, head_card
from lrmil.training.loop import (
    FitResult,
    LoopSettings,
    OnEpoch,
    SelectBy,
    Validation,
    fit,
    isolated_seed,
    run_epoch,
)

FloatArray = npt.NDArray[np.floating]

_SMALL_BAG = 1_000_000  # values


class TeacherSettings(LoopSettings):
    """How the HR teacher head is trained."""

    head: HeadSettings = HeadSettings()
    select_by: SelectBy = Field("auc", description="what early stopping watches on the validation split: auc or loss")


class StudentSettings(TeacherSettings):
    """How the LR student head is trained."""

    loss: Stage2LossSettings = Stage2LossSettings()


@dataclass(frozen=True)
class SlideBag:
    """One slide's instances and label."""

    slide_id: str
    features: FloatArray
    """(N, D) float16 or float32"""
    label: int | None
    """class index; None only where nothing is trained or validated"""
    coords: FloatArray | IntArray | None = None
    """(N, 2) positions (x, y), for heads that use them"""


@dataclass(frozen=True)
class BagPrediction:
    """What a head says about one slide."""

    slide_id: str
    logits: FloatArray
    """(C,) float32"""
    probabilities: FloatArray
    """(C,) float64: in float32, confident slides would tie at 1 and spoil an AUC"""
    attention_logits: FloatArray | None
    """(N,) float32"""
    attention: FloatArray | None
    """(N,) float32, sums to 1"""


@dataclass(frozen=True)
class TeacherSignal:
    """What the teacher head tells the student about one slide."""

    logits: FloatArray
    """(C,)"""
    attention_logits: FloatArray
    """(M,), one a child, before any softmax"""
    region: IntArray
    """(M,), row of the student's bag that the child lies in; -1 for none of them"""


@dataclass(frozen=True)
class TrainedHead:
    """A head with the best epoch's weights, in eval mode on the training device, and how it came about."""

    head: MILHead
    fit: FitResult


def train_teacher(
    train: Sequence[SlideBag],
    val: Sequence[SlideBag],
    settings: TeacherSettings,
    *,
    num_classes: int,
    seed: int,
    device: torch.device | str = "cpu",
    on_epoch: OnEpoch | None = None,
) -> TrainedHead:
    """Train a head on bag labels alone: L = CE. HR bags give the teacher, LR bags the baseline without distillation.

    Args:
        train: slides to learn from.
        val: slides that choose the epoch.
        settings: head, optimiser, patience.
        num_classes: C; labels are 0..C-1.
        seed: of the head's first weights and of the order of slides.
        device: where to train.
        on_epoch: called with each epoch's record.

    Raises:
        ConfigError: a split is empty, or a label is missing or out of range.
        CorruptBag: a bag is empty, has another width than the others, or holds values that are not finite.
        HeadError: no such head or option.
        TrainingError: a loss is not finite.
    """
    return _train(train, val, settings, num_classes, seed, torch.device(device), on_epoch, settings.head, None)


def train_student(
    train: Sequence[SlideBag],
    val: Sequence[SlideBag],
    teacher: Mapping[str, TeacherSignal],
    settings: StudentSettings,
    *,
    num_classes: int,
    seed: int,
    device: torch.device | str = "cpu",
    on_epoch: OnEpoch | None = None,
) -> TrainedHead:
    """Train the LR student by Eq. (6). Validation looks at LR bags and labels alone, as deployment will.

    Args:
        train: LR bags to learn from.
        val: LR bags that choose the epoch.
        teacher: by slide id, for every training slide.
        settings: head, optimiser, patience, and the loss.
        num_classes: C.
        seed: see `train_teacher`; the same seed gives the same first weights.
        device: where to train.
        on_epoch: called with each epoch's record.

    Raises:
        ConfigError: a training slide has no teacher signal, or one that does not fit its bag; or the head gives no
            attention and the loss needs it.
        And what `train_teacher` raises.
    """
    device = torch.device(device)
    loss, head = settings.loss, student_head(settings)
    targets = [_target(bag, teacher, loss, num_classes, device) for bag in train]

    def distil(ce: Tensor, output: HeadOutput, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits, scores = targets[index]
        joined = student_loss(ce, output.logits, output.attention_logits, output.instance_logits, logits, scores, loss)
        return joined.total, joined.terms

    return _train(train, val, settings, num_classes, seed, device, on_epoch, head, distil)


def student_head(settings: StudentSettings) -> HeadSettings:
    """Return the head that `train_student` builds: that of the settings, with what its loss asks of it.

    Raises:
        ConfigError: the head cannot give what the loss needs.
    """
    loss, head = settings.loss, settings.head
    gives = head_card(head.name).gives_attention
    if (loss.lambda_soft or (loss.lambda_hard and loss.hard_mode == "attention")) and not gives:
        raise ConfigError(
            f"head {head.name!r} weighs no instances, so it cannot learn from the teacher's attention.",
            fix="Set lambda_soft and lambda_hard to 0, or choose a head that gives attention.",
        )
    if not loss.lambda_hard or loss.hard_mode == "attention":
        return head
    source = {"hidden": "hidden", "released": "features"}[loss.hard_mode]
    if head.options.get("instance_classifier", source) != source:
        raise ConfigError(
            f"hard_mode: {loss.hard_mode} needs the head's instance_classifier: {source}, "
            f"not {head.options['instance_classifier']}.",
            fix="Leave that option out, or choose another hard_mode.",
        )
    return head.model_copy(update={"options": head.options | {"instance_classifier": source}})


def predict_bags(
    head: MILHead, bags: Sequence[SlideBag], *, device: torch.device | str | None = None
) -> list[BagPrediction]:
    """Apply a head to bags, one at a time; labels are not looked at. Puts the head in eval mode.

    Args:
        head: on any device.
        bags: any number of slides.
        device: where to compute; None is where the head is.
    """
    device = next(head.parameters()).device if device is None else torch.device(device)
    head.to(device).eval()
    found = []
    with torch.inference_mode():
        for bag in bags:
            _check_bag(bag, head.in_dim)
            output = head(_features(bag, device), coords=_coords(bag, device))
            found.append(
                BagPrediction(
                    slide_id=bag.slide_id,
                    logits=_array(output.logits),
                    probabilities=_probabilities(head, output.logits),
                    attention_logits=None if output.attention_logits is None else _array(output.attention_logits),
                    attention=None if output.attention is None else _array(output.attention),
                )
            )
    return found


def teacher_signal(prediction: BagPrediction, region: IntArray) -> TeacherSignal:
    """Join a teacher's prediction with the regions (M,) of its instances.

    Raises:
        HeadError: the teacher gives no attention, or the lengths differ.
    """
    if prediction.attention_logits is None:
        raise HeadError(
            "this head weighs no instances, so it cannot teach by attention.", fix="Choose a head that gives attention."
        )
    if len(prediction.attention_logits) != len(region):
        raise HeadError(
            f"{prediction.slide_id}: {len(prediction.attention_logits)} attention values for {len(region)} children."
        )
    return TeacherSignal(prediction.logits, prediction.attention_logits, region)


def selection_auc(probabilities: FloatArray, labels: IntArray) -> float:
    """Return the AUC that chooses epochs: of P(class 1) for two classes, else the mean of one class against the rest.

    Args:
        probabilities: (S, C).
        labels: (S,) in 0..C-1.

    Returns:
        NaN if one of the C classes is missing from `labels`, or a probability is NaN; never 0 or 1 in its place.
    """
    from sklearn.metrics import roc_auc_score  # takes seconds to import, and only training needs it

    classes = probabilities.shape[1]
    if classes < 2 or len(np.unique(labels)) < classes or not np.isfinite(probabilities).all():
        return float("nan")
    if classes == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    return float(np.mean([roc_auc_score(labels == c, probabilities[:, c]) for c in range(classes)]))


Distil = Callable[[Tensor, HeadOutput, int], tuple[Tensor, Mapping[str, Tensor]]]


def _train(
    train: Sequence[SlideBag],
    val: Sequence[SlideBag],
    settings: TeacherSettings,
    num_classes: int,
    seed: int,
    device: torch.device,
    on_epoch: OnEpoch | None,
    chosen: HeadSettings,
    distil: Distil | None,
) -> TrainedHead:
    in_dim = _check_splits(train, val, num_classes)
    with isolated_seed(seed):
        head = create_head(chosen.name, in_dim, num_classes, **chosen.options)
    head.to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    bags = _Resident([*train, *val], device)
    labels = torch.tensor([bag.label for bag in [*train, *val]], device=device)
    val_labels = np.array([bag.label for bag in val])

    def step(index: int) -> Mapping[str, Tensor]:
        output: HeadOutput = head(bags[index], label=labels[index], coords=bags.coords[index])
        ce = F.cross_entropy(output.logits[None], labels[index][None])
        loss, terms = distil(ce, output, index) if distil else (ce, {"ce": ce})
        total = head.total_loss(output, loss)
        total.backward()
        scalars = {"loss": total, **terms, **output.losses}
        return {name: value.detach() for name, value in scalars.items()}

    def train_epoch(generator: torch.Generator) -> Mapping[str, float]:
        return run_epoch(
            len(train),
            1,
            load=lambda indices: int(indices[0]),
            step=step,
            optimizer=optimizer,
            generator=generator,
            name=lambda indices: f"slide {train[int(indices[0])].slide_id}",
        )

    def validate() -> Validation:
        logits = torch.stack(
            [head(bags[i], coords=bags.coords[i]).logits for i in range(len(train), len(train) + len(val))]
        )
        probabilities = _probabilities(head, logits)
        return Validation(
            loss=float(F.cross_entropy(logits, labels[len(train) :])),
            auc=selection_auc(probabilities, val_labels),
            details={"accuracy": float((probabilities.argmax(axis=1) == val_labels).mean())},
        )

    with _few_threads([*train, *val], device):
        result = fit(
            head,
            train=train_epoch,
            validate=validate,
            settings=settings,
            select_by=settings.select_by,
            seed=seed,
            on_epoch=on_epoch,
        )
    return TrainedHead(head, result)


@contextmanager
def _few_threads(bags: Sequence[SlideBag], device: torch.device) -> Iterator[None]:
    """Use one thread where bags are small: on a CPU, handing out their work then takes longer than doing it."""
    before = torch.get_num_threads()
    if device.type == "cpu" and max(bag.features.size for bag in bags) < _SMALL_BAG:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Resident:
    """Bags as float32 tensors on the device, as many as fit a budget; the rest are moved when asked for."""

    def __init__(self, bags: Sequence[SlideBag], device: torch.device) -> None:
        self._bags = bags
        self._device = device
        self.coords = [_coords(bag, device) for bag in bags]
        budget = 2 << 30
        if device.type == "cuda":
            budget = torch.cuda.mem_get_info(device)[0] // 2
        self._tensors: list[Tensor | None] = []
        for bag in bags:
            # A float32 bag on the CPU is shared with its array and costs nothing.
            free = device.type == "cpu" and bag.features.dtype == np.float32 and bag.features.flags.c_contiguous
            cost = 0 if free else bag.features.size * 4
            fits = cost <= budget
            budget -= cost if fits else 0
            self._tensors.append(_features(bag, device) if fits else None)

    def __getitem__(self, index: int) -> Tensor:
        tensor = self._tensors[index]
        return _features(self._bags[index], self._device) if tensor is None else tensor


def _features(bag: SlideBag, device: torch.device) -> Tensor:
    return _shared(bag.features).to(device, torch.float32)


def _coords(bag: SlideBag, device: torch.device) -> Tensor | None:
    return None if bag.coords is None else _shared(bag.coords).to(device)


def _shared(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _probabilities(head: MILHead, logits: Tensor) -> FloatArray:
    return head.probabilities(logits.cpu().double()).numpy()


def _array(tensor: Tensor) -> FloatArray:
    return tensor.float().cpu().numpy()


def _target(
    bag: SlideBag,
    teacher: Mapping[str, TeacherSignal],
    loss: Stage2LossSettings,
    num_classes: int,
    device: torch.device,
) -> tuple[Tensor, RegionScores]:
    """Teacher logits, and region scores: both stay the same through all of training."""
    signal = teacher.get(bag.slide_id)
    if signal is None:
        raise ConfigError(
            f"training slide {bag.slide_id} has no teacher output.",
            fix="Leave slides that do not reach hr_mpp out of the training split.",
        )
    region = np.asarray(signal.region, dtype=np.int64)
    problem = None
    if signal.logits.shape != (num_classes,):
        problem = f"{signal.logits.shape} logits for {num_classes} classes"
    elif signal.attention_logits.shape != region.shape:
        problem = f"{len(signal.attention_logits)} attention values for {len(region)} children"
    elif len(region) and (region.min() < -1 or region.max() >= len(bag.features)):
        problem = f"children of regions {region.min()} to {region.max()}, where 0 to {len(bag.features) - 1} exist"
    elif not (np.isfinite(signal.logits).all() and np.isfinite(signal.attention_logits).all()):
        problem = "values that are not finite"
    if problem:
        raise ConfigError(f"the teacher's output for {bag.slide_id} has {problem}.", fix="Train the teacher again.")
    scores = region_scores(
        torch.tensor(signal.attention_logits, device=device),
        torch.tensor(region, device=device),
        len(bag.features),
        teacher_scores=loss.teacher_scores,
        aggregation=loss.region_aggregation,
    )
    return torch.tensor(signal.logits, device=device), scores


def _check_splits(train: Sequence[SlideBag], val: Sequence[SlideBag], num_classes: int) -> int:
    """Look at every bag and label once, before training; return the width of the bags."""
    for bags, split in ((train, "training"), (val, "validation")):
        if not bags:
            raise ConfigError(f"the {split} split has no slides.", fix="Use fewer folds, or more patients.")
        for bag in bags:
            if bag.label is None or not 0 <= bag.label < num_classes:
                raise ConfigError(
                    f"{split} slide {bag.slide_id} has label {bag.label}; {num_classes} classes are 0 to "
                    f"{num_classes - 1}.",
                    fix="Check the label column and the list of classes.",
                )
    in_dim = train[0].features.shape[-1]
    for bag in (*train, *val):
        _check_bag(bag, in_dim)
    return in_dim


def _check_bag(bag: SlideBag, in_dim: int) -> None:
    features = bag.features
    if features.ndim != 2 or len(features) == 0 or features.shape[1] != in_dim:
        raise CorruptBag(
            f"{bag.slide_id}: features have shape {features.shape}; wanted (N, {in_dim}) with N of at least 1.",
            fix="Encode all slides with one encoder, and leave slides without patches out.",
        )
    # The sum is not finite if any value is not (float64, so that it cannot overflow), and reads the bag only once.
    if not np.isfinite(features.sum(dtype=np.float64)):
        row = int((~np.isfinite(features)).any(axis=1).argmax())
        raise CorruptBag(f"{bag.slide_id}: features hold NaN or infinity, first in row {row}.", fix="Encode it again.")
