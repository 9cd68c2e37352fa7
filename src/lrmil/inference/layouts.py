"""Where the patches of a slide lie, at every scale that a head of many scales asks for, rows in the head's order.

Both layouts come from the slide's own grid, whose regions every other method sees, too:

    "low", "mid", "high"  all regions (lr_mpp); the four quarters of each, twice as fine; all patches of hr_mpp in
                          those, tissue or not: none may be missing. The patches of a quarter stand together, quarters
                          of a region, too. Within them rows run down, then across: (row, column) = (0, 0), (1, 0),
                          (0, 1), (1, 1), as in the files of ZoomMIL's program
    "high"                the children of the grid (hr_mpp), those alone that hold enough tissue
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrmil.errors import ConfigError, NoTissue, SlideTooCoarse
from lrmil.geometry import GridSettings, IntArray, MatchedGrid
from lrmil.inference.stream import Read
from lrmil.mil.scales import nested_slots

ZOOM_SCALES = ("low", "mid", "high")
CHILD_SCALES = ("high",)
_MID_SIDE = 2
"""Middle patches along a region: the step of 2 of all published settings, whatever lies below"""


@dataclass(frozen=True)
class ScaleLayout:
    """The n patches of one slide at one scale."""

    boxes_l0: IntArray
    """(n, 4) (x0, y0, x1, y1) in level-0 pixels, half open"""
    region: IntArray
    """(n,) row of the grid's region that each lies in, ascending"""
    cell: IntArray
    """(n, 2) column and row of each within its region, counted in patches of this scale"""
    cells_side: int
    """patches along a region"""
    side_l0: float
    """side of a patch in level-0 pixels"""
    mpp: float
    """um per pixel of a patch as it is encoded"""

    def __len__(self) -> int:
        """Return n."""
        return len(self.region)

    @property
    def slot(self) -> IntArray:
        """(n,) place of each within its region, row by row."""
        return self.cell[:, 1] * self.cells_side + self.cell[:, 0]


def layouts_for(scales: Sequence[str], grid: MatchedGrid, *, slide: str = "slide") -> dict[str, ScaleLayout]:
    """Lay out the patches for a head that reads `scales`, coarsest first: `ZOOM_SCALES` or `CHILD_SCALES`.

    Raises:
        SlideTooCoarse: the slide does not reach the high resolution.
        NoTissue: there is no patch.
        ConfigError: other scales, or no scale in the middle.
    """
    if not grid.scale.has_hr:
        raise SlideTooCoarse(
            f"its pixels are {grid.scale.mpp_l0:.4g} um wide, too coarse for the high resolution of this method.",
            slide=slide,
            fix="Leave it out, or choose a method of the low resolution alone.",
        )
    if tuple(scales) == CHILD_SCALES:
        found = {"high": _children(grid)}
    elif tuple(scales) == ZOOM_SCALES:
        require_middle(grid.scale.ratio)
        found = {
            "low": _all_patches(grid, 1, np.zeros(1, np.int64)),
            "mid": _all_patches(grid, _MID_SIDE, np.arange(_MID_SIDE**2)),
            "high": _all_patches(grid, grid.scale.ratio, nested_slots(_MID_SIDE, grid.scale.ratio).numpy()),
        }
    else:
        raise ConfigError(
            f"no layout for scales {', '.join(scales)}.",
            fix=f"Known are {', '.join(ZOOM_SCALES)}, and {', '.join(CHILD_SCALES)} alone.",
        )
    if not len(found["high"]):
        raise NoTissue("no patch of it holds enough tissue.", slide=slide, fix="Leave it out.")
    return found


def require_middle(ratio: int) -> None:
    """See that a scale lies in the middle.

    Raises:
        ConfigError: `GridSettings.ratio` is odd, or 2.
    """
    if ratio < 2 * _MID_SIDE or ratio % _MID_SIDE:
        raise ConfigError(
            f"three magnifications need a middle one, twice as fine as the low; lr_mpp / hr_mpp is {ratio}.",
            fix="Choose lr_mpp and hr_mpp 4 apart (or 6, 8, ...), or leave ZoomMIL out.",
        )


