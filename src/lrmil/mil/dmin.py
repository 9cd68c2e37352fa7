"""DMIN, the first step of HDMIL: class-wise attention on all patches that learns which of them it needs.

For instances x_n in R^D and classes c, with a dropout behind every nonlinearity:

    h_n = relu(W x_n + b) in R^512       s_n = W_s (tanh(V h_n) * sigmoid(U h_n)) in R^C       KAN_c: 512 -> 1

    vanilla  A_c = softmax_n(s_{.,c})        M_c = sum_n A_nc h_n                             logit_c = KAN_c(M_c)
    dynamic  m_nc = [ sigmoid((s_nc + g1 - g2) / 0.7) > 0.5 ], g Gumbel noise, gradient straight through the sigmoid
             w_nc = exp(s_nc) m_nc / sum_{n,c} exp(s_nc) m_nc                                 one sum for all classes
             M'_c = sum_n w_nc h_n                                                            logit'_c = KAN_c(M'_c)
    eval     m_nc = [ s_nc > 0 ]; M_c the softmax over the kept instances of class c alone; zero where none is kept

    rate     rho = (1/N) sum_n [ sum_c m_nc != 0 ], gradient straight through the sum
    loss     0.7 CE(logit, Y) + 0.3 L_inst + 0.5 KL(p || p') + 0.5 MSE(M', M) + 2 (rho - mask_ratio)^2

L_inst is CLAM-MB's with the smooth top-1 SVM loss and a Chebyshev layer 512 -> 2 for each class. p and M, from the
vanilla path, get gradients too. Training forwards give the vanilla logits.

The original counts only the first two classes in rho (`rate_classes: first_two` does that), and has no answer where the
dynamic path keeps nothing (0/0; such steps are skipped): here M' is then zero.

Dong et al.: Fast and accurate gigapixel pathological image classification with hierarchical distillation multi-instance
learning, CVPR 2025.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lrmil.errors import HeadError
from lrmil.mil.base import HeadOutput, MILHead
from lrmil.mil.card import HeadCard
from lrmil.mil.chebyshev import ChebyshevInit, ChebyshevLayer
from lrmil.mil.instance_loss import judge_instances
from lrmil.mil.label import class_index
from lrmil.mil.recipe import Recipe
from lrmil.mil.registry import register_head
from lrmil.mil.smooth_top1_svm import smooth_top1_svm
from lrmil.settings import Settings

RateClasses = Literal["all", "first_two"]
_TEMPERATURE = 0.7


class DMINOptions(Settings):
    """Options of HDMIL's first step."""

    embed_dim: int = Field(512, ge=1, description="width of the embedded features")
    hidden_dim: int = Field(256, ge=1, description="width of the gated attention")
    dropout: float = Field(0.25, ge=0, lt=1, description="dropout of embedded features and of both gates")
    degree: int = Field(12, ge=1, description="degree of the Chebyshev polynomials; 16 for NSCLC in the paper")
    init: ChebyshevInit = Field("xavier", description="how Chebyshev coefficients are drawn")
    k_sample: int = Field(
        32, ge=1, description="instances of either sign in the instance loss; fewer if there are fewer"
    )
    subtyping: bool = Field(True, description="let the instance loss look at the other classes, too")
    mask_ratio: float = Field(0.6, ge=0, le=1, description="share of instances that should be kept")
    rate_classes: RateClasses = Field(
        "all", description="classes that count as keeping an instance; first_two is the original's, wrong for 3 or more"
    )


def keep_rate(mask: Tensor, classes: RateClasses = "all") -> Tensor:
    """Return rho, the share of instances that a mask (N, C) of 0 and 1 keeps for any class.

    Its gradient is that of the mean number of classes that keep an instance.
    """
    kept = (mask if classes == "all" else mask[:, :2]).sum(dim=1)
    return (kept + ((kept != 0).to(kept.dtype) - kept).detach()).mean()


def hard_gate(logits: Tensor) -> Tensor:
    """Return [sigmoid(logits) > 0.5] as 0 and 1, with the gradient of the sigmoid."""
    soft = torch.sigmoid(logits)
    return soft + ((logits > 0).to(soft.dtype) - soft).detach()


def gumbel_mask(scores: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return the dynamic path's mask m (N, C).

    Args:
        scores: s (N, C).
        noise: two draws (N, C) of the unit exponential distribution, g = -log(draw); drawn here if not given.
    """
    if noise is None:
        noise = torch.empty_like(scores).exponential_(), torch.empty_like(scores).exponential_()
    return hard_gate((scores - noise[0].log() + noise[1].log()) / _TEMPERATURE)


def pool_dynamic(scores: Tensor, mask: Tensor, embedded: Tensor) -> Tensor:
    """Return M' (C, H): weights exp(s) m over their sum over instances and classes; zero where nothing is kept."""
    weights = torch.exp(scores - scores.detach().max()) * mask
    total = weights.sum()
    return (weights / torch.where(total > 0, total, torch.ones_like(total))).T @ embedded


def pool_kept(scores: Tensor, mask: Tensor, embedded: Tensor) -> Tensor:
    """Return M (C, H): for each class the softmax over the instances that its column of mask (N, C) keeps."""
    # The lowest finite value, not minus infinity: a class that keeps nothing would have NaN in all of its column.
    attention = torch.softmax(scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min), dim=0)
    return attention.masked_fill(mask == 0, 0.0).T @ embedded


