"""The smooth top-1 SVM loss, which CLAM and HDMIL use on instances.

For the scores x of one row with true class y, margin alpha and temperature tau:

    smooth   tau * log sum_c exp( (x_c + alpha [c != y] - x_y) / tau )
    hard     max_c ( x_c + alpha [c != y] ) - x_y

The hard form replaces the smooth one in rows whose largest score leads the second largest by tau * ln(1000) or more,
where the smooth form loses precision. The loss is the mean over rows.

Berrada, Zisserman, Kumar: Smooth loss functions for deep top-k classification, ICLR 2018.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_HARD_FROM = math.log(1000.0)


def smooth_top1_svm(scores: Tensor, targets: Tensor, *, margin: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Return the loss, a scalar.

    Args:
        scores: (R, K), K at least 2, before any softmax.
        targets: (R,) int64 in 0..K-1.
        margin: alpha.
        temperature: tau.
    """
    wrong = 1.0 - F.one_hot(targets, scores.shape[1]).to(scores.dtype)
    violation = scores + margin * wrong - scores.gather(1, targets[:, None])
    smooth = temperature * torch.logsumexp(violation / temperature, dim=1)
    hard = violation.amax(dim=1)
    best, second = scores.detach().topk(2, dim=1).values.unbind(1)
    return torch.where(best - second >= temperature * _HARD_FROM, hard, smooth).mean()
