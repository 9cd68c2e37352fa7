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

from lrmil.errors import NotASlide, SlideError
from lrmil.slides.base import Slide
from lrmil.slides.blocks import DecodeError
from lrmil.slides.levels import Level, nominal_downsample
from lrmil.slides.resample import UInt8Array
from lrmil.slides.scale import TIFF_TAGS, VENDOR, StatedMpp, believed_mpp
from lrmil.slides.tiff_tags import describe_tiff, tiff_resolution

READER = "openslide"


class OpenSlideSlide(Slide):
    """A slide read through OpenSlide.

    Args:
        path: file that OpenSlide understands; of a DICOM slide, any one of its files.
        mpp: what the user says about the level-0 um/px; overrides the file.
        open_handle: makes an OpenSlide handle from a path.

    Raises:
        NotASlide: OpenSlide does not understand the file.
        MissingMpp, ImplausibleMpp: see `believed_mpp`.
    """

    def __init__(
        self, path: Path, mpp: float | None = None, *, open_handle: Callable[[str], Any] = openslide.OpenSlide
    ) -> None:
        self._open_handle = open_handle
        self._user_mpp = mpp
        try:
            handle = open_handle(str(path))
            dimensions = handle.dimensions
            level_dimensions, self._own_downsamples = handle.level_dimensions, handle.level_downsamples
            properties = dict(handle.properties)
        except openslide.OpenSlideUnsupportedFormatError as error:
            reason = describe_tiff(path) or "it is of no kind that OpenSlide knows"
            raise NotASlide(f"{reason}.", slide=path.name, fix=_CONVERT) from error
        except openslide.OpenSlideError as error:
            raise NotASlide(
                f"the file is damaged ({error}).", slide=path.name, fix="Copy or export it again."
            ) from error
        vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        stated = (lambda: _stated(properties, vendor), lambda: tiff_resolution(path))
        level0_mpp, source = believed_mpp(path.name, user=mpp, stated=(s for say in stated if (s := say()) is not None))
        super().__init__(
            path,
            reader=READER,
            vendor=vendor,
            dimensions=dimensions,
            levels=[
                Level(index, width, height, nominal_downsample(dimensions, (width, height)))
                for index, (width, height) in enumerate(level_dimensions)
            ],
            mpp=level0_mpp,
            mpp_source=source,
            background_rgb=_background(properties),
            bounds_l0=_bounds(properties, dimensions),
        )
        self.properties: Mapping[str, str] = properties
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


_CONVERT = "Give a whole-slide image, or convert it to a tiled pyramidal TIFF (8-bit RGB)."


def _stated(properties: Mapping[str, str], vendor: str) -> StatedMpp | None:
    x = _number(properties.get(openslide.PROPERTY_NAME_MPP_X))
    y = _number(properties.get(openslide.PROPERTY_NAME_MPP_Y))
    if x is None or y is None:
        return None
    return StatedMpp(x, y, TIFF_TAGS if vendor == "generic-tiff" else VENDOR)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _background(properties: Mapping[str, str]) -> tuple[int, int, int]:
    colour = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "")
    try:
        red, green, blue = bytes.fromhex(colour)
    except ValueError:
        return 255, 255, 255
    return red, green, blue


def _bounds(properties: Mapping[str, str], dimensions: tuple[int, int]) -> tuple[int, int, int, int]:
    names = ("openslide.bounds-x", "openslide.bounds-y", "openslide.bounds-width", "openslide.bounds-height")
    x, y, width, height = (_number(properties.get(name)) for name in names)
    if x is None or y is None or not width or not height:
        return 0, 0, *dimensions
    right, bottom = min(x + width, dimensions[0]), min(y + height, dimensions[1])
    return max(0, int(x)), max(0, int(y)), int(right), int(bottom)
