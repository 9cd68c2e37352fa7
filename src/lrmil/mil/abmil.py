"""Attention-based MIL, the head of LRMIL's teacher and student.

For instances h_n in R^D, hidden width 128:

    plain   u_n = tanh(V h_n + b_V)
    gated   u_n = tanh(V h_n + b_V) * sigmoid(U h_n + b_U)
    e_n = w^T u_n + b_w          a = softmax(e)          Z = sum_n a_n h_n          y = W_c Z + b_c

h is pooled as it comes: no projection before, no dropout. Ilse, Tomczak, Welling: Attention-based deep multiple
instance learning, ICML 2018; without its feature extractor, and with one logit a class, in LRMIL.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lrmil.mil.base import HeadOutput, MILHead
from lrmil.mil.card import HeadCard
from lrmil.mil.registry import register_head
from lrmil.settings import Settings

InstanceClassifier = Literal["none", "hidden", "features"]


class ABMILOptions(Settings):
    """Options of attention-based MIL."""

    gated: bool = Field(False, description="multiply the hidden vector by a sigmoid gate")
    hidden_dim: int = Field(128, ge=1, description="width of the attention's hidden vector")
    instance_classifier: InstanceClassifier = Field(
        "none", description="add a 2-way classifier of instances on the attention's hidden vector, or on the features"
    )


@register_head(
    HeadCard(
        name="abmil",
        title="Attention-based MIL, as in LRMIL",
        citation="Ilse et al., Attention-based deep multiple instance learning, ICML 2018",
        licence_note="original: MIT",
        gives_attention=True,
    )
)
class ABMIL(MILHead):
    """See the top of this file. `hidden` of its output is u (N, hidden_dim)."""

    Options = ABMILOptions

    def __init__(self, in_dim: int, num_classes: int, options: ABMILOptions) -> None:
        super().__init__(in_dim, num_classes, options)
        hidden = options.hidden_dim
        self.attention_v = nn.Linear(in_dim, hidden)
        self.attention_u = nn.Linear(in_dim, hidden) if options.gated else None
        self.attention_w = nn.Linear(hidden, 1)
        self.classifier = nn.Linear(in_dim, num_classes)
        # Made last: the weights above are then the same with and without it, for one seed.
        width = {"none": 0, "hidden": hidden, "features": in_dim}[options.instance_classifier]
        self.instance_classifier = nn.Linear(width, 2) if width else None
        self._classify_hidden = options.instance_classifier == "hidden"

    def score(self, bag: Tensor, *, label: Tensor | None, coords: Tensor | None) -> HeadOutput:
        """Pool by attention and classify."""
        hidden = torch.tanh(self.attention_v(bag))
        if self.attention_u is not None:
            hidden = hidden * torch.sigmoid(self.attention_u(bag))
        attention_logits = self.attention_w(hidden).squeeze(1)
        attention = torch.softmax(attention_logits, dim=0)
        bag_feature = attention @ bag
        instance_logits = None
        if self.instance_classifier is not None:
            instance_logits = self.instance_classifier(hidden if self._classify_hidden else bag)
        return HeadOutput(
            logits=self.classifier(bag_feature),
            attention=attention,
            attention_logits=attention_logits,
            bag_feature=bag_feature,
            hidden=hidden,
            instance_logits=instance_logits,
        )
