"""One training step of a head: forward, loss and backward of the slides that step together.

Where the loss of several slides is the mean of their own, each slide's gradient is added as it is computed. Where it is
not (Cox), their graphs would all have to be kept. Instead the slides are passed through the head twice: first without
gradient, which gives all logits y_i and from them the loss L and g_i = dL/dy_i; then, one slide at a time and with the
same random numbers, with gradient, of the sum of g_i y_i. The result is the same, and memory is that of one slide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lrmil.geometry import IntArray
from lrmil.mil import HeadOutput, MILHead
from lrmil.mil.recipe import Recipe
from lrmil.training.loop import run_epoch
from lrmil.training.objectives import FittedObjective, Targets
from lrmil.training.slide_bags import ResidentBags
from lrmil.training.support import support
from lrmil.training.teaching import Distil

MAIN = ""
"""among streams, the head's own logits"""


class HeadStep:
    """Adds the gradients of a step; see the top of this file."""

    def __init__(
        self,
        head: MILHead,
        objective: FittedObjective,
        recipe: Recipe,
        bags: ResidentBags,
        targets: Tensor,
        labels: Sequence[Tensor | None],
        distil: Distil | None,
    ) -> None:
        """Prepare.

        Args:
            head: in training mode when steps are made.
            objective: gives the loss.
            recipe: clip_norm and shuffle_instances count here.
            bags: by number.
            targets: (S, ...), rows of `FittedObjective.tensor`, on the device of the head.
            labels: what each slide's class is to the head's own losses, if they are to know one.
            distil: adds the teacher's terms.
        """
        self.head = head
        self.objective = objective
        self.recipe = recipe
        self.bags = bags
        self.targets = targets
        self.labels = labels
        self.distil = distil
        # With classes, heads compute the losses of their streams themselves, from the label.
        classes = objective.readout.meaning == "classification"
        self.weights: Mapping[str, float] = {} if classes else head.stream_weights

    def __call__(self, indices: IntArray) -> Mapping[str, Tensor]:
        """Make the gradients of these slides; return the loss and its terms, averaged over them, detached."""
        slides = [int(i) for i in indices]
        parts = self._together(slides) if self.objective.joint else [self._alone(i, len(slides)) for i in slides]
        if self.recipe.clip_norm is not None:
            self._clip(self.recipe.clip_norm)
        if len(parts) == 1:
            return parts[0]
        names = {name: None for part in parts for name in part}
        zero = parts[0]["loss"].new_zeros(())
        return {name: torch.stack([part.get(name, zero) for part in parts]).mean() for name in names}

    def _alone(self, index: int, count: int) -> dict[str, Tensor]:
        output = self._forward(index)
        row = self.targets[index : index + 1]
        losses = {
            name: self.objective.loss(logits, row.expand(len(logits), *row.shape[1:]))
            for name, logits in self._streams(output).items()
        }
        return self._backward(output, losses, index, count)

    def _together(self, slides: Sequence[int]) -> list[dict[str, Tensor]]:
        states, seen = [], []
        with torch.no_grad():
            for index in slides:
                states.append(self._random_state())
                seen.append(self._streams(self._forward(index)))
        values: dict[str, Tensor] = {}
        gradients: dict[str, tuple[Tensor, ...]] = {}
        for name in seen[0]:
            pieces = [streams[name].requires_grad_() for streams in seen]
            # Each row of a stream is a case of its own, with the slide's target.
            rows = [
                self.targets[i : i + 1].expand(len(p), *self.targets.shape[1:])
                for i, p in zip(slides, pieces, strict=True)
            ]
            loss = self.objective.loss(torch.cat(pieces), torch.cat(rows))
            gradients[name] = torch.autograd.grad(loss, pieces)
            values[name] = loss.detach()
        count = len(slides)
        parts = []
        for place, index in enumerate(slides):
            self._set_random_state(states[place])
            output = self._forward(index)
            losses = {}
            for name, logits in self._streams(output).items():
                # Its value is the loss of all; its gradient is this slide's share, times count: slides are averaged.
                share = (gradients[name][place] * (logits - logits.detach())).sum()
                losses[name] = values[name] + count * share
            parts.append(self._backward(output, losses, index, count))
        return parts

    def _backward(self, output: HeadOutput, losses: Mapping[str, Tensor], index: int, count: int) -> dict[str, Tensor]:
        own = {name: self.weights[name] * loss for name, loss in losses.items() if name != MAIN}
        if own:
            output = replace(output, losses={**output.losses, **own})
        # The teacher's terms come on top of what the head makes of the loss of the target, never inside of it.
        total = self.head.total_loss(output, losses[MAIN])
        terms: Mapping[str, Tensor] = {}
        if self.distil:
            total, terms = self.distil(total, output, index)
        (total if count == 1 else total / count).backward()
        scalars = {"loss": total, self.objective.loss_name: losses[MAIN], **terms}
        # DSMIL calls one of its terms "bag", as Eq. (6) does.
        scalars |= {f"own_{name}" if name in scalars else name: value for name, value in output.losses.items()}
        return {name: value.detach() for name, value in scalars.items()}

    def _streams(self, output: HeadOutput) -> dict[str, Tensor]:
        """All logits (R, C) that learn from the target."""
        return {MAIN: output.logits[None]} | {name: output.streams[name] for name in self.weights}

    def _forward(self, index: int) -> HeadOutput:
        bag, coords = self.bags[index], self.bags.coords[index]
        if not self.recipe.shuffle_instances:
            return self.head(bag, label=self.labels[index], coords=coords)
        order = torch.randperm(len(bag)).to(bag.device)
        output = self.head(bag[order], label=self.labels[index], coords=None if coords is None else coords[order])
        back = torch.argsort(order)
        # The teacher speaks of instances in the order of the bag.
        return replace(
            output,
            attention_logits=None if output.attention_logits is None else output.attention_logits[back],
            instance_logits=None if output.instance_logits is None else output.instance_logits[back],
        )

    def _clip(self, largest: float) -> None:
        groups = [list(module.parameters()) for module in self.head.children()]
        for group in (*groups, list(self.head.parameters(recurse=False))):
            torch.nn.utils.clip_grad_norm_(group, largest)

    def _random_state(self) -> tuple[Tensor, Tensor | None]:
        device = self.targets.device
        return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def _set_random_state(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self.targets.device)


