"""The one training loop: stage 1, the teacher and the student all go through it.

`fit` runs epochs, validates after each, keeps the best state and stops early. `run_epoch` is one pass over shuffled
items. What a step computes, and what validation measures, is given by the caller.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from lrmil.errors import TrainingError
from lrmil.geometry import IntArray
from lrmil.mil.recipe import Recipe, SelectBy
from lrmil.settings import Settings

Record = dict[str, Any]
"""one epoch, ready for JSON (an undefined score is NaN)"""
OnEpoch = Callable[[Record], None]
AfterEpoch = Callable[[float], None]
"""called after each epoch with its validation loss"""
OnStep = Callable[[int, int], None]
"""called with (items done, items of the epoch)"""
Batch = TypeVar("Batch")

_CHECK_EVERY = 16  # steps; looking at a loss waits for the GPU


class LoopSettings(Settings):
    """How long to train, and how fast: the recipe called paper. Adam, betas 0.9 and 0.999, the rate kept."""

    learning_rate: float = Field(1e-4, gt=0, description="Adam's learning rate")
    weight_decay: float = Field(0.0, ge=0, description="Adam's weight decay")
    epochs: int = Field(100, ge=1, description="at most this many")
    patience: int = Field(20, ge=1, description="stop after this many epochs without a better validation result")

    def paper_recipe(self, select_by: SelectBy) -> Recipe:
        """Return these numbers as the loop wants them."""
        return Recipe(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            epochs=self.epochs,
            patience=self.patience,
            select_by=select_by,
            source="LRMIL, which trains all methods in one way",
        )


@dataclass(frozen=True)
class Validation:
    """What one validation measured."""

    loss: float
    score: float = math.nan
    """Higher is better; NaN where it is undefined, or there is none"""
    name: str = "auc"
    """Of the score"""
    details: Mapping[str, float] = field(default_factory=dict)
    undefined: str = "the validation score is undefined"
    """Why, where the score is NaN"""

    @property
    def auc(self) -> float:
        """The AUC, of whatever the score is; NaN where there is none."""
        return self.score if self.name == "auc" else self.details.get("auc", math.nan)


@dataclass(frozen=True)
class FitResult:
    """How a training went. The model itself holds the best epoch's weights."""

    history: list[Record]
    """every epoch: epoch, seconds, train_*, val_loss, val_<name of the score>, val_*, best"""
    best_epoch: int
    """counted from 1"""
    best: Validation
    selected_by: str
    """name of the score, loss, or last"""
    stopped_early: bool
    seconds: float
    notes: tuple[str, ...]
    """what the user should know, also issued as warnings"""

    def time_shares(self) -> dict[str, float]:
        """Return the share of all seconds spent in loading batches, in training steps, and in validation."""
        parts = {"loading": "train_loading_s", "steps": "train_steps_s", "validation": "val_s"}
        total = sum(r["seconds"] for r in self.history) or 1.0
        return {name: sum(r[key] for r in self.history) / total for name, key in parts.items()}


def fit(
    model: nn.Module,
    *,
    train: Callable[[torch.Generator], Mapping[str, float]],
    validate: Callable[[], Validation],
    recipe: Recipe,
    seed: int,
    notes: tuple[str, ...] = (),
    on_epoch: OnEpoch | None = None,
    after_epoch: AfterEpoch | None = None,
) -> FitResult:
    """Train `model` in place; on return it holds the weights of the best epoch and is in eval mode.

    The best epoch has the highest validation score; among equal ones, the lowest validation loss. Patience counts
    epochs since the score last rose strictly; a lower loss at the same score does not prolong training. With
    `select_by="loss"`, and where the score is undefined, the lowest validation loss decides; with "last" nothing does.

    Args:
        model: its whole state dict is what is kept.
        train: one epoch, the model being in training mode; shuffles by the generator it is given and returns averages,
            as `run_epoch` does.
        validate: called in eval mode under `torch.inference_mode`.
        recipe: epochs, patience, first_epoch, earliest_stop and select_by, by which `validate` chooses its score; the
            rest is the caller's.
        seed: of the shuffling, and of torch's global generators (dropout), which are given back as they were.
        notes: what the caller warned of already; passed on.
        on_epoch: called with each epoch's record.
        after_epoch: called with each epoch's validation loss, to set the learning rate of the next.

    Raises:
        TrainingError: a loss is NaN or infinite; or no epoch may be kept.
    """
    if not recipe.first_epoch <= recipe.epochs:
        raise TrainingError(f"no epoch before {recipe.first_epoch} is kept, but there are {recipe.epochs} only.")
    began = time.perf_counter()
    history: list[Record] = []
    best: Validation | None = None
    best_state: dict[str, Any] = {}
    best_epoch = epoch = 0
    last_gain = max(0, recipe.first_epoch - 1)
    watched: str = recipe.select_by
    device = next((p.device for p in model.parameters()), None)
    with isolated_seed(seed, device):
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(1, recipe.epochs + 1):
            start = time.perf_counter()
            model.train()
            averages = train(generator)
            trained = time.perf_counter()
            model.eval()
            with torch.inference_mode():
                found = validate()
            if not math.isfinite(found.loss):
                raise TrainingError(
                    f"the validation loss became {found.loss} in epoch {epoch}.", fix="Lower the learning rate."
                )
            if watched not in ("loss", "last"):
                watched = found.name
                if math.isnan(found.score):
                    watched = "loss"
                    notes = (*notes, _warn(f"{found.undefined}: the best epoch is chosen by validation loss"))
            gain, better = _compare(found, best, watched) if epoch >= recipe.first_epoch else (False, False)
            if gain:
                last_gain = epoch
            if better:
                best, best_epoch = found, epoch
                best_state = {k: _kept(v) for k, v in model.state_dict().items()}
            ended = time.perf_counter()
            record: Record = {"epoch": epoch, "seconds": ended - start}
            record |= {f"train_{k}": v for k, v in averages.items()}
            record |= {"val_loss": found.loss, f"val_{found.name}": found.score}
            record |= {"val_s": ended - trained, "best": better}
            record |= {f"val_{k}": v for k, v in found.details.items()}
            history.append(record)
            if on_epoch:
                on_epoch(record)
            if recipe.patience is not None and epoch - last_gain >= recipe.patience and epoch >= recipe.earliest_stop:
                break
            if after_epoch:
                after_epoch(found.loss)
    assert best is not None
    model.load_state_dict(best_state)
    model.eval()
    return FitResult(
        history=history,
        best_epoch=best_epoch,
        best=best,
        selected_by=watched,
        stopped_early=epoch < recipe.epochs,
        seconds=time.perf_counter() - began,
        notes=notes,
    )


