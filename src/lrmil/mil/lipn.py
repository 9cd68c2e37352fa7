"""LIPN, the second step of HDMIL: a tiny network that sees from a thumbnail whether a patch is worth reading.

Input x / 255 - 0.5, one thumbnail of every patch (16 px where the patch is 256). Conv k/s: k x k, stride s, no bias,
each with batch normalisation; * : and ReLU. dw: depthwise.

    0 conv 3/2* 3>16   1 conv 3/2* 16>16   2 conv 1/1* 16>16   3 conv 3/2* 16>48   4 conv 1/1* 48>24
    5 dw 5/1, conv 1/1* 24>48, dw 5/2*, conv 1/1 48>48         6 dw 3/1, conv 1/1* 48>96, dw 3/2*, conv 1/1 96>64
    average over positions, conv 1/1* 64>64, Linear 64>C

The gate is `dmin.hard_gate`: [sigmoid(score) > 0.5] with the sigmoid's gradient, without noise in training, too. Its
loss against the mask m (N, C) that DMIN's eval path would use:

    mean |gate - m| + (rho(gate) - rho(m))^2          rho: `dmin.keep_rate`

Blocks after MobileNetV4 (Qin et al., ECCV 2024); the whole after Dong et al., CVPR 2025 (HDMIL).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrmil.mil.dmin import RateClasses, keep_rate

_CHUNK = 4096
"""Thumbnails at a time where no gradient is wanted"""


class LIPN(nn.Module):
    """See the top of this file. Fully convolutional: thumbnails of any size will do."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv(3, 16, 3, stride=2),
            _conv(16, 16, 3, stride=2),
            _conv(16, 16, 1),
            _conv(16, 48, 3, stride=2),
            _conv(48, 24, 1),
            _bottleneck(24, 48, 48, 5),
            _bottleneck(48, 96, 64, 3),
        )
        self.last = _conv(64, 64, 1)
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, thumbnails: Tensor) -> Tensor:
        """Score (N, h, w, 3) uint8 thumbnails: (N, C), before the gate.

        In training, batch normalisation uses the statistics of all thumbnails of the slide together; a single one
        has none, and is scored with the running ones.
        """
        if self.training and len(thumbnails) > 1:
            return self._score(thumbnails)
        was_training = self.training
        self.eval()
        try:
            size = len(thumbnails) if torch.is_grad_enabled() else _CHUNK
            return torch.cat([self._score(part) for part in thumbnails.split(size)])
        finally:
            self.train(was_training)

    def _score(self, thumbnails: Tensor) -> Tensor:
        images = thumbnails.to(self.classifier.weight.dtype).permute(0, 3, 1, 2) / 255.0 - 0.5
        pooled = self.features(images).mean(dim=(2, 3), keepdim=True)
        return self.classifier(self.last(pooled).flatten(1))


def lipn_losses(gate: Tensor, mask: Tensor, rate_classes: RateClasses = "all") -> dict[str, Tensor]:
    """Return the two terms of LIPN's loss. gate: its (N, C) `hard_gate`; mask: DMIN's, 0 and 1, no gradient."""
    mask = mask.to(gate.dtype)
    difference = keep_rate(gate, rate_classes) - keep_rate(mask, rate_classes)
    return {"mask": (gate - mask).abs().mean(), "keep_rate": difference.square()}


def _conv(
    width: int, out: int, kernel: int, *, stride: int = 1, depthwise: bool = False, relu: bool = True
) -> nn.Module:
    conv = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=width if depthwise else 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), *([nn.ReLU()] if relu else []))


def _bottleneck(width: int, wide: int, out: int, kernel: int) -> nn.Module:
    return nn.Sequential(
        _conv(width, width, kernel, depthwise=True, relu=False),
        _conv(width, wide, 1),
        _conv(wide, wide, kernel, stride=2, depthwise=True),
        _conv(wide, out, 1, relu=False),
    )
