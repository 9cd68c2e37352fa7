"""JPEG 2000 tiles as Aperio's scanners write them: RGB (33005), or YCbCr with chroma at half width (33003).

A decoder that stops one step short of full resolution hands out the wavelet's low band. It is no average: its samples
lie over the even pixels, a quarter of a sample to the upper left of the average over two by two pixels, and it is
sharper. A short filter corrects both: its taps are the least-squares fit of the averages of real tissue. That is done
for the 9-7 wavelet, which scanners use, and chroma of full size; other streams are decoded fully and averaged.
"""

from __future__ import annotations

import io
import struct

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image

from lrmil.slides.blocks import DecodeError
from lrmil.slides.resample import UInt8Array, area_resample
from lrmil.slides.tiff.structure import NotUnderstood

_REDUCTIONS = {4: 2, 8: 2}
"""What to decode at, where an average over 4 or 8 pixels is wanted; the rest is averaged. Over regions of a frozen
section (100 and 60) the features of a ViT-S had a cosine of at least 0.9998 and 0.9999 with those of the exact average.
An average over 2 made from the low band alone fell to 0.9957, one over 4 from the second low band to 0.9918."""

_TAPS = (-0.0878, 0.8721, 0.2676, -0.0519)
"""Weights of the samples -1, 0, 1 and 2 of the first low band in average 0, along x and along y."""

_SIZ_BYTES = 42
"""from the start of the stream to the list of components"""


class Jpeg2000Tiles:
    """Decodes tiles of `tile_px` (width, height), three components of 8 bits, `ycbcr` or RGB."""

    def __init__(self, tile_px: tuple[int, int], ycbcr: bool) -> None:
        self._tile_px = tile_px
        self._ycbcr = ycbcr
        self._reducible = False

    def check(self, data: bytes) -> None:
        """Look at the header of one tile.

        Raises:
            NotUnderstood: it is intact, but of a kind that is not read directly.
            DecodeError: it is damaged.
        """
        sampling = self._sampling(data)
        if sampling != ((1, 1),) * 3 and not (self._ycbcr and sampling == ((1, 1), (2, 1), (2, 1))):
            raise NotUnderstood(f"its JPEG 2000 components are sampled {sampling}")
        self._reducible = _is_whole(sampling) and _has_low_band(data)

    def reduction(self, factor: int) -> int:
        """Return by how much to reduce while decoding, where the average over `factor` is wanted."""
        return _REDUCTIONS.get(factor, 1) if self._reducible else 1

    def decode(self, data: bytes, reduction: int = 1) -> UInt8Array:
        """Return the pixels of one tile, reduced to 1/`reduction`, (h, w, 3).

        Raises:
            DecodeError: the stream is damaged in any way that OpenJPEG notices.
        """
        whole = _is_whole(self._sampling(data))
        # Tiles of one file are alike; one that is not is decoded fully.
        by_wavelet = reduction if whole and _has_low_band(data) else 1
        try:
            if by_wavelet > 1:
                pixels = _averages(_decode_with_pillow(data, by_wavelet))
            elif whole:
                pixels = np.asarray(imagecodecs.jpeg2k_decode(data))
            else:
                pixels = _decode_with_pillow(_stretched(data), 1)[::2]
        except Exception as error:
            raise DecodeError(f"JPEG 2000: {error}") from error
        if by_wavelet < reduction:
            pixels = area_resample(
                pixels, (0, 0, *self._tile_px), (self._tile_px[0] // reduction, self._tile_px[1] // reduction)
            )
        width, height = self._tile_px[0] // reduction, self._tile_px[1] // reduction
        if pixels.shape != (height, width, 3) or pixels.dtype != np.uint8:
            raise DecodeError(f"JPEG 2000: decoded to {pixels.shape}, where {(height, width, 3)} was expected")
        return _rgb(pixels) if self._ycbcr else pixels

    def _sampling(self, data: bytes) -> tuple[tuple[int, int], ...]:
        """Return (horizontal, vertical) subsampling of each component: ITU-T T.800, A.5.1."""
        if data[:4] != b"\xff\x4f\xff\x51" or len(data) < _SIZ_BYTES + 9:
            raise DecodeError("JPEG 2000: the stream does not begin with its size")
        right, bottom, *origin_and_tiles, components = struct.unpack(">8IH", data[8:_SIZ_BYTES])
        one_tile = [0, 0, right, bottom, 0, 0]  # from the origin, and not cut into tiles of its own
        if (right, bottom) != self._tile_px or origin_and_tiles != one_tile or components != 3:
            raise DecodeError(f"JPEG 2000: {right} x {bottom} px where a tile has {self._tile_px}")
        parts = [data[_SIZ_BYTES + 3 * i : _SIZ_BYTES + 3 * i + 3] for i in range(3)]
        if any(depth != 7 for depth, _, _ in parts):
            raise DecodeError("JPEG 2000: samples are not of 8 bits")
        return tuple((x, y) for _, x, y in parts)


def _is_whole(sampling: tuple[tuple[int, int], ...]) -> bool:
    return all(factors == (1, 1) for factors in sampling)


def _has_low_band(data: bytes) -> bool:
    """Whether the 9-7 wavelet, and no other, halves the image at least once. ITU-T T.800, A.6.1."""
    position = 2
    while data[position : position + 1] == b"\xff" and position + 4 <= len(data):
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1] == 0x52 and length >= 12:
            levels, wavelet = data[position + 9], data[position + 13]
            return levels >= 1 and wavelet == 0
        if data[position + 1] == 0x90 or length < 2:
            break
        position += 2 + length
    return False


