"""Heads that weigh no instances: mean, largest value of each feature, most suspicious instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.errors import CheckpointError, HeadError
from lrmil.mil import MILHead, create_head, load_original


def _bag(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 9), seed=st.integers(0, 99))
def test_mean_and_max_pool_by_feature(count: int, seed: int) -> None:
    bag = _bag(count, 5, seed)
    for name, pool in (("mean_pool", np.mean), ("max_pool", np.max)):
        head = create_head(name, 5, 3)
        pooled = np.array([pool([float(h[d]) for h in bag]) for d in range(5)])
        out = head(bag)
        w, b = head.classifier.weight.detach().numpy(), head.classifier.bias.detach().numpy()
        np.testing.assert_allclose(out.bag_feature.detach(), pooled, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(out.logits.detach(), w @ pooled + b, rtol=1e-4, atol=1e-5)
        assert out.attention is None
        assert out.attention_logits is None


def test_max_pool_joins_features_of_different_instances() -> None:
    """An instance-wise maximum would return one of the rows."""
    out = create_head("max_pool", 2, 2)(torch.tensor([[5.0, 0.0], [0.0, 7.0]]))
    assert out.bag_feature.tolist() == [5.0, 7.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["mean_pool", "max_pool", "instance_max"])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    """A maximum would pass over -inf."""
    bag = _bag(6, 4)
    bag[3, 2] = value
    with pytest.raises(HeadError, match=r"1 of the 6 instances.*row 3"):
        create_head(name, 4, 2).eval()(bag)


def _instance_scores(head: Any, bag: torch.Tensor) -> np.ndarray[Any, Any]:
    state = {k: v.double().numpy() for k, v in head.state_dict().items()}
    h = np.maximum(bag.double().numpy() @ state["embed.weight"].T + state["embed.bias"], 0)
    return h @ state["classifier.weight"].T + state["classifier.bias"]


def _passing_on(classes: int) -> MILHead:
    """A head whose scores of an instance are the instance, where that is not negative."""
    head: Any = create_head("instance_max", classes, classes, embed_dim=classes).eval()
    with torch.no_grad():
        for layer in (head.embed, head.classifier):
            layer.weight.copy_(torch.eye(classes))
            layer.bias.zero_()
    return head


def test_two_classes_take_the_instance_with_the_largest_second_probability() -> None:
    """Not the instance that is surest of either class, nor the one with the largest second logit."""
    head = _passing_on(2)
    # P(class 1): 0.0003, 0.731, 0.880; the second row has the largest second logit, the first the surest verdict.
    out = head(torch.tensor([[8.0, 0.0], [4.0, 5.0], [0.0, 2.0]]))
    assert out.logits.tolist() == [0.0, 2.0]


def test_more_classes_take_the_instance_that_is_surest_of_any() -> None:
    """Class 1 has no special part."""
    head = _passing_on(3)
    assert head(torch.tensor([[0.0, 3.0, 0.0], [6.0, 5.9, 6.0], [4.0, 0.0, 0.0]])).logits.tolist() == [4.0, 0.0, 0.0]


@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 12), classes=st.integers(1, 5), seed=st.integers(0, 99))
def test_instance_max_follows_its_definition(count: int, classes: int, seed: int) -> None:
    torch.manual_seed(seed)
    head = create_head("instance_max", 6, classes, embed_dim=7).eval()
    bag = _bag(count, 6, seed)
    scores = _instance_scores(head, bag)
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    rank = {1: scores[:, 0], 2: p[:, -1]}.get(classes, p.max(axis=1))
    np.testing.assert_allclose(head(bag).logits.detach(), scores[np.argmax(rank)], rtol=1e-4, atol=1e-5)


def test_golden_instance_max(golden: Callable[[str], Any]) -> None:
    file = golden("clam_mil_fc_D768_C2")
    state = {k: torch.from_numpy(v) for k, v in file.under("param/").items()}
    head = load_original("instance_max", state)
    seen = set()

    def expect(key: str, actual: Any) -> None:
        file.expect(key, actual)
        seen.add(key)

    for case in ("N37", "N200"):
        bag = torch.from_numpy(file[f"in/{case}/bag"])
        out = head(bag)
        expect(f"out/{case}/logits", out.logits[None])
        expect(f"out/{case}/Y_prob", head.probabilities(out.logits)[None])
        expect(f"out/{case}/Y_hat", out.logits.argmax()[None, None])
        expect(f"out/{case}/top_feature", out.bag_feature[None])
        one_by_one = torch.stack([head.probabilities(head(row[None]).logits) for row in bag])
        expect(f"out/{case}/instance_probs", one_by_one)
        expect(f"loss/{case}/ce", F.cross_entropy(out.logits[None], torch.from_numpy(file[f"in/{case}/label"])))
    assert seen == {k for k in file.arrays if k.startswith(("out/", "loss/"))}


@pytest.mark.parametrize(
    ("embed", "last", "classes", "dropout"),
    [
        ("fc.0", "classifier", 2, 0.25),
        ("fc.0", "classifiers", 4, 0.25),
        ("classifier.0", "classifier.3", 2, 0.25),
        ("classifier.0", "classifier.2", 2, 0.0),
    ],
)
def test_checkpoints_of_all_versions(embed: str, last: str, classes: int, dropout: float) -> None:
    own = create_head("instance_max", 5, classes, embed_dim=16).eval()
    state = {
        k.replace("embed", embed) if k.startswith("embed") else k.replace("classifier", last): v
        for k, v in own.state_dict().items()
    }
    head = load_original("instance_max", state)
    assert head.describe() == own.describe() | {"dropout": dropout}
    bag = _bag(8, 5)
    assert torch.equal(head(bag).logits, own(bag).logits)


def test_checkpoints_of_other_methods_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint of 'instance_max'"):
        load_original(
            "instance_max", {"classifiers.weight": torch.zeros(2, 4), "attention_net.0.weight": torch.zeros(4)}
        )