RECIPE = Recipe(
    learning_rate=3e-4,
    weight_decay=1e-5,
    epochs=200,
    select_by="loss",
    patience=20,
    first_epoch=50,
    balanced_sampler=True,
    source="published commands; NSCLC: 3e-5, degree 16, mask_ratio 0.7; BRCA: mask_ratio 0.7; RCC: k_sample 8; "
    "CAMELYON16: no subtyping. The published shell script sets mask_ratio 0.1",
)


@register_head(
    HeadCard(
        name="dmin",
        title="HDMIL's first step alone: class-wise attention on all patches",
        citation="Dong et al., Hierarchical distillation multi-instance learning, CVPR 2025",
        licence_note="original: GPLv3, non-commercial",
        gives_attention=False,
        recipe=RECIPE,
    )
)
class DMIN(MILHead):
    """See the top of this file. `hidden` is h (N, 512), `class_attention_logits` s (N, C), `bag_feature` M (C, 512)."""

    Options = DMINOptions
    options: DMINOptions
    bag_loss_weight = 0.7

    def __init__(self, in_dim: int, num_classes: int, options: DMINOptions) -> None:
        super().__init__(in_dim, num_classes, options)
        if num_classes < 2:
            raise HeadError("DMIN keeps patches for classes, and needs two at least.", fix="Use another head.")
        embed, hidden = options.embed_dim, options.hidden_dim
        first = nn.Linear(in_dim, embed)
        self.embed = nn.Sequential(first, nn.ReLU(), nn.Dropout(options.dropout))
        self.attention_v = nn.Linear(embed, hidden)
        self.attention_u = nn.Linear(embed, hidden)
        self.attention_w = nn.Linear(hidden, num_classes)
        self.gate_dropout = nn.Dropout(options.dropout)
        for layer in (first, self.attention_v, self.attention_u, self.attention_w):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

        def per_class(out: int) -> nn.ModuleList:
            return nn.ModuleList(ChebyshevLayer(embed, out, options.degree, options.init) for _ in range(num_classes))

        self.classifiers = per_class(1)
        self.instance_classifiers = per_class(2)

    def attend(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        """Return h (N, H) and s (N, C) of a bag (N, D)."""
        embedded = self.embed(bag)
        gated = self.gate_dropout(torch.tanh(self.attention_v(embedded))) * self.gate_dropout(
            torch.sigmoid(self.attention_u(embedded))
        )
        return embedded, self.attention_w(gated)

    def classify(self, pooled: Tensor) -> Tensor:
        """Return the logits (C,) of M (C, H), each row by the Chebyshev layer of its class."""
        return torch.cat([layer(row) for layer, row in zip(self.classifiers, pooled, strict=True)])

    def score(self, bag: Tensor, *, label: Tensor | None, coords: Tensor | None) -> HeadOutput:
        """Take the vanilla path in training, with all losses if there is a label; the eval path otherwise."""
        embedded, scores = self.attend(bag)
        if self.training:
            pooled = torch.softmax(scores, dim=0).T @ embedded
        else:
            pooled = pool_kept(scores, scores > 0, embedded)
        logits = self.classify(pooled)
        losses = {}
        if self.training and label is not None:
            losses = self.losses(embedded, scores, pooled, logits, class_index(label, self.num_classes))
        return HeadOutput(
            logits=logits, bag_feature=pooled, hidden=embedded, class_attention_logits=scores, losses=losses
        )

    def losses(
        self,
        embedded: Tensor,
        scores: Tensor,
        pooled: Tensor,
        logits: Tensor,
        label: int,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return all terms of the loss but that of the bag, weighted; noise as in `gumbel_mask`."""
        mask = gumbel_mask(scores, noise)
        kept = pool_dynamic(scores, mask, embedded)
        kept_logits = self.classify(kept)
        divergence = F.kl_div(
            torch.log_softmax(kept_logits, dim=0), torch.log_softmax(logits, dim=0), reduction="sum", log_target=True
        )
        rate = keep_rate(mask, self.options.rate_classes)
        return {
            "instance": 0.3 * self.instance_loss(embedded, scores, label),
            "kept_logits": 0.5 * divergence,
            "kept_features": 0.5 * F.mse_loss(kept, pooled),
            "keep_rate": 2.0 * (rate - self.options.mask_ratio).square(),
        }

    def instance_loss(self, embedded: Tensor, scores: Tensor, label: int) -> Tensor:
        """Return CLAM's instance loss of h (N, H) and s (N, C), before its weight."""
        loss, _, _ = judge_instances(
            embedded,
            scores,
            label,
            self.instance_classifiers,
            smooth_top1_svm,
            k_sample=self.options.k_sample,
            subtyping=self.options.subtyping,
        )
        return loss
