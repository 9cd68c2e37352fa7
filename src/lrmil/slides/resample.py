"""Area resampling: every output pixel is the mean of the box of input that it covers. Pure functions.

The mean of a box is what a coarser scan of the same tissue records, so a 40x and a 20x slide agree; point samples
(nearest, bilinear without antialiasing) do not.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
from scipy import sparse

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

_SNAP_PX = 1e-4
"""Edges this close to a whole pixel are meant to be whole; the difference is below a hundredth of a grey level."""


def snap(value_px: float) -> float:
    """Return the nearest whole number where `value_px` differs from it by floating-point noise only."""
    nearest = float(round(value_px))
    return nearest if abs(value_px - nearest) < _SNAP_PX else value_px


def area_resample(
    pixels: UInt8Array, box_px: tuple[float, float, float, float], size_px: tuple[int, int]
) -> UInt8Array:
    """Average the box (x0, y0, x1, y1) of `pixels` (H, W, C) into an image (h, w, C) of `size_px` = (w, h).

    Edges may be fractional: a pixel that the box cuts counts by the share inside. The box must lie within the array.
    Rounded to the nearest grey level.
    """
    x0, y0, x1, y1 = (snap(edge) for edge in box_px)
    width, height = size_px
    factor_x, factor_y = snap((x1 - x0) / width), snap((y1 - y0) / height)
    if all(value.is_integer() for value in (x0, y0, x1, y1, factor_x, factor_y)):
        cut = pixels[int(y0) : int(y1), int(x0) : int(x1)]
        if factor_x == factor_y == 1:
            return np.array(cut)
        mean = cv2.resize(cut, size_px, interpolation=cv2.INTER_AREA)
        return np.asarray(mean, np.uint8).reshape(height, width, pixels.shape[2])
    return np.rint(area_mean(pixels, (x0, y0, x1, y1), size_px)).astype(np.uint8)


def area_mean(
    pixels: npt.NDArray[np.uint8 | np.float32], box_px: tuple[float, float, float, float], size_px: tuple[int, int]
) -> Float32Array:
    """As `area_resample`, for pixels (H, W, C) of any numbers, unrounded: float32 (h, w, C)."""
    x0, y0, x1, y1 = box_px
    width, height = size_px
    channels = pixels.shape[2]
    columns = slice(int(np.floor(x0)), int(np.ceil(x1)))
    cut = pixels[:, columns].astype(np.float32)
    x0, x1 = x0 - columns.start, x1 - columns.start
    down = _weights(y0, y1, height, cut.shape[0]) @ cut.reshape(cut.shape[0], -1)
    turned = down.reshape(height, -1, channels).transpose(1, 0, 2).reshape(-1, height * channels)
    across = _weights(x0, x1, width, turned.shape[0]) @ turned
    return np.ascontiguousarray(across.reshape(width, height, channels).transpose(1, 0, 2), dtype=np.float32)


def _weights(start_px: float, stop_px: float, count: int, length_px: int) -> sparse.csr_array:
    """Shares (count, length_px): row i says how much of each input pixel lies in the i-th of `count` equal parts."""
    edges = np.linspace(start_px, stop_px, count + 1)
    inner = np.arange(np.ceil(start_px), np.floor(stop_px) + 1)
    cuts = np.unique(np.concatenate([edges, inner[(inner > start_px) & (inner < stop_px)]]))
    middle = (cuts[1:] + cuts[:-1]) / 2
    row = np.clip(np.searchsorted(edges, middle, side="right") - 1, 0, count - 1)
    column = np.clip(np.floor(middle).astype(np.int64), 0, length_px - 1)
    share = np.diff(cuts) * (count / (stop_px - start_px))
    return sparse.csr_array((share.astype(np.float32), (row, column)), shape=(count, length_px))


def over_background(rgba: UInt8Array, background_rgb: tuple[int, int, int]) -> tuple[UInt8Array, Float32Array | None]:
    """Compose (H, W, 4) straight-alpha pixels over a colour.

    Returns:
        rgb (H, W, 3), and the alpha (H, W) in 0..1, or None where all of it is opaque.
    """
    rgb = np.asarray(cv2.cvtColor(np.ascontiguousarray(rgba), cv2.COLOR_RGBA2RGB), np.uint8)
    alpha = rgba[..., 3]
    if alpha.min() == 255:
        return rgb, None
    share: Float32Array = np.divide(alpha, 255, dtype=np.float32)
    colour = np.asarray(background_rgb, dtype=np.float32)
    mixed = rgb * share[..., None] + colour * (1 - share[..., None])
    return np.rint(mixed).astype(np.uint8), share
