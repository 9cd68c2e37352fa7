"""A slide that remembers every request for pixels: the proof that nothing finer than the wanted scale was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lrmil.slides.base import Slide
from lrmil.slides.blocks import Box, Sample
from lrmil.slides.levels import Level
from lrmil.slides.resample import UInt8Array


@dataclass(frozen=True)
class ReadRequest:
    """One block of pixels that was asked of the file. An ordinary region is one block, an overview several."""

    box_l0: Box
    size_px: tuple[int, int]
    mpp: float
    """um per pixel that was asked for; the finer one where x and y differ"""
    level: int
    """index of the level that served it"""


class RecordingSlide(Slide):
    """Behaves as the slide that it wraps, shares its counters, and lists every request, also those that fail."""

    def __init__(self, slide: Slide) -> None:
        super().__init__(
            slide.path,
            reader=slide.reader,
            vendor=slide.vendor,
            dimensions=slide.dimensions,
            levels=slide.levels,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            background_rgb=slide.background_rgb,
            bounds_l0=slide.bounds_l0,
        )
        self.stats = slide.stats
        self.requests: list[ReadRequest] = []
        self._slide = slide

    def announce(self, requests: Iterable[tuple[Box, tuple[int, int]]]) -> None:
        """Pass it on."""
        self._slide.announce(requests)

    def withdraw(self) -> None:
        """Pass it on."""
        self._slide.withdraw()

    def sample(self, level: Level, box_l0: Box, size_px: tuple[int, int], out: UInt8Array | None = None) -> Sample:
        """Note the request and pass it on."""
        x0, y0, x1, y1 = box_l0
        mpp = self.mpp * min((x1 - x0) / size_px[0], (y1 - y0) / size_px[1])
        self.requests.append(ReadRequest(box_l0, size_px, mpp, level.index))
        return self._slide.sample(level, box_l0, size_px, out)

    @property
    def finest_mpp(self) -> float:
        """Smallest um per pixel that was asked for; infinite where nothing was."""
        return min((request.mpp for request in self.requests), default=math.inf)

    @property
    def finest_level(self) -> int | None:
        """Index of the finest level that was opened, or None where none was."""
        by_index = {level.index: level.downsample for level in self.levels}
        return min((request.level for request in self.requests), key=by_index.__getitem__, default=None)

    def _read_level(self, level: Level, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8Array:
        return self._slide._read_level(level, x_px, y_px, width_px, height_px)

    def close(self) -> None:
        """Close the wrapped slide."""
        self._slide.close()
