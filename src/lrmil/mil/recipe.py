"""How the original program of a head trains it: plain data that the training loop can follow, `recipe: original`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SelectBy = Literal["auc", "loss", "auc+accuracy", "weighted_f1", "last"]


@dataclass(frozen=True)
class Recipe:
    """Optimiser, schedule and stopping of one published program. One bag makes one step unless `accumulate` says so."""

    learning_rate: float
    weight_decay: float = 0.0
    optimiser: Literal["adam", "lookahead_radam"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    decay_matrices_only: bool = False
    """No weight decay on biases and other one-dimensional parameters"""
    epochs: int = 200
    select_by: SelectBy = "loss"
    """What is watched on the validation split; "last" keeps the last epoch. A task without AUC, accuracy or F1 is
    watched by its own score instead"""
    patience: int | None = None
    """Epochs without gain before training ends; None: all epochs are run"""
    earliest_stop: int = 0
    """Training does not end before this epoch, counted from 1, for want of patience; earlier ones may still be kept"""
    first_epoch: int = 0
    """No epoch before this one, counted from 1, is kept, nor counts for `patience`"""
    schedule: Literal["constant", "cosine", "step", "plateau"] = "constant"
    schedule_epochs: int = 0
    """Length of the cosine, epoch of the step, or patience of the plateau"""
    schedule_factor: float = 1.0
    """Last learning rate over the first of the cosine, or factor of the step or plateau"""
    accumulate: int = 1
    """Bags a step"""
    clip_norm: float | None = None
    """Largest gradient norm of each top-level module"""
    balanced_sampler: bool = False
    """Draw slides with replacement, each class as often as the others"""
    shuffle_instances: bool = False
    """Shuffle the instances of a bag each time it is seen"""
    source: str = ""
    """Where the published program says so"""