def run_epoch(
    count: int,
    batch_size: int,
    *,
    load: Callable[[IntArray], Batch],
    step: Callable[[Batch], Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    name: Callable[[IntArray], str],
    prefetch: bool = False,
    on_step: OnStep | None = None,
    at_least: bool = False,
    weights: Tensor | None = None,
) -> dict[str, float]:
    """Pass once over items 0..count-1 in random order, `batch_size` at a time, with one optimiser step a batch.

    Args:
        count: number of items.
        batch_size: items a step; the last batch may be smaller.
        load: indices (n,) to a batch.
        step: computes the loss, calls `backward` (several times if it likes: gradients are cleared before, and applied
            after), and returns detached scalars by name, `loss` among them.
        optimizer: over the model's parameters.
        generator: of the order.
        name: what to call items in an error message.
        prefetch: load the next batch on a thread while a step computes.
        on_step: called after each batch.
        at_least: let no batch be smaller than batch_size, unless there are fewer items: they share what is left over.
        weights: (count,), draw as many items, but with replacement and as often as these say.

    Returns:
        The averages of the step's scalars over items, and seconds spent waiting for batches (`loading_s`) and in steps
        (`steps_s`).

    Raises:
        TrainingError: a loss is NaN or infinite; names the items.
    """
    if weights is None:
        order = torch.randperm(count, generator=generator).numpy()
    else:
        order = torch.multinomial(weights, count, replacement=True, generator=generator).numpy()
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    if at_least:
        batches = np.array_split(order, max(1, count // batch_size))
    sums: dict[str, float] = {}
    pending: list[tuple[IntArray, Mapping[str, Tensor]]] = []
    loading_s = steps_s = 0.0
    done = 0
    loaded = _loaded(batches, load, prefetch)
    for indices in batches:
        start = time.perf_counter()
        batch = next(loaded)
        got = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        pending.append((indices, step(batch)))
        optimizer.step()
        done += len(indices)
        if len(pending) >= _CHECK_EVERY or done == count:
            _settle(pending, sums, name)
        loading_s += got - start
        steps_s += time.perf_counter() - got
        if on_step:
            on_step(done, count)
    return {k: v / count for k, v in sums.items()} | {"loading_s": loading_s, "steps_s": steps_s}


@contextmanager
def isolated_seed(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators for a while, then give those of the CPU and of `device` back as they were."""
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _warn(message: str) -> str:
    warnings.warn(message, UserWarning, stacklevel=3)
    return message


def _compare(found: Validation, best: Validation | None, watched: str) -> tuple[bool, bool]:
    """Whether what is watched got strictly better, and whether this epoch is the one to keep."""
    if best is None or watched == "last":
        return True, True
    if watched == "loss":
        return (found.loss < best.loss,) * 2
    # Most scores are ratios of counts: differences this small come from the order of summation.
    gain = found.score > best.score + 1e-9
    return gain, gain or (found.score >= best.score - 1e-9 and found.loss < best.loss)


def _kept(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def _loaded(batches: list[IntArray], load: Callable[[IntArray], Batch], prefetch: bool) -> Iterator[Batch]:
    if not prefetch:
        yield from map(load, batches)
        return
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(load, batches[0])
        for following in batches[1:]:
            ready = upcoming.result()
            upcoming = thread.submit(load, following)
            yield ready
        yield upcoming.result()


def _settle(
    pending: list[tuple[IntArray, Mapping[str, Tensor]]], sums: dict[str, float], name: Callable[[IntArray], str]
) -> None:
    """Move the scalars of `pending` steps off the device, check them, and add them to `sums`, weighted by items."""
    weights = np.array([len(indices) for indices, _ in pending])
    # A term that only some steps have counts as 0 in the others.
    zero = torch.zeros_like(next(iter(pending[0][1].values())))
    for key in {key: None for _, scalars in pending for key in scalars}:
        values = torch.stack([scalars.get(key, zero) for _, scalars in pending]).cpu().double().numpy()
        if not np.isfinite(values).all():
            indices = pending[int((~np.isfinite(values)).argmax())][0]
            raise TrainingError(
                f"the training loss ({key}) is not finite; first for {name(indices)}.",
                fix="Lower the learning rate, or look at these features.",
            )
        sums[key] = sums.get(key, 0.0) + float(values @ weights)
    pending.clear()
