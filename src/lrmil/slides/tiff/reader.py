"""The Slide over compressed tiles: each that a request needs is decoded once, at reduced size where that suffices.

OpenSlide is asked once, on opening, what the file is: vendor, levels, mpp. What it says must fit the directories that
are read here, so the two readers never disagree about a slide; pixels are decoded without it.

Where a request wants the average over 2, 4 or 8 pixels of a level (or a multiple of these) and begins at a multiple of
that factor, tiles are decoded at reduced size, see `TileDecoder.reduction`. Tiles that end in a part of such an average
(at the right and lower edge of a level) are decoded fully, so that no padding gets into it. Any other request decodes
fully, and averages.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrmil.errors import NotASlide, SlideError
from lrmil.slides.base import Slide
from lrmil.slides.blocks import Block, Box, Sample
from lrmil.slides.levels import Level, nominal_downsample
from lrmil.slides.resample import Float32Array, UInt8Array, area_mean, area_resample, snap
from lrmil.slides.tiff.file import RandomAccessFile
from lrmil.slides.tiff.layout import TiledImage, TileRect
from lrmil.slides.tiff.structure import NotUnderstood
from lrmil.slides.tiff.tiles import TileRef, TileStore
from lrmil.slides.tiff.understand import understand

READER = "tiff"

CACHE_BYTES = 128 * 2**20
"""Decoded tiles kept for each open slide: about 680 of 256 x 256 px, or 10,000 of them at 1/4."""

SHARED_MPP = 2.1
"""A level of which 5x is decoded at reduced size (to 2 um/px, and 5 % for odd scanners) is decoded no coarser for an
overview: the regions then find the tiles that the search for tissue has decoded."""

_FACTORS = (8, 4, 2)
_SCRATCH_BYTES = 4 * 2**20
"""Largest picture that a thread keeps the memory of, for the next one"""


@dataclass(frozen=True)
class _Request:
    """A sample in pixels of a level."""

    box_px: Box
    step: int
    """how many pixels of the level, along both axes, go into one of the sample; 0 where that, or the upper left corner,
    is not whole"""
    aligned: bool
    """whether the upper left corner is a multiple of the step, where tiles can be averaged one by one"""
    reduction: int
    """at which part of their size tiles are decoded that have no padding in the last group"""


class TiffSlide(Slide):
    """A tiled TIFF or SVS, read directly.

    Args:
        path: the file.
        mpp: what the user says about the level-0 um/px; overrides the file.
        cache_bytes: bound on the decoded tiles that are kept.

    Raises:
        NotASlide: it is damaged, or something in it is not fully understood here; OpenSlide may read it.
        MissingMpp, ImplausibleMpp: see `believed_mpp`.
    """

    def __init__(self, path: Path, mpp: float | None = None, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._user_mpp = mpp
        try:
            self._file = RandomAccessFile(path)
            self._images, facts = understand(self._file, path, mpp)
        except NotUnderstood as error:
            raise NotASlide(
                f"it is not read directly: {error}.", slide=path.name, fix="Leave it to OpenSlide."
            ) from error
        except OSError as error:
            raise NotASlide(f"it cannot be read ({error}).", slide=path.name, fix="Check its permissions.") from error
        super().__init__(
            path,
            reader=READER,
            vendor=facts.vendor,
            dimensions=facts.dimensions,
            levels=[
                Level(i, image.width_px, image.height_px, _downsample(facts.dimensions, image))
                for i, image in enumerate(self._images)
            ],
            mpp=facts.mpp,
            mpp_source=facts.mpp_source,
            background_rgb=facts.background_rgb,
            bounds_l0=facts.bounds_l0,
        )
        self.properties = facts.properties
        self._tiles = TileStore(self._file, self._images, self.stats, cache_bytes)
        self._scratch = threading.local()

    def tiles_of(self, box_l0: Box, size_px: tuple[int, int]) -> tuple[TileRef, ...]:
        """Return the tiles that `read_box` decodes for a request, in file order; those never scanned are left out.

        Raises:
            ConfigError: the box or the size is empty.
        """
        rect = self._tiles_under(box_l0, size_px)
        if rect is None:
            return ()
        refs = (
            self._tiles.ref(rect.level, column, row, rect.reduction)
            for row in range(rect.first_row, rect.last_row)
            for column in range(rect.first_column, rect.last_column)
        )
        return tuple(sorted(ref for ref in refs if ref.length))

    def read_tile(self, ref: TileRef) -> UInt8Array | None:
        """Return a decoded tile, (h, w, 3) at 1/`ref.reduction`, or None where nothing was scanned.

        It is not to be written to. What lies beyond the edges of the level in it is padding.

        Raises:
            DecodeError: it is damaged, or lies beyond the end of the file.
            SlideError: the slide has been closed.
        """
        return self._fetch(TileRect(ref.level, ref.column, ref.row, ref.column + 1, ref.row + 1, ref.reduction))[0]

    def announce(self, requests: Iterable[tuple[Box, tuple[int, int]]]) -> None:
        """Keep the tiles that several of these boxes share until the last of them has been read."""
        rects = (self._tiles_under(box_l0, size_px) for box_l0, size_px in requests)
        self._tiles.announce([rect for rect in rects if rect is not None])

    def withdraw(self) -> None:
        """Let go of announced boxes that have not been read."""
        self._tiles.withdraw()

    def _tiles_under(self, box_l0: Box, size_px: tuple[int, int]) -> TileRect | None:
        self._check(box_l0, size_px)
        x0, y0, x1, y1 = map(float, box_l0)
        if min(x1, y1) <= 0 or x0 >= self.dimensions[0] or y0 >= self.dimensions[1]:
            return None
        level = self.level_for(self.mpp * min((x1 - x0) / size_px[0], (y1 - y0) / size_px[1]))
        request = self._request(level, (x0, y0, x1, y1), size_px)
        left, top, right, bottom = request.box_px
        image = self._images[level.index]
        # A level may end short of the slide by a rounded-off remainder; its last pixel is repeated there.
        first_x, first_y = (
            max(0, min(math.floor(edge), side - 1)) for edge, side in ((left, image.width_px), (top, image.height_px))
        )
        last_x, last_y = min(math.ceil(right), image.width_px), min(math.ceil(bottom), image.height_px)
        if last_x <= first_x or last_y <= first_y:
            return None
        return image.rect(level.index, first_x, first_y, last_x, last_y, request.reduction)

    def _fetch(self, rect: TileRect) -> list[UInt8Array | None]:
        if self._file.closed:
            raise SlideError("it has been closed.", slide=self.name, fix="Open it again to read from it.")
        return self._tiles.fetch(rect)

    def _request(self, level: Level, box_l0: Box, size_px: tuple[int, int]) -> _Request:
        """Say how a sample is made: which part of their size its tiles are decoded at."""
        x0, y0, x1, y1 = (snap(edge / level.downsample) for edge in box_l0)
        step_x, step_y = snap((x1 - x0) / size_px[0]), snap((y1 - y0) / size_px[1])
        step, aligned, reduction = 0, False, 1
        if step_x == step_y and step_x >= 1 and step_x.is_integer() and x0.is_integer() and y0.is_integer():
            step = int(step_x)
            aligned = x0 % step == 0 and y0 % step == 0
            # An average across the top or left edge is made of whole pixels. With all of the request made of them, no
            # tile is decoded twice; at the other edges `TileStore.reduction_of` sees to that, tile by tile.
            cut = (x0 < 0 and x0 % step != 0) or (y0 < 0 and y0 % step != 0)
            coarsest = 1 if cut else self._coarsest(level, step)
            factor = next((f for f in _FACTORS if step % f == 0 and f <= coarsest), 1)
            if factor > 1 and x0 % factor == 0 and y0 % factor == 0:
                reduction = self._images[level.index].decoder.reduction(factor)
        return _Request((x0, y0, x1, y1), step, aligned, reduction)

    def _coarsest(self, level: Level, step: int) -> float:
        """Return the coarsest reduction at which tiles of a level are decoded to be averaged to 1/`step`."""
        mpp = self.mpp * level.downsample
        shared = step * mpp > SHARED_MPP and self.level_for(SHARED_MPP) is level
        # Where regions need whole tiles, what an overview saves by smaller ones is more than what they would share.
        return SHARED_MPP / mpp if shared and 2 * mpp <= SHARED_MPP else math.inf

    def _sample(self, level: Level, box_l0: Box, size_px: tuple[int, int], out: UInt8Array | None = None) -> Sample:
        """As every slide does; the part that consists of whole averages within the level is made without detours."""
        request = self._request(level, box_l0, size_px)
        inner = _inner(request, size_px, (level.width_px, level.height_px)) if request.step else None
        if inner is None:
            return super()._sample(level, box_l0, size_px)
        rgb = np.empty((size_px[1], size_px[0], 3), np.uint8) if out is None else out
        holes = self._averages(level, request, inner, rgb[inner.place])
        source_px = inner.area_px * request.step**2
        if inner.size_px == size_px:
            return Sample(rgb, holes, source_px)
        scanned: Float32Array = np.ones(rgb.shape[:2], np.float32)
        if holes is not None:
            scanned[inner.place] = holes
        step_l0 = (box_l0[2] - box_l0[0]) / size_px[0], (box_l0[3] - box_l0[1]) / size_px[1]
        for block in _around(inner, size_px):
            sample = super()._sample(level, block.box_l0(box_l0[:2], step_l0), block.size_px)
            rgb[block.place] = sample.rgb
            source_px += sample.source_px
            if sample.scanned is not None:
                scanned[block.place] = sample.scanned
        return Sample(rgb, None if scanned.min() == 1 else scanned, source_px)

    def _averages(self, level: Level, request: _Request, inner: Block, rgb: UInt8Array) -> Float32Array | None:
        """Put the pixels `inner` of a request into `rgb`; return which share of each was scanned, None: all of it."""
        step, reduction = request.step, request.reduction
        left, top = round(request.box_px[0]) + inner.x_px * step, round(request.box_px[1]) + inner.y_px * step
        width, height = self._images[level.index].tile_px
        if request.aligned and width % step == height % step == 0:
            holes = self._assemble(level, left, top, step, reduction, rgb)
        else:
            times = step // reduction
            picture = self._scratch_picture(inner.width_px * times, inner.height_px * times)
            holes = self._assemble(level, left, top, reduction, reduction, picture)
            rgb[...] = area_resample(picture, (0, 0, picture.shape[1], picture.shape[0]), inner.size_px)
        if holes is None:
            return None
        whole = (0.0, 0.0, float(holes.shape[1]), float(holes.shape[0]))
        return area_mean((~holes).astype(np.float32)[..., None], whole, inner.size_px)[..., 0]

    def _scratch_picture(self, width_px: int, height_px: int) -> UInt8Array:
        """Return memory for a picture (h, w, 3) that is over before this thread asks for the next one."""
        length = 3 * width_px * height_px
        kept: UInt8Array | None = getattr(self._scratch, "picture", None)
        if kept is None or len(kept) < length:
            kept = np.empty(length, np.uint8)
            if length <= _SCRATCH_BYTES:
                self._scratch.picture = kept
        return kept[:length].reshape(height_px, width_px, 3)

    def _read_level(self, level: Level, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8Array:
        rgb = np.empty((height_px, width_px, 3), np.uint8)
        holes = self._assemble(level, x_px, y_px, 1, 1, rgb)
        if holes is None:
            return rgb
        return np.dstack([rgb, np.where(holes, 0, 255).astype(np.uint8)])

    def _assemble(
        self, level: Level, left: int, top: int, step: int, reduction: int, canvas: UInt8Array
    ) -> npt.NDArray[np.bool_] | None:
        """Fill `canvas` with the level at 1/`step`; return which of its pixels were never scanned, None: none.

        Tiles are decoded at 1/`reduction`, and averaged one by one where that is less. `left` and `top` are in pixels
        of the level; they and the sides of a tile are multiples of `step`.
        """
        image = self._images[level.index]
        width, height = image.tile_px
        right, bottom = left + canvas.shape[1] * step, top + canvas.shape[0] * step
        rect = image.rect(level.index, left, top, right, bottom, reduction)
        tiles = iter(self._fetch(rect))
        holes = None
        for row in range(rect.first_row, rect.last_row):
            y = row * height
            y0, y1 = max(y, top), min(y + height, bottom)
            for column in range(rect.first_column, rect.last_column):
                tile = next(tiles)
                x = column * width
                x0, x1 = max(x, left), min(x + width, right)
                place = (
                    slice((y0 - top) // step, (y1 - top) // step),
                    slice((x0 - left) // step, (x1 - left) // step),
                )
                if tile is None:
                    canvas[place] = self.background_rgb
                    holes = np.zeros(canvas.shape[:2], np.bool_) if holes is None else holes
                    holes[place] = True
                else:
                    own = height // len(tile)  # 1 instead of the reduction in some tiles, see `TileStore.reduction_of`
                    part = tile[(y0 - y) // own : (y1 - y) // own, (x0 - x) // own : (x1 - x) // own]
                    if own < step:
                        size = (x1 - x0) // step, (y1 - y0) // step
                        part = area_resample(part, (0, 0, part.shape[1], part.shape[0]), size)
                    canvas[place] = part
        return holes

    def close(self) -> None:
        """Release the file, once no other thread reads from it, and what was kept of it."""
        self._file.close()
        self._tiles.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as path and mpp; the file is opened anew there."""
        return TiffSlide, (self.path, self._user_mpp)


