"""One image of a TIFF as a grid of compressed tiles: where each lies, and what decodes it.

Accepted is what is fully understood: 8-bit RGB or YCbCr, samples side by side, tiles of a sane size. The rest raises
`NotUnderstood`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lrmil.slides.blocks import DecodeError
from lrmil.slides.resample import UInt8Array
from lrmil.slides.tiff.file import RandomAccessFile
from lrmil.slides.tiff.jpeg import JpegTiles
from lrmil.slides.tiff.jpeg2000 import Jpeg2000Tiles
from lrmil.slides.tiff.plain import PlainCompression, PlainTiles
from lrmil.slides.tiff.structure import Directory, NotUnderstood

MAX_TILE_PX = 4096
"""Largest side of a tile: 50 MB once decoded."""

_SUBFILE_TYPE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_FILL_ORDER, _ORIENTATION, _SAMPLES, _PLANAR, _PREDICTOR = 266, 274, 277, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _OFFSETS, _COUNTS, _EXTRA_SAMPLES = 322, 323, 324, 325, 338
_SAMPLE_FORMAT, _JPEG_TABLES, _DEPTH, _TILE_DEPTH = 339, 347, 32997, 32998

_RGB, _YCBCR = 2, 6
_JPEG, _APERIO_YCBCR, _APERIO_RGB = 7, 33003, 33005
_PLAIN: dict[int, PlainCompression] = {1: "none", 5: "lzw", 8: "deflate", 32946: "deflate"}
_DIFFERENCES = 2

_FIXED = {
    _FILL_ORDER: (1, "its bits are in reverse order"),
    _ORIENTATION: (1, "it is stored turned or mirrored"),
    _PLANAR: (1, "its colours are stored apart"),
    _SAMPLES: (3, "it has not three samples for each pixel"),
    _BITS: (8, "its samples are not of 8 bits"),
    _SAMPLE_FORMAT: (1, "its samples are not unsigned whole numbers"),
    _DEPTH: (1, "it is a volume"),
    _TILE_DEPTH: (1, "its tiles are volumes"),
}
"""what these tags must say, also where they say nothing, except for `_SAMPLES` and `_BITS`"""


class TileDecoder(Protocol):
    """Makes pixels of the compressed bytes of one tile. Used by several threads at once."""

    def check(self, data: bytes) -> None:
        """Look at the header of one tile; raises `NotUnderstood`, or `DecodeError` where it is damaged."""

    def reduction(self, factor: int) -> int:
        """Return by how much to reduce while decoding, where the average over `factor` (2, 4, 8) pixels is wanted."""

    def decode(self, data: bytes, reduction: int = 1) -> UInt8Array:
        """Return a tile at 1/`reduction`, (h, w, 3); raises `DecodeError`."""


@dataclass(frozen=True)
class TileRect:
    """Neighbouring tiles of a level, wanted at 1/`reduction`; columns and rows are half open."""

    level: int
    first_column: int
    first_row: int
    last_column: int
    """beyond the last one"""
    last_row: int
    reduction: int


@dataclass(frozen=True)
class TiledImage:
    """A tiled image of a file."""

    width_px: int
    height_px: int
    tile_px: tuple[int, int]
    """width and height of a tile"""
    across: int
    """tiles in a row"""
    down: int
    """rows of tiles"""
    offsets: npt.NDArray[np.int64]
    """(down * across,) where each tile begins in the file"""
    lengths: npt.NDArray[np.int64]
    """(down * across,) bytes of each tile; 0 where nothing was scanned"""
    decoder: TileDecoder

    @property
    def sparse(self) -> bool:
        """Whether some tiles hold nothing."""
        return bool((self.lengths == 0).any())

    def rect(self, level: int, left: int, top: int, right: int, bottom: int, reduction: int) -> TileRect:
        """Return the tiles under a rectangle of pixels; the image is `level`, and they are wanted at 1/`reduction`."""
        width, height = self.tile_px
        last_column, last_row = (right - 1) // width + 1, (bottom - 1) // height + 1
        return TileRect(level, left // width, top // height, last_column, last_row, reduction)


def is_tiled(directory: Directory) -> bool:
    """Whether the image is stored as tiles."""
    return _TILE_WIDTH in directory


def is_reduced(directory: Directory) -> bool:
    """Whether the image is marked as a smaller version of another one."""
    return bool(directory.number(_SUBFILE_TYPE, 0) & 1)


def tiled_image(file: RandomAccessFile, directory: Directory) -> TiledImage:
    """Return the layout of a directory's image, once one of its tiles has been looked at.

    Raises:
        NotUnderstood: something about it is not known, or damaged.
    """
    if not is_tiled(directory):
        raise NotUnderstood("it is stored without tiles")
    for tag, (wanted, otherwise) in _FIXED.items():
        if directory.number(tag, None if tag in (_SAMPLES, _BITS) else wanted) != wanted:
            raise NotUnderstood(otherwise)
    if len(directory.numbers(_EXTRA_SAMPLES)):
        raise NotUnderstood("it has an alpha channel")
    width, height = directory.number(_WIDTH), directory.number(_HEIGHT)
    tile_px = directory.number(_TILE_WIDTH), directory.number(_TILE_HEIGHT)
    if width < 1 or height < 1 or any(side < 16 or side > MAX_TILE_PX or side % 16 for side in tile_px):
        raise NotUnderstood(f"an image of {width} x {height} px is cut into tiles of {tile_px[0]} x {tile_px[1]} px")
    across, down = -(-width // tile_px[0]), -(-height // tile_px[1])
    offsets, lengths = directory.numbers(_OFFSETS), directory.numbers(_COUNTS)
    if not len(offsets) == len(lengths) == across * down:
        raise NotUnderstood(f"it lists {len(offsets)} tiles and {len(lengths)} lengths, where {across * down} are due")
    image = TiledImage(width, height, tile_px, across, down, offsets, lengths, _decoder(directory, tile_px))
    _look_at_a_tile(file, image)
    return image


def _decoder(directory: Directory, tile_px: tuple[int, int]) -> TileDecoder:
    compression, photometric = directory.number(_COMPRESSION, 1), directory.number(_PHOTOMETRIC)
    predictor = directory.number(_PREDICTOR, 1)
    if compression == _JPEG and photometric in (_RGB, _YCBCR):
        return JpegTiles(tile_px, directory.data(_JPEG_TABLES), photometric == _YCBCR)
    if compression in (_APERIO_YCBCR, _APERIO_RGB):
        return Jpeg2000Tiles(tile_px, compression == _APERIO_YCBCR)
    plain = _PLAIN.get(compression)
    if plain and photometric == _RGB and (predictor == 1 or (predictor == _DIFFERENCES and plain != "none")):
        return PlainTiles(tile_px, plain, predictor == _DIFFERENCES)
    raise NotUnderstood(f"compression {compression}, photometric {photometric}, predictor {predictor}")


def _look_at_a_tile(file: RandomAccessFile, image: TiledImage) -> None:
    """Let the decoder see a tile. The first may be damaged, which says nothing about the others: try another, too."""
    filled = np.flatnonzero(image.lengths)
    if not len(filled):
        raise NotUnderstood("an image has no tiles at all")
    problem = ""
    for index in dict.fromkeys(int(filled[i]) for i in (0, len(filled) // 2, -1)):
        try:
            image.decoder.check(file.read_at(int(image.offsets[index]), int(image.lengths[index])))
        except DecodeError as error:
            problem = problem or str(error)
        else:
            return
    raise NotUnderstood(f"its tiles cannot be decoded: {problem}")
