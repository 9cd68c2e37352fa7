"""The attention head: its equations, what it tells, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.errors import HeadError
from lrmil.mil import MILHead, create_head


def _head(in_dim: int = 6, num_classes: int = 3, **options: Any) -> MILHead:
    torch.manual_seed(0)
    return create_head("abmil", in_dim, num_classes, **options)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 12), classes=st.integers(1, 7), gated=st.booleans(), seed=st.integers(0, 99))
def test_it_follows_its_equations(count: int, classes: int, gated: bool, seed: int) -> None:
    head = _head(5, classes, gated=gated, hidden_dim=4)
    bag = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    w = head.state_dict()
    scores = []
    for h in bag:
        u = torch.tanh(w["attention_v.weight"] @ h + w["attention_v.bias"])
        if gated:
            u = u / (1 + torch.exp(-(w["attention_u.weight"] @ h + w["attention_u.bias"])))
        scores.append((w["attention_w.weight"] @ u + w["attention_w.bias"])[0])
    e = torch.stack(scores)
    a = torch.exp(e) / torch.exp(e).sum()
    z = sum(a[n] * bag[n] for n in range(count))
    out = head(bag)
    torch.testing.assert_close(out.attention_logits, e)
    torch.testing.assert_close(out.attention, a)
    torch.testing.assert_close(out.bag_feature, z)
    torch.testing.assert_close(out.logits, w["classifier.weight"] @ z + w["classifier.bias"])
    assert out.logits.shape == (classes,)
    assert out.hidden is not None
    assert out.hidden.shape == (count, 4)
    assert out.losses == {}


def test_the_defaults_are_those_of_the_paper() -> None:
    state = _head(768, 2).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "attention_v.weight": (128, 768),
        "attention_v.bias": (128,),
        "attention_w.weight": (1, 128),
        "attention_w.bias": (1,),
        "classifier.weight": (2, 768),
        "classifier.bias": (2,),
    }


@pytest.mark.parametrize(("source", "width"), [("hidden", 128), ("features", 6)])
def test_an_instance_classifier_changes_no_other_weight(source: str, width: int) -> None:
    plain, with_classifier = _head().state_dict(), _head(instance_classifier=source)
    assert all(torch.equal(plain[k], with_classifier.state_dict()[k]) for k in plain)
    assert with_classifier.state_dict()["instance_classifier.weight"].shape == (2, width)
    out = with_classifier(torch.randn(9, 6))
    assert out.instance_logits is not None
    assert out.instance_logits.shape == (9, 2)


def test_label_and_order_of_instances_do_not_change_the_answer() -> None:
    head, bag = _head(), torch.randn(20, 6)
    order = torch.randperm(20)
    torch.testing.assert_close(head(bag).logits, head(bag[order]).logits)
    torch.testing.assert_close(head(bag).attention[order], head(bag[order]).attention)
    assert torch.equal(head(bag).logits, head(bag, label=torch.tensor(1)).logits)


def test_it_is_built_again_from_its_description() -> None:
    head = _head(gated=True, hidden_dim=16)
    described = json.loads(json.dumps(head.describe()))
    again = create_head(**described)
    again.load_state_dict(head.state_dict())
    bag = torch.randn(4, 6)
    assert torch.equal(again(bag).logits, head(bag).logits)


@pytest.mark.parametrize(
    ("bag", "message"),
    [
        (torch.zeros(4, 7), r"\(4, 7\).*\(N, 6\)"),
        (torch.zeros(6), r"\(N, 6\)"),
        (torch.zeros(0, 6), "no instances"),
        (torch.tensor([[0.0] * 6, [float("nan")] + [0.0] * 5]), "1 of the 2 instances.*row 1"),
        (torch.tensor([[float("-inf")] + [0.0] * 5, [0.0] * 6]), "row 0"),
    ],
)
def test_it_refuses_bad_bags(bag: torch.Tensor, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        _head()(bag)


def test_attention_stays_finite_for_extreme_scores() -> None:
    head = _head()
    with torch.no_grad():
        head.attention_w.weight.fill_(1e4)  # type: ignore[union-attr, operator]
    out = head(torch.randn(50, 6) * 100)
    assert torch.isfinite(out.attention).all()
    torch.testing.assert_close(out.attention.sum(), torch.tensor(1.0))


def test_total_loss_adds_named_terms_and_weighs_the_bag() -> None:
    head = _head()
    out = head(torch.randn(3, 6))
    assert head.total_loss(out, torch.tensor(2.0)) == 2.0
    out.losses["instance"] = torch.tensor(0.25)
    head.bag_loss_weight = 0.5
    assert head.total_loss(out, torch.tensor(2.0)) == 1.25
