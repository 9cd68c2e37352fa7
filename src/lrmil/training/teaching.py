"""What a teacher head tells a student about a slide, and which heads can teach and learn so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrmil.distill import RegionScores, Stage2LossSettings, region_scores, student_loss
from lrmil.errors import ConfigError, HeadError
from lrmil.geometry import IntArray
from lrmil.mil import HeadOutput, HeadSettings, head_cards
from lrmil.training.objectives import FittedObjective
from lrmil.training.predict import BagPrediction
from lrmil.training.slide_bags import SlideBag

FloatArray = npt.NDArray[np.floating]
Distil = Callable[[Tensor, HeadOutput, int], tuple[Tensor, Mapping[str, Tensor]]]
"""the loss of the target, what the head said, number of the slide; to the student's loss and its terms"""


@dataclass(frozen=True)
class TeacherSignal:
    """What the teacher head tells the student about one slide."""

    logits: FloatArray
    """(C,)"""
    attention_logits: FloatArray | None
    """(M,), one a child, before any softmax; None from a head that weighs no instances"""
    region: IntArray
    """(M,), row of the student's bag that the child lies in; -1 for none of them"""


def teacher_signal(prediction: BagPrediction, region: IntArray) -> TeacherSignal:
    """Join a teacher's prediction with the regions (M,) of its instances.

    Raises:
        HeadError: the lengths differ.
    """
    scores = prediction.attention_logits
    if scores is not None and len(scores) != len(region):
        raise HeadError(f"{prediction.slide_id}: {len(scores)} attention values for {len(region)} children.")
    return TeacherSignal(prediction.logits, scores, region)


def needs_attention(loss: Stage2LossSettings) -> bool:
    """Whether a loss compares with the teacher's attention."""
    return bool(loss.lambda_soft or loss.lambda_hard)


def require_teaching_head(teacher: HeadSettings, loss: Stage2LossSettings) -> None:
    """See that a teacher's head can give what the student's loss needs; long before either is trained.

    Raises:
        ConfigError: it weighs no instances by one score; names it.
    """
    if needs_attention(loss) and not _gives_attention(teacher.name):
        able = ", ".join(card.name for card in head_cards() if card.gives_attention)
        raise ConfigError(
            f"teacher head {teacher.name!r} weighs no instances by one score, so it cannot teach by attention.",
            fix=f"Set the student's lambda_soft and lambda_hard to 0, or choose one of: {able}.",
        )


def learning_head(head: HeadSettings, loss: Stage2LossSettings) -> HeadSettings:
    """Return a student's head with what its loss asks of it.

    Raises:
        ConfigError: the head cannot give what the loss needs.
    """
    if (loss.lambda_soft or (loss.lambda_hard and loss.hard_mode == "attention")) and not _gives_attention(head.name):
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


def distillation(
    bags: Sequence[SlideBag],
    teacher: Mapping[str, TeacherSignal],
    loss: Stage2LossSettings,
    objective: FittedObjective,
    device: torch.device,
) -> Distil:
    """Return Eq. (6) for the slides of the training split; what the teacher says of them is worked out once.

    Raises:
        ConfigError: a slide has no teacher signal, or one that does not fit its bag, the task or the loss.
    """
    told = [_told(bag, teacher, loss, objective.outputs, device) for bag in bags]
    distance = objective.bag_distance(torch.stack([logits for logits, _ in told]), loss)

    def distil(supervised: Tensor, output: HeadOutput, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits, scores = told[index]
        joined = student_loss(
            supervised,
            output.logits,
            output.attention_logits,
            output.instance_logits,
            logits,
            scores,
            loss,
            bag_distance=distance,
        )
        return joined.total, {name: value for name, value in joined.terms.items() if name != "ce"}

    return distil


def _told(
    bag: SlideBag,
    teacher: Mapping[str, TeacherSignal],
    loss: Stage2LossSettings,
    outputs: int,
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
    values = signal.attention_logits
    if values is None:
        if needs_attention(loss):
            raise ConfigError(
                f"the teacher's output for {bag.slide_id} has no attention, but the loss compares with it.",
                fix="Set lambda_soft and lambda_hard to 0, or choose a teacher head that gives attention.",
            )
        values = np.zeros(len(region), np.float32)
    problem = None
    if signal.logits.shape != (outputs,):
        problem = f"{signal.logits.shape} logits for {outputs} outputs"
    elif values.shape != region.shape:
        problem = f"{len(values)} attention values for {len(region)} children"
    elif len(region) and (region.min() < -1 or region.max() >= len(bag.features)):
        problem = f"children of regions {region.min()} to {region.max()}, where 0 to {len(bag.features) - 1} exist"
    elif not (np.isfinite(signal.logits).all() and np.isfinite(values).all()):
        problem = "values that are not finite"
    if problem:
        raise ConfigError(f"the teacher's output for {bag.slide_id} has {problem}.", fix="Train the teacher again.")
    scores = region_scores(
        torch.tensor(values, device=device),
        torch.tensor(region, device=device),
        len(bag.features),
        teacher_scores=loss.teacher_scores,
        aggregation=loss.region_aggregation,
    )
    return torch.tensor(signal.logits, device=device), scores


def _gives_attention(name: str) -> bool:
    return {card.name: card.gives_attention for card in head_cards()}.get(name, True)