def head_epoch(
    step: HeadStep, slide_ids: Sequence[str], optimizer: torch.optim.Optimizer, strata: IntArray
) -> Callable[[torch.Generator], Mapping[str, float]]:
    """Return what `fit` calls for one pass over the training slides.

    Args:
        step: makes the gradients; slides are its `bags`, of which the first S are trained on.
        slide_ids: of these (S,), for messages.
        optimizer: over the parameters of the head.
        strata: (S,) groups, see `FittedObjective.strata`; they count if the recipe asks for a balanced sampler.
    """
    recipe, objective = step.recipe, step.objective

    def train_epoch(generator: torch.Generator) -> Mapping[str, float]:
        return run_epoch(
            len(slide_ids),
            max(recipe.accumulate, objective.bags_per_step),
            load=lambda indices: indices,
            step=step,
            optimizer=optimizer,
            generator=generator,
            name=lambda indices: f"slide {', '.join(slide_ids[int(i)] for i in indices)}",
            at_least=objective.joint,
            weights=_balanced(strata) if recipe.balanced_sampler else None,
        )

    return train_epoch


def labels_for(head: str, objective: FittedObjective, targets: Targets, device: torch.device) -> list[Tensor | None]:
    """Return, slide by slide, the class that the own losses of the head of that name are told; None: none."""
    meaning = objective.readout.meaning
    if meaning != "classification" and support(head, meaning).how != "bins":
        return [None] * len(targets)
    return [None if label is None else torch.tensor(label, device=device) for label in objective.labels(targets)]


def _balanced(strata: IntArray) -> Tensor:
    """Weights (S,) that draw every group as often as the others."""
    _, group, count = np.unique(strata, return_inverse=True, return_counts=True)
    return torch.from_numpy(1.0 / count[group])
