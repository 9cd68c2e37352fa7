"""Slides of any size, written in seconds: a few blocks are compressed once, and their tiles repeated.

A block is so large that it has whole tiles on every level, so the levels of a slide are the averages of its level 0 as
they are in any pyramid. What a reader does with such a file is what it does with one from a scanner: every tile has
bytes of its own in the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import imagecodecs
import numpy as np
import simplejpeg
import tifffile

from lrmil.benchmarks.material import FRINGE, GLASS, ISLAND, TISSUE, TURNED, Material, UInt8Array

Codec = Literal["JPEG 4:4:4", "JPEG 4:2:0", "JPEG 2000"]
TILE_PX = 256
_JPEG_QUALITY = 70
"""as Aperio's scanners are commonly set"""
_JPEG2000_DB = 40
_APERIO_JPEG2000_RGB = 33005
_SUBSAMPLING = {"JPEG 4:4:4": ("444", (1, 1)), "JPEG 4:2:0": ("420", (2, 2))}
_BIGTIFF_BYTES = 3_900_000_000


@dataclass(frozen=True)
class SlideSpec:
    """A slide to be written."""

    mpp: float
    size_px: tuple[int, int]
    """width and height; what of the last blocks lies beyond is cut off"""
    downsamples: tuple[int, ...]
    """Levels are rounded up: one of 2048 px under 8191 px is 3.9995 times smaller, as OpenSlide counts"""
    codec: Codec
    cells: tuple[tuple[str, ...], ...]
    """kinds of blocks, row by row"""

    @property
    def gigapixels(self) -> float:
        """Area of level 0."""
        return self.size_px[0] * self.size_px[1] / 1e9

    @property
    def tissue_cells(self) -> int:
        """Blocks that hold tissue."""
        return sum(kind != GLASS for row in self.cells for kind in row)


class TileStock:
    """Compressed tiles of the blocks of one material, made when they are first needed."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self._tiles: dict[tuple[str, int, Codec], list[list[bytes]]] = {}

    def tiles(self, kind: str, downsample: int, codec: Codec) -> list[list[bytes]]:
        """Return the tiles of a block on one level, row by row."""
        key = kind, downsample, codec
        if key not in self._tiles:
            block = self.material.block(kind)
            side = block.shape[0] // downsample
            if side % TILE_PX:
                raise ValueError(f"a block of {block.shape[0]} px has no whole tiles at 1/{downsample}")
            level = cv2.resize(block, (side, side), interpolation=cv2.INTER_AREA) if downsample > 1 else block
            starts = range(0, side, TILE_PX)
            self._tiles[key] = [
                [_encode(np.asarray(level[y : y + TILE_PX, x : x + TILE_PX], np.uint8), codec) for x in starts]
                for y in starts
            ]
        return self._tiles[key]


def full_cells(across: int, down: int) -> tuple[tuple[str, ...], ...]:
    """Return a map of blocks that are all tissue."""
    return tuple(tuple((TISSUE, TURNED)[(row + column) % 2] for column in range(across)) for row in range(down))


def cells_with_tissue(across: int, down: int, tissue: int) -> tuple[tuple[str, ...], ...]:
    """Return a map of glass with `tissue` blocks of tissue around its middle; the outer half of them are ragged."""
    middle_x, middle_y = (across - 1) / 2, (down - 1) / 2
    places = [(row, column) for row in range(down) for column in range(across)]
    places.sort(key=lambda place: (math.hypot(place[0] - middle_y, place[1] - middle_x), place))
    inner = math.ceil(tissue / 2)
    kinds = {place: (TISSUE, TURNED)[i % 2] for i, place in enumerate(places[:inner])}
    kinds |= {place: (ISLAND, FRINGE)[i % 2] for i, place in enumerate(places[inner:tissue])}
    return tuple(tuple(kinds.get((row, column), GLASS) for column in range(across)) for row in range(down))


def write_slide(path: Path, spec: SlideSpec, stock: TileStock) -> Path:
    """Write a tiled TIFF as Aperio's scanners do."""
    width, height = spec.size_px
    levels = [(factor, math.ceil(width / factor), math.ceil(height / factor)) for factor in spec.downsamples]
    with tifffile.TiffWriter(path, bigtiff=_bytes(spec, stock) > _BIGTIFF_BYTES) as tiff:
        for factor, level_width, level_height in levels:
            size = f"{width}x{height}" + ("" if factor == 1 else f" -> {level_width}x{level_height}")
            tiff.write(
                _tiles(spec, stock, factor, level_width, level_height),
                shape=(level_height, level_width, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                subfiletype=0 if factor == 1 else 1,
                description=f"Aperio Image Library\r\n{size} ({TILE_PX}x{TILE_PX})|MPP = {spec.mpp:.6g}",
                metadata=None,
                software=False,
                **_options(spec.codec),
            )
    return path


def _tiles(spec: SlideSpec, stock: TileStock, factor: int, width: int, height: int) -> Iterator[bytes]:
    across = math.ceil(width / TILE_PX)
    for row in range(math.ceil(height / TILE_PX)):
        line: list[bytes] = []
        for kind in spec.cells[row // _tiles_a_block(stock, factor)]:
            block = stock.tiles(kind, factor, spec.codec)
            line += block[row % len(block)]
        yield from line[:across]


def _tiles_a_block(stock: TileStock, factor: int) -> int:
    return stock.material.block_px // factor // TILE_PX


def _bytes(spec: SlideSpec, stock: TileStock) -> int:
    """Return how large the file will be, about."""
    kinds = [kind for row in spec.cells for kind in row]
    one = {kind: [stock.tiles(kind, factor, spec.codec) for factor in spec.downsamples] for kind in set(kinds)}
    size = {kind: sum(len(tile) for block in blocks for line in block for tile in line) for kind, blocks in one.items()}
    return sum(size[kind] for kind in kinds)


def _encode(tile: UInt8Array, codec: Codec) -> bytes:
    tile = np.ascontiguousarray(tile)
    if codec == "JPEG 2000":
        return bytes(imagecodecs.jpeg2k_encode(tile, level=_JPEG2000_DB, codecformat="j2k", reversible=False))
    chroma, _ = _SUBSAMPLING[codec]
    return simplejpeg.encode_jpeg(tile, quality=_JPEG_QUALITY, colorspace="RGB", colorsubsampling=chroma)


def _options(codec: Codec) -> dict[str, Any]:
    if codec == "JPEG 2000":
        return {"compression": _APERIO_JPEG2000_RGB, "photometric": "rgb"}
    return {"compression": "jpeg", "photometric": "ycbcr", "subsampling": _SUBSAMPLING[codec][1]}
