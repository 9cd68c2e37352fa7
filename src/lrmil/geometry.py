"""Where things are: physical scale, the matched grid, and which tokens lie under which child. Pure functions, no I/O.

Words. A *region* is one low-resolution (LR) patch; its *children* are the K = ratio**2 high-resolution (HR) patches
inside it. Child (row, col) sits in *slot* ratio*row + col. x is a column and y a row; arrays of points are (x, y);
`_l0` means level-0 pixels of the slide. The only true scale is mpp, micrometres per pixel.

One rule of scale. If a power-of-two multiple of the slide's own mpp lies within `mpp_tolerance` of the wanted one,
that multiple *is* the working mpp, every step is a whole number of level-0 pixels and nothing is resampled beyond box
averaging ("snapped"). Otherwise boundary i of the child grid lies at round(i * child_um / mpp): neighbours share it, so
there is no gap and no overlap, and sides differ by at most one level-0 pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from lrmil.errors import ConfigError, GridMismatch, SlideTooCoarse, SlideTooSmall
from lrmil.settings import Settings

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
CoverageFunction = Callable[[IntArray], npt.NDArray[np.floating]]

_REL_EPS = 1e-6


class GridSettings(Settings):
    """What is asked of every slide: two scales, a patch side, and how far a slide's own scale may be from them."""

    patch_px: int = Field(256, ge=8, le=4096, description="side of a patch at both scales, in pixels")
    lr_mpp: float = Field(2.0, gt=0, description="low resolution, um per pixel (2.0 is called 5x)")
    hr_mpp: float = Field(0.5, gt=0, description="high resolution, um per pixel (0.5 is called 20x)")
    mpp_tolerance: float = Field(
        0.05,
        ge=0,
        lt=0.34,
        description="a power-of-two multiple of the slide's mpp this close to the wanted one is used as it is",
    )

    @model_validator(mode="after")
    def _check(self) -> GridSettings:
        ratio = self.lr_mpp / self.hr_mpp
        if round(ratio) < 2 or abs(ratio - round(ratio)) > 1e-3 * ratio:
            raise ValueError(f"lr_mpp / hr_mpp must be a whole number of at least 2 (2, 4, 8); it is {ratio:.4g}")
        if self.patch_px % round(ratio):
            raise ValueError(f"patch_px={self.patch_px} is not divisible by lr_mpp / hr_mpp = {round(ratio)}")
        return self

    @property
    def ratio(self) -> int:
        """Children along one side of a region."""
        return round(self.lr_mpp / self.hr_mpp)

    @property
    def children_per_region(self) -> int:
        """K = ratio**2."""
        return self.ratio**2


@dataclass(frozen=True)
class SlideScale:
    """How the wanted scales look on one slide. Made by `resolve_scale`."""

    mpp_l0: float
    """The slide's own um per level-0 pixel."""
    child_side_l0: float
    """Side of a child in level-0 pixels; whole when snapped."""
    ratio: int
    patch_px: int
    snapped: bool
    has_hr: bool
    """False where the slide is coarser than hr_mpp: it can be predicted on, not trained with."""

    @property
    def region_side_l0(self) -> float:
        """Side of a region in level-0 pixels."""
        return self.child_side_l0 * self.ratio

    @property
    def hr_mpp(self) -> float:
        """Effective um per pixel of a child patch."""
        return self.child_side_l0 * self.mpp_l0 / self.patch_px

    @property
    def lr_mpp(self) -> float:
        """Effective um per pixel of a region patch."""
        return self.hr_mpp * self.ratio

    def child_boundary_l0(self, index: npt.ArrayLike) -> IntArray:
        """Level-0 position of child-grid boundary `index` (integers, any shape), rounded half up."""
        return np.floor(np.asarray(index, dtype=np.float64) * self.child_side_l0 + 0.5).astype(np.int64)


def resolve_scale(grid: GridSettings, mpp_l0: float, *, slide: str = "slide") -> SlideScale:
    """Apply the rule of scale (top of this file) to a slide of `mpp_l0` um per level-0 pixel.

    Raises:
        SlideTooCoarse: its pixels are larger than `grid.lr_mpp` allows, so there is nothing to average.
    """
    limit = 1.0 + grid.mpp_tolerance + _REL_EPS
    if mpp_l0 > grid.lr_mpp * limit:
        raise SlideTooCoarse(
            f"its pixels are {mpp_l0:.4g} um wide, coarser than the {grid.lr_mpp:g} um/px that is asked for.",
            slide=slide,
            fix="Use a scan of higher resolution, or a model made for a larger lr_mpp.",
        )
    multiple = 2.0 ** round(math.log2(grid.hr_mpp / mpp_l0))
    child_side_l0 = grid.patch_px * multiple
    near = abs(mpp_l0 * multiple / grid.hr_mpp - 1.0) <= grid.mpp_tolerance + _REL_EPS
    snapped = near and child_side_l0 >= 1.0 and child_side_l0 == int(child_side_l0)
    if not snapped:
        child_side_l0 = grid.patch_px * grid.hr_mpp / mpp_l0
    return SlideScale(
        mpp_l0=mpp_l0,
        child_side_l0=child_side_l0,
        ratio=grid.ratio,
        patch_px=grid.patch_px,
        snapped=snapped,
        has_hr=mpp_l0 <= grid.hr_mpp * limit,
    )


