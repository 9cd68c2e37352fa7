"""CLAM, with one attention branch (SB) or one a class (MB), and its instance loss.

    h_n = dropout(ReLU(W_1 x_n + b_1))                                                embedding, 512 wide
    u_n = tanh(V h_n + b_V) [* sigmoid(U h_n + b_U)]                                  256 wide; 384 in size big
    s_{n,j} = w_j^T u_n + b_j          A_j = softmax_n(s_{.,j})          M_j = sum_n A_{n,j} h_n
    SB: one branch,       y = W M + b
    MB: a branch a class, y_c = w_c'^T M_c + b_c'

Pooled is the embedding h, not the instance x. Where dropout is not 0, a dropout of 0.25, whatever its value, follows
the tanh and the sigmoid.

L_inst, the instance loss, is in `instance_loss`; its classifiers look at h. One branch, as SB has it, ranks instances
for all classes. Total = 0.7 CE(y, Y) + 0.3 L_inst. The original asks for k_sample instances and fails on smaller bags;
here top and bottom may share instances, down to a bag of one.

Lu, Williamson, Chen, Chen, Barbieri, Mahmood: Data-efficient and weakly supervised computational pathology on
whole-slide images, Nature Biomedical Engineering 5, 2021.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lrmil.errors import HeadError
from lrmil.mil.base import HeadOutput, MILHead
from lrmil.mil.card import HeadCard
from lrmil.mil.instance_loss import judge_instances
from lrmil.mil.label import class_index
from lrmil.mil.recipe import Recipe
from lrmil.mil.registry import register_head
from lrmil.mil.smooth_top1_svm import smooth_top1_svm
from lrmil.settings import Settings

_WIDTHS = {"small": (512, 256), "big": (512, 384)}
_ATTENTION_DROPOUT = 0.25


class CLAMOptions(Settings):
    """Options of CLAM."""

    size: Literal["small", "big"] = Field("small", description="embedding and attention 512 and 256, or 512 and 384")
    embed_dim: int | None = Field(None, ge=1, description="width of the embedding, in place of that of size")
    attention_dim: int | None = Field(None, ge=1, description="width of the attention, in place of that of size")
    gated: bool = Field(True, description="multiply the attention's hidden vector by a sigmoid gate")
    dropout: float = Field(
        0.25, ge=0, lt=1, description="dropout of the embedding; 0 also turns off the attention's, which is else 0.25"
    )
    instance_loss: Literal["svm", "ce", "none"] = Field(
        "svm", description="loss of the instances with most and least attention; none: the bag's loss alone"
    )
    subtyping: bool = Field(
        False, description="classes exclude each other: instances that speak for another class are negative for it"
    )
    instance_classes: int | None = Field(
        None,
        ge=1,
        description="classes of the instance loss where they are not the outputs, such as quantile bins of a number",
    )
    k_sample: int = Field(8, ge=1, description="B, instances taken from either end of the attention")
    bag_weight: float = Field(0.7, ge=0, le=1, description="weight of the bag's loss; the instance loss has the rest")

    def widths(self) -> tuple[int, int]:
        """Return the widths of embedding and attention."""
        embed, attention = _WIDTHS[self.size]
        return self.embed_dim or embed, self.attention_dim or attention


class _CLAM(MILHead):
    Options = CLAMOptions
    options: CLAMOptions
    branch_per_class: ClassVar[bool]

    def __init__(self, in_dim: int, num_classes: int, options: CLAMOptions) -> None:
        super().__init__(in_dim, num_classes, options)
        embed, attention = options.widths()
        self.instance_classes = options.instance_classes or num_classes
        branches = num_classes if self.branch_per_class else 1
        if branches not in (1, self.instance_classes):
            raise HeadError(
                f"{branches} attention branches cannot rank the instances of {self.instance_classes} instance_classes.",
                fix=f"Set instance_classes to {num_classes}, or choose clam_sb.",
            )
        self.embed = nn.Linear(in_dim, embed)
        self.attention_v = nn.Linear(embed, attention)
        self.attention_u = nn.Linear(embed, attention) if options.gated else None
        self.attention_w = nn.Linear(attention, branches)
        self.embed_dropout = nn.Dropout(options.dropout)
        self.attention_dropout = nn.Dropout(_ATTENTION_DROPOUT if options.dropout else 0.0)
        self.instance_classifiers = nn.ModuleList(nn.Linear(embed, 2) for _ in range(self.instance_classes))
        self.bag_loss_weight = 1.0 if options.instance_loss == "none" else options.bag_weight

    def classify(self, pooled: Tensor) -> Tensor:
        """Return the logits (C,) of the pooled branches (n, H)."""
        raise NotImplementedError

    def score(self, bag: Tensor, *, label: Tensor | None, coords: Tensor | None) -> HeadOutput:
        """Embed, weigh, pool and classify; with a label, judge the instances at both ends of the attention."""
        embedded = self.embed_dropout(torch.relu(self.embed(bag)))
        hidden = self.attention_dropout(torch.tanh(self.attention_v(embedded)))
        if self.attention_u is not None:
            hidden = hidden * self.attention_dropout(torch.sigmoid(self.attention_u(embedded)))
        branches = self.attention_w(hidden)
        attention = torch.softmax(branches, dim=0)
        pooled = attention.T @ embedded
        logits = self.classify(pooled)
        losses = {}
        if label is not None and self.options.instance_loss != "none":
            loss, _, _ = self.judge_instances(embedded, branches, class_index(label, self.instance_classes))
            losses["instance"] = (1.0 - self.bag_loss_weight) * loss
        counts = int(logits.argmax()) if self.branch_per_class else 0
        return HeadOutput(
            logits=logits,
            attention=attention[:, counts],
            attention_logits=branches[:, counts],
            bag_feature=pooled if self.branch_per_class else pooled[0],
            hidden=hidden,
            class_attention_logits=branches if self.branch_per_class else None,
            losses=losses,
        )

    def judge_instances(self, embedded: Tensor, branches: Tensor, label: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the instance loss before its weight, targets and predictions: see `instance_loss.judge_instances`."""
        return judge_instances(
            embedded,
            branches,
            label,
            self.instance_classifiers,
            smooth_top1_svm if self.options.instance_loss == "svm" else F.cross_entropy,
            k_sample=self.options.k_sample,
            subtyping=self.options.subtyping,
        )


