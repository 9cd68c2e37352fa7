"""TransMIL: two layers of Nystrom attention over the instances and a class token, with positions by convolution.

For a bag (N, D):

    h   = relu(Linear(D -> 512))
    s   = ceil(sqrt(N)); the FIRST s^2 - N rows of h are appended, so that the instances fill a square; a learned class
          token is put before them
    x   = x + Nystrom(LayerNorm(x))                                  layer 1
    x   = x + dw7(x) + dw5(x) + dw3(x)                               PPEG: the instances laid out as an s x s image,
                                                                     depthwise convolutions; the class token stays
    x   = x + Nystrom(LayerNorm(x))                                  layer 2
    y   = Linear(512 -> C)(LayerNorm(x)[class token])

The ORDER of the instances matters: it decides which are repeated, which lie beside each other in the image, and which
share a landmark. The image is no map of the slide: a row of it is s instances, not a row of the tissue. With
`order="given"`, as published, instances come as the bag holds them; `order="raster"` sorts them by y, then x first.

Attention. No score of one instance is computed anywhere: the answer goes through two layers of eight heads, a
convolution, and a pseudo-inverse with negative entries. So there are no `attention_logits`, and the head can neither
teach nor be taught by attention. `attention` is a rollout for heatmaps (Abnar, Zuidema: Quantifying attention flow in
transformers, ACL 2020): the class token's row of layer 2, carried back through layer 1, each layer counting half and
the connection past it the other half; heads averaged, negative weights set to zero, convolutions left out, repeated
instances summed, the class token's own share dropped. It is computed in eval mode only.

Shao et al.: TransMIL: transformer based correlated multiple instance learning for whole slide image classification,
NeurIPS 2021.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lrmil.errors import HeadError
from lrmil.mil.base import HeadOutput, MILHead
from lrmil.mil.card import HeadCard
from lrmil.mil.nystrom import Keep, NystromAttention
from lrmil.mil.recipe import Recipe
from lrmil.mil.registry import register_head
from lrmil.settings import Settings


class TransMILOptions(Settings):
    """Options of TransMIL."""

    dim: int = Field(512, ge=1, description="width of the tokens; a multiple of the heads")
    heads: int = Field(8, ge=1, description="attention heads")
    landmarks: int = Field(256, ge=1, description="landmarks of the Nystrom attention")
    pinv_iterations: int = Field(6, ge=1, description="steps of its pseudo-inverse")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout after each attention")
    nystrom_keep: Keep = Field(
        "tail",
        description="rows kept of a padded sequence; head: only for weights trained with nystrom-attention 0.0.9",
    )
    order: Literal["given", "raster"] = Field("given", description="instances as the bag holds them, or by y, then x")
    rollout: bool = Field(True, description="compute attention for heatmaps when predicting")


class TransLayer(nn.Module):
    """What a layer adds to its input: attention over the normalised tokens."""

    def __init__(self, options: TransMILOptions) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(options.dim)
        self.attn = NystromAttention(
            options.dim,
            heads=options.heads,
            landmarks=options.landmarks,
            pinv_iterations=options.pinv_iterations,
            dropout=options.dropout,
            keep=options.nystrom_keep,
        )

    def forward(self, x: Tensor, *, rows: int | None = None) -> Tensor:
        """Return the first `rows` rows of x + Nystrom(LayerNorm(x)); x is (n, dim)."""
        return x[:rows] + self.attn(self.norm(x), rows=rows)

    @torch.no_grad()
    def back(self, x: Tensor, weights: Tensor) -> Tensor:
        """Carry weights (n,) of the layer's outputs back to its inputs, half through the attention, half past it."""
        through = self.attn.back(self.norm(x), weights).clamp_min(0)
        return 0.5 * weights + 0.5 * through / through.sum().clamp_min(torch.finfo(through.dtype).tiny)


