"""HDMIL: a thumbnail of every patch decides which patches are read at high magnification.

    deployed   gate = [ LIPN(thumbnails) > 0 ] in {0,1}^{N x C};  read the patches that the gate keeps for any class
               (h, s) = DMIN on those;  M_c = softmax of s_c over the patches kept for class c, times h
               logit_c = KAN_c(M_c); a class for which none is kept has M_c = 0 and so a constant logit

Two trainings, one after the other:

    step "dmin"   DMIN on all patches, see `dmin`
    step "lipn"   LIPN on the thumbnails, target: the mask of the frozen DMIN's eval path, see `lipn`. The original has
                  DMIN in training mode meanwhile, so that dropout blurs the targets: `target_mode: train` does so, too

`begin_step` chooses; before training, and after the step "lipn" in eval mode, the head is the deployed one. In the
step "dmin" eval mode is DMIN's own, on all patches.

Dong et al.: Fast and accurate gigapixel pathological image classification with hierarchical distillation multi-instance
learning, CVPR 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrmil.errors import HeadError
from lrmil.mil.base import HeadOutput
from lrmil.mil.card import HeadCard
from lrmil.mil.dmin import DMIN, DMINOptions, hard_gate, pool_kept
from lrmil.mil.dmin import RECIPE as DMIN_RECIPE
from lrmil.mil.lipn import LIPN, lipn_losses
from lrmil.mil.multi_scale import MultiScaleHead, MultiScaleOutput
from lrmil.mil.recipe import Recipe
from lrmil.mil.registry import register_head
from lrmil.mil.scales import PatchSource

TargetMode = Literal["eval", "train"]

LIPN_RECIPE = Recipe(
    learning_rate=1e-4,
    weight_decay=1e-5,
    epochs=200,
    select_by="loss",
    patience=5,
    balanced_sampler=True,
    source="published commands; validation loss is the cross-entropy of the deployed path, from the first epoch on",
)


class HDMILOptions(DMINOptions):
    """Options of HDMIL: those of its first step, and of the second's targets."""

    target_mode: TargetMode = Field(
        "eval", description="mode of DMIN while it makes LIPN's targets; train, with dropout, is the original's"
    )


def dmin_step(dmin: DMIN, bag: Tensor, label: Tensor) -> HeadOutput:
    """Run step 1 on one slide: the vanilla path's answer to a bag (N, D), with the loss terms beside the bag's."""
    dmin.train()
    return dmin(bag, label=label)


def lipn_targets(dmin: DMIN, bag: Tensor, mode: TargetMode = "eval") -> tuple[Tensor, Tensor, Tensor]:
    """Return h (N, H), s (N, C) and the mask (N, C) of DMIN's eval path, without gradient; DMIN's mode is put back."""
    was_training = dmin.training
    dmin.train(mode == "train")
    try:
        with torch.no_grad():
            embedded, scores = dmin.attend(bag)
    finally:
        dmin.train(was_training)
    return embedded, scores, (scores > 0).to(scores.dtype)


def lipn_step(lipn: LIPN, dmin: DMIN, thumbnails: Tensor, bag: Tensor, mode: TargetMode = "eval") -> HeadOutput:
    """Run step 2 on one slide: LIPN's losses, and the logits that DMIN gives through LIPN's gate, without gradient.

    Args:
        lipn: is trained.
        dmin: is not.
        thumbnails: (N, h, w, 3) uint8.
        bag: (N, D), features of the same patches in the same order.
        mode: mode of DMIN while it makes the targets.
    """
    embedded, scores, mask = lipn_targets(dmin, bag, mode)
    gate = hard_gate(lipn(thumbnails))
    with torch.no_grad():
        pooled = pool_kept(scores, gate, embedded)
        logits = dmin.classify(pooled)
    losses = lipn_losses(gate, mask, dmin.options.rate_classes)
    return HeadOutput(logits=logits, bag_feature=pooled, class_attention_logits=scores, losses=losses)


