"""JPEG tiles: abbreviated streams with shared tables, RGB or YCbCr, at full size or reduced by the DCT itself.

A TIFF's photometric tag, not the JPEG stream, says whether the components are RGB: Aperio's scanners store RGB and mark
the streams in no way. libjpeg takes the word of an Adobe marker, so each stream gets one and loses its own.

At 1/2, 1/4 and 1/8 libjpeg takes the low frequencies of each block only, which is the block's average up to rounding.
Chroma that was stored at half size along one axis alone stays at half size there, and is interpolated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg

from lrmil.slides.blocks import DecodeError
from lrmil.slides.resample import UInt8Array
from lrmil.slides.tiff.structure import NotUnderstood

_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_SOF = {0xC0, 0xC1, 0xC2}
"""baseline, extended and progressive, with Huffman codes"""
_OTHER_SOF = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}

_REDUCTIONS = {
    (1, 1): {2: 2, 4: 4, 8: 8},
    (2, 2): {4: 4, 8: 8},
    (2, 1): {4: 2, 8: 4},
}
"""By the sampling factors of luma over chroma: what to decode at, where an average over 2, 4 or 8 pixels is wanted.

Chroma of half size is handled differently at full and at reduced size. Allowed is what kept the cosine of a ViT-S's
features with those of the exact average above 0.999 on 100 regions of a skin section: 4:2:0 at 1/2 fell to 0.9985 and
4:2:2 to 0.9970, so these are decoded fully; 4:2:2 at coarser scales is decoded one step finer, and averaged."""


@dataclass(frozen=True)
class _Frame:
    """What a stream's frame header says."""

    width_px: int
    height_px: int
    sampling: tuple[tuple[int, int], ...]
    """(horizontal, vertical) of each component"""


class JpegTiles:
    """Decodes tiles of `tile_px` (width, height).

    Args:
        tile_px: size of a tile; streams of any other size are damaged.
        tables: content of the JPEGTables tag, or nothing.
        ycbcr: whether the components are YCbCr rather than RGB.

    Raises:
        NotUnderstood: the tables are damaged.
    """

    def __init__(self, tile_px: tuple[int, int], tables: bytes, ycbcr: bool) -> None:
        self._tile_px = tile_px
        self._ycbcr = ycbcr
        adobe = struct.pack(">HH5sHHHB", 0xFFEE, 14, b"Adobe", 100, 0, 0, int(ycbcr))
        try:
            shared = b"".join(data for marker, data in _segments(tables) if not _dropped(marker)) if tables else b""
        except DecodeError as error:
            raise NotUnderstood(f"its shared JPEG tables are damaged: {error}") from error
        self._start = b"\xff\xd8" + adobe + shared
        self._reductions: dict[int, int] = {}
        self._last: tuple[bytes, bytes, _Frame] | None = None
        """header of the stream seen last, what it was made into, and its frame: tiles of a file are mostly alike"""

    def check(self, data: bytes) -> None:
        """Look at the header of one tile, before the first is decoded; from then on `reduction` knows the sampling.

        Raises:
            NotUnderstood: it is intact, but of a kind that is not read directly.
            DecodeError: it is damaged.
        """
        _, frame = self._stream(data)
        luma, *chroma = frame.sampling
        plain = all(factors == (1, 1) for factors in chroma)
        if not plain or luma not in ({(1, 1), (2, 1), (2, 2)} if self._ycbcr else {(1, 1)}):
            raise NotUnderstood(f"its JPEG components are sampled {frame.sampling}")
        self._reductions = _REDUCTIONS[luma]

    def reduction(self, factor: int) -> int:
        """Return by how much to reduce while decoding (1, 2, 4 or 8), where the average over `factor` is wanted."""
        return self._reductions.get(factor, 1)

    def decode(self, data: bytes, reduction: int = 1) -> UInt8Array:
        """Return the pixels of one tile, reduced to 1/`reduction`, (h, w, 3).

        Raises:
            DecodeError: the stream is damaged in any way that libjpeg notices.
        """
        stream, _ = self._stream(data)
        width, height = self._tile_px[0] // reduction, self._tile_px[1] // reduction
        try:
            pixels = simplejpeg.decode_jpeg(stream, min_width=width, min_height=height)
        except ValueError as error:
            raise DecodeError(f"JPEG: {error}") from error
        if pixels.shape != (height, width, 3):
            raise DecodeError(f"JPEG: decoded to {pixels.shape}, where {(height, width, 3)} was expected")
        return np.asarray(pixels)

    def _stream(self, data: bytes) -> tuple[bytes, _Frame]:
        """Return a whole JPEG stream, and its frame header."""
        last = self._last
        if last is not None and data.startswith(last[0]):
            return last[1] + data[len(last[0]) - 2 :], last[2]
        kept: list[bytes] = [self._start]
        frame: _Frame | None = None
        position = 2
        for marker, segment in _segments(data):
            if marker == _SOS:
                break
            position += len(segment)
            if marker in _SOF:
                frame = _frame(segment)
            elif marker in _OTHER_SOF:
                raise DecodeError(f"JPEG: coding process {marker:#x} is not read")
            if not _dropped(marker):
                kept.append(segment)
        else:
            raise DecodeError("JPEG: there is no image in the stream")
        if frame is None or (frame.width_px, frame.height_px) != self._tile_px or len(frame.sampling) != 3:
            raise DecodeError(f"JPEG: {frame} where a tile of {self._tile_px} px in three colours was expected")
        start = b"".join(kept)
        self._last = data[: position + 2], start, frame  # the marker of the scan belongs to what is compared
        return start + data[position:], frame


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and bytes (marker and length included) of each segment, up to SOS or EOI."""
    if data[:2] != b"\xff\xd8":
        raise DecodeError("JPEG: the stream does not begin with its start marker")
    position = 2
    while position + 2 <= len(data):
        if data[position] != 0xFF or data[position + 1] in (0x00, 0xFF):
            raise DecodeError(f"JPEG: no marker at byte {position}")
        marker = data[position + 1]
        if marker == _EOI:
            return
        if position + 4 > len(data):
            break
        length = 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if length < 4 or position + length > len(data):
            break
        yield marker, data[position : position + length]
        if marker == _SOS:
            return
        position += length
    raise DecodeError("JPEG: the stream ends within its header")


def _dropped(marker: int) -> bool:
    return 0xE0 <= marker <= 0xEF or marker == _COM


def _frame(segment: bytes) -> _Frame:
    """Read a frame header: ITU-T T.81, B.2.2."""
    if len(segment) < 10 or len(segment) < 10 + 3 * segment[9]:
        raise DecodeError("JPEG: the frame header is too short")
    precision, height, width, components = struct.unpack(">BHHB", segment[4:10])
    if precision != 8:
        raise DecodeError(f"JPEG: {precision} bits for each sample")
    factors = segment[11 : 10 + 3 * components : 3]
    return _Frame(width, height, tuple((value >> 4, value & 15) for value in factors))