def clam_card(name: str, title: str, *, gives_attention: bool = True) -> HeadCard:
    """Return the card of a head of CLAM's program, with the recipe that all of them have there."""
    return HeadCard(
        name=name,
        title=title,
        citation="Lu et al., Data-efficient and weakly supervised computational pathology, Nat Biomed Eng 2021",
        licence_note="original: GPL-3.0, non-commercial academic use",
        gives_attention=gives_attention,
        recipe=Recipe(
            learning_rate=1e-4,
            weight_decay=1e-5,
            select_by="loss",
            patience=20,
            earliest_stop=50,
            source="CLAM's defaults with early stopping; its README's examples use 2e-4 and a balanced sampler",
        ),
    )


@register_head(clam_card("clam_sb", "CLAM with a single attention branch"))
class CLAMSingleBranch(_CLAM):
    """See the top of this file. `bag_feature` of its output is M (512,)."""

    branch_per_class = False

    def __init__(self, in_dim: int, num_classes: int, options: CLAMOptions) -> None:
        super().__init__(in_dim, num_classes, options)
        self.classifiers = nn.Linear(options.widths()[0], num_classes)

    def classify(self, pooled: Tensor) -> Tensor:
        """Classify the one pooled vector."""
        return self.classifiers(pooled[0])


@register_head(clam_card("clam_mb", "CLAM with an attention branch a class"))
class CLAMMultiBranch(_CLAM):
    """See the top of this file. `bag_feature` of its output is M (C, 512).

    `class_attention_logits` are all branches; `attention` and `attention_logits` are those of the predicted class.
    """

    branch_per_class = True

    def __init__(self, in_dim: int, num_classes: int, options: CLAMOptions) -> None:
        super().__init__(in_dim, num_classes, options)
        self.classifiers = nn.ModuleList(nn.Linear(options.widths()[0], 1) for _ in range(num_classes))

    def classify(self, pooled: Tensor) -> Tensor:
        """Classify the vector of each branch by the classifier of its class."""
        return torch.cat([classifier(row) for classifier, row in zip(self.classifiers, pooled, strict=True)])