class PPEG(nn.Module):
    """Positions by depthwise convolutions of the instances laid out as a square."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.proj1 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, side: int) -> Tensor:
        """x: (1 + side^2, dim), the class token first. Returns the same shape."""
        # All four terms are linear: one convolution by the sum of the kernels gives their sum.
        kernel = self.proj.weight + F.pad(self.proj1.weight, [1] * 4) + F.pad(self.proj2.weight, [2] * 4)
        bias = self.proj.bias + self.proj1.bias + self.proj2.bias  # type: ignore[operator]
        image = x[1:].view(1, side, side, -1).permute(0, 3, 1, 2)
        added = F.conv2d(image, kernel, bias, padding=3, groups=len(kernel))
        return torch.cat([x[:1], x[1:] + added.permute(0, 2, 3, 1).reshape(side * side, -1)])


@register_head(
    HeadCard(
        name="transmil",
        title="TransMIL",
        citation="Shao et al., TransMIL: transformer based correlated multiple instance learning, NeurIPS 2021",
        licence_note="original: GPL-3.0 and non-commercial by its README",
        gives_attention=False,
        recipe=Recipe(
            learning_rate=2e-4,
            weight_decay=1e-5,
            optimiser="lookahead_radam",
            decay_matrices_only=True,
            epochs=200,
            select_by="loss",
            patience=10,
            accumulate=2,
            source="TransMIL.yaml and train.py of the TransMIL repository, which also trains in half precision",
        ),
    )
)
class TransMIL(MILHead):
    """See the top of this file. `bag_feature` of its output is the normalised class token (dim,)."""

    Options = TransMILOptions

    def __init__(self, in_dim: int, num_classes: int, options: TransMILOptions) -> None:
        super().__init__(in_dim, num_classes, options)
        self.fc1 = nn.Linear(in_dim, options.dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, options.dim))
        self.layer1 = TransLayer(options)
        self.pos_layer = PPEG(options.dim)
        self.layer2 = TransLayer(options)
        self.norm = nn.LayerNorm(options.dim)
        self.fc2 = nn.Linear(options.dim, num_classes)
        self._raster = options.order == "raster"
        self._rollout = options.rollout

    def score(self, bag: Tensor, *, label: Tensor | None, coords: Tensor | None) -> HeadOutput:
        """Attend twice and classify the class token."""
        order = self._order(coords) if self._raster else None
        first, side = self.embed(bag if order is None else bag[order])
        second = self.pos_layer(self.layer1(first), side)
        bag_feature = self.norm(self.layer2(second, rows=1))[0]
        attention = None
        if self._rollout and not self.training:
            attention = self._attention(first, second, len(bag))
            if order is not None:
                attention = torch.empty_like(attention).index_copy_(0, order, attention)
        return HeadOutput(logits=self.fc2(bag_feature), attention=attention, bag_feature=bag_feature)

    def embed(self, bag: Tensor) -> tuple[Tensor, int]:
        """Return the tokens (1 + side^2, dim) of a bag (N, D), and the side."""
        side = math.isqrt(len(bag) - 1) + 1
        embedded = torch.relu(self.fc1(bag))
        return torch.cat([self.cls_token[0].to(embedded.dtype), embedded, embedded[: side * side - len(bag)]]), side

    @torch.no_grad()
    def _attention(self, first: Tensor, second: Tensor, count: int) -> Tensor:
        weights = first.new_zeros(len(first), dtype=torch.promote_types(first.dtype, torch.float32))
        weights[0] = 1
        weights = self.layer1.back(first, self.layer2.back(second, weights))[1:]
        attention = weights[:count].clone()
        attention[: len(weights) - count] += weights[count:]
        total = attention.sum()
        return torch.where(total > 0, attention / total, torch.full_like(attention, 1 / count))

    @staticmethod
    def _order(coords: Tensor | None) -> Tensor:
        if coords is None:
            raise HeadError(
                "order: raster needs the positions of the instances.", fix="Give coords, or set order to given."
            )
        by_x = torch.argsort(coords[:, 0], stable=True)
        return by_x[torch.argsort(coords[by_x, 1], stable=True)]
