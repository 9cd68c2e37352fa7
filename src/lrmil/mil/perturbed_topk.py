"""Choosing the k best of N scores so that a gradient reaches the scores.

Scores are shaken S times by Gaussian noise, and the choices averaged:

    I = (1/S) sum_s onehot(sort(topk(x + sigma e_s)))          in R^{k x N};  row j: the j-th chosen index, ascending

    diagonal   dL/dx_d = sum_j G_jd (1/(S sigma)) sum_s onehot_sjd e_sd                               with G = dL/dI
    full       dL/dx_d = (1/(S sigma)) sum_s e_sd sum_jn G_jn onehot_sjn

"full" is the unbiased gradient of the smoothed choice. "diagonal" keeps of it only how I_jd answers to x_d itself; this
is what published implementations compute. Cordonnier et al.: Differentiable patch selection for image recognition, CVPR
2021; Berthet et al.: Learning with differentiable perturbed optimizers, NeurIPS 2020.

At most S*k columns of I are not zero. Only those are ever held: I is returned as its columns `rows` (U,) and the
weights (k, U) in them. G matters in no other column, so that no gradient is lost.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lrmil.errors import HeadError

Jacobian = Literal["diagonal", "full"]
_NOISE_VALUES = 2**20
"""Noise values drawn at a time"""


def perturbed_topk(
    scores: Tensor,
    k: int,
    *,
    sigma: float,
    samples: int = 100,
    jacobian: Jacobian = "diagonal",
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the k largest of `scores` under noise.

    Args:
        scores: (N,) float.
        k: how many, 1 to N.
        sigma: standard deviation of the noise; of the order of the differences between scores.
        samples: S, drawn from torch's global generator.
        jacobian: see the top of this file.
        noise: (S, N) standard normal, instead of drawing it.

    Returns:
        rows (U,) int64, ascending: every index that was chosen at least once. weights (k, U): the averaged choice, each
        row summing to 1; differentiable by `scores`.

    Raises:
        HeadError: k is not within 1 to N.
    """
    count = len(scores)
    if not 1 <= k <= count:
        raise HeadError(f"cannot choose {k} of {count} patches.", fix=f"Choose 1 to {count}.")
    if noise is not None:
        samples = len(noise)
    picks, kept = [], []
    with torch.no_grad():
        step = max(1, _NOISE_VALUES // count)
        for start in range(0, samples, step):
            size = (min(step, samples - start), count)
            shake = (
                torch.randn(size, dtype=scores.dtype, device=scores.device) if noise is None else noise[start:][:step]
            )
            pick = torch.topk(scores + sigma * shake, k, dim=1, sorted=False).indices.sort(dim=1).values
            picks.append(pick)
            # The diagonal needs the noise where something was picked, the full Jacobian all of it.
            kept.append(shake.gather(1, pick) if jacobian == "diagonal" else shake)
        rows, slots = torch.unique(torch.cat(picks), return_inverse=True)
    return rows, _Indicator.apply(scores, rows, slots, torch.cat(kept), sigma, jacobian)


class _Indicator(torch.autograd.Function):
    """The averaged choice (k, U), from picks that have been made: slots (S, k) index into rows (U,)."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, rows: Tensor, slots: Tensor, noise: Tensor, sigma: float, jacobian: Jacobian
    ) -> Tensor:
        ctx.save_for_backward(rows, slots, noise)
        ctx.sigma, ctx.jacobian, ctx.count = sigma, jacobian, len(scores)
        samples, k = slots.shape
        chosen = torch.arange(k, device=slots.device).expand_as(slots)
        weights = scores.new_zeros(k, len(rows))
        return weights.index_put_((chosen, slots), scores.new_tensor(1.0 / samples), accumulate=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, slots, noise = ctx.saved_tensors
        (grad,) = grad_outputs
        samples, k = slots.shape
        at_picks = grad[torch.arange(k, device=slots.device), slots]
        if ctx.jacobian == "full":
            grad_scores = at_picks.sum(dim=1) @ noise
        else:
            grad_scores = grad.new_zeros(ctx.count)
            grad_scores.index_add_(0, rows[slots].flatten(), (at_picks * noise).flatten())
        return grad_scores / (samples * ctx.sigma), None, None, None, None, None