@dataclass(frozen=True)
class MatchedGrid:
    """Regions and, generated from them, their children. Row order: regions row-major; children by region, then slot.

    Boxes are (x0, y0, x1, y1) in level-0 pixels, half open; they may reach past the right and lower edge of the slide.
    """

    scale: SlideScale
    dimensions_l0: tuple[int, int]
    """width and height of the slide"""
    region_boxes_l0: IntArray
    """(N, 4)"""
    region_index: IntArray
    """(N, 2), column and row of the region on its grid"""
    region_tissue: npt.NDArray[np.float32]
    """(N,), share of the region that is tissue"""
    child_boxes_l0: IntArray
    """(M, 4)"""
    child_region: IntArray
    """(M,), row of the parent in `region_boxes_l0`"""
    child_slot: IntArray
    """(M,), ratio*row + col within the parent"""
    child_tissue: npt.NDArray[np.float32]
    """(M,), share of the child that is tissue"""

    @property
    def num_regions(self) -> int:
        """N, the number of LR patches."""
        return len(self.region_boxes_l0)

    @property
    def num_children(self) -> int:
        """M, the number of HR patches over all regions."""
        return len(self.child_boxes_l0)

    @property
    def children_per_region(self) -> IntArray:
        """(N,), K_r: how many children each region kept, 0 to K."""
        return np.bincount(self.child_region, minlength=self.num_regions).astype(np.int64)


