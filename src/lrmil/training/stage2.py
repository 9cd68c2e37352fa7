"""Stage 2: train the HR teacher head on slides' targets (2.1), then the LR student head on targets and teacher (2.2).

Everything is in memory: bags are arrays, one slide makes one step unless the task or the recipe says otherwise. The
student without a teacher is the baseline "LR without distillation"; with all lambdas 0 the two are the same bit for
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lrmil.distill import Stage2LossSettings
from lrmil.errors import ConfigError
from lrmil.mil import HeadSettings, MILHead, create_head, head_cards
from lrmil.mil.readout import Readout
from lrmil.training.loop import FitResult, OnEpoch, Validation, fit, isolated_seed
from lrmil.training.objectives import FittedObjective, Objective, asked_objective
from lrmil.training.objectives.classification import selection_auc
from lrmil.training.optimisers import make_optimiser, make_scheduler
from lrmil.training.predict import BagPrediction, predict_bags
from lrmil.training.recipes import HeadTrainingSettings, training_recipe
from lrmil.training.slide_bags import ResidentBags, SlideBag, check_splits, few_threads
from lrmil.training.steps import HeadStep, head_epoch, labels_for
from lrmil.training.support import fitting_head
from lrmil.training.teaching import (
    Distil,
    TeacherSignal,
    distillation,
    learning_head,
    require_teaching_head,
    teacher_signal,
)

__all__ = [
    "BagPrediction",
    "SlideBag",
    "StudentSettings",
    "TeacherSettings",
    "TeacherSignal",
    "TrainedHead",
    "predict_bags",
    "selection_auc",
    "student_head",
    "teacher_signal",
    "train_student",
    "train_teacher",
    "trainable_head",
    "trainable_pair",
]


class TeacherSettings(HeadTrainingSettings):
    """How the HR teacher head is trained."""


class StudentSettings(TeacherSettings):
    """How the LR student head is trained."""

    loss: Stage2LossSettings = Stage2LossSettings()


@dataclass(frozen=True)
class TrainedHead:
    """A head with the best epoch's weights, in eval mode on the training device, and how it came about."""

    head: MILHead
    fit: FitResult
    objective: FittedObjective
    """What it was trained for, with the statistics of its training split"""

    @property
    def readout(self) -> Readout:
        """How its logits are read; keep it beside the weights."""
        return self.objective.readout


def train_teacher(
    train: Sequence[SlideBag],
    val: Sequence[SlideBag],
    settings: HeadTrainingSettings,
    *,
    num_classes: int | None = None,
    objective: Objective | None = None,
    seed: int,
    device: torch.device | str = "cpu",
    on_epoch: OnEpoch | None = None,
) -> TrainedHead:
    """Train a head on targets alone. HR bags give the teacher, LR bags the baseline without distillation.

    Args:
        train: slides to learn from.
        val: slides that choose the epoch.
        settings: head, recipe and its numbers.
        num_classes: C, where the task is one of classes; labels are 0..C-1.
        objective: of any other task, in its place.
        seed: of the head's first weights and of the order of slides.
        device: where to train.
        on_epoch: called with each epoch's record.

    Raises:
        ConfigError: a split is empty; a target is missing or impossible; the head cannot learn this task, or has no
            original recipe.
        CorruptBag: a bag is empty, has another width than the others, or holds values that are not finite.
        HeadError: no such head or option.
        TrainingError: a loss is not finite.
    """
    wanted = asked_objective(num_classes, objective)
    return _train(train, val, settings, wanted, settings.head, None, seed, torch.device(device), on_epoch)


