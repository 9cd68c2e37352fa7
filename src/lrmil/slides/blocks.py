"""Requests cut into blocks of bounded memory, and what becomes of a block: a sample, or an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lrmil.slides.resample import Float32Array, UInt8Array

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in level-0 pixels, half open"""

BLOCK_PX = 2048
"""Largest side of a block in level pixels: 16 MB of RGBA."""


class DecodeError(Exception):
    """What a reader raises when the file's pixels cannot be decoded; `Slide` turns it into `UnreadableRegion`."""


@dataclass(frozen=True)
class Sample:
    """One box as an image."""

    rgb: UInt8Array
    """(h, w, 3)"""
    scanned: Float32Array | None
    """(h, w), share of each pixel that was scanned; None means all of it"""
    source_px: int
    """pixels of the level that were read for it"""


@dataclass(frozen=True)
class Block:
    """A rectangle of output pixels."""

    x_px: int
    y_px: int
    width_px: int
    height_px: int

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height."""
        return self.width_px, self.height_px

    @property
    def area_px(self) -> int:
        """Number of pixels."""
        return self.width_px * self.height_px

    @property
    def place(self) -> tuple[slice, slice]:
        """Rows and columns of the output array."""
        return slice(self.y_px, self.y_px + self.height_px), slice(self.x_px, self.x_px + self.width_px)

    def box_l0(self, origin_l0: tuple[float, float], step_l0: tuple[float, float]) -> Box:
        """Return what the block covers, where output pixel (0, 0) begins at `origin_l0` and measures `step_l0`."""
        return (
            origin_l0[0] + self.x_px * step_l0[0],
            origin_l0[1] + self.y_px * step_l0[1],
            origin_l0[0] + (self.x_px + self.width_px) * step_l0[0],
            origin_l0[1] + (self.y_px + self.height_px) * step_l0[1],
        )

    def cut(self, width_px: int, height_px: int) -> Iterator[Block]:
        """Yield parts of at most `width_px` x `height_px`, row by row."""
        for y in range(0, self.height_px, height_px):
            for x in range(0, self.width_px, width_px):
                width, height = min(width_px, self.width_px - x), min(height_px, self.height_px - y)
                yield Block(self.x_px + x, self.y_px + y, width, height)


def block_sides(step_level_px: tuple[float, float], block_px: int = BLOCK_PX) -> tuple[int, int]:
    """Return the largest width and height of a block whose pixels each measure `step_level_px` pixels of a level."""
    return max(1, int(block_px / step_level_px[0] + 1e-9)), max(1, int(block_px / step_level_px[1] + 1e-9))
