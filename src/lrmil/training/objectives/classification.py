"""One of several classes: cross-entropy, KL to the teacher (Eq. 3), AUC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lrmil.distill import Stage2LossSettings, bag_distillation_loss
from lrmil.errors import ConfigError
from lrmil.geometry import IntArray
from lrmil.mil.base import Head
from lrmil.mil.readout import Readout
from lrmil.mil.recipe import SelectBy
from lrmil.training.loop import Validation
from lrmil.training.objectives.base import BagDistance, FittedObjective, Objective, Targets
from lrmil.training.slide_bags import SlideBag

NO_AUC = "a class is missing from the validation split, so its AUC is undefined"


@dataclass(frozen=True)
class Classification(Objective):
    """Classes 0..C-1, from `SlideBag.label`."""

    name = "classification"
    num_classes: int

    @property
    def outputs(self) -> int:
        """One logit a class."""
        return self.num_classes

    def targets(self, bags: Sequence[SlideBag], split: str) -> Targets:
        """Return the class indices (S,) int64."""
        for bag in bags:
            if bag.label is None or not 0 <= bag.label < self.num_classes:
                raise ConfigError(
                    f"{split} slide {bag.slide_id} has label {bag.label}; {self.num_classes} classes are 0 to "
                    f"{self.num_classes - 1}.",
                    fix="Check the label column and the list of classes.",
                )
        return np.array([bag.label for bag in bags], dtype=np.int64)

    def fit(self, targets: Targets) -> FittedClassification:
        """There is nothing to take from the training split."""
        return FittedClassification(self.num_classes)


@dataclass(frozen=True)
class FittedClassification(FittedObjective):
    """See `FittedObjective`."""

    loss_name: ClassVar[str] = "ce"
    score_name: ClassVar[str] = "auc"
    num_classes: int

    @property
    def outputs(self) -> int:
        """One logit a class."""
        return self.num_classes

    @property
    def readout(self) -> Readout:
        """Class probabilities, the head's own way."""
        return Readout(meaning="classification")

    def tensor(self, targets: Targets) -> Tensor:
        """Class indices."""
        return torch.from_numpy(targets)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(logits, target)

    def bag_distance(self, teacher_logits: Tensor, loss: Stage2LossSettings) -> BagDistance:
        """KL with the teacher as reference, softened by a temperature."""
        return lambda teacher, student: bag_distillation_loss(
            student, teacher, temperature=loss.bag_temperature, temperature_squared=loss.temperature_squared
        )

    def labels(self, targets: Targets) -> list[int | None]:
        """The classes themselves."""
        return [int(label) for label in targets]

    def strata(self, targets: Targets) -> IntArray:
        """The classes themselves."""
        return targets

    def validation(self, head: Head, logits: Tensor, targets: Targets, select_by: SelectBy) -> Validation:
        """Cross-entropy; AUC, accuracy and weighted F1 of the head's probabilities.

        "auc+accuracy" is half the sum of the accuracy and of all classes' AUCs, each class against the rest.
        """
        from sklearn.metrics import f1_score  # takes seconds to import, and only training needs it

        probabilities = self.readout.read(head, logits).probabilities
        predicted = probabilities.argmax(axis=1)
        auc, accuracy = selection_auc(probabilities, targets), float((predicted == targets).mean())
        scores = {"auc": auc, "accuracy": accuracy}
        if select_by == "auc+accuracy":
            scores[select_by] = (self.num_classes * auc + accuracy) / 2
        if select_by == "weighted_f1":
            scores[select_by] = float(f1_score(targets, predicted, average="weighted", zero_division=0))
        name = select_by if select_by in scores else "auc"
        return Validation(
            loss=float(F.cross_entropy(logits, self.tensor(targets).to(logits.device))),
            score=scores.pop(name),
            name=name,
            details=scores,
            undefined=NO_AUC,
        )


def selection_auc(probabilities: npt.NDArray[np.floating], labels: IntArray) -> float:
    """Return the AUC that chooses epochs: of P(class 1) for two classes, else the mean of one class against the rest.

    Args:
        probabilities: (S, C).
        labels: (S,) in 0..C-1.

    Returns:
        NaN if one of the C classes is missing from `labels`, or a probability is NaN; never 0 or 1 in its place.
    """
    from sklearn.metrics import roc_auc_score

    classes = probabilities.shape[1]
    if classes < 2 or len(np.unique(labels)) < classes or not np.isfinite(probabilities).all():
        return math.nan
    if classes == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    return float(np.mean([roc_auc_score(labels == c, probabilities[:, c]) for c in range(classes)]))
