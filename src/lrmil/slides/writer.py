"""Write an image as a pyramidal tiled TIFF that OpenSlide and every other reader opens at the right scale."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any, Literal

import cv2
import imagecodecs
import numpy as np
import simplejpeg
import tifffile

from lrmil.errors import ConfigError
from lrmil.files import atomic_path
from lrmil.slides.resample import UInt8Array
from lrmil.slides.scale import MAX_MPP, MIN_MPP

Compression = Literal["jpeg", "jpeg2000", "deflate"]
Chroma = Literal["444", "422", "420"]
Vendor = Literal["generic", "aperio"]

_APERIO_JPEG2000_RGB = 33005
_BIGTIFF_BYTES = 3_900_000_000
_DEFAULT_QUALITY = {"jpeg": 90.0, "jpeg2000": 50.0}
_QUALITY_RANGE = {"jpeg": (1, 100), "jpeg2000": (45, 100)}


def write_pyramid(
    path: str | os.PathLike[str],
    image: UInt8Array | Iterable[UInt8Array],
    mpp: float,
    downsamples: Sequence[int] = (1, 4, 16),
    tile_px: int = 256,
    compression: Compression | None = "jpeg",
    quality: float | None = None,
    description: str | None = None,
    *,
    vendor: Vendor | None = None,
    chroma: Chroma = "444",
) -> Path:
    """Write level 0 and its area averages, atomically, holding a band of tiles in memory.

    Args:
        path: the file to write; `.tif`, `.tiff` or `.svs`.
        image: uint8 (H, W, 3), or row strips (h, W, 3) of any heights from top to bottom.
        mpp: um per level-0 pixel, written as resolution tags in pixels per centimetre.
        downsamples: whole numbers, ascending, the first 1. A remainder at the right and lower edge of a level is cut
            off, as scanners do; levels that would have no pixel are left out.
        tile_px: side of a tile, a multiple of 16.
        compression: "jpeg", "jpeg2000" (lossy, always in Aperio's manner, since OpenSlide knows no other), "deflate"
            (lossless) or None.
        quality: JPEG quality 1-100 (default 90), or for JPEG 2000 the signal-to-noise ratio in dB (45-100, default 50;
            below, the encoder turns blank tiles grey).
        description: free text for the ImageDescription tag.
        vendor: "aperio" begins the description as Aperio's scanners do and states the mpp there; "generic" leaves it to
            the tags. Default: what the compression needs.
        chroma: subsampling of JPEG's colour channels.

    Raises:
        ConfigError: an argument is out of range, or strips differ in width.
        OutputError: the disk is full, or there is no permission.
    """
    path = Path(path)
    _check(path, mpp, downsamples, tile_px, compression, quality, vendor)
    vendor = vendor or ("aperio" if compression == "jpeg2000" else "generic")
    encode = _encoder(compression, quality, chroma)
    strips = iter(_strips(image, tile_px))
    first = next(strips, None)
    if first is None:
        raise ConfigError(f"{path.name}: there are no pixels to write.", fix="Give at least one strip of rows.")
    width = first.shape[1]
    with atomic_path(path) as scratch, tempfile.TemporaryFile(dir=scratch.parent) as spool:
        levels = [_Level(factor, width, tile_px, encode, spool) for factor in downsamples if width >= factor]
        for strip in chain([first], strips):
            if strip.shape[1] != width:
                raise ConfigError(
                    f"{path.name}: strips are {width} and {strip.shape[1]} px wide.", fix="Give strips of one width."
                )
            for level in levels:
                level.push(strip)
        for level in levels:
            level.finish()
        height = levels[0].height
        options = _tiff_options(compression, chroma)
        with tifffile.TiffWriter(scratch, bigtiff=spool.tell() > _BIGTIFF_BYTES) as tiff:
            for level in levels:
                if level.height == 0:
                    continue
                tiff.write(
                    level.encoded_tiles(),
                    shape=(level.height, level.width, 3),
                    dtype=np.uint8,
                    tile=(tile_px, tile_px),
                    subfiletype=0 if level.factor == 1 else 1,
                    resolution=(1e4 / (mpp * level.factor),) * 2,
                    resolutionunit="CENTIMETER",
                    description=_describe(vendor, description, (width, height), level, tile_px, compression, mpp),
                    metadata=None,
                    software=False,
                    **options,
                )
    return path


class _Level:
    """One level as it grows: rows that wait for averaging, averages that wait for a band of tiles, tiles on disk."""

    def __init__(
        self, factor: int, width_l0: int, tile_px: int, encode: Callable[[UInt8Array], bytes], spool: IO[bytes]
    ) -> None:
        self.factor = factor
        self.width = width_l0 // factor
        self.height = 0
        self._tile_px = tile_px
        self._encode = encode
        self._spool = spool
        self._waiting = np.empty((0, width_l0, 3), np.uint8)
        self._band = np.empty((0, self.width, 3), np.uint8)
        self._tiles: list[tuple[int, int]] = []

    def push(self, strip: UInt8Array) -> None:
        """Take further level-0 rows (h, W, 3)."""
        rows = np.concatenate([self._waiting, strip]) if len(self._waiting) else strip
        count = len(rows) // self.factor
        self._waiting = rows[count * self.factor :].copy()
        if not count:
            return
        whole = np.ascontiguousarray(rows[: count * self.factor, : self.width * self.factor])
        mean = cv2.resize(whole, (self.width, count), interpolation=cv2.INTER_AREA) if self.factor > 1 else whole
        self.height += count
        self._band = np.concatenate([self._band, mean.reshape(count, self.width, 3)])
        while len(self._band) >= self._tile_px:
            self._write_band(self._band[: self._tile_px])
            self._band = self._band[self._tile_px :].copy()

    def finish(self) -> None:
        """Write the last, lower band of tiles."""
        if len(self._band):
            self._write_band(self._band)

    def encoded_tiles(self) -> Iterator[bytes]:
        """Yield the compressed tiles, row by row."""
        for offset, length in self._tiles:
            self._spool.seek(offset)
            yield self._spool.read(length)
        self._spool.seek(0, os.SEEK_END)

    def _write_band(self, band: UInt8Array) -> None:
        # Repeating the edge keeps JPEG from ringing into the last column and row.
        right = math.ceil(self.width / self._tile_px) * self._tile_px - self.width
        band = np.pad(band, ((0, self._tile_px - len(band)), (0, right), (0, 0)), mode="edge")
        for left in range(0, band.shape[1], self._tile_px):
            data = self._encode(np.ascontiguousarray(band[:, left : left + self._tile_px]))
            self._tiles.append((self._spool.tell(), len(data)))
            self._spool.write(data)


def _strips(image: UInt8Array | Iterable[UInt8Array], rows: int) -> Iterator[UInt8Array]:
    parts = (image[top : top + rows] for top in range(0, len(image), rows)) if isinstance(image, np.ndarray) else image
    for part in parts:
        if part.ndim != 3 or part.shape[2] != 3 or part.dtype != np.uint8:
            raise ConfigError(
                f"pixels of shape {part.shape} and type {part.dtype} cannot be written.", fix="Give uint8 (h, W, 3)."
            )
        if part.shape[0] and part.shape[1]:
            yield part


def _encoder(compression: Compression | None, quality: float | None, chroma: Chroma) -> Callable[[UInt8Array], bytes]:
    if compression == "jpeg":
        level = round(quality or _DEFAULT_QUALITY["jpeg"])
        return lambda tile: simplejpeg.encode_jpeg(tile, quality=level, colorspace="RGB", colorsubsampling=chroma)
    if compression == "jpeg2000":
        decibel = round(quality or _DEFAULT_QUALITY["jpeg2000"])
        return lambda tile: bytes(imagecodecs.jpeg2k_encode(tile, level=decibel, codecformat="j2k", reversible=False))
    if compression == "deflate":
        return lambda tile: bytes(imagecodecs.deflate_encode(_differences(tile), 6))
    return lambda tile: tile.tobytes()


def _differences(tile: UInt8Array) -> bytes:
    """TIFF's predictor 2: each pixel minus the one to its left, modulo 256."""
    result = tile.copy()
    result[:, 1:] -= tile[:, :-1]
    return result.tobytes()


def _tiff_options(compression: Compression | None, chroma: Chroma) -> dict[str, Any]:
    if compression == "jpeg":
        sampling = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}[chroma]
        return {"compression": "jpeg", "photometric": "ycbcr", "subsampling": sampling}
    if compression == "jpeg2000":
        return {"compression": _APERIO_JPEG2000_RGB, "photometric": "rgb"}
    if compression == "deflate":
        return {"compression": "adobe_deflate", "photometric": "rgb", "predictor": 2}
    return {"photometric": "rgb"}


