"""The layer of Chebyshev polynomials."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.mil.chebyshev import ChebyshevInit, ChebyshevLayer


def test_it_matches_the_original(golden: Callable[[str], Any]) -> None:
    file = golden("hdmil_D768_C2")
    layer = ChebyshevLayer(6, 3, 12)
    layer.load_state_dict({"coefficients": torch.tensor(file["in/cheby_unit/coeffs"])})
    file.expect("out/cheby_unit/y", layer(torch.tensor(file["in/cheby_unit/x"])))


@settings(deadline=None, max_examples=30)
@given(sizes=st.tuples(*[st.integers(1, 4)] * 2), degree=st.integers(1, 16), seed=st.integers(0, 99))
def test_it_follows_its_formula(sizes: tuple[int, int], degree: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = ChebyshevLayer(*sizes, degree).double()
    x = torch.randn(5, sizes[0], dtype=torch.float64)
    angles = torch.arccos(torch.tanh(x))
    wanted = sum(torch.cos(d * angles) @ layer.coefficients[:, :, d] for d in range(degree + 1))
    torch.testing.assert_close(layer(x), wanted)
    assert torch.equal(layer(x[0]), layer(x[:1])[0])


def test_zero_gives_the_constant_of_the_even_polynomials() -> None:
    layer = ChebyshevLayer(4, 2, 7)
    signs = torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0, 0.0, -1.0, 0.0])
    torch.testing.assert_close(layer(torch.zeros(4)), (layer.coefficients * signs).sum(dim=(0, 2)))
    assert layer(torch.zeros(4)).abs().min().item() > 1e-3


def test_gradients_are_finite_where_tanh_saturates_and_right_elsewhere() -> None:
    layer = ChebyshevLayer(3, 1, 12)
    x = torch.tensor([50.0, -50.0, 0.0], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    double = ChebyshevLayer(3, 2, 5).double()
    assert torch.autograd.gradcheck(double, (torch.randn(4, 3, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize(
    ("init", "deviation"),
    [
        ("xavier", math.sqrt(2 / ((200 + 50) * 13))),
        ("kaiming", math.sqrt(2 / (200 * 13))),
        ("normal", 1 / (200 * 13)),
    ],
)
def test_coefficients_are_drawn_with_their_deviation(init: str, deviation: float) -> None:
    torch.manual_seed(0)
    drawn = ChebyshevLayer(200, 50, 12, cast(ChebyshevInit, init)).coefficients
    assert float(drawn.detach().std()) == pytest.approx(deviation, rel=0.02)
    assert abs(float(drawn.detach().mean())) < deviation / 50
