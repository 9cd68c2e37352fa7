"""From the kind of a task to what heads are trained for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lrmil.errors import ConfigError
from lrmil.settings import Settings
from lrmil.tasks import TaskKind
from lrmil.training.objectives.base import Objective
from lrmil.training.objectives.classification import Classification
from lrmil.training.objectives.cox import Cox
from lrmil.training.objectives.hazards import Hazards
from lrmil.training.objectives.regression import Regression


class ObjectiveSettings(Settings):
    """What heads are trained for where the task is not one of classes. See docs/tasks.md."""

    survival: Literal["hazards", "cox"] = Field(
        "hazards",
        description="hazards of intervals of time, or Cox's partial likelihood over slides that step together",
    )
    intervals: int = Field(4, ge=2, description="intervals of time that have a hazard each")
    cox_bags: int = Field(32, ge=2, description="slides a step of Cox's partial likelihood, at least")
    label_bins: int = Field(
        4, ge=2, description="quantile bins that stand for classes in parts of heads that need some (regression, cox)"
    )


def asked_objective(num_classes: int | None, objective: Objective | None) -> Objective:
    """Return what a head is to be trained for, where either a number of classes or an objective is given.

    Raises:
        ConfigError: both are, or neither.
    """
    if objective is not None and num_classes is None:
        return objective
    if objective is None and num_classes is not None:
        return Classification(num_classes)
    raise ConfigError("a head is trained for num_classes or for an objective.", fix="Give one of the two.")


def make_objective(
    kind: TaskKind, num_classes: int | None = None, settings: ObjectiveSettings | None = None
) -> Objective:
    """Build the objective of a task.

    Args:
        kind: of the task.
        num_classes: C, for classification.
        settings: for the other kinds.

    Raises:
        ConfigError: classification without classes.
    """
    s = settings or ObjectiveSettings()
    if kind == "regression":
        return Regression(s.label_bins)
    if kind == "survival":
        return Hazards(s.intervals) if s.survival == "hazards" else Cox(s.cox_bags, s.label_bins)
    if num_classes is None or num_classes < 1:
        raise ConfigError(f"a task of classes needs some, not {num_classes}.", fix="Check the label column.")
    return Classification(num_classes)
