"""DTFD-MIL: a slide is dealt into pseudo-bags; what the first tier finds in each is what the second tier pools.

For a bag (N, D):

    m_n = relu(W x_n) (512), then residual blocks  m + relu(W'' relu(W' m))            no biases
    e_n = w^T (tanh(V m_n + b_V) * sigmoid(U m_n + b_U)) + b_w                         once for the whole slide

The instances are shuffled and dealt into G pseudo-bags whose sizes differ by at most one. In each:

    a = softmax of its e         f = sum_n a_n m_n         tier-1 logits = W_cls f + b_cls
    p_n = softmax_c(W_cls (a_n m_n)), without b_cls; an instance's rank is its p of ONE class

What a pseudo-bag hands to tier 2 (`distillation`), with q = total_instance // G, at least 1:

    afs       f
    maxs      m of the q instances of largest p
    maxmins   m of the q of largest p, then of the q of smallest p
    mas       m of the instance of largest a

Tier 2 pools all rows handed over by gated attention of its own, and classifies: its logits are the slide's. Losses:
tier 1, the mean cross-entropy of the pseudo-bags, each under the slide's label; tier 2, the cross-entropy of the slide.
The second is the bag's loss, which whoever trains computes from the logits (and may add distillation to), so the head's
own losses name only `tier1`. Both are computed, then added: with one backward pass, one Adam does what two Adams over
the two tiers' own parameters do. By default what is handed over is detached, so that tier 2 does not train tier 1; in
the original its gradients are thrown away.

Fewer instances than pseudo-bags: as many pseudo-bags as instances. total_instance below G: q would be 0, which hands
over nothing, or everything; it is 1 then.

`instance_class`, the class whose p ranks: "last", as published, where the last of two classes is the tumour; "label",
the slide's own class in training (so that the tier-2 logits of training depend on the label, for maxs and maxmins) and
the class that tier 1 predicts otherwise; "auto" is "last" for up to two classes and "label" for more.

In training the split is drawn anew from torch's global generator; in eval mode it is drawn from `split_seed`, so that
the same bag always gets the same answer. With several `random_splits`, the probabilities of the slide are the mean of
the softmax probabilities over splits, and the logits are log(mean probability) + the mean log-sum-exp of the splits'
logits: their softmax is that mean, and one split keeps its own logits.

`attention` is the softmax over the whole slide of e, tier 1's score of an instance. What an instance adds to the answer
depends on the split and on tier 2 as well.

Zhang et al.: DTFD-MIL: double-tier feature distillation multiple instance learning for histopathology whole slide image
classification, CVPR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lrmil.errors import HeadError
from lrmil.mil.base import HeadOutput, MILHead
from lrmil.mil.card import HeadCard
from lrmil.mil.label import class_index
from lrmil.mil.recipe import Recipe
from lrmil.mil.registry import register_head
from lrmil.settings import Settings


class DTFDOptions(Settings):
    """Options of DTFD-MIL."""

    distillation: Literal["afs", "maxs", "maxmins", "mas"] = Field(
        "afs", description="what a pseudo-bag hands to tier 2: its feature, or that of chosen instances"
    )
    groups: int = Field(4, ge=1, description="pseudo-bags a slide")
    total_instance: int = Field(
        4, ge=1, description="instances that all pseudo-bags together hand over (maxs, maxmins)"
    )
    instance_class: Literal["auto", "last", "label"] = Field(
        "auto", description="class whose probability ranks instances (maxs, maxmins)"
    )
    tier2_trains_tier1: bool = Field(False, description="let the loss of tier 2 train tier 1")
    residual_layers: int = Field(0, ge=0, description="residual blocks after the first layer")
    hidden_dim: int = Field(512, ge=1, description="width of the reduced instances")
    attention_dim: int = Field(128, ge=1, description="width of the attention's hidden vector")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before each classifier")
    random_splits: int = Field(1, ge=1, description="splits averaged when predicting")
    split_seed: int = Field(0, ge=0, description="seed of the splits when predicting")


class Reduction(nn.Module):
    """x (N, D) to m (N, hidden)."""

    def __init__(self, in_dim: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(hidden, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, hidden, bias=False), nn.ReLU()
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Reduce."""
        x = torch.relu(self.fc1(x))
        for block in self.blocks:
            x = x + block(x)
        return x


