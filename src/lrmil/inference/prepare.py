"""What happens to every slide, in training as in deployment, before an encoder sees it: tissue, then the grid."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from lrmil.errors import NoTissue, TooManyUnreadable
from lrmil.geometry import GridSettings, MatchedGrid, SlideScale, match_grids
from lrmil.settings import Settings
from lrmil.slides import Overview, Slide, open_slide
from lrmil.slides.overview import SNAP_FACTOR
from lrmil.tissue import TissueMask, TissueSettings, find_tissue


class TileSettings(Settings):
    """Which regions and children of a slide are looked at."""

    min_region_tissue: float = Field(0.1, ge=0, le=1, description="share of a region that must be tissue")
    min_child_tissue: float = Field(0.1, ge=0, le=1, description="share of a child that must be tissue")
    min_regions: int = Field(1, ge=1, description="a slide with fewer regions has too little tissue to answer")
    max_unreadable: float = Field(
        0.2, ge=0, le=1, description="share of a slide's patches that may be undecodable before the slide is given up"
    )
    reader: Literal["auto", "openslide"] = Field(
        "auto",
        description="what reads pixels, in training and deployment alike. auto: tiled TIFF and SVS directly, the rest "
        "by OpenSlide; openslide: all by OpenSlide",
    )

    def open(self, path: str | os.PathLike[str], mpp: float | None = None) -> Slide:
        """Open a slide with the reader of these settings; see `open_slide`."""
        return open_slide(path, mpp=mpp, reader=None if self.reader == "auto" else self.reader)


@dataclass(frozen=True)
class PreparedSlide:
    """A slide's tissue and matched grid."""

    overview: Overview
    tissue: TissueMask
    grid: MatchedGrid
    seconds: float
    """spent on the overview, the mask and the grid"""


def prepare_slide(
    slide: Slide, grid: GridSettings, tissue: TissueSettings, tiles: TileSettings, threads: int = 1
) -> PreparedSlide:
    """Find the tissue of a slide and lay the matched grid over it. Reads nothing finer than `grid.lr_mpp`.

    `threads` look at the slide. They pay where a single slide is waited for: where many are prepared ahead of an
    encoder, the others keep the cores busy.

    Raises:
        NoTissue: fewer than `tiles.min_regions` regions hold enough tissue.
        TooManyUnreadable: more than the share `tiles.max_unreadable` of the overview cannot be decoded.
        SlideTooCoarse, SlideTooSmall: see `match_grids`.
    """
    prepared = survey_slide(slide, grid, tissue, tiles, threads)
    overview, found = prepared.overview, prepared.grid.num_regions
    lost = overview.unreadable_px / overview.scanned.size
    if lost > tiles.max_unreadable:
        raise TooManyUnreadable(
            f"{lost:.0%} of its overview cannot be decoded, where {tiles.max_unreadable:.0%} are allowed "
            "(max_unreadable).",
            slide=slide.name,
            fix="Copy the file again from its source.",
        )
    if found < tiles.min_regions:
        raise NoTissue(_too_little(prepared, tiles), slide=slide.name, fix=_LOOK)
    return prepared


def survey_slide(
    slide: Slide, grid: GridSettings, tissue: TissueSettings, tiles: TileSettings, threads: int = 1
) -> PreparedSlide:
    """As `prepare_slide`, for slides of which little or nothing may be left: the grid may be empty.

    Raises:
        SlideTooCoarse, SlideTooSmall: see `match_grids`.
    """
    began = time.perf_counter()
    # The scale is checked before any pixel is read: a hopeless slide should cost nothing.
    scale = match_grids(grid, slide.mpp, slide.dimensions, slide=slide.name).scale
    mask, overview = find_tissue(slide, tissue, finest_mpp=finest_overview_mpp(scale), threads=threads)
    matched = match_grids(
        grid,
        slide.mpp,
        slide.dimensions,
        mask.coverage,
        min_region_tissue=tiles.min_region_tissue,
        min_child_tissue=tiles.min_child_tissue,
        slide=slide.name,
    )
    return PreparedSlide(overview, mask, matched, time.perf_counter() - began)


def finest_overview_mpp(scale: SlideScale) -> float:
    """Return the um per pixel that an overview may be asked for, so that it shows nothing finer than regions do.

    An overview takes whole numbers of level pixels where they are near. On a snapped scale these are the regions' own;
    on another they may be finer by `SNAP_FACTOR`, which is added here.
    """
    return scale.lr_mpp if scale.snapped else scale.lr_mpp / (1 - SNAP_FACTOR)


_LOOK = "See what was taken for tissue with `lrmil info SLIDE --picture tissue.png`."


def _too_little(prepared: PreparedSlide, tiles: TileSettings) -> str:
    mask, grid = prepared.tissue, prepared.grid
    side_um = grid.scale.region_side_l0 * grid.scale.mpp_l0
    text = (
        f"too little tissue: {mask.tissue_share:.1%} of the slide; regions ({side_um:.0f} um wide) that hold at least "
        f"{tiles.min_region_tissue:.0%} of it: {grid.num_regions}, needed: {tiles.min_regions}."
    )
    if mask.pen_share > mask.tissue_share:
        text += f" Taken for pen marks: {mask.pen_share:.1%}."
    if mask.unreadable:
        text += f" Blocks of its overview that cannot be decoded: {mask.unreadable}."
    return text
