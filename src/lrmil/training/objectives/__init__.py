"""What a head is trained for: its loss, how a student follows a teacher, and what chooses epochs. One file a task."""

from lrmil.training.objectives.base import FittedObjective, Objective, Targets
from lrmil.training.objectives.choose import ObjectiveSettings, asked_objective, make_objective
from lrmil.training.objectives.classification import Classification
from lrmil.training.objectives.cox import Cox
from lrmil.training.objectives.hazards import Hazards
from lrmil.training.objectives.regression import Regression

__all__ = [
    "Classification",
    "Cox",
    "FittedObjective",
    "Hazards",
    "Objective",
    "ObjectiveSettings",
    "Regression",
    "Targets",
    "asked_objective",
    "make_objective",
]
