"""DSMIL: a stream of instances finds the critical one of each class, a stream of the bag attends to what is like it.

    c_n = W_0 h_n + b_0 in R^C                        m_c = argmax_n c_{n,c}
    q_n = tanh(W_2 ReLU(W_1 h_n + b_1) + b_2) in R^128      (query: linear  q_n = W_1 h_n + b_1)
    v_n = h_n                                         (passing_v  v_n = ReLU(W_v dropout(h_n) + b_v))
    A_{n,c} = softmax_n( q_n . q_{m_c} / sqrt(128) )        B_c = sum_n A_{n,c} v_n
    y_o = sum_c sum_d F_{o,c,d} B_{c,d} + b_o         every class sees the rows B of all classes

    L = 0.5 l(y, Y) + 0.5 l(max_n c_n, Y)

`loss: bce` is the original's: l is the mean over classes of binary cross-entropies with a one-hot target, and the
probabilities are C sigmoids that need not sum to 1; metrics and answers take each divided by the sum of all. `loss:
ce`, for classes that exclude each other, is cross-entropy and softmax. With `average`, prediction (eval mode) joins
both streams: the probabilities are the mean of those of y and of max_n c_n, and the logits say so; the original adds
the two up, which ranks alike.

What num_classes means: the outputs, C above. For two classes of which one is the absence of the other (tumour or not)
the original has a single output and calls that C = 1: this is num_classes = 2 with `one_output`. The logits are then
(0, y), whose softmax is (1 - sigmoid(y), sigmoid(y)). With num_classes = 1 the one logit is y itself.

Li, Li, Eliceiri: Dual-stream multiple instance learning network for whole slide image classification with
self-supervised contrastive learning, CVPR 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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

_QUERY_DIM = 128


class DSMILOptions(Settings):
    """Options of DSMIL."""

    loss: Literal["ce", "bce"] = Field(
        "ce", description="ce: classes exclude each other; bce: one sigmoid a class, as the original"
    )
    one_output: bool = Field(False, description="two classes by one sigmoid output; needs loss: bce")
    query: Literal["nonlinear", "linear"] = Field("nonlinear", description="two layers with tanh, or one layer")
    passing_v: bool = Field(False, description="project instances before pooling; else they are pooled as they come")
    value_relu: bool = Field(True, description="ReLU after that projection; the program's first version had none")
    dropout_v: float = Field(0.0, ge=0, lt=1, description="dropout before that projection")
    init: Literal["orthogonal", "torch"] = Field(
        "orthogonal", description="first weights: orthogonal with zero biases, as the original, or torch's own"
    )
    average: bool = Field(False, description="predict by the mean of the bag's and the critical instance's probability")


@register_head(
    HeadCard(
        name="dsmil",
        title="DSMIL, dual-stream",
        citation="Li et al., Dual-stream multiple instance learning network, CVPR 2021",
        licence_note="original: MIT",
        gives_attention=True,
        recipe=Recipe(
            learning_rate=1e-4,
            betas=(0.5, 0.9),
            weight_decay=1e-3,
            epochs=50,
            schedule="cosine",
            schedule_epochs=50,
            schedule_factor=0.05,
            select_by="auc+accuracy",
            patience=10,
            shuffle_instances=True,
            source="DSMIL's train_tcga; never its choice of epoch and threshold on the test split",
        ),
    )
)
class DSMIL(MILHead):
    """See the top of this file. `bag_feature` of its output is B (C, D), `hidden` is q (N, 128).

    `class_attention_logits` are q_n . q_{m_c} / sqrt(128), where there are several outputs; `attention` and
    `attention_logits` are those of the predicted class.
    """

    Options = DSMILOptions
    options: DSMILOptions
    stream_weights: ClassVar[Mapping[str, float]] = {"max": 0.5}

    def __init__(self, in_dim: int, num_classes: int, options: DSMILOptions) -> None:
        super().__init__(in_dim, num_classes, options)
        if options.one_output and (num_classes != 2 or options.loss != "bce"):
            raise HeadError(
                f"dsmil with one_output tells two classes apart by a sigmoid, not {num_classes} by {options.loss}.",
                fix="Set loss: bce and use it for two classes, or leave one_output out.",
            )
        outputs = 1 if options.one_output else num_classes
        self.instance_scores = nn.Linear(in_dim, outputs)
        first = nn.Linear(in_dim, _QUERY_DIM)
        self.query: nn.Module = first
        if options.query == "nonlinear":
            self.query = nn.Sequential(first, nn.ReLU(), nn.Linear(_QUERY_DIM, _QUERY_DIM), nn.Tanh())
        self.value: nn.Module = nn.Identity()
        if options.passing_v:
            last = nn.ReLU() if options.value_relu else nn.Identity()
            self.value = nn.Sequential(nn.Dropout(options.dropout_v), nn.Linear(in_dim, in_dim), last)
        self.bag_scores = nn.Conv1d(outputs, outputs, kernel_size=in_dim)
        if options.init == "orthogonal":
            self.apply(_orthogonal)
        # With ce, the bag's own loss is the first half; bce is not the loss of the bag that others compute.
        self.bag_loss_weight = 0.5 if options.loss == "ce" else 0.0

    def score(self, bag: Tensor, *, label: Tensor | None, coords: Tensor | None) -> HeadOutput:
        """Find the critical instances, attend to their like, and classify."""
        instance_scores = self.instance_scores(bag)
        largest, critical = instance_scores.max(dim=0)
        query = self.query(bag)
        attention_logits = query @ query[critical].T / math.sqrt(_QUERY_DIM)
        attention = torch.softmax(attention_logits, dim=0)
        pooled = attention.T @ self.value(bag)
        # The convolution's kernel is as long as its input, so it is one matrix product.
        scores = F.linear(pooled.flatten(), self.bag_scores.weight.flatten(1), self.bag_scores.bias)
        losses = {} if label is None else self._losses(scores, largest, label)
        if self.options.average and not self.training:
            scores = self._averaged(scores, largest)
        counts = int(scores.argmax())
        return HeadOutput(
            logits=torch.cat([torch.zeros_like(scores), scores]) if self.options.one_output else scores,
            attention=attention[:, counts],
            attention_logits=attention_logits[:, counts],
            bag_feature=pooled,
            hidden=query,
            class_attention_logits=attention_logits if len(scores) > 1 else None,
            losses=losses,
            streams={"max": largest[None]},
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        """With `loss: bce` one sigmoid a class, which need not sum to 1; a softmax with `loss: ce` or `one_output`."""
        if self.options.loss == "bce" and not self.options.one_output:
            return torch.sigmoid(logits)
        return super().probabilities(logits)

    def class_shares(self, logits: Tensor) -> Tensor:
        """With one sigmoid a class: each divided by the sum of all; which class has the highest stays."""
        if self.options.loss == "bce" and self.num_classes > 1 and not self.options.one_output:
            # A softmax of their logarithms, so that sigmoids that are all next to 0 can be divided, too.
            return torch.softmax(F.logsigmoid(logits), dim=-1)
        return self.probabilities(logits)

    def total_loss(self, output: HeadOutput, bag_loss: Tensor) -> Tensor:
        """Join both streams; where no class was known to the head, the loss is that of the bag alone."""
        return super().total_loss(output, bag_loss) if output.losses else bag_loss

    def _losses(self, scores: Tensor, largest: Tensor, label: Tensor) -> dict[str, Tensor]:
        outputs = len(scores)
        index = class_index(label, max(outputs, 2) if self.options.loss == "bce" else outputs)
        if self.options.loss == "ce":
            return {"max": 0.5 * F.cross_entropy(largest[None], torch.tensor([index], device=largest.device))}
        target = torch.zeros_like(scores)
        if outputs == 1:
            target[0] = index
        else:
            target[index] = 1.0
        return {
            "bag": 0.5 * F.binary_cross_entropy_with_logits(scores, target),
            "max": 0.5 * F.binary_cross_entropy_with_logits(largest, target),
        }

    def _averaged(self, scores: Tensor, largest: Tensor) -> Tensor:
        """Return logits of the mean probability of both streams, computed in logarithms so that none saturates."""
        if self.options.loss == "ce":
            mean = torch.logaddexp(torch.log_softmax(scores, dim=0), torch.log_softmax(largest, dim=0))
            return mean - math.log(2.0)
        yes = torch.logaddexp(F.logsigmoid(scores), F.logsigmoid(largest))
        no = torch.logaddexp(F.logsigmoid(-scores), F.logsigmoid(-largest))
        return yes - no


def _orthogonal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv1d):
        nn.init.orthogonal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
