"""How large the pixels are: which statement about a slide's mpp is believed, and which is refused. Pure functions.

Nothing is ever guessed, neither from an objective power nor from a usual value: a wrong scale gives a wrong answer that
looks right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lrmil.errors import ImplausibleMpp, MissingMpp

MIN_MPP = 0.05
MAX_MPP = 20.0
MAX_ANISOTROPY = 0.02
"""Largest relative difference between the mpp along x and along y."""

USER = "user"
VENDOR = "vendor metadata"
TIFF_TAGS = "TIFF resolution tags"
OME_XML = "OME-XML"

GIVE_MPP = "Give its true level-0 um/px in the column `mpp` of the cohort table or with --mpp."


@dataclass(frozen=True)
class StatedMpp:
    """What one part of a file says about the size of a level-0 pixel, um per pixel along x and y."""

    x: float
    y: float
    source: str


def believed_mpp(slide: str, *, user: float | None, stated: Iterable[StatedMpp]) -> tuple[float, str]:
    """Return the level-0 mpp of a slide and where it comes from.

    Args:
        slide: name for error messages.
        user: what the user says; it overrides the file.
        stated: what the file says, the most trusted first. Only the first counts: where it is absurd, the slide is
            refused rather than a weaker statement believed.

    Raises:
        MissingMpp: nobody says anything.
        ImplausibleMpp: outside 0.05-20 um/px, not a number, or x and y differ by more than 2 %.
    """
    if user is not None:
        first: StatedMpp | None = StatedMpp(user, user, USER)
    else:
        first = next(iter(stated), None)
    if first is None:
        raise MissingMpp("the file does not say how large its pixels are.", slide=slide, fix=GIVE_MPP)
    fix = "Give the true level-0 um/px of the slide." if first.source == USER else GIVE_MPP
    for value in (first.x, first.y):
        if not (math.isfinite(value) and MIN_MPP <= value <= MAX_MPP):
            raise ImplausibleMpp(
                f"{value:.6g} um/px (from: {first.source}) is not the pixel size of a microscope scan, "
                f"which lies between {MIN_MPP:g} and {MAX_MPP:g}.",
                slide=slide,
                fix=fix,
            )
    if abs(first.x - first.y) > MAX_ANISOTROPY * min(first.x, first.y):
        raise ImplausibleMpp(
            f"its pixels are not square: {first.x:.6g} um/px along x and {first.y:.6g} along y (from: {first.source}), "
            f"more than {MAX_ANISOTROPY:.0%} apart.",
            slide=slide,
            fix=fix,
        )
    return (first.x + first.y) / 2, first.source