def match_grids(
    grid: GridSettings,
    mpp_l0: float,
    dimensions_l0: tuple[int, int],
    coverage: CoverageFunction | None = None,
    *,
    min_region_tissue: float = 0.1,
    min_child_tissue: float = 0.1,
    origin_l0: tuple[int, int] = (0, 0),
    slide: str = "slide",
) -> MatchedGrid:
    """Lay one grid of regions over a slide and generate each region's children from it.

    Args:
        grid: the wanted scales.
        mpp_l0: the slide's um per level-0 pixel.
        dimensions_l0: width and height of the slide in level-0 pixels.
        coverage: maps boxes (N, 4) int64 to the share (N,) of each that is tissue, in 0..1; pixels outside the slide
            count as no tissue. None means that all of the slide is tissue.
        min_region_tissue: a region needs at least this share.
        min_child_tissue: so does a child of a kept region; a region may lose some or all children.
        origin_l0: where the grid starts; it may be chosen to line up with the file's own tiles. Children to the left of
            or above it are not looked at.
        slide: name for error messages.

    Raises:
        SlideTooCoarse: see `resolve_scale`.
        SlideTooSmall: not even one child fits into the slide.
    """
    scale = resolve_scale(grid, mpp_l0, slide=slide)
    width_l0, height_l0 = dimensions_l0
    if min(width_l0, height_l0) < scale.child_side_l0:
        raise SlideTooSmall(
            f"it measures {width_l0} x {height_l0} px, smaller than one patch of {scale.child_side_l0:.0f} px.",
            slide=slide,
            fix="Leave it out.",
        )
    if coverage is None:
        coverage = _share_inside(width_l0, height_l0)

    ratio = scale.ratio
    columns = _count(scale, width_l0 - origin_l0[0])
    rows = _count(scale, height_l0 - origin_l0[1])
    row, col = (a.ravel() for a in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    origin = np.asarray(origin_l0, dtype=np.int64)
    boxes = _boxes(scale, col * ratio, row * ratio, ratio, origin)
    tissue = _checked(coverage(boxes), len(boxes))
    kept = tissue >= min_region_tissue

    slot = np.arange(ratio * ratio)
    child_col = col[kept][:, None] * ratio + slot % ratio
    child_row = row[kept][:, None] * ratio + slot // ratio
    child_boxes = _boxes(scale, child_col.ravel(), child_row.ravel(), 1, origin)
    parent = np.repeat(np.arange(int(kept.sum())), ratio * ratio)
    slots = np.tile(slot, int(kept.sum()))
    if not scale.has_hr:
        child_boxes, parent, slots = child_boxes[:0], parent[:0], slots[:0]
    child_tissue = _checked(coverage(child_boxes), len(child_boxes))
    child_kept = child_tissue >= min_child_tissue

    return MatchedGrid(
        scale=scale,
        dimensions_l0=(int(width_l0), int(height_l0)),
        region_boxes_l0=boxes[kept],
        region_index=np.stack([col[kept], row[kept]], axis=1).astype(np.int64),
        region_tissue=tissue[kept],
        child_boxes_l0=child_boxes[child_kept],
        child_region=parent[child_kept].astype(np.int64),
        child_slot=slots[child_kept].astype(np.int64),
        child_tissue=child_tissue[child_kept],
    )


def token_blocks(token_grid_side: int, ratio: int) -> IntArray:
    """Return the patch tokens under each child: (ratio**2, M) row-major token indices, CLS not counted.

    With 16 x 16 tokens and ratio 4, slot k = 4*row + col owns the 4 x 4 block of token rows 4*row.. and columns 4*col..

    Raises:
        GridMismatch: the token grid cannot be cut into ratio x ratio equal blocks.
    """
    check_token_grid(token_grid_side, ratio)
    block = token_grid_side // ratio
    tokens = np.arange(token_grid_side**2).reshape(ratio, block, ratio, block)
    return tokens.transpose(0, 2, 1, 3).reshape(ratio**2, block**2)


def check_token_grid(token_grid_side: int, ratio: int) -> None:
    """Raise `GridMismatch` unless a square token grid can be cut into ratio x ratio equal blocks."""
    if token_grid_side % ratio:
        raise GridMismatch(
            f"the encoder's token grid is {token_grid_side} x {token_grid_side}, which cannot be cut into "
            f"{ratio} x {ratio} equal blocks, one for each child.",
            fix=f"Choose a patch side whose number of tokens is a multiple of {ratio} "
            f"(224 px for 14-px tokens, 256 px for 16-px tokens).",
        )


@dataclass(frozen=True)
class ContainedPairs:
    """Which child lies wholly inside which region, for grids that were tiled independently of each other."""

    region: IntArray
    """(P,) row of the region"""
    child: IntArray
    """(P,) row of the child; a child in several overlapping regions appears once for each"""
    offset_l0: IntArray
    """(P, 2) child top-left minus region top-left, (x, y)"""


def match_by_containment(
    region_coords_l0: IntArray, child_coords_l0: IntArray, region_side_l0: float, child_side_l0: float
) -> ContainedPairs:
    """Match patches of two independently tiled scales: 0 <= offset <= region side - child side in x and in y.

    Coordinates are (N, 2) top-left corners (x, y) in one common frame. Pairs are sorted by region, then by child row.
    """
    reach = region_side_l0 - child_side_l0
    order = np.argsort(child_coords_l0[:, 1], kind="stable")
    child_y = child_coords_l0[order, 1]
    first = np.searchsorted(child_y, region_coords_l0[:, 1], side="left")
    last = np.searchsorted(child_y, region_coords_l0[:, 1] + reach, side="right")
    regions, children = [], []
    for r, (lo, hi) in enumerate(zip(first, last, strict=True)):
        candidates = order[lo:hi]
        dx = child_coords_l0[candidates, 0] - region_coords_l0[r, 0]
        inside = np.sort(candidates[(dx >= 0) & (dx <= reach)])
        regions.append(np.full(len(inside), r, dtype=np.int64))
        children.append(inside.astype(np.int64))
    region = np.concatenate(regions) if regions else np.empty(0, np.int64)
    child = np.concatenate(children) if children else np.empty(0, np.int64)
    return ContainedPairs(region, child, child_coords_l0[child] - region_coords_l0[region])


def _count(scale: SlideScale, extent_l0: int) -> int:
    """Number of regions that begin inside `extent_l0` pixels."""
    count = max(0, math.ceil(extent_l0 / scale.region_side_l0) + 1)
    starts = scale.child_boundary_l0(np.arange(count) * scale.ratio)
    return int((starts < extent_l0).sum())


def _boxes(scale: SlideScale, col: IntArray, row: IntArray, span: int, origin: IntArray) -> IntArray:
    """Boxes that begin at child-grid (col, row) and span `span` children each way."""
    edges: Sequence[IntArray] = [scale.child_boundary_l0(i) for i in (col, row, col + span, row + span)]
    return np.stack(edges, axis=1) + np.tile(origin, 2)


def _share_inside(width_l0: int, height_l0: int) -> CoverageFunction:
    def coverage(boxes: IntArray) -> FloatArray:
        x0, y0, x1, y1 = boxes.T
        inside_x = np.clip(np.minimum(x1, width_l0) - np.maximum(x0, 0), 0, None)
        inside_y = np.clip(np.minimum(y1, height_l0) - np.maximum(y0, 0), 0, None)
        return inside_x * inside_y / np.maximum((x1 - x0) * (y1 - y0), 1)

    return coverage


def _checked(tissue: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.float32]:
    tissue = np.asarray(tissue, dtype=np.float32)
    if tissue.shape != (count,):
        raise ConfigError(f"a coverage function returned shape {tissue.shape} for {count} boxes.", fix="Return (N,).")
    return tissue
