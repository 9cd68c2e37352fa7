"""Smooth random fields and the resampling of coarse fields to pixels. Everything is in um, whatever the pixel size.

Scenes are described by fields on a coarse grid, so that a scene can be painted in windows, at any pixel size: sample
(i, j) of a field with step s lies at x = (j + 0.5) * s, y = (i + 0.5) * s um.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Field2D = npt.NDArray[np.float32]
STEP_UM = 2.0


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, int], scale_um: float, step_um: float = STEP_UM
) -> Field2D:
    """Gaussian noise (h, w) whose features are about `scale_um` wide; mean 0 and variance 1 in expectation."""
    h, w = shape
    cell = max(scale_um / step_um, 1.0)
    ch, cw = math.ceil(h / cell) + 4, math.ceil(w / cell) + 4
    coarse = rng.standard_normal((ch, cw), dtype=np.float32)
    if cell <= 1.0:
        return np.ascontiguousarray(coarse[:h, :w])
    dx, dy = rng.uniform(0, 1, 2)
    matrix = np.array([[1 / cell, 0, 1 + dx], [0, 1 / cell, 1 + dy]], dtype=np.float64)
    noise = cv2.warpAffine(coarse, matrix, (w, h), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
    return np.asarray(
        noise * 1.29, np.float32
    )  # cubic interpolation lowers the variance of white noise to 0.6 on average


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, int], scale_um: float, octaves: int, step_um: float = STEP_UM
) -> Field2D:
    """Sum of `octaves` noises, each half as wide and half as strong as the one before; variance 1 in expectation."""
    total = np.zeros(shape, np.float32)
    power = 0.0
    for octave in range(octaves):
        weight = 0.5**octave
        total += np.float32(weight) * smooth_noise(rng, shape, scale_um / 2**octave, step_um)
        power += weight**2
    return np.asarray(total / math.sqrt(power), np.float32)


def to_pixels(
    field: npt.NDArray[np.float32],
    origin_px: tuple[int, int],
    size_px: tuple[int, int],
    mpp: float,
    *,
    step_um: float = STEP_UM,
    smooth: bool = True,
) -> Field2D:
    """Resample a coarse field to a window of (w, h) pixels whose top-left pixel is `origin_px` (x, y).

    `smooth` interpolates cubically, for fields whose level lines are to be seen; else linearly, which is faster.
    """
    scale = mpp / step_um
    shift = [(o + 0.5) * scale - 0.5 for o in origin_px]
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]], dtype=np.float64)
    flags = (cv2.INTER_CUBIC if smooth else cv2.INTER_LINEAR) | cv2.WARP_INVERSE_MAP
    pixels = cv2.warpAffine(field, matrix, size_px, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(pixels, np.float32)


def sample(field: npt.NDArray[Any], points_um: npt.NDArray[np.float64], step_um: float = STEP_UM) -> npt.NDArray[Any]:
    """Values of a coarse field at points (N, 2) in um, nearest sample."""
    h, w = field.shape[:2]
    col = np.clip((points_um[:, 0] / step_um).astype(np.int64), 0, w - 1)
    row = np.clip((points_um[:, 1] / step_um).astype(np.int64), 0, h - 1)
    return field[row, col]


def jittered_grid(
    rng: np.random.Generator, width_um: float, height_um: float, spacing_um: float, jitter: float = 0.5
) -> npt.NDArray[np.float64]:
    """Points (N, 2) of a hexagonal grid that reaches over the border, each moved by up to `jitter` x spacing / 2."""
    row_um = spacing_um * math.sqrt(3) / 2
    rows, cols = math.ceil(height_um / row_um) + 3, math.ceil(width_um / spacing_um) + 3
    offset = rng.uniform(0, 1, 2) * (spacing_um, row_um)
    j, i = np.meshgrid(np.arange(cols), np.arange(rows))
    points = np.stack([(j + 0.5 * (i % 2)) * spacing_um, i * row_um], axis=-1).reshape(-1, 2).astype(np.float64)
    points += rng.uniform(-0.5, 0.5, points.shape) * jitter * spacing_um
    return points - spacing_um - offset


def periodic_noise(rng: np.random.Generator, side: int, sigma_x: float, sigma_y: float) -> Field2D:
    """Gaussian-filtered white noise (side, side) that repeats seamlessly; mean 0, variance 1. Sigmas in samples."""
    spectrum = np.fft.rfft2(rng.standard_normal((side, side)))
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]
    spectrum *= np.exp(-2 * np.pi**2 * ((fx * sigma_x) ** 2 + (fy * sigma_y) ** 2))
    noise = np.fft.irfft2(spectrum, s=(side, side))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def smoothstep(values: Field2D, low: float, high: float) -> Field2D:
    """0 below `low`, 1 above `high`, smooth in between."""
    t = np.clip((values - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)
