"""What happens to every slide, in training as in deployment, before an encoder sees it: tissue, then the grid."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pydantic import Field

from lrmil.errors import NoTissue
from lrmil.geometry import GridSettings, MatchedGrid, match_grids
from lrmil.settings import Settings
from lrmil.slides import Overview, Slide
from lrmil.tissue import TissueMask, TissueSettings, find_tissue


class TileSettings(Settings):
    """Which regions and children of a slide are looked at."""

    min_region_tissue: float = Field(0.1, ge=0, le=1, description="share of a region that must be tissue")
    min_child_tissue: float = Field(0.1, ge=0, le=1, description="share of a child that must be tissue")
    min_regions: int = Field(1, ge=1, description="a slide with fewer regions has too little tissue to answer")
    max_unreadable: float = Field(
        0.2, ge=0, le=1, description="share of a slide's patches that may be undecodable before the slide is given up"
    )


@dataclass(frozen=True)
class PreparedSlide:
    """A slide's tissue and matched grid."""

    overview: Overview
    tissue: TissueMask
    grid: MatchedGrid
    seconds: float
    """spent on the overview, the mask and the grid"""


def prepare_slide(slide: Slide, grid: GridSettings, tissue: TissueSettings, tiles: TileSettings) -> PreparedSlide:
    """Find the tissue of a slide and lay the matched grid over it. Reads nothing finer than `grid.lr_mpp`.

    Raises:
        NoTissue: fewer than `tiles.min_regions` regions hold enough tissue.
        SlideTooCoarse, SlideTooSmall: see `match_grids`.
        UnreadableRegion: see `Slide.overview`.
    """
    began = time.perf_counter()
    # The scale is checked before any pixel is read: a hopeless slide should cost nothing.
    match_grids(grid, slide.mpp, slide.dimensions, slide=slide.name)
    mask, overview = find_tissue(slide, tissue, finest_mpp=grid.lr_mpp)
    matched = match_grids(
        grid,
        slide.mpp,
        slide.dimensions,
        mask.coverage,
        min_region_tissue=tiles.min_region_tissue,
        min_child_tissue=tiles.min_child_tissue,
        slide=slide.name,
    )
    if matched.num_regions < tiles.min_regions:
        raise NoTissue(
            f"{matched.num_regions} regions of {matched.scale.region_side_l0 * slide.mpp:.0f} um hold tissue, "
            f"{tiles.min_regions} are needed ({mask.tissue_share:.1%} of the slide is tissue).",
            slide=slide.name,
            fix="Look at it with `lrmil info`; if tissue was missed, change the tissue settings.",
        )
    return PreparedSlide(overview, mask, matched, time.perf_counter() - began)
