"""Train the heads that choose their patches, in as many steps as they have, and let them speak about slides.

While it learns, a head sees what it asks for: all patches of a slide in both steps of HDMIL; of ZoomMIL's children
those of parents that were chosen under noise. Slides are `PatchSource`s of precomputed features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrmil.errors import ConfigError, CorruptBag, HeadError
from lrmil.mil import HeadOutput, MultiScaleHead, MultiScaleOutput, PatchSource, create_head
from lrmil.mil.readout import Readout
from lrmil.mil.recipe import Recipe
from lrmil.training.loop import FitResult, OnEpoch, Validation, fit, isolated_seed
from lrmil.training.objectives import FittedObjective, Objective, asked_objective
from lrmil.training.optimisers import make_optimiser, make_scheduler
from lrmil.training.predict import BagPrediction, prediction_of
from lrmil.training.recipes import HeadTrainingSettings, training_recipe
from lrmil.training.seeds import derive_seed
from lrmil.training.slide_bags import SlideBag, few_threads
from lrmil.training.steps import HeadStep, head_epoch, labels_for
from lrmil.training.support import fitting_head


@dataclass(frozen=True)
class SlideSource:
    """One slide's patches and what is to be learned of it."""

    slide_id: str
    source: PatchSource
    label: int | None
    """class index; None for tasks without classes, and where nothing is trained or validated"""
    target: npt.NDArray[np.floating] | float | None = None
    """for tasks without classes, see `SlideBag.target`"""


@dataclass(frozen=True)
class TrainedScales:
    """A head with the best epoch's weights of each step, in eval mode on the training device, and how it came about."""

    head: MultiScaleHead
    fits: Mapping[str, FitResult]
    """by step"""
    objective: FittedObjective
    """What it was trained for, with the statistics of its training split"""

    @property
    def fit(self) -> FitResult:
        """The last step's."""
        return list(self.fits.values())[-1]

    @property
    def readout(self) -> Readout:
        """How its logits are read; keep it beside the weights."""
        return self.objective.readout


def train_scales(
    train: Sequence[SlideSource],
    val: Sequence[SlideSource],
    settings: HeadTrainingSettings,
    *,
    num_classes: int | None = None,
    objective: Objective | None = None,
    seed: int,
    device: torch.device | str = "cpu",
    on_epoch: OnEpoch | None = None,
) -> TrainedScales:
    """Train a head on targets alone, step after step, each until its own early stop.

    Args:
        train: slides to learn from.
        val: slides that choose the epoch. In HDMIL's first step they are judged with all patches, in the second as
            deployed: by the patches that thumbnails choose.
        settings: head, recipe and its numbers. With `recipe: original` each step follows its own program's.
        num_classes: see `train_teacher`.
        objective: see `train_teacher`.
        seed: of the head's first weights, the order of slides, and noise.
        device: where to train; features come to it as they are asked for.
        on_epoch: called with each epoch's record, in which `step` names the step.

    Raises:
        ConfigError: a split is empty; a target is missing or impossible; the head takes bags of one scale, cannot learn
            this task, or has no original recipe.
        CorruptBag: a slide lacks a scale, or has features of another width than the others.
        HeadError: no such head or option; or a slide does not hold what the head asks for.
        TrainingError: a loss is not finite.
    """
    wanted = asked_objective(num_classes, objective)
    chosen = fitting_head(settings.head, wanted)
    _require_slides(train, val)
    in_dim = _width(train[0])
    placeholders = [_placeholder(slide, in_dim) for slide in (*train, *val)]
    train_targets = wanted.targets(placeholders[: len(train)], "training")
    val_targets = wanted.targets(placeholders[len(train) :], "validation")
    fitted = wanted.fit(train_targets)
    fitted.check_validation(val_targets)
    with isolated_seed(seed):
        head = create_head(chosen.name, in_dim, fitted.outputs, **chosen.options)
    if not isinstance(head, MultiScaleHead):
        raise ConfigError(
            f"head {chosen.name!r} takes bags of one scale, and chooses no patches.", fix="Use train_teacher."
        )
    _check_slides([*train, *val], head)
    device = torch.device(device)
    head.to(device)
    targets = fitted.tensor(train_targets).to(device)
    labels = labels_for(chosen.name, fitted, train_targets, device)
    strata = fitted.strata(train_targets)

    def train_step(name: str) -> FitResult:
        head.begin_step(name)
        recipe = _recipe(settings, head, name)
        optimizer = make_optimiser(recipe, head)
        step = _ScalesStep(head, fitted, recipe, train, targets, labels)

        def validate() -> Validation:
            logits = torch.stack([_ask(head, slide).logits for slide in val])
            return fitted.validation(head, logits, val_targets, recipe.select_by)

        return fit(
            head,
            train=head_epoch(step, [slide.slide_id for slide in train], optimizer, strata),
            validate=validate,
            recipe=recipe,
            seed=seed if name == head.steps[0] else derive_seed(seed, name),
            on_epoch=None if on_epoch is None else lambda record: on_epoch({"step": name, **record}),
            after_epoch=make_scheduler(recipe, optimizer),
        )

    with few_threads(placeholders, device):
        fits = {name: train_step(name) for name in head.steps}
    return TrainedScales(head, fits, fitted)


