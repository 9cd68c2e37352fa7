"""What written slides are made of: square blocks of tissue, real or simulated, and of glass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.benchmarks.settings import RealSlide
from lrmil.slides import open_slide

UInt8Array = npt.NDArray[np.uint8]

TISSUE, TURNED, ISLAND, FRINGE, GLASS = "tissue", "turned", "island", "fringe", "glass"
"""Kinds of blocks: full of tissue, the same turned; tissue in the middle of glass, the same turned; glass."""

_SIDE_PX = 1024
"""side of the piece of a slide, or of the simulated tile, that is mirrored until it fills a block"""
_SEARCH_PX = 16
"""the piece is looked for in an overview that is so much smaller"""
_LIKE = 1.25
"""largest quotient of a slide's mpp and the wanted one for its tissue to pass as it is"""
_GLASS_RGB = (243, 242, 244)


@dataclass(frozen=True)
class Material:
    """Blocks of one scale."""

    piece: UInt8Array
    """(h, w, 3) tissue"""
    source: str
    """where it comes from, in words"""
    block_px: int
    seed: int

    def block(self, kind: str) -> UInt8Array:
        """Return a block (block_px, block_px, 3) of one of the kinds."""
        if kind == GLASS:
            return self._glass
        if kind in (TURNED, FRINGE):
            upright = self._tissue if kind == TURNED else self._island
            return np.asarray(cv2.rotate(upright, cv2.ROTATE_90_CLOCKWISE), np.uint8)
        return self._island if kind == ISLAND else self._tissue

    @cached_property
    def _tissue(self) -> UInt8Array:
        height, width = self.piece.shape[:2]
        down, across = math.ceil(self.block_px / height), math.ceil(self.block_px / width)
        beside = np.concatenate([self.piece[:, :: (1, -1)[i % 2]] for i in range(across)], axis=1)
        below = np.concatenate([beside[:: (1, -1)[i % 2]] for i in range(down)])
        return np.ascontiguousarray(below[: self.block_px, : self.block_px])

    @cached_property
    def _glass(self) -> UInt8Array:
        rng = np.random.default_rng([self.seed, 1])
        noise = rng.standard_normal((_SIDE_PX, _SIDE_PX, 1), dtype=np.float32)
        glass = np.clip(np.rint(np.asarray(_GLASS_RGB, np.float32) + 1.5 * noise), 0, 255).astype(np.uint8)
        times = math.ceil(self.block_px / _SIDE_PX)
        return np.ascontiguousarray(np.tile(glass, (times, times, 1))[: self.block_px, : self.block_px])

    @cached_property
    def _island(self) -> UInt8Array:
        return np.asarray(cv2.copyTo(self._tissue, self._outline, self._glass.copy()), np.uint8)

    @cached_property
    def _outline(self) -> UInt8Array:
        """Not 0 inside of a ragged blob that keeps away from the block's edges."""
        rng = np.random.default_rng([self.seed, 2])
        rough = cv2.resize(rng.standard_normal((9, 9)).astype(np.float32), (256, 256), interpolation=cv2.INTER_CUBIC)
        y, x = np.mgrid[-1:1:256j, -1:1:256j].astype(np.float32)
        inside = 0.8 - np.hypot(x, y) + 0.12 * rough
        inside = np.minimum(inside, 0.95 - np.maximum(np.abs(x), np.abs(y)))
        return np.asarray(cv2.resize(inside, (self.block_px, self.block_px)) > 0, np.uint8)


def find_material(mpp: float, real: Sequence[RealSlide], block_px: int, seed: int) -> Material:
    """Return tissue at `mpp` um per pixel: from the first of the real slides whose own is near that, else simulated."""
    for known in real:
        with open_slide(known.path, mpp=known.mpp) as slide:
            if max(slide.mpp / mpp, mpp / slide.mpp) > _LIKE or min(slide.dimensions) < _SIDE_PX:
                continue
            view = slide.overview(slide.mpp * _SEARCH_PX)
            side = _SIDE_PX // _SEARCH_PX
            stain = cv2.boxFilter(255.0 - view.rgb[..., 1], -1, (side, side), anchor=(0, 0))
            last_y, last_x = (max(0, length // _SEARCH_PX - side) for length in reversed(slide.dimensions))
            y, x = np.unravel_index(stain[: last_y + 1, : last_x + 1].argmax(), (last_y + 1, last_x + 1))
            x_l0, y_l0 = int(x) * _SEARCH_PX, int(y) * _SEARCH_PX
            piece = slide.read_box((x_l0, y_l0, x_l0 + _SIDE_PX, y_l0 + _SIDE_PX), (_SIDE_PX, _SIDE_PX))
            return Material(piece, f"real ({known.path.name})", block_px, seed)
    from lrmil.cohorts.simulated import preset
    from lrmil.cohorts.simulated.slide import render_tile

    rng = np.random.default_rng([seed, round(1000 * mpp)])
    piece, _ = render_tile(rng, preset("demo"), min(_SIDE_PX, block_px), mpp)
    return Material(piece, "simulated", block_px, seed)
