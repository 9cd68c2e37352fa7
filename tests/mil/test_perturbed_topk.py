"""The choice of k patches that lets a gradient through."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrmil.errors import HeadError
from lrmil.mil import perturbed_topk as module
from lrmil.mil.perturbed_topk import Jacobian, perturbed_topk


def _dense(scores: Tensor, k: int, noise: Tensor, sigma: float, jacobian: Jacobian = "diagonal") -> Tensor:
    rows, weights = perturbed_topk(scores, k, sigma=sigma, noise=noise, jacobian=jacobian)
    return weights.new_zeros(k, len(scores)).index_copy(1, rows, weights)


def _by_formula(scores: Tensor, k: int, noise: Tensor, sigma: float) -> Tensor:
    """One-hot choices (S, k, N), as the formula has them."""
    chosen = torch.topk(scores + sigma * noise, k).indices.sort(dim=1).values
    return torch.nn.functional.one_hot(chosen, len(scores)).to(scores.dtype)


@pytest.mark.parametrize("case", ["a", "b"])
def test_choice_and_gradient_are_the_original_ones(golden: Callable[[str], Any], case: str) -> None:
    file = golden("zoommil_perturbed_topk")
    k, samples, sigma = file[f"in/{case}/k_samples_sigma"]
    x, noise, grad = (torch.tensor(file[f"in/{case}/{name}"]) for name in ("x", "noise", "grad_out"))
    assert noise.shape[1] == samples
    x.requires_grad_()
    choice = torch.stack([_dense(row, int(k), own, sigma) for row, own in zip(x, noise, strict=True)])
    file.expect(f"out/{case}/indicators", choice)
    choice.backward(grad)
    file.expect(f"out/{case}/grad_x", x.grad)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 9), data=st.data(), seed=st.integers(0, 999))
def test_it_follows_its_formulas(count: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, count))
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, generator=g, dtype=torch.float64).requires_grad_()
    noise, grad = (torch.randn(n, count, generator=g, dtype=torch.float64) for n in (7, k))
    one_hot = _by_formula(scores.detach(), k, noise, 0.5)
    wanted = {
        "diagonal": torch.einsum("kd,skd,sd->d", grad, one_hot, noise) / (7 * 0.5),
        "full": torch.einsum("kn,skn,sd->d", grad, one_hot, noise) / (7 * 0.5),
    }
    for jacobian, answer in wanted.items():
        choice = _dense(scores, k, noise, 0.5, jacobian)  # type: ignore[arg-type]
        torch.testing.assert_close(choice, one_hot.mean(0))
        torch.testing.assert_close(torch.autograd.grad(choice, scores, grad)[0], answer)


def test_rows_are_the_indices_that_were_chosen_ascending() -> None:
    noise = torch.zeros(3, 6)
    noise[2, 5] = 10.0
    rows, weights = perturbed_topk(torch.tensor([0.1, 0.9, 0.2, 0.8, 0.0, 0.0]), 2, sigma=1.0, noise=noise)
    assert rows.tolist() == [1, 3, 5]
    # The first place always has row 1; the second has row 3 twice and row 5 once.
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0, 0.0], [0.0, 2 / 3, 1 / 3]]))


def test_the_full_jacobian_is_the_gradient_of_the_smoothed_choice_and_the_diagonal_its_diagonal() -> None:
    # The best of two is the first with probability Phi((x1 - x2) / (sigma sqrt 2)): compare with finite differences.
    sigma, x = 0.3, torch.tensor([0.2, 0.1], dtype=torch.float64, requires_grad=True)
    noise = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def first(a: float, b: float) -> float:
        return 0.5 * (1 + math.erf((a - b) / (sigma * 2)))

    step = 1e-4
    slope = (first(0.2 + step, 0.1) - first(0.2 - step, 0.1)) / (2 * step)
    jacobians: dict[str, Tensor] = {}
    for kind in ("diagonal", "full"):
        choice = _dense(x, 1, noise, sigma, kind)[0]  # type: ignore[arg-type]
        assert abs(float(choice[0].detach()) - first(0.2, 0.1)) < 5e-3
        jacobians[kind] = torch.stack([torch.autograd.grad(choice[i], x, retain_graph=True)[0] for i in range(2)])
    wanted = torch.tensor([[slope, -slope], [-slope, slope]], dtype=torch.float64)
    torch.testing.assert_close(jacobians["full"], wanted, rtol=0.03, atol=0.0)
    torch.testing.assert_close(jacobians["diagonal"], torch.diag(wanted.diag()), rtol=0.03, atol=0.0)


def test_noise_is_drawn_from_the_global_generator_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NOISE_VALUES", 100)
    scores = torch.rand(30)
    torch.manual_seed(5)
    rows, weights = perturbed_topk(scores, 3, sigma=0.1, samples=10)
    torch.manual_seed(5)
    noise = torch.cat([torch.randn(3, 30), torch.randn(3, 30), torch.randn(3, 30), torch.randn(1, 30)])
    again = perturbed_topk(scores, 3, sigma=0.1, noise=noise)
    assert torch.equal(rows, again[0])
    assert torch.equal(weights, again[1])
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_what_is_kept_for_the_gradient_does_not_grow_with_the_number_of_patches() -> None:
    held: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t.numel()), t)[1], lambda t: t):
        scores = torch.rand(50_000).requires_grad_()
        rows, weights = perturbed_topk(torch.softmax(scores, 0), 12, sigma=0.002)
        loss = weights.square().sum()
    loss.backward()
    assert len(rows) <= 12 * 100
    assert weights.shape == (12, len(rows))
    assert max(held) <= 50_000  # the softmax; (S, k, N) would be 60 million
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("k", [0, 4])
def test_more_or_fewer_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(HeadError, match=f"cannot choose {k} of 3"):
        perturbed_topk(torch.rand(3), k, sigma=0.1)


def test_all_of_them_may_be_chosen() -> None:
    rows, weights = perturbed_topk(torch.rand(3), 3, sigma=0.1, samples=4)
    assert rows.tolist() == [0, 1, 2]
    torch.testing.assert_close(weights, torch.eye(3))
