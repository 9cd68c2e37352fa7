"""What an objective is. `Objective` is what is asked; fitted to a training split it knows that split's statistics.

Shapes. S slides, C outputs of the head. Targets of S slides are an array (S, ...) as `lrmil.tasks` words it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lrmil.distill import Stage2LossSettings
from lrmil.errors import ConfigError
from lrmil.geometry import IntArray
from lrmil.mil.base import Head
from lrmil.mil.readout import Meaning, Readout
from lrmil.mil.recipe import SelectBy
from lrmil.training.loop import Validation
from lrmil.training.slide_bags import SlideBag

Targets = npt.NDArray[Any]
BagDistance = Callable[[Tensor, Tensor], Tensor]
"""L_bag of one slide: teacher's logits (C,), student's logits (C,) to a scalar; no gradient flows into the teacher's"""


class FittedObjective(ABC):
    """An objective that has seen the targets of its training split, and nothing else."""

    loss_name: ClassVar[str]
    """What the loss of the target is called in the history"""
    score_name: ClassVar[str]
    """What chooses epochs, higher being better"""
    joint: ClassVar[bool] = False
    """True if the loss of several slides is not the mean of their own losses, so that slides must step together"""

    @property
    def bags_per_step(self) -> int:
        """Slides that one step needs at least, or all there are."""
        return 1

    @property
    @abstractmethod
    def outputs(self) -> int:
        """C, what the head gives."""

    @property
    @abstractmethod
    def readout(self) -> Readout:
        """How logits are read, also long after training."""

    @property
    def label_classes(self) -> int:
        """Classes of `labels`, for parts of heads that need some."""
        return self.outputs

    @abstractmethod
    def tensor(self, targets: Targets) -> Tensor:
        """Return targets (S, ...) as `loss` wants them, on the CPU."""

    @abstractmethod
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss of logits (S, C), averaged over slides; `target` are rows of `tensor`."""

    @abstractmethod
    def bag_distance(self, teacher_logits: Tensor, loss: Stage2LossSettings) -> BagDistance:
        """Return L_bag.

        Args:
            teacher_logits: (S, C), of the training slides, for statistics of the teacher.
            loss: temperatures.

        Raises:
            ConfigError: a temperature is set that this L_bag does not have.
        """

    @abstractmethod
    def labels(self, targets: Targets) -> list[int | None]:
        """Return, slide by slide, the class 0..label_classes-1 for parts of heads that need one; None if unknown."""

    @abstractmethod
    def strata(self, targets: Targets) -> IntArray:
        """Return (S,) groups that a balanced sampler draws equally often."""

    @abstractmethod
    def validation(self, head: Head, logits: Tensor, targets: Targets, select_by: SelectBy) -> Validation:
        """Measure logits (S, C) of the validation split; the score is the one that `select_by` asks for, if it can."""

    def check_validation(self, targets: Targets) -> None:  # noqa: B027 (most can)
        """See that these targets can choose an epoch at all.

        Raises:
            ConfigError: they cannot.
        """


class Objective(ABC):
    """What a head is trained for, before any target was seen."""

    name: ClassVar[Meaning]

    def check_loss(self, loss: Stage2LossSettings) -> None:
        """See that a student's loss has a meaning for this task.

        Raises:
            ConfigError: a temperature is set that L_bag does not have.
        """
        if self.name in ("regression", "cox"):
            without_temperature(loss, self.name)

    @property
    @abstractmethod
    def outputs(self) -> int:
        """C, what the head gives."""

    @property
    def label_classes(self) -> int:
        """Classes of `FittedObjective.labels`."""
        return self.outputs

    @abstractmethod
    def targets(self, bags: Sequence[SlideBag], split: str) -> Targets:
        """Return the targets (S, ...) of bags.

        Raises:
            ConfigError: one is missing or impossible; names the slide, and `split`.
        """

    @abstractmethod
    def fit(self, targets: Targets) -> FittedObjective:
        """Take from the targets of the training split what the loss needs.

        Raises:
            ConfigError: these targets cannot be learned from.
        """


def numbers(bags: Sequence[SlideBag], split: str, shape: tuple[int, ...], wanted: str) -> npt.NDArray[np.float64]:
    """Return the targets of bags (S, *shape), float64, finite.

    Raises:
        ConfigError: one is missing, has another shape or is not finite.
    """
    found = []
    for bag in bags:
        target = None if bag.target is None else np.asarray(bag.target, dtype=np.float64)
        if target is None or target.shape != shape or not np.isfinite(target).all():
            told = None if target is None else target.tolist()
            raise ConfigError(
                f"{split} slide {bag.slide_id} has target {told}; wanted {wanted}.", fix="Check the cohort table."
            )
        found.append(target)
    return np.stack(found)


def without_temperature(loss: Stage2LossSettings, what: str) -> None:
    """See that no temperature is set where L_bag has none.

    Raises:
        ConfigError: one is.
    """
    if loss.lambda_bag and loss.bag_temperature != 1.0:
        raise ConfigError(
            f"loss.bag_temperature is {loss.bag_temperature:g}, but L_bag of {what} compares numbers, which have none.",
            fix="Leave bag_temperature at 1.",
        )
