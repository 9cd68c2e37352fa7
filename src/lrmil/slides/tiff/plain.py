"""Tiles without loss: LZW, deflate, or as they are."""

from __future__ import annotations

from typing import Literal

import imagecodecs
import numpy as np

from lrmil.slides.blocks import DecodeError
from lrmil.slides.resample import UInt8Array

PlainCompression = Literal["none", "lzw", "deflate"]


class PlainTiles:
    """Decodes RGB tiles of `tile_px` (width, height). Nothing is gained by decoding fewer pixels."""

    def __init__(self, tile_px: tuple[int, int], compression: PlainCompression, differences: bool) -> None:
        self._shape = (tile_px[1], tile_px[0], 3)
        self._length = 3 * tile_px[0] * tile_px[1]
        self._compression = compression
        self._differences = differences
        """TIFF's predictor 2: each pixel holds the difference to the one on its left"""

    def check(self, data: bytes) -> None:
        """Nothing to look at."""

    def reduction(self, factor: int) -> int:
        """Return 1: always at full size."""
        return 1

    def decode(self, data: bytes, reduction: int = 1) -> UInt8Array:
        """Return the pixels of one tile, (h, w, 3).

        Raises:
            DecodeError: the data are damaged, or not of one tile's length.
        """
        plain: bytes | bytearray = data
        if self._compression != "none":
            decode = imagecodecs.lzw_decode if self._compression == "lzw" else imagecodecs.deflate_decode
            try:
                # One byte of room more than a tile holds, so that longer data show, however long they are.
                plain = decode(data, out=bytearray(self._length + 1))
            except Exception as error:
                raise DecodeError(f"{self._compression}: {error}") from error
        if len(plain) != self._length:
            raise DecodeError(f"{self._compression}: {len(plain)} bytes, where a tile has {self._length}")
        pixels = np.frombuffer(plain, np.uint8).reshape(self._shape)
        return np.asarray(imagecodecs.delta_decode(pixels, axis=1)) if self._differences else pixels
