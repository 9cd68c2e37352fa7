"""The Slide: pixels of any box at any size, by area average, and nothing else.

A reader is a subclass. It must say how to read whole pixels of a level (`_read_level`); it may replace `_sample`, which
turns a box of level-0 pixels into an image, where it can do that faster (decoding at reduced size, for example).
Everything above stays the same for every reader: choice of level, blocks of bounded memory, errors, counters.

Level-0 coordinates: x is a column and y a row of the finest level, whatever scale the pixels are wanted at. A box is
(x0, y0, x1, y1), half open; its edges may be fractional and may lie outside the slide.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from lrmil.errors import ConfigError, UnreadableRegion
from lrmil.slides.blocks import Block, Box, DecodeError, Sample, block_sides
from lrmil.slides.levels import Level, coarsest_level
from lrmil.slides.overview import Overview, read_overview
from lrmil.slides.resample import UInt8Array, area_mean, area_resample, over_background, snap
from lrmil.slides.stats import ReadStats


@dataclass(frozen=True)
class _Span:
    """What to read along one axis of a level."""

    place: slice
    """where it goes, in pixels of the level counted from the start of the request"""
    first_px: int
    count_px: int
    repeat_px: int
    """how often the last pixel is repeated, where the level falls short of the slide by a rounded-off remainder"""


class Slide(ABC):
    """An open slide. Reads from several threads at once are safe."""

    def __init__(
        self,
        path: Path,
        *,
        reader: str,
        vendor: str,
        dimensions: tuple[int, int],
        levels: Sequence[Level],
        mpp: float,
        mpp_source: str,
        background_rgb: tuple[int, int, int] = (255, 255, 255),
        bounds_l0: tuple[int, int, int, int] | None = None,
    ) -> None:
        self.path = path
        self.name = path.stem
        self.reader = reader
        """name of the reader's card"""
        self.vendor = vendor
        self.dimensions = dimensions
        """width and height of level 0"""
        self.levels = tuple(levels)
        self.mpp = mpp
        """um per level-0 pixel"""
        self.mpp_source = mpp_source
        """who said so: "user", "vendor metadata", "TIFF resolution tags" or "OME-XML" """
        self.background_rgb = background_rgb
        """colour of pixels that were never scanned"""
        self.bounds_l0 = bounds_l0 or (0, 0, *dimensions)
        """box that holds all scanned pixels"""
        self.stats = ReadStats()

    @abstractmethod
    def _read_level(self, level: Level, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8Array:
        """Return whole pixels of a level, (h, w, 3) or with straight alpha (h, w, 4); the rectangle lies inside it.

        Raises:
            DecodeError: they cannot be decoded. The next call, for other pixels, must work.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the file. Reading afterwards is an error; closing twice is not."""

    def read_box(self, box_l0: Box, size_px: tuple[int, int], out: UInt8Array | None = None) -> UInt8Array:
        """Return the area average of a level-0 box as an image, uint8 (h, w, 3).

        Reads from the coarsest level that is at least as fine as wanted. What lies outside the slide, or was never
        scanned, has the background colour.

        Args:
            box_l0: (x0, y0, x1, y1) in level-0 pixels.
            size_px: width and height of the result.
            out: array of that shape to put the pixels into, and to return; a new one is made where there is none.

        Raises:
            UnreadableRegion: some of its pixels cannot be decoded. Other boxes can still be read.
            ConfigError: the box or the size is empty.
        """
        self._check(box_l0, size_px)
        x0, y0, x1, y1 = map(float, box_l0)
        step_l0 = (x1 - x0) / size_px[0], (y1 - y0) / size_px[1]
        level = self.level_for(self.mpp * min(step_l0))
        sides = block_sides((step_l0[0] / level.downsample, step_l0[1] / level.downsample))
        image = np.empty((size_px[1], size_px[0], 3), np.uint8) if out is None else out
        for block in Block(0, 0, *size_px).cut(*sides):
            try:
                place = image[block.place]
                rgb = self.sample(level, block.box_l0((x0, y0), step_l0), block.size_px, place).rgb
                if rgb is not place:
                    place[...] = rgb
            except DecodeError as error:
                self.stats.add_unreadable()
                raise UnreadableRegion(
                    f"the pixels of level-0 box x {x0:.9g}..{x1:.9g}, y {y0:.9g}..{y1:.9g} (level {level.index}) "
                    f"cannot be decoded: {error}.",
                    slide=self.name,
                    fix="Other regions can still be read; copy or export the file again if many fail.",
                ) from error
        return image

    def read(self, x_l0: float, y_l0: float, width_px: int, height_px: int, mpp: float) -> UInt8Array:
        """Return `width_px` x `height_px` pixels of `mpp` um each whose top-left corner is at level 0 (x_l0, y_l0).

        uint8 (height_px, width_px, 3); see `read_box`.
        """
        if not (math.isfinite(mpp) and mpp > 0):
            raise ConfigError(f"{self.name}: cannot read at {mpp} um per pixel.", fix="Give a positive number.")
        step_l0 = mpp / self.mpp
        return self.read_box((x_l0, y_l0, x_l0 + width_px * step_l0, y_l0 + height_px * step_l0), (width_px, height_px))

    def overview(self, mpp: float, threads: int = 1) -> Overview:
        """Return the whole slide at about `mpp` um per pixel, read in blocks of bounded memory; see `Overview`."""
        if not (math.isfinite(mpp) and mpp > 0):
            raise ConfigError(f"{self.name}: no overview at {mpp} um per pixel.", fix="Give a positive number.")
        return read_overview(self, mpp, threads)

    def thumbnail(self, max_side_px: int = 1024) -> UInt8Array:
        """Return the whole slide as a small image (h, w, 3), its longer side about `max_side_px`."""
        return self.overview(self.mpp * max(self.dimensions) / max_side_px).rgb

    def level_for(self, mpp: float) -> Level:
        """Return the level that serves `mpp`: the coarsest one at or below it, or level 0 where none is that fine."""
        return coarsest_level(self.levels, mpp / self.mpp)

    def describe(self) -> dict[str, Any]:
        """Return what is known about the slide, ready for JSON."""
        return {
            "name": self.name,
            "path": str(self.path),
            "reader": self.reader,
            "vendor": self.vendor,
            "dimensions": list(self.dimensions),
            "mpp": self.mpp,
            "mpp_source": self.mpp_source,
            "bounds_l0": list(self.bounds_l0),
            "background_rgb": list(self.background_rgb),
            "levels": [
                {
                    "index": level.index,
                    "width_px": level.width_px,
                    "height_px": level.height_px,
                    "downsample": level.downsample,
                    "mpp": self.mpp * level.downsample,
                }
                for level in self.levels
            ],
        }

    def announce(self, requests: Iterable[tuple[Box, tuple[int, int]]]) -> None:
        """Say which boxes at which sizes will be read, once each: a reader may keep what several of them share."""
        return

    def withdraw(self) -> None:
        """Take back what was announced and has not been read."""
        return

    def sample(self, level: Level, box_l0: Box, size_px: tuple[int, int], out: UInt8Array | None = None) -> Sample:
        """Average one block of a request from the pixels of `level`, and count it. Every read of pixels passes here.

        Where there is `out`, of the right shape, the sample's `rgb` may be that array, or another one.

        Raises:
            DecodeError: some of its pixels cannot be decoded.
        """
        x0, y0, x1, y1 = box_l0
        self.stats.add_asked(self.mpp * min((x1 - x0) / size_px[0], (y1 - y0) / size_px[1]))
        sample = self._sample(level, box_l0, size_px, out)
        self.stats.add_read(level, size_px[0] * size_px[1], sample.source_px)
        return sample

    def _sample(self, level: Level, box_l0: Box, size_px: tuple[int, int], out: UInt8Array | None = None) -> Sample:
        """Average a level-0 box that is at most a block large, from the pixels of `level`. Readers may do it faster."""
        x0, y0, x1, y1 = (snap(edge / level.downsample) for edge in box_l0)
        left, top, right, bottom = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
        across, down = self._span(level, 0, left, right), self._span(level, 1, top, bottom)
        inner: Box = (x0 - left, y0 - top, x1 - left, y1 - top)
        if across is None or down is None:
            empty = np.full((size_px[1], size_px[0], 3), self.background_rgb, np.uint8)
            return Sample(empty, np.zeros(empty.shape[:2], np.float32), 0)

        pixels = self._read_level(level, across.first_px, down.first_px, across.count_px, down.count_px)
        if across.repeat_px or down.repeat_px:
            pixels = np.pad(pixels, ((0, down.repeat_px), (0, across.repeat_px), (0, 0)), mode="edge")
        rgb, alpha = over_background(pixels, self.background_rgb) if pixels.shape[2] == 4 else (pixels, None)
        if rgb.shape[:2] != (bottom - top, right - left):
            canvas = np.full((bottom - top, right - left, 3), self.background_rgb, np.uint8)
            canvas[down.place, across.place] = rgb
            inside = np.zeros(canvas.shape[:2], np.float32)
            inside[down.place, across.place] = 1.0 if alpha is None else alpha
            rgb, alpha = canvas, inside
        share = None if alpha is None else area_mean(alpha[..., None], inner, size_px)[..., 0]
        return Sample(area_resample(rgb, inner, size_px), share, across.count_px * down.count_px)

    def _span(self, level: Level, axis: int, start_px: int, stop_px: int) -> _Span | None:
        """Return which of the level's columns (axis 0) or rows (axis 1) start..stop were scanned, or None if none."""
        low_l0, high_l0 = self.bounds_l0[axis], self.bounds_l0[axis + 2]
        length_px = (level.width_px, level.height_px)[axis]
        low = math.ceil(low_l0 / level.downsample - 0.5)
        if high_l0 == self.dimensions[axis]:
            # Makers of pyramids cut the remainder off: up to the edge of level 0 there is tissue without a level pixel.
            high = math.ceil(snap(high_l0 / level.downsample))
        else:
            high = min(math.ceil(high_l0 / level.downsample - 0.5), length_px)
        first, last = max(start_px, low), min(stop_px, high)
        if first >= last:
            return None
        first_source, last_source = min(first, length_px - 1), min(last, length_px)
        count = last_source - first_source
        return _Span(slice(first - start_px, last - start_px), first_source, count, last - first - count)

    def _check(self, box_l0: Box, size_px: tuple[int, int]) -> None:
        x0, y0, x1, y1 = box_l0
        width, height = size_px
        if width < 1 or height < 1 or not (x1 > x0 and y1 > y0) or not all(map(math.isfinite, box_l0)):
            raise ConfigError(
                f"{self.name}: box {tuple(box_l0)} at {width} x {height} px is empty.",
                fix="A box is (x0, y0, x1, y1) in level-0 pixels with x0 < x1 and y0 < y1.",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        width, height = self.dimensions
        return f"<{type(self).__name__} {self.name}: {width} x {height} px, {self.mpp:.4g} um/px ({self.mpp_source})>"
