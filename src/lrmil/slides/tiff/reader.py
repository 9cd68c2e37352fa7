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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openslide

from lrmil.errors import NotASlide, SlideError
from lrmil.slides.base import Slide
from lrmil.slides.blocks import Block, Box, DecodeError, Sample
from lrmil.slides.levels import Level, nominal_downsample
from lrmil.slides.openslide_facts import OpenSlideFacts, read_facts
from lrmil.slides.resample import Float32Array, UInt8Array, area_mean, area_resample, snap
from lrmil.slides.tiff.cache import TileCache
from lrmil.slides.tiff.file import RandomAccessFile
from lrmil.slides.tiff.layout import TiledImage, is_reduced, is_tiled, tiled_image
from lrmil.slides.tiff.structure import (
    SUB_IFDS,
    Directory,
    NotUnderstood,
    read_directories,
    sub_directories,
)

READER = "tiff"

CACHE_BYTES = 32 * 2**20
"""Decoded tiles kept for each open slide: about 160 of 256 x 256 px."""

_FACTORS = (8, 4, 2)
_PYRAMID_TOLERANCE = 0.02
"""Largest relative difference between the downsamples of a level along x and y, for levels that OpenSlide ignores."""


@dataclass(frozen=True, order=True)
class TileRef:
    """A compressed tile that a request needs. Sorted, they lie in file order."""

    offset: int
    """where its bytes begin in the file"""
    length: int
    """how many they are; 0 where nothing was scanned"""
    level: int
    column: int
    row: int
    reduction: int
    """1, 2, 4 or 8: at which part of its size it is decoded"""


