"""Pen marks, told from tissue by the direction of their optical density.

Every stain of routine histology takes most from green (eosin, haematoxylin) or from blue light (DAB), or is pale grey
(counterstain of IHC). So: ink that takes most from red light is blue or green; ink that takes green and blue alike and
hardly any red is red; ink that takes everything alike, and much of it, is black. A solid core of at least the width of
a stroke is demanded, so that erythrocytes, nuclei and pigment do not pass for ink; from there the mark grows into its
own blurred edge, where the same tests hold less strictly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np

from lrmil.tissue.mask import BoolArray
from lrmil.tissue.settings import TissueSettings
from lrmil.tissue.stain import Float32Array

_Test = Callable[[Float32Array, Float32Array, Float32Array, bool], BoolArray]


def pen_marks(density: Float32Array, mpp: float, settings: TissueSettings) -> BoolArray:
    """Return (h, w), True on pen marks of the colours in `settings.pens`. `density` is (3, h, w), smoothed."""
    red, green, blue = density
    marks = np.zeros(red.shape, dtype=bool)
    for colour in settings.pens:
        test = _TESTS[colour]
        core = _open(test(red, green, blue, True), settings.min_pen_um / mpp)
        if not core.any():
            continue
        marks |= _grow(core, test(red, green, blue, False), settings.pen_reach_um / mpp)
    return _dilate(marks, settings.pen_margin_um / mpp) if marks.any() else marks


def _blue_green(red: Float32Array, green: Float32Array, blue: Float32Array, core: bool) -> BoolArray:
    if core:
        return (red > 0.15) & (red > 1.4 * green) & (red > 1.4 * blue)
    return (red > 0.04) & (red > 1.1 * green) & (red > 1.2 * blue)


def _red(red: Float32Array, green: Float32Array, blue: Float32Array, core: bool) -> BoolArray:
    if core:
        return (green > 0.40) & (red < 0.30 * green) & (blue > 0.60 * green + 0.7 * red) & (blue < 1.15 * green)
    return (green > 0.05) & (red < 0.45 * green) & (blue > 0.57 * green + 0.6 * red) & (blue < 1.15 * green)


def _black(red: Float32Array, green: Float32Array, blue: Float32Array, core: bool) -> BoolArray:
    mean = (red + green + blue) / 3
    if core:
        return (mean > 0.65) & (red < 1.4 * green) & (blue > 0.72 * green) & (blue < 1.05 * green)
    return (mean > 0.15) & (red < 1.4 * green) & (blue > 0.68 * green) & (blue < 1.15 * green)


_TESTS: Mapping[str, _Test] = {"blue_green": _blue_green, "red": _red, "black": _black}


def _open(mask: BoolArray, diameter_px: float) -> BoolArray:
    """Keep what a disk of that diameter fits into; the image is taken to go on beyond its edges."""
    middle = _distance_to(~mask) > diameter_px / 2
    return mask & _dilate(middle, diameter_px / 2)


def _dilate(mask: BoolArray, radius_px: float) -> BoolArray:
    return _distance_to(mask) <= radius_px


def _grow(core: BoolArray, edge: BoolArray, reach_px: float) -> BoolArray:
    """Add to `core` the parts of `edge` that touch it, as far as `reach_px` from it."""
    near = core | (edge & (_distance_to(core) <= reach_px))
    count, labels = cv2.connectedComponents(near.astype(np.uint8), connectivity=8)
    touches = np.zeros(count, dtype=bool)
    touches[labels[core]] = True
    return touches[labels]


def _distance_to(mask: BoolArray) -> Float32Array:
    """Distance of each pixel to the nearest True one, in pixels; infinite where there is none."""
    if not mask.any():
        return np.full(mask.shape, np.inf, dtype=np.float32)
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(distance, dtype=np.float32)