def predict_scales(
    head: MultiScaleHead,
    slides: Sequence[SlideSource],
    *,
    device: torch.device | str | None = None,
    readout: Readout | None = None,
) -> list[BagPrediction]:
    """Apply a head to slides, one at a time; labels and targets are not looked at. Puts the head in eval mode.

    Such heads have no attention over one bag, so none is given.

    Args:
        head: on any device.
        slides: any number.
        device: where to compute; None is where the head is.
        readout: what the logits stand for, as `TrainedScales.readout` says; None is class probabilities.
    """
    device = next(head.parameters()).device if device is None else torch.device(device)
    readout = readout or Readout()
    head.to(device).eval()
    found = []
    with torch.inference_mode():
        for slide in slides:
            found.append(prediction_of(slide.slide_id, head, _ask(head, slide), readout))
    return found


class _ScalesStep(HeadStep):
    """Steps of a head that asks sources of patches in place of bags."""

    def __init__(
        self,
        head: MultiScaleHead,
        objective: FittedObjective,
        recipe: Recipe,
        slides: Sequence[SlideSource],
        targets: Tensor,
        labels: Sequence[Tensor | None],
    ) -> None:
        # Only `_forward` looks at head and slides as what they are.
        super().__init__(cast(Any, head), objective, recipe, cast(Any, slides), targets, labels, None)
        self.slides = slides

    def _forward(self, index: int) -> HeadOutput:
        return _ask(self.head, self.slides[index], self.labels[index])


def _ask(head: Any, slide: SlideSource, label: Tensor | None = None) -> MultiScaleOutput:
    """Call the head; say of which slide it complains."""
    try:
        return head(slide.source, label=label)
    except HeadError as error:
        raise HeadError(f"{slide.slide_id}: {error.message}", fix=error.fix) from error


def _recipe(settings: HeadTrainingSettings, head: MultiScaleHead, step: str) -> Recipe:
    whole = training_recipe(settings)
    return head.step_recipes.get(step, whole) if settings.recipe == "original" else whole


def _width(slide: SlideSource) -> int:
    """D, from one row of the scale that has the fewest."""
    counts = slide.source.counts
    scale = min(counts, key=lambda name: counts[name])
    if counts[scale] < 1:
        raise CorruptBag(f"{slide.slide_id}: there are no patches at scale {scale!r}.", fix="Leave it out.")
    return slide.source.fetch(scale, torch.zeros(1, dtype=torch.int64)).shape[1]


def _placeholder(slide: SlideSource, in_dim: int) -> SlideBag:
    """A bag of the slide's size and target that takes no memory."""
    nothing = np.broadcast_to(np.float32(0), (sum(slide.source.counts.values()), in_dim))
    return SlideBag(slide.slide_id, nothing, slide.label, target=slide.target)


def _require_slides(train: Sequence[SlideSource], val: Sequence[SlideSource]) -> None:
    for slides, split in ((train, "training"), (val, "validation")):
        if not slides:
            raise ConfigError(f"the {split} split has no slides.", fix="Use fewer folds, or more patients.")


def _check_slides(slides: Sequence[SlideSource], head: MultiScaleHead) -> None:
    """Look at every slide once, before training; values are checked as they are asked for."""
    for slide in slides:
        missing = [scale for scale in head.scales if slide.source.counts.get(scale, 0) < 1]
        if missing:
            raise CorruptBag(
                f"{slide.slide_id}: there are no patches at {' and '.join(map(repr, missing))}.",
                fix="Encode all scales of the slide, or leave it out.",
            )
        if (width := _width(slide)) != head.in_dim:
            raise CorruptBag(
                f"{slide.slide_id}: features are {width} wide, not {head.in_dim} as those of the first slide.",
                fix="Encode all slides with one encoder.",
            )
        if head.needs_thumbnails:
            slide.source.thumbnails()
