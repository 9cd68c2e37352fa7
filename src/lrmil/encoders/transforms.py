"""From uint8 pixels to what an encoder reads. Runs where the encoder is, so that bytes and not floats cross the bus."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lrmil.errors import EncoderError


def normalise(images: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, input_px: int) -> torch.Tensor:
    """Turn uint8 images into normalised floats.

    Args:
        images: (B, P, P, 3) uint8 RGB.
        scale: (1, 3, 1, 1), 1 / (255 * std).
        shift: (1, 3, 1, 1), -mean / std.
        input_px: side that the encoder wants. Patches normally arrive with it and are not resampled; others are, by
            antialiased bicubic interpolation, clipped to 0..255.

    Returns:
        (B, 3, input_px, input_px) float32 on the device of `scale`.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise EncoderError(
            f"images have shape {tuple(images.shape)} and type {str(images.dtype).removeprefix('torch.')}.",
            fix="Give uint8 RGB of shape (B, P, P, 3).",
        )
    pixels = images.to(scale.device, non_blocking=True).permute(0, 3, 1, 2)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    if pixels.shape[2] != input_px and len(pixels):
        pixels = F.interpolate(pixels, size=(input_px, input_px), mode="bicubic", antialias=True).clamp_(0, 255)
    return pixels.mul_(scale).add_(shift)
