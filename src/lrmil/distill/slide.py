"""Slide-level distillation, stage 2: the LR student head learns from the HR teacher head of the same slide.

(3)  L_bag  = tb^2 KL( softmax(y_HR / tb) || softmax(y_LR / tb) )
     a_r    = mean (or max) over the children n of region r of the teacher's attention logit e_HR[n]
(4)  L_soft = ta^2 KL( softmax(a / ta) || softmax(e_LR / ta) ),   softmax over the regions of the slide
(5)  L_hard = 1/(2k) sum over r in T_k and B_k of loss(g_r, 1 on T_k and 0 on B_k)
     T_k, B_k: the regions of the k largest and k smallest a_r;  k <= N/2, and L_hard = 0 if that leaves none
(6)  L_stu  = CE + l_bag L_bag + l_soft L_soft + l_hard L_hard

g_r is the student's own attention logit e_LR[r] (`hard_mode: attention`), or a 2-way classifier's verdict on the
attention's hidden vector (`hidden`, as CLAM classifies instances) or on the raw features (`released`, as the authors'
code, where it shares no weight with anything that predicts and so cannot change a prediction).

Hinton, Vinyals, Dean: Distilling the knowledge in a neural network, 2015 (temperature); Lu et al.: CLAM, 2021 (5).
Regions without a child have no a_r: they are left out of (4) and (5), unless `unmatched: released` counts them as 0.

Shapes. N regions (instances of the student), M children (instances of the teacher), C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from lrmil.settings import Settings

Unmatched = Literal["exclude", "released"]
TeacherScores = Literal["logits", "softmax"]
RegionAggregation = Literal["mean", "max"]
BagDistance = Callable[[Tensor, Tensor], Tensor]
"""teacher's logits (C,), student's logits (C,) to a scalar"""


class Stage2LossSettings(Settings):
    """Weights and variants of the student's loss."""

    lambda_ce: float = Field(1.0, ge=0, description="weight of the cross-entropy with the slide's label")
    lambda_bag: float = Field(1.0, ge=0, description="weight of the teacher's logits")
    lambda_soft: float = Field(1.0, ge=0, description="weight of the teacher's attention over regions")
    lambda_hard: float = Field(1.0, ge=0, description="weight of its most and least attended regions")
    bag_temperature: float = Field(1.0, gt=0, description="tau_b, softens both sides of L_bag")
    attention_temperature: float = Field(1.0, gt=0, description="tau_a, softens both sides of L_soft")
    temperature_squared: bool = Field(True, description="multiply both KLs by their squared temperature")
    hard_k: int = Field(4, ge=1, description="k: regions at either end; at most half of a slide's regions are used")
    hard_mode: Literal["attention", "hidden", "released"] = Field(
        "attention", description="what L_hard supervises; released has no effect on predictions"
    )
    teacher_scores: TeacherScores = Field(
        "logits", description="region score: logits aggregated, or softmax mass of the region's children"
    )
    region_aggregation: RegionAggregation = Field("mean", description="how logits of children become a region's")
    unmatched: Unmatched = Field(
        "exclude", description="regions without a child: left out, or given score 0 (released)"
    )
    attn_kl_reduction: Literal["sum", "mean"] = Field(
        "sum", description="sum is the KL; mean divides it by the number of regions, as the authors' code does"
    )

    @model_validator(mode="after")
    def _check(self) -> Stage2LossSettings:
        if self.unmatched == "released" and self.teacher_scores == "softmax":
            raise ValueError(
                "unmatched: released gives regions without a child the score 0, a middling logit but the largest log "
                "of a share; use it with teacher_scores: logits"
            )
        return self


@dataclass(frozen=True, slots=True)
class RegionScores:
    """What the teacher thinks of each region of the student."""

    score: Tensor
    """(N,) float32, 0 where unmatched"""
    matched: Tensor
    """(N,) bool, whether the region has a child"""
    all_matched: bool
    none_matched: bool


def bag_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, temperature_squared: bool = True
) -> Tensor:
    """Eq. (3), from logits (C,) of both; KL with the teacher as reference. No gradient flows into the teacher."""
    return _kl(teacher_logits, student_logits, temperature, temperature_squared)


def region_scores(
    teacher_attention_logits: Tensor,
    region: Tensor,
    num_regions: int,
    *,
    teacher_scores: TeacherScores = "logits",
    aggregation: RegionAggregation = "mean",
) -> RegionScores:
    """Turn the teacher's scores of M children into scores of N regions.

    With `teacher_scores="softmax"` a region's score is the log of the attention that its children receive together, so
    that softmax(score) is that share itself; `aggregation` is not used then. (Softmaxing averaged shares a second time
    would give a nearly uniform target.)

    Args:
        teacher_attention_logits: (M,).
        region: (M,) int64, row 0..N-1 of the student's bag; -1 for a child that lies in none of its regions.
        num_regions: N.
        teacher_scores: see above.
        aggregation: mean or max of the children's logits.
    """
    values = teacher_attention_logits.detach().float()
    if teacher_scores == "softmax":
        values = torch.log_softmax(values, dim=0)
    if len(values) and bool((region < 0).any()):
        values, region = values[region >= 0], region[region >= 0]
    zeros = torch.zeros(num_regions, device=values.device)
    count = zeros.index_add(0, region, torch.ones_like(values))
    matched = count > 0
    if teacher_scores == "logits" and aggregation == "mean":
        score = zeros.index_add(0, region, values) / count.clamp(min=1)
    else:
        score = zeros.scatter_reduce(0, region, values, "amax", include_self=False)
        if teacher_scores == "softmax":
            mass = zeros.index_add(0, region, torch.exp(values - score[region]))
            score = torch.where(matched, score + torch.log(mass.clamp(min=1)), 0.0)
    number = int(matched.sum())
    return RegionScores(score, matched, all_matched=number == num_regions, none_matched=number == 0)


