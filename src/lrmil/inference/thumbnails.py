"""Thumbnails of the patches of a slide: 1/16 of their resolution, 1.25x where the patches are 20x.

They are never made from the patches, which is what they are there to save: each region is read once at the coarse
scale, from a coarse level of the file, and cut up. On a grid that is not snapped, cuts may be off by the rounding of a
child's edge, less than one level-0 pixel.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lrmil.geometry import IntArray, MatchedGrid
from lrmil.inference.layouts import ScaleLayout
from lrmil.inference.stream import Read, ReadingLog, stream_patches
from lrmil.slides import Slide

THUMBNAIL_FACTOR = 16
"""Pixels of a patch along one pixel of its thumbnail"""
_READ_AHEAD = 4096


def thumbnail_px(patch_px: int) -> int:
    """Return the side of a thumbnail: 16 px for a patch of 256."""
    return max(1, patch_px // THUMBNAIL_FACTOR)


def read_thumbnails(
    slide: Slide, grid: MatchedGrid, layout: ScaleLayout, *, threads: int
) -> tuple[npt.NDArray[np.uint8], ReadingLog]:
    """Read a thumbnail of each of the n patches of `layout`.

    Returns:
        (n, t, t, 3) uint8, t of `thumbnail_px`, in the layout's order; and how reading went. Thumbnails that cannot be
        decoded are listed in the log, and zero.
    """
    side_px = thumbnail_px(grid.scale.patch_px)
    images = np.zeros((len(layout), side_px, side_px, 3), np.uint8)
    log = ReadingLog()
    reads = thumbnail_reads(grid, layout, side_px)
    for batch in stream_patches(slide, reads, side_px, batch_size=_READ_AHEAD, threads=threads, log=log):
        images[batch.rows] = batch.images
    return images, log


def thumbnail_reads(grid: MatchedGrid, layout: ScaleLayout, side_px: int) -> list[Read]:
    """One request for each region that holds patches of `layout`, of which thumbnails of `side_px` are to be cut."""
    picture = (layout.cells_side * side_px,) * 2
    reads = []
    starts = np.searchsorted(layout.region, np.arange(grid.num_regions + 1))
    for region in np.flatnonzero(np.diff(starts)):
        rows: IntArray = np.arange(starts[region], starts[region + 1])
        x0, y0, x1, y1 = grid.region_boxes_l0[region].tolist()
        reads.append(Read((x0, y0, x1, y1), picture, rows, layout.cell[rows] * side_px, layout.boxes_l0[rows]))
    return reads
