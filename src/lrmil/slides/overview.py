"""The whole slide at a glance: read block by block, honest about what was not scanned or cannot be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lrmil.slides.blocks import Block, DecodeError, block_sides

if TYPE_CHECKING:
    from lrmil.slides.base import Slide

SNAP_FACTOR = 0.05
"""A whole number of level pixels per overview pixel is taken where it is this close to the wanted scale."""

BLOCK_PX = 1024
"""Side of a block in level pixels: small enough that a slide without a pyramid has some for every thread."""

SMALLEST_SPLIT_PX = 256
"""A block that cannot be decoded is quartered down to this side in level pixels: one bad tile costs one tile."""

MAX_SPLITS = 64
"""After so many quarterings the file is taken for damaged as a whole: further bad blocks count in one piece."""


@dataclass(frozen=True)
class Overview:
    """A whole slide as a small image. Its pixel (x, y) covers level-0 pixels from (x, y) * downsample_l0."""

    rgb: npt.NDArray[np.uint8]
    """(h, w, 3); background colour where nothing was scanned or could be read"""
    scanned: npt.NDArray[np.bool_]
    """(h, w), False where at least half of the pixel was never scanned, lies outside the slide, or cannot be read"""
    mpp: float
    """um per pixel of this image, within 5 % of what was asked or exactly that"""
    downsample_l0: tuple[float, float]
    """level-0 pixels per pixel of this image, along x and y"""
    unreadable: int
    """blocks that could not be decoded"""
    unreadable_px: int
    """pixels of this image in those blocks"""


def read_overview(slide: Slide, mpp: float, threads: int = 1) -> Overview:
    """Read a slide at `mpp` um per pixel from the coarsest level that is fine enough; see `Slide.overview`.

    Never finer than level 0. The image starts at level-0 (0, 0) and its last column and row may reach past the slide.
    How many threads read makes no difference to it.
    """
    level = slide.level_for(mpp)
    factor = max(1.0, mpp / slide.mpp / level.downsample)
    if abs(round(factor) / factor - 1) <= SNAP_FACTOR:
        factor = float(round(factor))
    downsample = level.downsample * factor
    # A sliver below a thousandth of a pixel is floating-point noise, not a further column.
    width, height = (max(1, math.ceil(side / downsample - 1e-3)) for side in slide.dimensions)
    rgb = np.full((height, width, 3), slide.background_rgb, np.uint8)
    scanned = np.zeros((height, width), np.bool_)

    def read(block: Block) -> bool:
        try:
            sample = slide.sample(level, block.box_l0((0, 0), (downsample, downsample)), block.size_px)
        except DecodeError:
            return False
        rgb[block.place] = sample.rgb
        scanned[block.place] = True if sample.scanned is None else sample.scanned > 0.5
        return True

    unreadable = unreadable_px = splits = 0
    blocks = list(Block(0, 0, width, height).cut(*block_sides((factor, factor), BLOCK_PX)))
    failed = [block for block, done in zip(blocks, _each(read, blocks, threads), strict=True) if not done][::-1]
    while failed:
        block = failed.pop()
        longer_px = max(block.size_px)
        if splits < MAX_SPLITS and longer_px > 1 and longer_px * factor > SMALLEST_SPLIT_PX:
            splits += 1
            half = math.ceil(longer_px / 2)
            failed.extend([part for part in block.cut(half, half) if not read(part)][::-1])
        else:
            unreadable += 1
            unreadable_px += block.area_px
            slide.stats.add_unreadable()
    return Overview(rgb, scanned, slide.mpp * downsample, (downsample, downsample), unreadable, unreadable_px)


def _each(read: Callable[[Block], bool], blocks: Sequence[Block], threads: int) -> list[bool]:
    if threads == 1 or len(blocks) == 1:
        return [read(block) for block in blocks]
    with ThreadPoolExecutor(min(threads, len(blocks)), thread_name_prefix="overview") as pool:
        return list(pool.map(read, blocks))
