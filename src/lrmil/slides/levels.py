"""Pyramid levels: how much smaller each one really is, and which one to read for a wanted scale. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL_TOLERANCE = 0.005
"""A level this much coarser than wanted still serves; it absorbs child sides that were rounded to whole pixels."""


@dataclass(frozen=True)
class Level:
    """One level of a pyramid. Pixel i of it covers level-0 pixels [i * downsample, (i + 1) * downsample)."""

    index: int
    width_px: int
    height_px: int
    downsample: float
    """Nominal: 4.0 where the file's sizes say 3.9998 only because they were rounded to whole pixels."""


def nominal_downsample(dimensions_l0: tuple[int, int], level_px: tuple[int, int]) -> float:
    """Return the downsample that the makers of a level meant, from the sizes (width, height) of level 0 and the level.

    A level of 1110 x 830 px under 17763 x 13282 px is 16 times smaller with the remainder cut off, not 16.0024 times.
    A power of two, then any whole number, is taken where it explains the size within 2 px in both directions (rounding
    once leaves less than 1 px, rounding after each of several halvings up to 2); otherwise the mean of both quotients.
    """
    quotients = [full / small for full, small in zip(dimensions_l0, level_px, strict=True)]
    actual = sum(quotients) / 2
    power, whole = 2.0 ** round(math.log2(actual)), float(round(actual))
    for limit_px in (1.0, 2.0):
        for candidate in (power, whole):
            pairs = zip(dimensions_l0, level_px, strict=True)
            if candidate >= 1 and all(abs(full / candidate - small) < limit_px for full, small in pairs):
                return candidate
    return actual


def coarsest_level(levels: Sequence[Level], downsample: float) -> Level:
    """Return the coarsest level that is not coarser than `downsample`, or the finest one where all are coarser."""
    finest = min(levels, key=lambda level: level.downsample)
    fine_enough = [level for level in levels if level.downsample <= downsample * (1 + LEVEL_TOLERANCE)]
    return max(fine_enough, key=lambda level: level.downsample, default=finest)