class GatedAttention(nn.Module):
    """e (N,) and the hidden vectors (N, attention_dim) it is computed from."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.v = nn.Linear(width, hidden)
        self.u = nn.Linear(width, hidden)
        self.w = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Score each row of x (N, width)."""
        hidden = torch.tanh(self.v(x)) * torch.sigmoid(self.u(x))
        return self.w(hidden).squeeze(1), hidden


class SecondTier(nn.Module):
    """Pools what the pseudo-bags hand over, and classifies."""

    def __init__(self, width: int, attention_dim: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.attention = GatedAttention(width, attention_dim)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """rows (R, width). Returns logits (C,), the pooled row (width,) and its attention (R,)."""
        attention = torch.softmax(self.attention(rows)[0], dim=0)
        pooled = attention @ rows
        return self.classifier(self.dropout(pooled)), pooled, attention


@dataclass(frozen=True, slots=True)
class Tiers:
    """What both tiers say of one split into G pseudo-bags."""

    tier1_features: Tensor
    """(G, hidden)"""
    tier1_logits: Tensor
    """(G, C)"""
    handed_over: Tensor
    """(R, hidden), in the order of the pseudo-bags"""
    tier2_attention: Tensor
    """(R,)"""
    pooled: Tensor
    """(hidden,)"""
    logits: Tensor
    """(C,)"""


@register_head(
    HeadCard(
        name="dtfd",
        title="DTFD-MIL",
        citation="Zhang et al., DTFD-MIL: double-tier feature distillation multiple instance learning, CVPR 2022",
        licence_note="original: MIT",
        gives_attention=True,
        recipe=Recipe(
            learning_rate=1e-4,
            weight_decay=1e-4,
            epochs=200,
            select_by="auc",
            first_epoch=160,
            schedule="step",
            schedule_epochs=100,
            schedule_factor=0.2,
            clip_norm=5.0,
            source="Main_DTFD_MIL.py of the DTFD-MIL repository; its two Adams are one here",
        ),
    )
)
class DTFD(MILHead):
    """See the top of this file. `hidden` of its output is what e is computed from, `bag_feature` tier 2's pooled row.

    It is trained with a label, or, for other tasks, with the loss of its stream "tier1" (G, C) among its losses.
    """

    Options = DTFDOptions
    stream_weights: ClassVar[Mapping[str, float]] = {"tier1": 1.0}

    def __init__(self, in_dim: int, num_classes: int, options: DTFDOptions) -> None:
        super().__init__(in_dim, num_classes, options)
        if num_classes == 1 and options.distillation in ("maxs", "maxmins"):
            raise HeadError(
                f"{options.distillation} ranks instances by the probability of a class, and there is one output only.",
                fix="Choose afs or mas.",
            )
        width = options.hidden_dim
        self.reduction = Reduction(in_dim, width, options.residual_layers)
        self.attention = GatedAttention(width, options.attention_dim)
        self.dropout = nn.Dropout(options.dropout)
        self.classifier = nn.Linear(width, num_classes)
        self.tier2 = SecondTier(width, options.attention_dim, num_classes, options.dropout)
        self._chosen = options

    def score(self, bag: Tensor, *, label: Tensor | None, coords: Tensor | None) -> HeadOutput:
        """Score by both tiers, over one split in training and `random_splits` in eval mode."""
        m = self.reduction(bag)
        scores, hidden = self.attention(m)
        tiers = [self.two_tiers(m, scores, split, label) for split in self._splits(len(bag))]
        logits = join_splits(torch.stack([t.logits for t in tiers]))
        # An instance that is NaN could stay unseen: not every instance reaches tier 2.
        logits = torch.where(torch.isfinite(scores).all(), logits, torch.full_like(logits, torch.nan))
        losses = {}
        if label is not None:
            losses["tier1"] = torch.stack([self.tier1_loss(t, label) for t in tiers]).mean()
        return HeadOutput(
            logits=logits,
            attention=torch.softmax(scores, dim=0),
            attention_logits=scores,
            bag_feature=torch.stack([t.pooled for t in tiers]).mean(dim=0),
            hidden=hidden,
            losses=losses,
            streams={"tier1": torch.cat([t.tier1_logits for t in tiers])},
        )

    def tier1_loss(self, tiers: Tiers, label: Tensor) -> Tensor:
        """Return the mean loss of the pseudo-bags of one split, each under the slide's label."""
        return torch.stack([F.cross_entropy(row, label) for row in tiers.tier1_logits]).mean()

    def total_loss(self, output: HeadOutput, bag_loss: Tensor) -> Tensor:
        """Add tier 1's loss to the bag's, which is tier 2's."""
        if "tier1" not in output.losses:
            raise HeadError("without a label, tier 1 of dtfd would not be trained.", fix="Give the head the label.")
        return super().total_loss(output, bag_loss)

    def two_tiers(self, m: Tensor, scores: Tensor, split: Sequence[Tensor], label: Tensor | None = None) -> Tiers:
        """Run both tiers.

        Args:
            m: (N, hidden), reduced instances.
            scores: (N,), their attention before softmax.
            split: for each pseudo-bag the indices of its instances (n,).
            label: the slide's class, for `instance_class="label"` in training.
        """
        attention = [torch.softmax(scores[rows], dim=0) for rows in split]
        features = torch.stack([a @ m[rows] for a, rows in zip(attention, split, strict=True)])
        tier1_logits = self.classifier(self.dropout(features))
        handed_over = features
        if self._chosen.distillation != "afs":
            column = self._ranking_class(tier1_logits, label)
            chosen = [self.choose(m, a, rows, column) for a, rows in zip(attention, split, strict=True)]
            handed_over = m[torch.cat(chosen)]
        if not self._chosen.tier2_trains_tier1:
            handed_over = handed_over.detach()
        logits, pooled, tier2_attention = self.tier2(handed_over)
        return Tiers(features, tier1_logits, handed_over, tier2_attention, pooled, logits)

    @torch.no_grad()
    def choose(self, m: Tensor, attention: Tensor, rows: Tensor, column: int) -> Tensor:
        """Return which instances a pseudo-bag hands to tier 2, most important first.

        Args:
            m: (N, hidden), all instances.
            attention: (n,), softmaxed within the pseudo-bag.
            rows: (n,), its instances.
            column: the class whose probability ranks.
        """
        if self._chosen.distillation == "mas":
            return rows[attention.argmax()].unsqueeze(0)
        ranked = rows[self.instance_probabilities(m[rows], attention)[:, column].argsort(descending=True, stable=True)]
        count = max(1, self._chosen.total_instance // self._chosen.groups)
        if self._chosen.distillation == "maxs":
            return ranked[:count]
        return torch.cat([ranked[:count], ranked[-count:]])

    def instance_probabilities(self, m: Tensor, attention: Tensor) -> Tensor:
        """Return p (n, C) of the instances m (n, hidden) of one pseudo-bag; attention (n,) is softmaxed within it."""
        return torch.softmax(attention.unsqueeze(1) * (m @ self.classifier.weight.T), dim=1)

    def _ranking_class(self, tier1_logits: Tensor, label: Tensor | None) -> int:
        by_label = self._chosen.instance_class == "label" or (
            self._chosen.instance_class == "auto" and self.num_classes > 2
        )
        if not by_label:
            return self.num_classes - 1
        if self.training and label is not None:
            return class_index(label, self.num_classes)
        return int(torch.softmax(tier1_logits, dim=1).mean(dim=0).argmax())

    def _splits(self, count: int) -> list[tuple[Tensor, ...]]:
        # Drawn on the CPU: the same pseudo-bags on every device.
        device = self.classifier.weight.device
        generator = None if self.training else torch.Generator().manual_seed(self._chosen.split_seed)
        return [
            torch.randperm(count, generator=generator).to(device).tensor_split(min(self._chosen.groups, count))
            for _ in range(1 if self.training else self._chosen.random_splits)
        ]


def join_splits(logits: Tensor) -> Tensor:
    """Return logits (C,) whose softmax is the mean softmax of the rows of `logits` (S, C); one row is kept as it is."""
    if len(logits) == 1:
        return logits[0]
    mean_log = torch.logsumexp(torch.log_softmax(logits, dim=1), dim=0) - math.log(len(logits))
    return mean_log + torch.logsumexp(logits, dim=1).mean()
