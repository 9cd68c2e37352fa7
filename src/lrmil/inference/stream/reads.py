"""What to ask of a slide for its regions or its children.

A child patch costs almost as much to read as its whole region, so where the grid allows it (snapped scale) the children
of a region are cut from one read of it. The cut pixels equal those of single reads: both are box averages of the same
whole pixels of one level. (OpenSlide blends neighbours on levels whose size was rounded, see its reader; there the two
differ by about a grey level.)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lrmil.errors import UnreadableRegion
from lrmil.geometry import IntArray, MatchedGrid
from lrmil.slides import Slide


@dataclass(frozen=True)
class Read:
    """One request to the reader, and the patches to cut from what it returns."""

    box_l0: tuple[int, int, int, int]
    size_px: tuple[int, int]
    """width and height of the picture that is asked for"""
    rows: IntArray
    """(n,) which patch each cut is, as a row of the grid's regions or children"""
    corners_px: IntArray
    """(n, 2) top-left (x, y) of each cut in the picture"""
    boxes_l0: IntArray
    """(n, 4) the cuts' own boxes, to read them one by one where the whole cannot be decoded"""


def region_reads(grid: MatchedGrid) -> list[Read]:
    """One read for each region, at the low resolution."""
    return [_single(row, box, grid.scale.patch_px) for row, box in enumerate(grid.region_boxes_l0)]


def child_reads(grid: MatchedGrid, regions: IntArray | None = None) -> list[Read]:
    """Reads for the children of all regions, or of the given ones, at the high resolution."""
    wanted = np.ones(grid.num_regions, bool)
    if regions is not None:
        wanted = np.isin(np.arange(grid.num_regions), regions)
    patch_px, ratio = grid.scale.patch_px, grid.scale.ratio
    starts = np.searchsorted(grid.child_region, np.arange(grid.num_regions + 1))
    reads: list[Read] = []
    for region in np.flatnonzero(wanted):
        rows = np.arange(starts[region], starts[region + 1])
        boxes = grid.child_boxes_l0[rows]
        if grid.scale.snapped and 2 * len(rows) > ratio * ratio:
            slots = grid.child_slot[rows]
            corners = np.stack([slots % ratio, slots // ratio], axis=1) * patch_px
            side = ratio * patch_px
            reads.append(Read(_as_box(grid.region_boxes_l0[region]), (side, side), rows, corners, boxes))
        else:
            reads += [_single(int(row), box, patch_px) for row, box in zip(rows, boxes, strict=True)]
    return reads


def _single(row: int, box: IntArray, patch_px: int) -> Read:
    return Read(_as_box(box), (patch_px, patch_px), np.array([row]), np.zeros((1, 2), np.int64), box[None])


def _as_box(box: IntArray) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (int(v) for v in box)
    return x0, y0, x1, y1


class PatchReader:
    """Performs reads. Each thread has one picture in memory, the one that patches are being cut from."""

    def __init__(self, patch_px: int) -> None:
        self._patch_px = patch_px
        self._kept = threading.local()

    def read(self, slide: Slide, read: Read, patches: Sequence[npt.NDArray[np.uint8]]) -> dict[int, str]:
        """Fill `patches`, (P, P, 3) each; return the places of those that cannot be decoded, and why.

        Raises:
            SlideError: the slide cannot be read at all.
        """
        side = self._patch_px
        try:
            if len(patches) == 1 and read.size_px == (side, side):
                slide.read_box(read.box_l0, read.size_px, patches[0])
            else:
                picture = self._picture(read.size_px)
                slide.read_box(read.box_l0, read.size_px, picture)
                for patch, (x, y) in zip(patches, read.corners_px.tolist(), strict=True):
                    patch[...] = picture[y : y + side, x : x + side]
            return {}
        except UnreadableRegion as error:
            reason = error.message.removeprefix(f"{error.slide}: ")
        if len(patches) == 1:
            return {0: reason}
        # One bad tile need not cost the whole region: ask for its children one by one.
        failed: dict[int, str] = {}
        for place, (patch, box) in enumerate(zip(patches, read.boxes_l0, strict=True)):
            try:
                slide.read_box(_as_box(box), (side, side), patch)
            except UnreadableRegion:
                failed[place] = reason
        return failed

    def _picture(self, size_px: tuple[int, int]) -> npt.NDArray[np.uint8]:
        kept: npt.NDArray[np.uint8] | None = getattr(self._kept, "picture", None)
        if kept is None or kept.shape[:2] != size_px[::-1]:
            kept = self._kept.picture = np.empty((size_px[1], size_px[0], 3), np.uint8)
        return kept
