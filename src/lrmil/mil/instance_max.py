"""CLAM's max pooling over whole instances, its model type `mil`.

    g_n = dropout(ReLU(W_1 h_n + b_1)) in R^512          s_n = W_2 g_n + b_2 in R^C          p_n = softmax(s_n)
    C = 2     m = argmax_n p_{n,1}               C > 2     m = row of the largest entry of p (N x C)
    y = s_m

The bag's logits are those of the chosen instance m. One output (C = 1, for tasks without classes) is not in the
original: there m is the instance with the largest output. Ties go to the first instance.

Lu et al.: Data-efficient and weakly supervised computational pathology on whole-slide images, Nature Biomedical
Engineering 5, 2021, whose program has it as a baseline; Campanella et al., Nature Medicine 25, 2019.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from lrmil.mil.base import HeadOutput, MILHead
from lrmil.mil.clam import clam_card
from lrmil.mil.registry import register_head
from lrmil.settings import Settings


class InstanceMaxOptions(Settings):
    """Options of max pooling over instances."""

    embed_dim: int = Field(512, ge=1, description="width of the embedding of an instance")
    dropout: float = Field(0.25, ge=0, lt=1, description="dropout of the embedding")


@register_head(clam_card("instance_max", "The most suspicious instance decides (CLAM's mil)", gives_attention=False))
class InstanceMax(MILHead):
    """See the top of this file. `bag_feature` of its output is g_m (embed_dim)."""

    Options = InstanceMaxOptions

    def __init__(self, in_dim: int, num_classes: int, options: InstanceMaxOptions) -> None:
        super().__init__(in_dim, num_classes, options)
        self.embed = nn.Linear(in_dim, options.embed_dim)
        self.dropout = nn.Dropout(options.dropout)
        self.classifier = nn.Linear(options.embed_dim, num_classes)

    def score(self, bag: Tensor, *, label: Tensor | None, coords: Tensor | None) -> HeadOutput:
        """Classify every instance and keep one."""
        embedded = self.dropout(torch.relu(self.embed(bag)))
        scores = self.classifier(embedded)
        if self.num_classes == 1:
            chosen = scores[:, 0].argmax()
        elif self.num_classes == 2:
            chosen = torch.softmax(scores, dim=1)[:, 1].argmax()
        else:
            # The instance that is most sure of any class at all.
            chosen = torch.softmax(scores, dim=1).amax(dim=1).argmax()
        return HeadOutput(logits=scores[chosen], bag_feature=embedded[chosen])