def _inner(request: _Request, size_px: tuple[int, int], level_px: tuple[int, int]) -> Block | None:
    """Return the output pixels that lie within the level altogether, or None where there are none."""
    step, x0, y0 = request.step, round(request.box_px[0]), round(request.box_px[1])
    first_x, first_y = max(0, -(x0 // step)), max(0, -(y0 // step))
    stop_x, stop_y = min(size_px[0], (level_px[0] - x0) // step), min(size_px[1], (level_px[1] - y0) // step)
    if stop_x <= first_x or stop_y <= first_y:
        return None
    return Block(first_x, first_y, stop_x - first_x, stop_y - first_y)


def _around(inner: Block, size_px: tuple[int, int]) -> list[Block]:
    """Return what of an image of `size_px` lies above, below, left and right of `inner`."""
    right, bottom = inner.x_px + inner.width_px, inner.y_px + inner.height_px
    blocks = [
        Block(0, 0, size_px[0], inner.y_px),
        Block(0, bottom, size_px[0], size_px[1] - bottom),
        Block(0, inner.y_px, inner.x_px, inner.height_px),
        Block(right, inner.y_px, size_px[0] - right, inner.height_px),
    ]
    return [block for block in blocks if block.area_px]


def _downsample(dimensions: tuple[int, int], image: TiledImage) -> float:
    return nominal_downsample(dimensions, (image.width_px, image.height_px))