@dataclass(frozen=True)
class _Request:
    """A sample in pixels of a level."""

    box_px: Box
    size_px: tuple[int, int]
    factor: int
    """8, 4 or 2 where pixels of the level are averaged in groups of that many along both axes, aligned; else 1"""
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
            self._images, facts = _understand(self._file, path, mpp)
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
        self._cache = TileCache(cache_bytes)

    def tiles_of(self, box_l0: Box, size_px: tuple[int, int]) -> tuple[TileRef, ...]:
        """Return the tiles that `read_box` decodes for a request, in file order; those never scanned are left out.

        Whoever works through many requests can sort and merge these, decode each with `read_tile`, and ask for the
        boxes while their tiles are still held: `read_box` then decodes nothing.

        Raises:
            ConfigError: the box or the size is empty.
        """
        self._check(box_l0, size_px)
        x0, y0, x1, y1 = map(float, box_l0)
        level = self.level_for(self.mpp * min((x1 - x0) / size_px[0], (y1 - y0) / size_px[1]))
        request = self._request(level, (x0, y0, x1, y1), size_px)
        left, top, right, bottom = request.box_px
        image = self._images[level.index]
        # A level may end short of the slide by a rounded-off remainder; its last pixel is repeated there.
        columns = range(max(0, min(math.floor(left), image.width_px - 1)), min(math.ceil(right), image.width_px))
        rows = range(max(0, min(math.floor(top), image.height_px - 1)), min(math.ceil(bottom), image.height_px))
        if (
            not len(columns)
            or not len(rows)
            or min(x1, y1) <= 0
            or x0 >= self.dimensions[0]
            or y0 >= self.dimensions[1]
        ):
            return ()
        refs = (
            self._ref(level, column, row, request.reduction)
            for row in range(rows[0] // image.tile_px[1], rows[-1] // image.tile_px[1] + 1)
            for column in range(columns[0] // image.tile_px[0], columns[-1] // image.tile_px[0] + 1)
        )
        return tuple(sorted(ref for ref in refs if ref.length))

    def read_tile(self, ref: TileRef) -> UInt8Array | None:
        """Return a decoded tile, (h, w, 3) at 1/`ref.reduction`, or None where nothing was scanned.

        It is not to be written to. What lies beyond the edges of the level in it is padding.

        Raises:
            DecodeError: it is damaged, or lies beyond the end of the file.
            SlideError: the slide has been closed.
        """
        if not ref.length:
            return None
        tile = self._cache.get(ref)
        if tile is not None:
            return tile
        if self._file.closed:
            raise SlideError("it has been closed.", slide=self.name, fix="Open it again to read from it.")
        try:
            data = self._file.read_at(ref.offset, ref.length)
            tile = self._images[ref.level].decoder.decode(data, ref.reduction)
        except DecodeError as error:
            raise DecodeError(f"tile {ref.column}, {ref.row}: {error}") from error
        self.stats.add_tile(ref.length)
        self._cache.put(ref, tile)
        return tile

    def _ref(self, level: Level, column: int, row: int, reduction: int) -> TileRef:
        image = self._images[level.index]
        cut_x = column == image.across - 1 and image.width_px % reduction
        cut_y = row == image.down - 1 and image.height_px % reduction
        index = row * image.across + column
        offset, length = int(image.offsets[index]), int(image.lengths[index])
        return TileRef(offset, length, level.index, column, row, 1 if cut_x or cut_y else reduction)

    def _request(self, level: Level, box_l0: Box, size_px: tuple[int, int]) -> _Request:
        """Say how a sample is made: which part of their size its tiles are decoded at."""
        x0, y0, x1, y1 = (snap(edge / level.downsample) for edge in box_l0)
        step_x, step_y = snap((x1 - x0) / size_px[0]), snap((y1 - y0) / size_px[1])
        factor = reduction = 1
        if step_x == step_y and step_x.is_integer() and x0.is_integer() and y0.is_integer():
            whole = next((f for f in _FACTORS if step_x % f == 0), 1)
            if whole > 1 and x0 % whole == 0 and y0 % whole == 0:
                factor, reduction = whole, self._images[level.index].decoder.reduction(whole)
        return _Request((x0, y0, x1, y1), size_px, factor, reduction)

    def _sample(self, level: Level, box_l0: Box, size_px: tuple[int, int]) -> Sample:
        """As every slide does; the part whose tiles can be decoded at reduced size is made from those."""
        request = self._request(level, box_l0, size_px)
        if request.reduction == 1:
            return super()._sample(level, box_l0, size_px)
        x0, y0, x1, _ = request.box_px
        step = round((x1 - x0) / size_px[0])
        inner = _inner(request, step, (level.width_px, level.height_px))
        if inner is None:
            return super()._sample(level, box_l0, size_px)
        reduced = self._reduced(level, inner, (round(x0), round(y0)), step, request.reduction)
        if inner.size_px == size_px:
            return reduced
        step_l0 = (box_l0[2] - box_l0[0]) / size_px[0], (box_l0[3] - box_l0[1]) / size_px[1]
        rgb = np.empty((size_px[1], size_px[0], 3), np.uint8)
        scanned: Float32Array = np.ones(rgb.shape[:2], np.float32)
        source_px = 0
        parts = [(inner, reduced)]
        for block in _around(inner, size_px):
            parts.append((block, super()._sample(level, block.box_l0(box_l0[:2], step_l0), block.size_px)))
        for block, sample in parts:
            rgb[block.place] = sample.rgb
            source_px += sample.source_px
            if sample.scanned is not None:
                scanned[block.place] = sample.scanned
        return Sample(rgb, None if scanned.min() == 1 else scanned, source_px)

    def _reduced(self, level: Level, inner: Block, origin_px: tuple[int, int], step: int, reduction: int) -> Sample:
        """Return the output pixels `inner` of a request whose pixel (0, 0) begins at `origin_px` of the level."""
        left, top = origin_px[0] + inner.x_px * step, origin_px[1] + inner.y_px * step
        width, height = inner.width_px * step, inner.height_px * step
        rgb, holes = self._assemble(level, left, top, width, height, reduction)
        times = step // reduction
        whole = (0.0, 0.0, float(rgb.shape[1]), float(rgb.shape[0]))
        scanned = None
        if holes is not None:
            scanned = area_mean((~holes).astype(np.float32)[..., None], whole, inner.size_px)[..., 0]
        return Sample(rgb if times == 1 else area_resample(rgb, whole, inner.size_px), scanned, width * height)

    def _read_level(self, level: Level, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8Array:
        rgb, holes = self._assemble(level, x_px, y_px, width_px, height_px, 1)
        if holes is None:
            return rgb
        return np.dstack([rgb, np.where(holes, 0, 255).astype(np.uint8)])

    def _assemble(
        self, level: Level, left: int, top: int, width: int, height: int, reduction: int
    ) -> tuple[UInt8Array, np.ndarray[Any, np.dtype[np.bool_]] | None]:
        """Return a rectangle of the level at 1/`reduction`, and which of its pixels were never scanned, if any.

        All its numbers are in pixels of the level and multiples of `reduction`. The result may be a view of a tile that
        is kept: not to be written to.
        """
        image = self._images[level.index]
        tile_width, tile_height = image.tile_px
        first, last = (
            (left // tile_width, top // tile_height),
            (
                (left + width - 1) // tile_width,
                (top + height - 1) // tile_height,
            ),
        )
        shape = height // reduction, width // reduction
        single = first == last
        canvas = None if single else np.empty((*shape, 3), np.uint8)
        holes = None
        for row in range(first[1], last[1] + 1):
            for column in range(first[0], last[0] + 1):
                x, y = column * tile_width, row * tile_height
                x0, x1 = max(x, left), min(x + tile_width, left + width)
                y0, y1 = max(y, top), min(y + tile_height, top + height)
                cut = self._cut(self._ref(level, column, row, reduction), (x0 - x, y0 - y, x1 - x, y1 - y), reduction)
                if single and cut is not None:
                    return cut, None
                if canvas is None:
                    canvas = np.empty((*shape, 3), np.uint8)
                place = (
                    slice((y0 - top) // reduction, (y1 - top) // reduction),
                    slice((x0 - left) // reduction, (x1 - left) // reduction),
                )
                if cut is not None:
                    canvas[place] = cut
                    continue
                canvas[place] = self.background_rgb
                holes = np.zeros(shape, np.bool_) if holes is None else holes
                holes[place] = True
        assert canvas is not None
        return canvas, holes

    def _cut(self, ref: TileRef, part_px: tuple[int, int, int, int], reduction: int) -> UInt8Array | None:
        """Return a part of a tile at 1/`reduction`; `part_px` is in its own full-size pixels. None: never scanned."""
        tile = self.read_tile(ref)
        if tile is None:
            return None
        x0, y0, x1, y1 = part_px
        if ref.reduction == reduction:
            return tile[y0 // reduction : y1 // reduction, x0 // reduction : x1 // reduction]
        return area_resample(tile, part_px, ((x1 - x0) // reduction, (y1 - y0) // reduction))

    def close(self) -> None:
        """Release the file, once no other thread reads from it, and what was kept of it."""
        self._file.close()
        self._cache.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as path and mpp; the file is opened anew there."""
        return TiffSlide, (self.path, self._user_mpp)


def _inner(request: _Request, step: int, level_px: tuple[int, int]) -> Block | None:
    """Return the output pixels that lie within the level altogether, or None where there are none."""
    x0, y0 = round(request.box_px[0]), round(request.box_px[1])
    first = [max(0, -(start // step)) for start in (x0, y0)]
    stop = [
        min(count, (length - start) // step)
        for count, length, start in zip(request.size_px, level_px, (x0, y0), strict=True)
    ]
    if stop[0] <= first[0] or stop[1] <= first[1]:
        return None
    return Block(first[0], first[1], stop[0] - first[0], stop[1] - first[1])


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


def _understand(file: RandomAccessFile, path: Path, mpp: float | None) -> tuple[tuple[TiledImage, ...], OpenSlideFacts]:
    """Return the images of the levels, and what OpenSlide says, once the two fit together."""
    directories = read_directories(file)
    if not is_tiled(directories[0]):
        raise NotUnderstood("its first image is stored without tiles")
    tiled_image(file, directories[0])  # before OpenSlide is asked: most files that are left to it are told by this
    facts, handle = read_facts(path, mpp, openslide.OpenSlide)
    handle.close()
    if facts.bounds_l0 != (0, 0, *facts.dimensions):
        raise NotUnderstood("only a part of it was scanned")
    levels = _levels(directories, facts.vendor)
    images = tuple(tiled_image(file, directory) for directory in levels)
    if facts.vendor == "generic-tiff":
        images = tuple(sorted(images, key=lambda image: -image.width_px))
        if len({image.width_px for image in images}) < len(images):
            raise NotUnderstood("two of its levels are equally wide")
    if tuple((image.width_px, image.height_px) for image in images) != facts.level_dimensions:
        raise NotUnderstood("its levels are not those that OpenSlide finds")
    if facts.vendor == "aperio" and len(images) > 1 and any(image.sparse for image in images):
        # OpenSlide fills such holes from the finer level, and distrusts the coarser ones around them.
        raise NotUnderstood("some tiles of an Aperio pyramid are missing")
    coarser = sub_directories(directories[0]) if SUB_IFDS in directories[0] else ()
    return images + _sub_levels(file, coarser, facts), facts


def _levels(directories: Sequence[Directory], vendor: str) -> list[Directory]:
    """Return the directories that OpenSlide takes for levels."""
    if vendor == "aperio":
        return [directory for directory in directories if is_tiled(directory)]
    if vendor == "generic-tiff":
        return [d for d in directories if is_tiled(d) and (d is directories[0] or is_reduced(d))]
    raise NotUnderstood(f"it is of vendor {vendor}")


def _sub_levels(
    file: RandomAccessFile, directories: Sequence[Directory], facts: OpenSlideFacts
) -> tuple[TiledImage, ...]:
    """Return levels that OpenSlide does not see, since they hang below level 0."""
    if not directories:
        return ()
    if len(facts.level_dimensions) > 1 or facts.vendor != "generic-tiff":
        raise NotUnderstood("it has levels in two places")
    images = [tiled_image(file, directory) for directory in directories if is_reduced(directory)]
    for image in images:
        across, down = facts.dimensions[0] / image.width_px, facts.dimensions[1] / image.height_px
        if min(across, down) <= 1 or abs(across - down) > _PYRAMID_TOLERANCE * down:
            raise NotUnderstood(f"a sub-image of {image.width_px} x {image.height_px} px is no level of its pyramid")
    return tuple(sorted(images, key=lambda image: -image.width_px))


def _downsample(dimensions: tuple[int, int], image: TiledImage) -> float:
    return nominal_downsample(dimensions, (image.width_px, image.height_px))