def _describe(
    vendor: Vendor,
    text: str | None,
    size_l0: tuple[int, int],
    level: _Level,
    tile_px: int,
    compression: Compression | None,
    mpp: float,
) -> str | None:
    if vendor == "generic":
        return text if level.factor == 1 else None
    full = f"{size_l0[0]}x{size_l0[1]}"
    size = full if level.factor == 1 else f"{full} -> {level.width}x{level.height}"
    lines = f"Aperio Image Library\r\n{size} ({tile_px}x{tile_px}) {compression or 'raw'}"
    return f"{lines}|MPP = {mpp:.6g}" + (f"|Note = {text.replace('|', '/')}" if text else "")


def _check(
    path: Path,
    mpp: float,
    downsamples: Sequence[int],
    tile_px: int,
    compression: str | None,
    quality: float | None,
    vendor: str | None,
) -> None:
    steps = list(downsamples)
    if not MIN_MPP <= mpp <= MAX_MPP:
        raise ConfigError(f"{path.name}: mpp={mpp} is no pixel size.", fix=f"Give {MIN_MPP:g} to {MAX_MPP:g} um/px.")
    if not steps or steps[0] != 1 or any(b <= a for a, b in pairwise(steps)):
        raise ConfigError(
            f"{path.name}: downsamples={steps}.", fix="Give ascending whole numbers, the first of them 1."
        )
    if any(step != int(step) for step in steps):
        raise ConfigError(f"{path.name}: downsamples={steps} are not whole.", fix="Give whole numbers.")
    if tile_px < 16 or tile_px % 16:
        raise ConfigError(f"{path.name}: tile_px={tile_px}.", fix="TIFF wants a multiple of 16.")
    if compression not in ("jpeg", "jpeg2000", "deflate", None):
        raise ConfigError(f"{path.name}: compression={compression!r}.", fix="Use jpeg, jpeg2000, deflate or None.")
    if compression == "jpeg2000" and vendor == "generic":
        raise ConfigError(f"{path.name}: OpenSlide reads JPEG 2000 in Aperio files only.", fix="Use vendor='aperio'.")
    low, high = _QUALITY_RANGE.get(compression or "", (-math.inf, math.inf))
    if quality is not None and not low <= quality <= high:
        raise ConfigError(f"{path.name}: quality={quality}.", fix=f"{compression} takes {low} to {high}.")
