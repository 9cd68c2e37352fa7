"""The reader that knows most formats: OpenSlide, with all its vendors (DICOM included).

Three habits of OpenSlide are dealt with here. It takes positions in level-0 pixels, divides them by its own downsample
(3.9998 where 4 is meant) and interpolates where the quotient is not whole. After an error a handle answers every
further request with that error. And its handles do not survive a fork.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openslide

from lrmil.errors import SlideError
from lrmil.slides.base import Slide
from lrmil.slides.blocks import DecodeError
from lrmil.slides.levels import Level, nominal_downsample
from lrmil.slides.openslide_facts import read_facts
from lrmil.slides.resample import UInt8Array

READER = "openslide"


class OpenSlideSlide(Slide):
    """A slide read through OpenSlide. Arguments and errors are those of `read_facts`."""

    def __init__(
        self, path: Path, mpp: float | None = None, *, open_handle: Callable[[str], Any] = openslide.OpenSlide
    ) -> None:
        self._open_handle = open_handle
        self._user_mpp = mpp
        facts, handle = read_facts(path, mpp, open_handle)
        dimensions, self._own_downsamples = facts.dimensions, facts.own_downsamples
        super().__init__(
            path,
            reader=READER,
            vendor=facts.vendor,
            dimensions=dimensions,
            levels=[
                Level(index, width, height, nominal_downsample(dimensions, (width, height)))
                for index, (width, height) in enumerate(facts.level_dimensions)
            ],
            mpp=facts.mpp,
            mpp_source=facts.mpp_source,
            background_rgb=facts.background_rgb,
            bounds_l0=facts.bounds_l0,
        )
        self.properties: Mapping[str, str] = facts.properties
        self.reopened = 0
        """how often an error made a new handle necessary"""
        self._lock = threading.Lock()
        self._handle: Any = handle
        self._pid = os.getpid()
        self._closed = False

    def _read_level(self, level: Level, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8Array:
        """Read through the shared handle; after an error once more through a handle of this call's own.

        The second try tells a region that cannot be decoded from one that merely came after such a region, in another
        thread, on the same handle.
        """
        request = (level.index, x_px, y_px, width_px, height_px)
        handle = self._shared_handle()
        try:
            return self._pixels(handle, *request)
        except openslide.OpenSlideError:
            self._retire(handle)
        del handle  # closes it once no other thread reads through it
        own = self._reopen()
        try:
            pixels = self._pixels(own, *request)
        except openslide.OpenSlideError as error:
            own.close()
            raise DecodeError(str(error)) from None
        with self._lock:
            if self._handle is None and not self._closed:
                self._handle = own
        return pixels

    def _pixels(self, handle: Any, index: int, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8Array:
        """Return straight-alpha RGBA (h, w, 4) of whole level pixels.

        OpenSlide takes whole level-0 positions. Where its own downsample is not whole, the nearest one still lies up to
        half a level-0 pixel beside the wanted level pixel, and OpenSlide blends neighbours: the place is right, the
        sharpest detail is softened. Nothing finer can be asked of it.
        """
        own = self._own_downsamples[index]
        location = (round(x_px * own), round(y_px * own))
        return np.asarray(handle.read_region(location, index, (width_px, height_px)))

    def _shared_handle(self) -> Any:
        with self._lock:
            if self._closed:
                raise SlideError("it has been closed.", slide=self.name, fix="Open it again to read from it.")
            if self._pid != os.getpid():
                self._handle, self._pid = None, os.getpid()
            handle = self._handle
        if handle is not None:
            return handle
        handle = self._reopen()
        with self._lock:
            if self._handle is None:
                self._handle = handle
            return self._handle

    def _retire(self, handle: Any) -> None:
        with self._lock:
            if self._handle is handle:
                self._handle = None

    def _reopen(self) -> Any:
        with self._lock:
            self.reopened += 1
        try:
            return self._open_handle(str(self.path))
        except (openslide.OpenSlideError, OSError) as error:
            raise DecodeError(f"the file cannot be opened again ({error})") from None

    def close(self) -> None:
        """Release the file, once no other thread reads from it."""
        with self._lock:
            self._handle, self._closed = None, True

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as path and mpp; the file is opened anew there."""
        return OpenSlideSlide, (self.path, self._user_mpp)
