"""Large bags: answers without a matrix of N x N, in eval mode and in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrmil.mil import create_head

WIDTH = 8
HEADS: dict[str, dict[str, Any]] = {
    "mean_pool": {},
    "max_pool": {},
    "instance_max": {"embed_dim": 16},
    "abmil": {"hidden_dim": 16},
    "abmil_original": {"hidden_dim": 16},
    "clam_sb": {"embed_dim": 16, "attention_dim": 16, "subtyping": True},
    "clam_mb": {"embed_dim": 16, "attention_dim": 16, "subtyping": True},
    "dsmil": {"passing_v": True},
}


class Largest(TorchDispatchMode):
    """Watches every operation, backward ones too, for the largest tensor it makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_the_watch_sees_operations_forward_and_backward() -> None:
    bag = torch.randn(300, WIDTH, requires_grad=True)
    with Largest() as largest:
        scores = bag @ bag[:2].T
    assert largest.elements == 300 * 2
    with Largest() as largest:
        scores.sum().backward()
    assert largest.elements == 300 * WIDTH
    with Largest() as largest:
        bag @ bag.T
    assert largest.elements == 300 * 300


@pytest.mark.parametrize("name", HEADS)
def test_a_training_step_makes_nothing_that_grows_with_the_square(name: str) -> None:
    head = create_head(name, WIDTH, 2, **HEADS[name]).train()
    count, label = 50_000, torch.tensor(1)
    bag = torch.randn(count, WIDTH)
    with Largest() as largest:
        out = head(bag, label=label)
        head.total_loss(out, F.cross_entropy(out.logits[None], label[None])).backward()
    assert 0 < largest.elements <= count * 128
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", HEADS)
def test_prediction_of_the_largest_bags(name: str) -> None:
    head = create_head(name, WIDTH, 2, **HEADS[name]).eval()
    bag = torch.randn(200_000, WIDTH)
    with torch.inference_mode(), Largest() as largest:
        out = head(bag)
    assert largest.elements <= len(bag) * 128
    assert torch.isfinite(out.logits).all()
    if out.attention is not None:
        assert float(out.attention.sum()) == pytest.approx(1.0, abs=1e-3)
    with torch.inference_mode():
        assert torch.equal(head(bag).logits, out.logits)
