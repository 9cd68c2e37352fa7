"""From a slide, or an overview of one, to its tissue mask."""

from __future__ import annotations

import cv2
import numpy as np

from lrmil.slides import Overview, Slide
from lrmil.tissue.mask import BoolArray, TissueMask
from lrmil.tissue.pens import pen_marks
from lrmil.tissue.settings import TissueSettings
from lrmil.tissue.stain import glass_colour, optical_density, smoothed, stain_amount, stain_threshold

# In a view so small that the whole of it is hardly a piece of tissue, this share of it is one.
_PIECE_OF_SMALL_VIEW = 0.1


def find_tissue(
    slide: Slide, settings: TissueSettings | None = None, *, finest_mpp: float | None = None, threads: int = 1
) -> tuple[TissueMask, Overview]:
    """Look at a slide at `settings.mpp`, or at `finest_mpp` where that is coarser; return the mask and what was seen.

    Nothing finer is asked of the slide, but for the rounding of an overview to whole level pixels (5 % at most, see
    `Overview.mpp`). A slide without tissue gives an empty mask, not an error. `threads` read; the mask is the same.
    """
    settings = settings or TissueSettings()
    overview = slide.overview(max(settings.mpp, finest_mpp or 0.0, slide.mpp), threads)
    return segment_tissue(overview, settings), overview


def segment_tissue(overview: Overview, settings: TissueSettings | None = None) -> TissueMask:
    """Tell tissue from glass, fat, pen and what was never scanned.

    Stained pixels are tissue (Otsu on optical density, within bounds), less pen marks, less specks, with small holes
    filled. Fat goes with the glass: its membranes are thinner than the scale of the overview. Pixels that were never
    scanned or cannot be read are never tissue. Any mpp will do; the sizes in `settings` are in um.
    """
    settings = settings or TissueSettings()
    scanned, mpp = overview.scanned, overview.mpp
    rgb = smoothed(overview.rgb, scanned, settings.smooth_um / mpp)
    glass = glass_colour(rgb, scanned)
    density = optical_density(rgb, glass)
    amount = stain_amount(density)
    threshold = stain_threshold(amount[scanned], settings.min_stain, settings.max_stain)
    pen = pen_marks(density, mpp, settings) & scanned
    blocked = pen | ~scanned
    mask = (amount > threshold) & ~blocked
    mask = _without_specks(mask, settings.min_tissue_um2 / mpp**2)
    mask = _with_holes_filled(mask, settings.max_hole_um2 / mpp**2) & ~blocked
    return TissueMask(
        mask=mask,
        downsample_l0=overview.downsample_l0,
        mpp=mpp,
        pen=pen,
        threshold=threshold,
        glass_rgb=glass,
        unreadable=overview.unreadable,
    )


def _without_specks(mask: BoolArray, min_area_px: float) -> BoolArray:
    """Drop connected pieces (8-neighbours) smaller than `min_area_px`; a small view asks for less."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min(min_area_px, _PIECE_OF_SMALL_VIEW * mask.size)
    keep[0] = False
    return keep[labels]


def _with_holes_filled(mask: BoolArray, max_area_px: float) -> BoolArray:
    """Fill background pieces (4-neighbours) smaller than `max_area_px`, unless they touch the edge of the image."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    fill = stats[:, cv2.CC_STAT_AREA] < max_area_px
    fill[0] = False
    fill[np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))] = False
    return mask | fill[labels]