def soft_attention_loss(
    student_attention_logits: Tensor,
    teacher: RegionScores,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    unmatched: Unmatched = "exclude",
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Eq. (4), from the student's attention logits (N,). 0 if no region has a child, or only one counts."""
    student, score = _counted(student_attention_logits, teacher, unmatched)
    if len(score) == 0:
        return student_attention_logits.new_zeros(())
    loss = _kl(score, student, temperature, temperature_squared)
    return loss / len(score) if reduction == "mean" else loss


def hard_attention_loss(
    instance_logits: Tensor, teacher: RegionScores, *, k: int, unmatched: Unmatched = "exclude"
) -> Tensor:
    """Eq. (5). g_r are logits (N,) for binary cross-entropy, or (N, 2) for two-class cross-entropy.

    k is cut to half of the regions that count, so that top and bottom never overlap; 0 if nothing is left.
    """
    own, score = _counted(instance_logits, teacher, unmatched)
    k = min(k, len(score) // 2)
    if k < 1:
        return instance_logits.new_zeros(())
    top, bottom = top_and_bottom(score, k)
    chosen = own[torch.cat([top, bottom])]
    target = torch.zeros(2 * k, device=own.device)
    target[:k] = 1.0
    if own.ndim == 1:
        return F.binary_cross_entropy_with_logits(chosen, target)
    return F.cross_entropy(chosen, target.long())


def top_and_bottom(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the rows of the k largest scores, largest first, and of the k smallest, smallest first."""
    return torch.topk(score, k).indices, torch.topk(score, k, largest=False).indices


@dataclass(frozen=True, slots=True)
class StudentLoss:
    """L_stu and its terms before weighting, by name: ce, and those of bag, soft, hard whose weight is not 0."""

    total: Tensor
    terms: dict[str, Tensor]


def student_loss(
    ce: Tensor,
    student_logits: Tensor,
    student_attention_logits: Tensor | None,
    instance_logits: Tensor | None,
    teacher_logits: Tensor,
    teacher: RegionScores,
    settings: Stage2LossSettings,
    *,
    bag_distance: BagDistance | None = None,
) -> StudentLoss:
    """Eq. (6). Terms of weight 0 are not computed at all, so that they change no bit of the result.

    Args:
        ce: scalar, loss of the slide's label: cross-entropy, or what the head makes of the loss of its task, with its
            own terms.
        student_logits: (C,).
        student_attention_logits: (N,); needed for the soft term and for `hard_mode: attention`.
        instance_logits: (N, 2); needed for the other hard modes.
        teacher_logits: (C,).
        teacher: see `region_scores`.
        settings: weights and variants.
        bag_distance: L_bag of tasks other than classification, from the logits (C,) of teacher and student; None is
            Eq. (3).
    """
    s = settings
    total, terms = ce if s.lambda_ce == 1.0 else s.lambda_ce * ce, {"ce": ce}
    if s.lambda_bag:
        if bag_distance is None:
            terms["bag"] = bag_distillation_loss(
                student_logits, teacher_logits, temperature=s.bag_temperature, temperature_squared=s.temperature_squared
            )
        else:
            terms["bag"] = bag_distance(teacher_logits, student_logits)
        total = total + s.lambda_bag * terms["bag"]
    if s.lambda_soft:
        terms["soft"] = soft_attention_loss(
            _needed(student_attention_logits, "attention"),
            teacher,
            temperature=s.attention_temperature,
            temperature_squared=s.temperature_squared,
            unmatched=s.unmatched,
            reduction=s.attn_kl_reduction,
        )
        total = total + s.lambda_soft * terms["soft"]
    if s.lambda_hard:
        own = student_attention_logits if s.hard_mode == "attention" else instance_logits
        terms["hard"] = hard_attention_loss(
            _needed(own, "attention" if s.hard_mode == "attention" else "instance classifier"),
            teacher,
            k=s.hard_k,
            unmatched=s.unmatched,
        )
        total = total + s.lambda_hard * terms["hard"]
    return StudentLoss(total, terms)


def _kl(reference: Tensor, learner: Tensor, temperature: float, squared: bool) -> Tensor:
    """KL( softmax(reference/t) || softmax(learner/t) ) of 1-D logits, times t**2 if `squared`; reference detached."""
    log_p = torch.log_softmax(reference.detach().float() / temperature, dim=0)
    log_q = torch.log_softmax(learner.float() / temperature, dim=0)
    loss = (log_p.exp() * (log_p - log_q)).sum()
    return loss * temperature**2 if squared else loss


def _counted(own: Tensor, teacher: RegionScores, unmatched: Unmatched) -> tuple[Tensor, Tensor]:
    """Student's values and teacher's scores of the regions that count. None do on a slide without any child."""
    if teacher.none_matched:
        return own[:0], teacher.score[:0]
    if unmatched == "released" or teacher.all_matched:
        return own, teacher.score
    return own[teacher.matched], teacher.score[teacher.matched]


def _needed(value: Tensor | None, what: str) -> Tensor:
    if value is None:
        raise ValueError(f"this loss needs the student's {what}, which its head does not give")
    return value
