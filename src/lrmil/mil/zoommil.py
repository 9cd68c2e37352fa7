"""ZoomMIL: attention at low magnification says where to look closer, twice.

Magnifications g: low (N1 patches), mid (r2 in each low one), high (r3 in each low one). With raw features x_g in R^D

    h = dropout(relu(W_g x + b_g))                                       in R^512
    e_g, aux_g = w^T (dropout(tanh(V h)) * dropout(sigmoid(U h)))        gated, 256 wide, each with its own weights
    M_g = sum_n softmax(e_g)_n h_n          y = W_c (M_low + M_mid + M_high) + b_c
    P_g = softmax(aux_g), g in {low, mid}

In eval mode the k largest of P_low are kept, in order of their rows, and only their children are read at mid; of these
the k largest of P_mid, and only their children at high. In training the choice is the perturbed one of
`perturbed_topk`, I in R^{k x N}: children at the same place within their parents are averaged with weights I (which is
I kron identity, never formed), so that the classification loss reaches aux. There, too, only the parents that were
chosen in some sample are read: all others have weight 0.

Thandiackal et al.: Differentiable zooming for multiple instance learning on whole-slide images, ECCV 2022.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from lrmil.mil.card import HeadCard
from lrmil.mil.multi_scale import MultiScaleHead, MultiScaleOutput
from lrmil.mil.perturbed_topk import Jacobian, perturbed_topk
from lrmil.mil.recipe import Recipe
from lrmil.mil.registry import register_head
from lrmil.mil.scales import PatchSource, children_of, ratio_between
from lrmil.settings import Settings


class ZoomMILOptions(Settings):
    """Options of ZoomMIL."""

    k: int = Field(12, ge=1, description="patches to look closer at, at low and again at mid; fewer if there are fewer")
    hidden_dim: int = Field(256, ge=1, description="width of the gated attention")
    out_dim: int = Field(512, ge=1, description="width of the embedded features")
    dropout: float = Field(0.25, ge=0, lt=1, description="dropout of embedded features and of both gates")
    sigma: float = Field(0.002, gt=0, description="standard deviation of the noise on the selection's probabilities")
    samples: int = Field(100, ge=1, description="noise samples a training step")
    jacobian: Jacobian = Field(
        "diagonal", description="gradient of the choice: its diagonal, as published, or the full (unbiased) one"
    )


class _GatedAttention(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.v = nn.Linear(in_dim, hidden_dim)
        self.u = nn.Linear(in_dim, hidden_dim)
        self.w = nn.Linear(hidden_dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, embedded: Tensor) -> Tensor:
        gated = self.dropout(torch.tanh(self.v(embedded))) * self.dropout(torch.sigmoid(self.u(embedded)))
        return self.w(gated).squeeze(1)


class _Magnification(nn.Module):
    """Embedding and attention pooling at one magnification, and the selection's own attention unless it is the last."""

    def __init__(self, in_dim: int, options: ZoomMILOptions, *, selects: bool) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(in_dim, options.out_dim), nn.ReLU(), nn.Dropout(options.dropout))
        sizes = (options.out_dim, options.hidden_dim, options.dropout)
        self.attention = _GatedAttention(*sizes)
        self.selection = _GatedAttention(*sizes) if selects else None

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return M (out_dim,), the attention logits (n,) and the selection's logits (n,)."""
        embedded = self.embed(features)
        logits = self.attention(embedded)
        pooled = torch.softmax(logits, dim=0) @ embedded
        return pooled, logits, None if self.selection is None else self.selection(embedded)


RECIPE = Recipe(
    learning_rate=1e-4,
    epochs=100,
    select_by="weighted_f1",
    schedule="plateau",
    schedule_epochs=5,
    schedule_factor=0.8,
    balanced_sampler=True,
    source="published config files; the default in the program text is a plateau factor of 0.5",
)


@register_head(
    HeadCard(
        name="zoommil",
        title="ZoomMIL: three magnifications, chosen patches only",
        citation="Thandiackal et al., Differentiable zooming for MIL on whole-slide images, ECCV 2022",
        licence_note="original: MIT",
        gives_attention=False,
        recipe=RECIPE,
        scales="many",
    )
)
class ZoomMIL(MultiScaleHead):
    """See the top of this file. Reads scales "low", "mid" and "high"; `bag_feature` is M (out_dim,)."""

    Options = ZoomMILOptions
    options: ZoomMILOptions
    scales = ("low", "mid", "high")

    def __init__(self, in_dim: int, num_classes: int, options: ZoomMILOptions) -> None:
        super().__init__(in_dim, num_classes, options)
        self.low = _Magnification(in_dim, options, selects=True)
        self.mid = _Magnification(in_dim, options, selects=True)
        self.high = _Magnification(in_dim, options, selects=False)
        self.classifier = nn.Linear(options.out_dim, num_classes)

    def score(self, source: PatchSource, *, label: Tensor | None) -> MultiScaleOutput:
        """Look at all low patches, then closer, then closer again."""
        mids_each = ratio_between(source.counts, "low", "mid")
        highs_each = ratio_between(source.counts, "mid", "high")
        device = self.classifier.weight.device

        low_rows = torch.arange(source.counts["low"], device=device)
        low_m, low_logits, low_aux = self.low(source.fetch("low", low_rows))
        parents, weights = self._choose(low_aux)

        mid_rows = children_of(parents, mids_each)
        mid_features = _mix(source.fetch("mid", mid_rows), weights, mids_each)
        mid_m, mid_logits, mid_aux = self.mid(mid_features)
        places, mid_weights = self._choose(mid_aux)

        if weights is None:
            # Every place is one mid patch.
            high_rows = children_of(mid_rows[places], highs_each)
            high_features = source.fetch("high", high_rows)
        else:
            # A place is a mixture of mid patches, and so are its children.
            high_rows = children_of(parents, mids_each * highs_each)
            mixed = _mix(source.fetch("high", high_rows), weights, mids_each * highs_each)
            high_features = _mix(mixed[children_of(places, highs_each)], mid_weights, highs_each)
        high_m, high_logits, _ = self.high(high_features)

        bag_feature = low_m + mid_m + high_m
        return MultiScaleOutput(
            logits=self.classifier(bag_feature),
            bag_feature=bag_feature,
            selected={"low": low_rows, "mid": mid_rows, "high": high_rows},
            scale_attention_logits={"low": low_logits, "mid": mid_logits, "high": high_logits},
            selection_logits={"low": low_aux, "mid": mid_aux},
        )

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the chosen rows, ascending; in training with the weights (k, rows) of the perturbed choice."""
        options = self.options
        k = min(options.k, len(logits))
        if not self.training:
            # The softmax keeps the order, but ties tiny values: choose before it.
            return torch.topk(logits, k, sorted=False).indices.sort().values, None
        return perturbed_topk(
            torch.softmax(logits, dim=0), k, sigma=options.sigma, samples=options.samples, jacobian=options.jacobian
        )


def _mix(features: Tensor, weights: Tensor | None, each: int) -> Tensor:
    """Average the children (U * each, D) of U parents, place by place, into (k * each, D), by weights (k, U)."""
    if weights is None:
        return features
    return (weights @ features.reshape(weights.shape[1], -1)).reshape(weights.shape[0] * each, -1)
