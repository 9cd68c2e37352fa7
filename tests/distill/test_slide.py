"""Eqs. 3 to 6 against plain numpy, their edge cases, and where gradients go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lrmil.distill import (
    RegionScores,
    Stage2LossSettings,
    bag_distillation_loss,
    hard_attention_loss,
    region_scores,
    soft_attention_loss,
    student_loss,
)
from lrmil.mil import create_head


def _softmax(x: Any) -> Any:
    e = np.exp(np.asarray(x, dtype=np.float64) - np.max(x))
    return e / e.sum()


def _kl(p: Any, q: Any) -> float:
    return float(np.sum(p * (np.log(p) - np.log(q))))


def _scores(values: list[float], matched: list[bool] | None = None) -> RegionScores:
    mask = torch.tensor([True] * len(values) if matched is None else matched)
    return RegionScores(torch.tensor(values), mask, bool(mask.all()), not bool(mask.any()))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), classes=st.sampled_from([2, 3, 7]), t=st.sampled_from([0.5, 1.0, 4.0]))
def test_bag_loss_is_teacher_against_student(seed: int, classes: int, t: float) -> None:
    teacher, student = torch.randn(2, classes, generator=torch.Generator().manual_seed(seed)) * 3
    kl = _kl(_softmax(teacher.numpy() / t), _softmax(student.numpy() / t))
    assert float(bag_distillation_loss(student, teacher, temperature=t)) == pytest.approx(
        t * t * kl, rel=1e-4, abs=1e-6
    )
    plain = bag_distillation_loss(student, teacher, temperature=t, temperature_squared=False)
    assert float(plain) == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert bag_distillation_loss(teacher, teacher, temperature=t) == 0


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), regions=st.integers(1, 9), children=st.integers(0, 30), mode=st.integers(0, 2))
def test_region_scores_against_loops(seed: int, regions: int, children: int, mode: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(children) * 4).astype(np.float32)
    region = rng.integers(-1, regions, children)
    options: dict[str, Any] = [{}, {"aggregation": "max"}, {"teacher_scores": "softmax"}][mode]
    found = region_scores(torch.from_numpy(logits), torch.from_numpy(region), regions, **options)
    for r in range(regions):
        own = logits[region == r]
        assert bool(found.matched[r]) == (len(own) > 0)
        if not len(own):
            assert found.score[r] == 0
            continue
        wanted = [np.mean, np.max, lambda _, r=r: np.log(_softmax(logits)[region == r].sum())][mode](own)
        assert float(found.score[r]) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert found.all_matched == bool(found.matched.all())
    assert found.none_matched == (not bool(found.matched.any()))


def test_softmax_scores_make_the_target_the_share_of_attention() -> None:
    logits, region = torch.tensor([2.0, 0.0, 1.0, -1.0]), torch.tensor([0, 0, 1, 2])
    scores = region_scores(logits, region, 3, teacher_scores="softmax")
    share = torch.softmax(logits, 0)
    expected = torch.stack([share[:2].sum(), share[2], share[3]])
    torch.testing.assert_close(torch.softmax(scores.score, 0), expected)
    assert soft_attention_loss(torch.log(expected) + 5, scores) == pytest.approx(0, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), count=st.integers(1, 12), t=st.sampled_from([0.5, 1.0, 2.0]))
def test_soft_loss_leaves_unmatched_regions_out_of_both_sides(seed: int, count: int, t: float) -> None:
    rng = np.random.default_rng(seed)
    student, score = rng.standard_normal((2, count)).astype(np.float32)
    matched = rng.random(count) < 0.6
    score[~matched] = 0
    teacher = _scores(score.tolist(), matched.tolist())
    own = torch.tensor(student, requires_grad=True)
    loss = soft_attention_loss(own, teacher, temperature=t)
    if not matched.any():
        assert loss == 0
        return
    kl = t * t * _kl(_softmax(score[matched] / t), _softmax(student[matched] / t))
    assert loss.item() == pytest.approx(kl, rel=1e-3, abs=1e-5)
    loss.backward()
    assert own.grad is not None
    assert not own.grad[~torch.tensor(matched)].any()
    mean = soft_attention_loss(own, teacher, temperature=t, reduction="mean")
    assert mean.item() == pytest.approx(kl / matched.sum(), rel=1e-3, abs=1e-5)
    released = soft_attention_loss(own, teacher, temperature=t, unmatched="released", reduction="mean")
    everyone = t * t * _kl(_softmax(score / t), _softmax(student / t)) / count
    assert released.item() == pytest.approx(everyone, rel=1e-3, abs=1e-5)


def test_hard_loss_by_hand() -> None:
    teacher = _scores([5.0, -3.0, 0.1, 4.0, -2.0, 0.0], [True, True, True, True, True, False])
    g = torch.tensor([0.3, 0.7, -9.0, -0.4, 1.1, 9.0])
    sigmoid = 1 / (1 + np.exp(-g.numpy()))
    wanted = -np.mean(np.log([sigmoid[0], sigmoid[3], 1 - sigmoid[1], 1 - sigmoid[4]]))
    # Five regions count, so k = 2 at most however many are asked for.
    for k in (2, 4, 1000):
        assert float(hard_attention_loss(g, teacher, k=k)) == pytest.approx(wanted, rel=1e-5)
    assert float(hard_attention_loss(g, teacher, k=1)) == pytest.approx(
        -np.mean(np.log([sigmoid[0], 1 - sigmoid[1]])), rel=1e-5
    )
    two_way = torch.stack([torch.zeros(6), g], dim=1)
    assert float(hard_attention_loss(two_way, teacher, k=2)) == pytest.approx(wanted, rel=1e-5)


def test_an_unmatched_region_enters_the_hard_sets_only_as_released() -> None:
    teacher = _scores([-1.0, -2.0, -3.0, -4.0, 0.0], [True] * 4 + [False])
    g = torch.zeros(5, requires_grad=True)
    hard_attention_loss(g, teacher, k=1).backward()
    assert g.grad is not None
    assert g.grad.nonzero().flatten().tolist() == [0, 3]
    g.grad = None
    hard_attention_loss(g, teacher, k=1, unmatched="released").backward()
    assert g.grad.nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize("unmatched", ["exclude", "released"])
def test_one_region_or_no_match_gives_no_guidance(unmatched: Any) -> None:
    one, none = _scores([2.0]), _scores([0.0, 0.0, 0.0, 0.0], [False] * 4)
    for teacher, count in ((one, 1), (none, 4)):
        e = torch.randn(count, requires_grad=True)
        assert hard_attention_loss(e, teacher, k=4, unmatched=unmatched) == 0
        assert soft_attention_loss(e, teacher, unmatched=unmatched) == 0
    # One matched region of several says nothing either: its share is 1 on both sides.
    assert soft_attention_loss(torch.randn(3), _scores([0.0, 3.0, 0.0], [False, True, False])) == 0


def test_guidance_is_not_skipped_where_scores_cancel() -> None:
    # The sum of signed logits is 0 here; that says nothing about the guidance.
    teacher = _scores([3.0, -3.0, 1.0, -1.0])
    assert soft_attention_loss(torch.zeros(4), teacher) > 0.1
    assert hard_attention_loss(torch.zeros(4), teacher, k=1) > 0.1


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize(
    ("mode", "source", "reached"),
    [
        ("attention", "none", {"attention_v", "attention_w"}),
        ("hidden", "hidden", {"attention_v", "instance_classifier"}),
        ("released", "features", {"instance_classifier"}),
    ],
)
def test_where_the_hard_loss_reaches(mode: Any, source: str, reached: set[str], classes: int) -> None:
    head = create_head("abmil", 6, classes, instance_classifier=source)
    out = head(torch.randn(10, 6))
    s = Stage2LossSettings(lambda_bag=0, lambda_soft=0, hard_mode=mode)
    teacher = _scores(torch.randn(10).tolist())
    loss = student_loss(
        torch.zeros(()), out.logits, out.attention_logits, out.instance_logits, torch.zeros(classes), teacher, s
    )
    loss.total.backward()
    touched = {n.split(".")[0] for n, p in head.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert touched == reached
    assert set(loss.terms) == {"ce", "hard"}


def test_student_loss_adds_the_four_terms() -> None:
    torch.manual_seed(0)
    head = create_head("abmil", 6, 3)
    out = head(torch.randn(12, 6))
    teacher, logits, ce = _scores(torch.randn(12).tolist()), torch.randn(3), torch.tensor(0.7)
    s = Stage2LossSettings(
        lambda_ce=2, lambda_bag=3, lambda_soft=5, lambda_hard=7, bag_temperature=2, attention_temperature=4, hard_k=3
    )
    loss = student_loss(ce, out.logits, out.attention_logits, None, logits, teacher, s)
    bag = bag_distillation_loss(out.logits, logits, temperature=2)
    soft = soft_attention_loss(out.attention_logits, teacher, temperature=4)
    hard = hard_attention_loss(out.attention_logits, teacher, k=3)
    torch.testing.assert_close(loss.total, 2 * ce + 3 * bag + 5 * soft + 7 * hard)
    assert {k: v.item() for k, v in loss.terms.items()} == {
        "ce": ce.item(), "bag": bag.item(), "soft": soft.item(), "hard": hard.item(),
    }  # fmt: skip


def test_terms_of_weight_zero_are_not_computed() -> None:
    s = Stage2LossSettings(lambda_bag=0, lambda_soft=0, lambda_hard=0)
    ce, nan = torch.tensor(0.5), torch.full((3,), float("nan"))
    loss = student_loss(ce, nan, None, None, nan, _scores([0.0, 1.0, 2.0]), s)
    assert loss.total is ce
    assert loss.terms == {"ce": ce}


def test_a_head_without_what_the_loss_needs_is_refused() -> None:
    args = (torch.zeros(()), torch.zeros(2), None, None, torch.zeros(2), _scores([0.0, 1.0]))
    with pytest.raises(ValueError, match="attention"):
        student_loss(*args, Stage2LossSettings())
    with pytest.raises(ValueError, match="instance classifier"):
        student_loss(*args, Stage2LossSettings(lambda_soft=0, hard_mode="hidden"))


def test_the_defaults_are_the_recommended_ones_and_nonsense_is_refused() -> None:
    s = Stage2LossSettings()
    assert (s.lambda_ce, s.lambda_bag, s.lambda_soft, s.lambda_hard) == (1, 1, 1, 1)
    assert (s.bag_temperature, s.attention_temperature, s.temperature_squared) == (1, 1, True)
    assert (s.hard_k, s.hard_mode, s.unmatched, s.attn_kl_reduction) == (4, "attention", "exclude", "sum")
    assert (s.teacher_scores, s.region_aggregation) == ("logits", "mean")
    with pytest.raises(ValidationError, match="largest log"):
        Stage2LossSettings(unmatched="released", teacher_scores="softmax")
    with pytest.raises(ValidationError):
        Stage2LossSettings(lambda_bag=-1)
