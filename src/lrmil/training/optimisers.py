"""Optimiser and learning-rate schedule of a head's recipe."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, ReduceLROnPlateau

from lrmil.errors import TrainingError
from lrmil.mil.recipe import Recipe
from lrmil.training.loop import AfterEpoch


def make_optimiser(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Build the recipe's optimiser over the parameters of `model` that are not frozen.

    "adam" is Adam, whose weight decay is added to the gradient. "lookahead_radam" is rectified Adam with decay applied
    to the weights (Liu et al., On the variance of the adaptive learning rate and beyond, ICLR 2020) inside Lookahead
    (Zhang et al., Lookahead optimizer: k steps forward, 1 step back, NeurIPS 2019): every 6th step, slow weights go
    half the way to the fast ones, and the fast ones continue from there. It is timm's, as in the program that uses it:
    slow weights begin as the fast ones of the 6th step, not as those of the start, so the first return is after 12.

    Args:
        recipe: its learning_rate, weight_decay, betas, optimiser and decay_matrices_only count here. Accumulation and
            clipping are for whoever makes the steps.
        model: already on its device.

    Raises:
        TrainingError: all parameters are frozen.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise TrainingError("there is nothing to train: all parameters are frozen.", fix="Unfreeze some.")
    groups: list[dict[str, Any]] = [{"params": [p for _, p in named]}]
    if recipe.decay_matrices_only:
        spared = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
        decayed = [p for name, p in named if p.ndim > 1 and not name.endswith(".bias")]
        groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
    if recipe.optimiser == "adam":
        return torch.optim.Adam(groups, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay)
    from timm.optim import Lookahead  # slow to import, and one recipe needs it

    fast = torch.optim.RAdam(
        groups,
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        decoupled_weight_decay=True,
    )
    return Lookahead(fast, alpha=0.5, k=6)


def make_scheduler(recipe: Recipe, optimiser: torch.optim.Optimizer) -> AfterEpoch:
    """Return what to call after each epoch, with its validation loss, to set the learning rate of the next.

    constant: nothing happens. cosine: half a cosine from the learning rate to `schedule_factor` times it, reached after
    `schedule_epochs` epochs and kept. step: times `schedule_factor` once, after `schedule_epochs` epochs. plateau:
    times `schedule_factor` whenever the validation loss has not fallen for more than `schedule_epochs` epochs.

    Raises:
        TrainingError: the recipe gives a cosine or a step no length.
    """
    kind, epochs, factor = recipe.schedule, recipe.schedule_epochs, recipe.schedule_factor
    if kind == "constant":
        return lambda loss: None
    if kind == "plateau":
        plateau = ReduceLROnPlateau(optimiser, factor=factor, patience=epochs)
        return lambda loss: plateau.step(loss)
    if epochs < 1:
        raise TrainingError(f"a {kind} schedule needs a length.", fix="Set schedule_epochs to 1 or more.")
    timed: LambdaLR | MultiStepLR
    if kind == "cosine":
        timed = LambdaLR(
            optimiser, lambda epoch: factor + (1 - factor) * (1 + math.cos(math.pi * min(epoch / epochs, 1))) / 2
        )
    else:
        timed = MultiStepLR(optimiser, [epochs], gamma=factor)
    return lambda loss: timed.step()
