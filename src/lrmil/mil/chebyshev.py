"""A Kolmogorov-Arnold layer of Chebyshev polynomials.

    u = tanh(x)      T_0 = 1      T_1 = u      T_d = 2 u T_{d-1} - T_{d-2}
    y_o = sum_i sum_{d=0..degree} coefficients[i, o, d] T_d(u_i)

No bias: T_0 is one. At x = 0 the answer is not zero but sum_i (c_0 - c_2 + c_4 - ...).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

ChebyshevInit = Literal["xavier", "kaiming", "normal"]


class ChebyshevLayer(nn.Module):
    """Maps (..., in_dim) to (..., out_dim). `coefficients` is (in_dim, out_dim, degree + 1).

    Coefficients are drawn from a normal distribution whose standard deviation is, with d + 1 = degree + 1 terms,
    sqrt(2 / ((in_dim + out_dim) (d + 1))) for "xavier", sqrt(2 / (in_dim (d + 1))) for "kaiming" and
    1 / (in_dim (d + 1)) for "normal".
    """

    def __init__(self, in_dim: int, out_dim: int, degree: int, init: ChebyshevInit = "xavier") -> None:
        super().__init__()
        terms = degree + 1
        deviation = {
            "xavier": math.sqrt(2.0 / ((in_dim + out_dim) * terms)),
            "kaiming": math.sqrt(2.0 / (in_dim * terms)),
            "normal": 1.0 / (in_dim * terms),
        }[init]
        self.coefficients = nn.Parameter(torch.randn(in_dim, out_dim, terms) * deviation)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_dim)."""
        u = torch.tanh(x)
        # By recurrence: the closed form cos(d arccos u) has no finite gradient where tanh saturates.
        terms = [torch.ones_like(u), u]
        while len(terms) < self.coefficients.shape[2]:
            terms.append(2.0 * u * terms[-1] - terms[-2])
        return torch.einsum("...id,iod->...o", torch.stack(terms, dim=-1), self.coefficients)
