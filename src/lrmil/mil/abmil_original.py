"""Attention-based MIL as its authors published it: one sigmoid output for two classes.

The attention is that of `abmil`, plain or gated, hidden width 128; then

    z = w_c^T Z + b_c          p = sigmoid(z), clamped to [1e-5, 1 - 1e-5] in the loss
    L = -( Y log p + (1 - Y) log(1 - p) )

The published program also learns to embed 28 x 28 digits; here the instances come embedded.

The logits of two classes are (0, z): their softmax is (1 - p, p), so that all that reads class probabilities can read
these. With num_classes = 1 the one logit is z itself.

Ilse, Tomczak, Welling: Attention-based deep multiple instance learning, ICML 2018.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lrmil.errors import HeadError
from lrmil.mil.abmil import ABMIL, ABMILOptions
from lrmil.mil.base import HeadOutput
from lrmil.mil.card import HeadCard
from lrmil.mil.label import class_index
from lrmil.mil.registry import register_head

_CLAMP = 1e-5


@register_head(
    HeadCard(
        name="abmil_original",
        title="Attention-based MIL with one sigmoid output",
        citation="Ilse et al., Attention-based deep multiple instance learning, ICML 2018",
        licence_note="original: MIT",
        gives_attention=True,
    )
)
class ABMILOriginal(ABMIL):
    """See the top of this file. Its loss is its own; the bag's cross-entropy, equal but for the clamp, is not added."""

    bag_loss_weight = 0.0

    def __init__(self, in_dim: int, num_classes: int, options: ABMILOptions) -> None:
        if num_classes > 2:
            raise HeadError(
                f"abmil_original tells two classes apart by one output, and cannot tell {num_classes}.",
                fix="Choose abmil, which has one output a class.",
            )
        super().__init__(in_dim, 1, options)
        self.num_classes = num_classes

    def score(self, bag: Tensor, *, label: Tensor | None, coords: Tensor | None) -> HeadOutput:
        """Pool by attention, classify, and compute the loss where the label is known."""
        output = super().score(bag, label=label, coords=coords)
        logit = output.logits
        losses = {}
        if label is not None:
            p = torch.sigmoid(logit[0]).clamp(_CLAMP, 1.0 - _CLAMP)
            losses["nll"] = -(p if class_index(label, 2) else 1.0 - p).log()
        logits = torch.cat([torch.zeros_like(logit), logit]) if self.num_classes == 2 else logit
        return replace(output, logits=logits, losses=losses)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax of (0, z), or the sigmoid of z where that is the only logit."""
        return super().probabilities(logits) if self.num_classes == 2 else torch.sigmoid(logits)

    def total_loss(self, output: HeadOutput, bag_loss: Tensor) -> Tensor:
        """Return the head's own loss, or that of the bag where no class was known to it."""
        return super().total_loss(output, bag_loss) if output.losses else bag_loss
