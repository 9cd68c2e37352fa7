"""What should not be on a slide: folds, pen strokes, fields out of focus, dust. None of it depends on the label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.cohorts.simulated.fields import STEP_UM, Field2D, smooth_noise

_INKS = ((0.10, 0.28, 0.62), (0.08, 0.45, 0.26), (0.12, 0.12, 0.14))
"""share of light that blue, green and black ink let through, in red, green, blue"""


@dataclass(frozen=True)
class Artefacts:
    """Coarse fields (h, w) of one slide; None where it has none of the kind."""

    fold: Field2D | None
    """factor on stain strength, 1 away from folds"""
    defocus: Field2D | None
    """0 sharp .. 1 out of focus"""
    ink: Field2D | None
    """0 no ink .. 1 full"""
    ink_transmission: tuple[float, float, float]
    dust_um: npt.NDArray[np.float64]
    """(N, 2) places of dust"""


def draw_artefacts(rng: np.random.Generator, shape: tuple[int, int], per_mm2: float) -> Artefacts:
    """Draw a slide's artefacts; `per_mm2` is the mean number of each kind per square millimetre of slide."""
    h, w = shape
    area_mm2 = h * w * (STEP_UM * 1e-3) ** 2
    folds, blurs, strokes = (rng.poisson(per_mm2 * area_mm2 * f) for f in (0.35, 0.35, 0.2))
    dust = rng.poisson(per_mm2 * area_mm2 * 5)
    fold: Field2D | None = None
    defocus: Field2D | None = None
    ink: Field2D | None = None
    if folds:
        band = np.zeros(shape, np.float32)
        for _ in range(folds):
            _stroke(rng, band, rng.uniform(140, 420), rng.uniform(12, 34))
        fold = np.asarray(1 + 0.75 * cv2.GaussianBlur(band, (0, 0), 3 / STEP_UM), np.float32)
    if blurs:
        defocus = np.zeros(shape, np.float32)
        for _ in range(blurs):
            centre = (int(rng.uniform(0, w)), int(rng.uniform(0, h)))
            axes = tuple(int(a / STEP_UM) for a in rng.uniform(60, 200, 2))
            cv2.ellipse(defocus, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
        defocus = np.asarray(cv2.GaussianBlur(defocus, (0, 0), 30 / STEP_UM), np.float32)
    if strokes:
        ink = np.zeros(shape, np.float32)
        for _ in range(strokes):
            _stroke(rng, ink, rng.uniform(300, 1200), rng.uniform(60, 130))
        uneven = np.clip(0.85 + 0.12 * smooth_noise(rng, shape, 40), 0.4, 1)
        ink = np.asarray(cv2.GaussianBlur(ink, (0, 0), 8 / STEP_UM) * uneven, np.float32)
    places = rng.uniform(0, 1, (dust, 2)) * (w * STEP_UM, h * STEP_UM)
    return Artefacts(fold, defocus, ink, _INKS[int(rng.integers(len(_INKS)))], places)


def _stroke(rng: np.random.Generator, field: Field2D, length_um: float, width_um: float) -> None:
    """Draw a bent band of value 1 into `field`."""
    h, w = field.shape
    steps = max(4, round(length_um / 25))
    heading = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 0.16, steps))
    x = rng.uniform(0, w) + np.cumsum(np.cos(heading)) * 25 / STEP_UM
    y = rng.uniform(0, h) + np.cumsum(np.sin(heading)) * 25 / STEP_UM
    points = np.stack([x, y], axis=1).round().astype(np.int32)
    cv2.polylines(field, [points], False, 1.0, max(1, round(width_um / STEP_UM)))