def train_student(
    train: Sequence[SlideBag],
    val: Sequence[SlideBag],
    teacher: Mapping[str, TeacherSignal],
    settings: StudentSettings,
    *,
    num_classes: int | None = None,
    objective: Objective | None = None,
    seed: int,
    device: torch.device | str = "cpu",
    on_epoch: OnEpoch | None = None,
) -> TrainedHead:
    """Train the LR student by Eq. (6). Validation looks at LR bags and targets alone, as deployment will.

    Args:
        train: LR bags to learn from.
        val: LR bags that choose the epoch.
        teacher: by slide id, for every training slide; of a teacher trained on the same slides for the same task.
        settings: head, recipe and its numbers, and the loss.
        num_classes: see `train_teacher`.
        objective: see `train_teacher`.
        seed: see `train_teacher`; the same seed gives the same first weights.
        device: where to train.
        on_epoch: called with each epoch's record.

    Raises:
        ConfigError: a training slide has no teacher signal, or one that does not fit its bag; or teacher or head give
            no attention and the loss needs it.
        And what `train_teacher` raises.
    """
    device = torch.device(device)
    wanted = asked_objective(num_classes, objective)

    def teach(fitted: FittedObjective) -> Distil:
        return distillation(train, teacher, settings.loss, fitted, device)

    return _train(train, val, settings, wanted, student_head(settings), teach, seed, device, on_epoch)


def student_head(settings: StudentSettings) -> HeadSettings:
    """Return the head that `train_student` builds: that of the settings, with what its loss asks of it.

    Raises:
        ConfigError: the head cannot give what the loss needs.
    """
    return learning_head(settings.head, settings.loss)


def trainable_head(settings: HeadTrainingSettings, objective: Objective) -> HeadSettings:
    """See, before any slide is read, that a head can be trained so; return it with the options that the task asks for.

    `create_head(head.name, in_dim, objective.outputs, **head.options)` then builds what `train_teacher` does.

    Raises:
        ConfigError: the head cannot learn this task, or has no original recipe.
        HeadError: no such head.
    """
    training_recipe(settings)
    return fitting_head(settings.head, objective)


def trainable_pair(
    teacher: TeacherSettings, student: StudentSettings, objective: Objective
) -> tuple[HeadSettings, HeadSettings]:
    """See, before any slide is read, that teacher and student can be trained so, the one by the other.

    Raises:
        ConfigError: see `trainable_head`; or teacher or student cannot give what the student's loss compares, or the
            loss has a temperature without a meaning for this task.
        HeadError: no such head.
    """
    teaching = trainable_head(teacher, objective)
    trainable_head(student, objective)
    require_teaching_head(teacher.head, student.loss)
    objective.check_loss(student.loss)
    return teaching, fitting_head(student_head(student), objective)


def _train(
    train: Sequence[SlideBag],
    val: Sequence[SlideBag],
    settings: HeadTrainingSettings,
    objective: Objective,
    chosen: HeadSettings,
    teach: Callable[[FittedObjective], Distil] | None,
    seed: int,
    device: torch.device,
    on_epoch: OnEpoch | None,
) -> TrainedHead:
    recipe = training_recipe(settings)
    chosen = fitting_head(chosen, objective)
    if any(card.name == chosen.name and card.scales == "many" for card in head_cards()):
        raise ConfigError(
            f"head {chosen.name!r} chooses what it reads from several scales, and is not trained on bags of one.",
            fix="Choose a head of one scale.",
        )
    in_dim = check_splits(train, val)
    train_targets, val_targets = objective.targets(train, "training"), objective.targets(val, "validation")
    fitted = objective.fit(train_targets)
    fitted.check_validation(val_targets)
    distil = teach(fitted) if teach else None
    with isolated_seed(seed):
        head: MILHead = create_head(chosen.name, in_dim, fitted.outputs, **chosen.options)
    head.to(device)
    optimizer = make_optimiser(recipe, head)
    bags = ResidentBags([*train, *val], device)
    labels = labels_for(chosen.name, fitted, train_targets, device)
    step = HeadStep(head, fitted, recipe, bags, fitted.tensor(train_targets).to(device), labels, distil)

    def validate() -> Validation:
        places = range(len(train), len(train) + len(val))
        logits = torch.stack([head(bags[i], coords=bags.coords[i]).logits for i in places])
        return fitted.validation(head, logits, val_targets, recipe.select_by)

    with few_threads([*train, *val], device):
        result = fit(
            head,
            train=head_epoch(step, [bag.slide_id for bag in train], optimizer, fitted.strata(train_targets)),
            validate=validate,
            recipe=recipe,
            seed=seed,
            on_epoch=on_epoch,
            after_epoch=make_scheduler(recipe, optimizer),
        )
    return TrainedHead(head, result, fitted)