@register_head(
    HeadCard(
        name="hdmil",
        title="HDMIL: thumbnails choose the patches to read",
        citation="Dong et al., Hierarchical distillation multi-instance learning, CVPR 2025",
        licence_note="original: GPLv3, non-commercial",
        gives_attention=False,
        recipe=DMIN_RECIPE,
        scales="many",
    )
)
class HDMIL(MultiScaleHead):
    """See the top of this file. Reads scale "high" and the thumbnails; `bag_feature` is M (C, 512).

    `selection_logits["high"]` are LIPN's scores (N, C), a patch being chosen where any is positive;
    `scale_attention_logits["high"]` are s (n, C) of the patches that were read.
    """

    Options = HDMILOptions
    options: HDMILOptions
    scales = ("high",)
    needs_thumbnails = True
    steps = ("dmin", "lipn")
    step_recipes: ClassVar[Mapping[str, Recipe]] = {"dmin": DMIN_RECIPE, "lipn": LIPN_RECIPE}

    def __init__(self, in_dim: int, num_classes: int, options: HDMILOptions) -> None:
        super().__init__(in_dim, num_classes, options)
        self.dmin = DMIN(in_dim, num_classes, options)
        self.lipn = LIPN(num_classes)
        self.step: str | None = None

    def begin_step(self, step: str) -> None:
        """Train "dmin" or "lipn" from here on; the other one is frozen."""
        super().begin_step(step)
        self.step = step
        self.dmin.requires_grad_(step == "dmin")
        self.lipn.requires_grad_(step == "lipn")
        # LIPN's losses are all there is in its step.
        self.bag_loss_weight = self.dmin.bag_loss_weight if step == "dmin" else 0.0

    def score(self, source: PatchSource, *, label: Tensor | None) -> MultiScaleOutput:
        """Train the current step, or predict as deployed."""
        if not self.training and self.step != "dmin":
            return self._deployed(source)
        if self.step is None:
            raise HeadError("HDMIL is trained in two steps.", fix="Call begin_step('dmin'), later begin_step('lipn').")
        rows = torch.arange(source.counts["high"], device=self.lipn.classifier.weight.device)
        bag = source.fetch("high", rows)
        if self.step == "dmin":
            answer = self.dmin(bag, label=label)
        else:
            answer = lipn_step(self.lipn, self.dmin, self._thumbnails(source), bag, self.options.target_mode)
        return _account(answer, rows)

    def _deployed(self, source: PatchSource) -> MultiScaleOutput:
        """Read what LIPN chooses, and only that."""
        wishes = self.lipn(self._thumbnails(source))
        gate = hard_gate(wishes)
        rows = gate.any(dim=1).nonzero().squeeze(1)
        # No patch at all is a legal choice: there is then nothing to read.
        bag = source.fetch("high", rows) if len(rows) else wishes.new_zeros(0, self.in_dim)
        embedded, scores = self.dmin.attend(bag)
        pooled = pool_kept(scores, gate[rows], embedded)
        answer = HeadOutput(logits=self.dmin.classify(pooled), bag_feature=pooled, class_attention_logits=scores)
        return _account(answer, rows, wishes)

    def _thumbnails(self, source: PatchSource) -> Tensor:
        thumbnails = source.thumbnails()
        if len(thumbnails) != source.counts["high"]:
            raise HeadError(
                f"there are {len(thumbnails)} thumbnails for {source.counts['high']} patches.",
                fix="Give one for each patch.",
            )
        return thumbnails.to(self.lipn.classifier.weight.device)


def _account(answer: HeadOutput, rows: Tensor, wishes: Tensor | None = None) -> MultiScaleOutput:
    """Add to an answer what was read for it."""
    scores = answer.class_attention_logits
    return MultiScaleOutput(
        logits=answer.logits,
        bag_feature=answer.bag_feature,
        losses=answer.losses,
        selected={"high": rows},
        scale_attention_logits={} if scores is None else {"high": scores},
        selection_logits={} if wishes is None else {"high": wishes},
    )