def scale_mpps(scales: Sequence[str], grid: GridSettings) -> dict[str, float]:
    """Return the um per pixel that is wanted at each of these scales."""
    known = {"low": grid.lr_mpp, "mid": grid.lr_mpp / _MID_SIDE, "high": grid.hr_mpp}
    return {scale: known[scale] for scale in scales}


def patch_reads(layout: ScaleLayout, rows: IntArray, patch_px: int, *, snapped: bool) -> list[Read]:
    """Requests to the reader for some rows of a layout, any order, each once.

    A block of patches costs little more to read than one of them, since files hold tiles. Where the grid is snapped,
    what is wanted of a region is therefore cut from one picture if it fills more than half of that; else the region is
    halved, and so on down to single patches. Only wanted patches are cut out.
    """
    reads: list[Read] = []
    rows = rows[np.argsort(layout.region[rows], kind="stable")]
    for group in np.split(rows, np.flatnonzero(np.diff(layout.region[rows])) + 1):
        if snapped and len(group):
            _cover(layout, group, patch_px, reads)
        else:
            reads += [_read(layout, row, patch_px) for row in np.split(group, len(group))] if len(group) else []
    return reads


def _cover(layout: ScaleLayout, rows: IntArray, patch_px: int, reads: list[Read]) -> None:
    cells = layout.cell[rows]
    first = cells.min(axis=0)
    span = cells.max(axis=0) - first + 1
    if 2 * len(rows) > span.prod():
        reads.append(_read(layout, rows, patch_px))
        return
    axis = int(span.argmax())
    near = cells[:, axis] < first[axis] + (span[axis] + 1) // 2
    _cover(layout, rows[near], patch_px, reads)
    _cover(layout, rows[~near], patch_px, reads)


def _read(layout: ScaleLayout, rows: IntArray, patch_px: int) -> Read:
    """One picture that holds these patches of one region."""
    cells, boxes = layout.cell[rows], layout.boxes_l0[rows]
    first = cells.min(axis=0)
    width, height = ((cells.max(axis=0) - first + 1) * patch_px).tolist()
    (x0, y0), (x1, y1) = boxes[:, :2].min(axis=0).tolist(), boxes[:, 2:].max(axis=0).tolist()
    return Read((x0, y0, x1, y1), (width, height), rows, (cells - first) * patch_px, boxes)


def _all_patches(grid: MatchedGrid, side: int, places: IntArray) -> ScaleLayout:
    """All side x side patches of every region, in the order of `places`, which count down columns."""
    scale = grid.scale
    span = scale.ratio // side
    column, row = places // side, places % side
    # Boundaries are those of the child grid, so that patches of all scales share them, snapped or not.
    start = grid.region_index * scale.ratio
    origin = grid.region_boxes_l0[:, :2] - scale.child_boundary_l0(start)
    cell = np.stack([column, row], axis=1).astype(np.int64)
    low = start[:, None] + cell * span
    corners = [scale.child_boundary_l0(index) + origin[:, None] for index in (low, low + span)]
    return ScaleLayout(
        boxes_l0=np.concatenate(corners, axis=2).reshape(-1, 4),
        region=np.repeat(np.arange(grid.num_regions), side**2),
        cell=np.tile(cell, (grid.num_regions, 1)),
        cells_side=side,
        side_l0=scale.child_side_l0 * span,
        mpp=scale.hr_mpp * span,
    )


def _children(grid: MatchedGrid) -> ScaleLayout:
    ratio = grid.scale.ratio
    return ScaleLayout(
        boxes_l0=grid.child_boxes_l0,
        region=grid.child_region,
        cell=np.stack([grid.child_slot % ratio, grid.child_slot // ratio], axis=1),
        cells_side=ratio,
        side_l0=grid.scale.child_side_l0,
        mpp=grid.scale.hr_mpp,
    )