def _decode_with_pillow(data: bytes, reduction: int) -> UInt8Array:
    with Image.open(io.BytesIO(data), formats=["JPEG2000"]) as image:
        image.reduce = reduction.bit_length() - 1  # type: ignore[assignment,method-assign]
        image.load()
        return np.array(image)


def _averages(low_band: UInt8Array) -> UInt8Array:
    """Turn the first low band (h, w, 3) into averages over 2 x 2 pixels."""
    taps = np.array(_TAPS) / sum(_TAPS)
    source = np.ascontiguousarray(low_band)
    return np.asarray(cv2.sepFilter2D(source, -1, taps, taps, anchor=(1, 1), borderType=cv2.BORDER_REPLICATE), np.uint8)


def _stretched(data: bytes) -> bytes:
    """Double the reference grid along y, in the stream's header only: each component keeps its samples.

    Decoders turn a stream with subsampled chroma into RGB by their own arithmetic, which differs from OpenSlide's by a
    grey level. They do not recognise one whose luma, too, covers two grid points, and repeat its samples instead: every
    second row then holds Y, Cb and Cr as they are, chroma repeated along x.
    """
    header = bytearray(data[: _SIZ_BYTES + 9])
    for position in (12, 20, 28, 36):  # lower edge and offset of the image, height and offset of its tiles
        (value,) = struct.unpack_from(">I", header, position)
        struct.pack_into(">I", header, position, 2 * value)
    for component in range(3):
        header[_SIZ_BYTES + 3 * component + 2] *= 2
    return bytes(header) + data[len(header) :]


def _table(factor: float) -> npt.NDArray[np.int32]:
    """Tabulate a multiple of a centred sample, halves rounded away from zero."""
    centred = np.arange(256) - 128
    return (np.sign(factor * centred) * np.floor(np.abs(factor * centred) + 0.5)).astype(np.int32)


_RED_OF_CR = _table(1.402).astype(np.int16)
_BLUE_OF_CB = _table(1.772).astype(np.int16)
_GREEN_OF_CB = _table(-0.34414 * 65536)
_GREEN_OF_CR = _table(-0.71414 * 65536) + 32768
"""JFIF's conversion, as OpenSlide tabulates it: factors with five digits, each entry rounded by itself. (libjpeg rounds
the factor instead, and differs from that by a grey level in one pixel of ten thousand.)"""


def _rgb(ycbcr: UInt8Array) -> UInt8Array:
    luma = ycbcr[..., 0].astype(np.int16)
    blue, red = ycbcr[..., 1], ycbcr[..., 2]
    green = ((_GREEN_OF_CB[blue] + _GREEN_OF_CR[red]) >> 16).astype(np.int16)
    channels = (luma + _RED_OF_CR[red], luma + green, luma + _BLUE_OF_CB[blue])
    return np.stack([np.clip(channel, 0, 255).astype(np.uint8) for channel in channels], axis=-1)
