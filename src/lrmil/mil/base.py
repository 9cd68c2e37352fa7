"""What every MIL head takes and gives: one bag of instances in, logits, attention and named losses out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrmil.errors import HeadError
from lrmil.mil.card import HeadCard
from lrmil.settings import Settings


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What a head says about one bag of N instances. C is the number of classes, or of outputs for other tasks."""

    logits: Tensor
    """(C,), before softmax or sigmoid; for other tasks the value itself, the log-risk, or the logits of the hazards"""
    attention: Tensor | None = None
    """(N,), non-negative, sums to 1; None for a head that weighs no instances"""
    attention_logits: Tensor | None = None
    """(N,), attention before its softmax; this is what distillation compares"""
    bag_feature: Tensor | None = None
    """(D') or (C, D'), the pooled representation"""
    hidden: Tensor | None = None
    """(N, H), what the attention score of each instance was computed from"""
    instance_logits: Tensor | None = None
    """(N, 2), an instance classifier's verdict (0: unimportant, 1: important), where the head has one"""
    class_attention_logits: Tensor | None = None
    """(N, C), one attention column a class, where the head has that; `attention_logits` is then the one that counts"""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """The head's own loss terms for a known label, already weighted; added to the loss of the bag"""
    streams: dict[str, Tensor] = field(default_factory=dict)
    """(R, C) each: further logits that learn from the slide's target, `Head.stream_weights` saying how much. For tasks
    other than classification, where the loss of a bag is not cross-entropy and may need other bags"""


class NoOptions(Settings):
    """A head without options."""


class Head(nn.Module):
    """What all heads share. A subclass defines `Options`. Build heads with `create_head`, which validates them."""

    Options: ClassVar[type[Settings]] = NoOptions
    card: HeadCard
    """Set by `create_head`."""
    bag_loss_weight: float = 1.0
    """Factor of the bag's loss beside `HeadOutput.losses`; 0 for a head that computes all of its loss itself."""
    stream_weights: ClassVar[Mapping[str, float]] = {}
    """Factor of the loss of each of `HeadOutput.streams`, under whose name it then stands in `HeadOutput.losses`."""

    def __init__(self, in_dim: int, num_classes: int, options: Settings) -> None:
        super().__init__()
        if in_dim < 1 or num_classes < 1:
            raise HeadError(f"a head needs in_dim and num_classes of at least 1, not {in_dim} and {num_classes}.")
        self.in_dim = in_dim
        self.num_classes = num_classes
        self.options = options

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits (..., C) into class probabilities: a softmax, unless the method is defined otherwise."""
        return torch.softmax(logits, dim=-1)

    def class_shares(self, logits: Tensor) -> Tensor:
        """Turn logits (..., C) into numbers in 0..1 that sum to 1, as metrics and tables want them.

        They are `probabilities`, unless a method gives its classes probabilities of their own, which need not.
        """
        return self.probabilities(logits)

    def total_loss(self, output: HeadOutput, bag_loss: Tensor) -> Tensor:
        """Join the loss of the bag (cross-entropy of its logits) with the head's own terms."""
        total = bag_loss if self.bag_loss_weight == 1.0 else self.bag_loss_weight * bag_loss
        for term in output.losses.values():
            total = total + term
        return total

    def describe(self) -> dict[str, Any]:
        """Return what builds this head again by `create_head(**described)`, options beside the rest, ready for JSON."""
        sizes = {"name": self.card.name, "in_dim": self.in_dim, "num_classes": self.num_classes}
        return sizes | self.options.model_dump(mode="json")


class MILHead(Head):
    """Base of the heads of one bag. A subclass defines `Options` and `score`; `forward` adds the checks."""

    def forward(self, bag: Tensor, *, label: Tensor | None = None, coords: Tensor | None = None) -> HeadOutput:
        """Score one bag.

        Args:
            bag: (N, D) float32, N at least 1.
            label: scalar int64, the class of the bag; only heads whose own losses need it look at it, and no head lets
                it change the logits.
            coords: (N, 2) positions (x, y), for heads that use them.

        Raises:
            HeadError: the bag is empty, has another width than the head, or holds values that are not finite.
        """
        if bag.ndim != 2 or bag.shape[1] != self.in_dim:
            raise HeadError(
                f"a bag has shape {tuple(bag.shape)}, but this head takes (N, {self.in_dim}).",
                fix="Were these features made by another encoder than the one the head was built for?",
            )
        if bag.shape[0] == 0:
            raise HeadError("a bag has no instances.", fix="Leave slides without patches out.")
        output = self.score(bag, label=label, coords=coords)
        # NaN anywhere in a bag reaches the logits: check those, and search the bag only if they are not finite.
        if not bool(torch.isfinite(output.logits).all()):
            broken = (~torch.isfinite(bag)).any(dim=1)
            if bool(broken.any()):
                row = int(broken.nonzero()[0, 0])
                raise HeadError(
                    f"{int(broken.sum())} of the {len(bag)} instances of a bag hold NaN or infinity, first row {row}.",
                    fix="Encode that slide again.",
                )
        return output

    def score(self, bag: Tensor, *, label: Tensor | None, coords: Tensor | None) -> HeadOutput:
        """Do the work of `forward`; the bag has been checked."""
        raise NotImplementedError
