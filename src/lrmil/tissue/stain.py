"""How strongly each pixel is stained, as optical density against the empty glass of the same slide.

Optical density is -log10 of the transmitted share of light (Beer-Lambert; Ruifrok and Johnston 2001): it adds up over
dyes, so "how much stain" is a length and "which dye" a direction, whatever the brightness of the scanner's lamp.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.tissue.mask import BoolArray

RgbArray = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
GlassColour = tuple[float, float, float]

# A slide without any glass in view is measured against this, a common white of scanners.
_USUAL_GLASS = (245.0, 245.0, 245.0)
# Glass is bright, nearly grey, not pink (green the darkest by far), and not a mere handful of pixels.
_GLASS_MIN, _GLASS_CAST, _GLASS_PINK, _GLASS_SHARE, _GLASS_TINT = 200, 20, 7, 0.05, 6.0
_GLASS_SAMPLE = 1_000_000
# Spread of the densities over their mean: shadows stay below 0.1, the greyest counterstain of IHC above 0.2.
_LEAST_COLOUR = 0.15
_OTSU_BINS, _OTSU_TOP = 256, 0.5


def glass_colour(rgb: RgbArray, scanned: BoolArray) -> GlassColour:
    """Return the colour of empty glass: the brightest tenth of all pixels that are bright and nearly grey.

    Where there is no glass these are pale tissue; its tint is then held to a few grey levels, so that tissue of that
    tint still differs from it.

    Args:
        rgb: (h, w, 3), smoothed, so that noise does not make glass of pale tissue.
        scanned: (h, w), pixels that were never scanned say nothing about the glass.
    """
    pixels = rgb[scanned]
    pixels = pixels[:: max(1, len(pixels) // _GLASS_SAMPLE)].astype(np.int16)
    red, green, blue = pixels.T
    low = np.minimum(np.minimum(red, green), blue)
    high = np.maximum(np.maximum(red, green), blue)
    pink = np.minimum(red, blue) - green
    glassy = pixels[(low >= _GLASS_MIN) & (high - low <= _GLASS_CAST) & (pink <= _GLASS_PINK)]
    if len(glassy) == 0 or len(glassy) < _GLASS_SHARE * len(pixels):
        return _USUAL_GLASS
    brightness = glassy.sum(axis=1, dtype=np.int32)
    glass = np.median(glassy[brightness >= np.quantile(brightness, 0.9)], axis=0)
    red, green, blue = np.maximum(glass, glass.max() - _GLASS_TINT).tolist()
    return red, green, blue


def smoothed(rgb: RgbArray, scanned: BoolArray, sigma_px: float) -> RgbArray:
    """Return (h, w, 3) after a Gaussian of `sigma_px` pixels, with blank glass where nothing was scanned.

    The fill colours of vendors, black as well as white, would bleed into the rim of the tissue.
    """
    if not scanned.all():
        rgb = np.where(scanned[..., None], rgb, np.uint8(_USUAL_GLASS[0]))
    if sigma_px > 0.2:  # below that the kernel is a single pixel
        rgb = np.asarray(cv2.GaussianBlur(rgb, (0, 0), sigma_px, borderType=cv2.BORDER_REFLECT_101), dtype=np.uint8)
    return rgb


def optical_density(rgb: RgbArray, glass_rgb: GlassColour) -> Float32Array:
    """Return optical density (3, h, w), planes red, green, blue, of (h, w, 3); 0 for glass and anything brighter."""
    light = np.arange(256, dtype=np.float64) + 1.0  # one grey level more, so that black has a density
    planes = []
    for channel, glass in enumerate(glass_rgb):
        table = np.clip(np.log10((glass + 1.0) / light), 0.0, None).astype(np.float32)
        planes.append(table[rgb[..., channel]])
    return np.stack(planes)


def stain_amount(density: Float32Array) -> Float32Array:
    """Return (h, w) from densities (3, h, w): the spread of the three plus half their mean.

    The spread (a saturation that does not fade with brightness) finds pale pink tissue and ignores grey shadows of the
    glass; the mean adds grey tissue, such as a blue-grey counterstain, which has next to no colour. What has none at
    all (the shadow at the edge of a slide, black fill) has no stain.
    """
    spread = density.max(axis=0) - density.min(axis=0)
    mean = density.mean(axis=0)
    return np.where(spread > _LEAST_COLOUR * mean, spread + 0.5 * mean, np.float32(0.0))


def stain_threshold(amount: Float32Array, low: float, high: float) -> float:
    """Return Otsu's threshold (1979) of the amounts (any shape), held between `low` and `high`."""
    counts, edges = np.histogram(np.minimum(amount, _OTSU_TOP), bins=_OTSU_BINS, range=(0.0, _OTSU_TOP))
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sum_below = np.cumsum(counts * middles)
    valid = (below > 0) & (above > 0)
    if not valid.any():
        return low
    mean_below = sum_below[valid] / below[valid]
    mean_above = (sum_below[-1] - sum_below[valid]) / above[valid]
    between = below[valid] * above[valid] * (mean_above - mean_below) ** 2
    return float(np.clip(edges[1:][valid][between.argmax()], low, high))
