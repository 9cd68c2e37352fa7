"""The mosaic of one assembled slide: which window of which field goes where, in pixels and in nuclei.

Regions are laid on a grid of 448 or 896 level-0 px (patches of 112 or 224 px, ratio 4, at 0.5 um/px), but a field is
500 px wide. A window of 448 px of each field, turned and mirrored, goes to a cell of 448 px, edge to edge with its
neighbours. With 112-px patches each region is then one window of one field, and its truth is that field's; with 224-px
patches it is two by two windows, and seams fall between children, never inside one. Windows of 256 px do the same for
patches of 64 and 128 px. Tissue finding needs some glass around: two cells to the left and above, which keeps the
mosaic on both grids, and one to the right and below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lrmil.cohorts.crchisto import CLASSES, SourceImage
from lrmil.cohorts.truth import NucleusTable

FIELD_PX = 500
GLASS = 244


@dataclass(frozen=True)
class Piece:
    """One field as it is used on one slide."""

    image: str
    offset_px: tuple[int, int]
    """(x, y) of the window in the field"""
    quarter_turns: int
    """counter-clockwise, before mirroring"""
    mirrored: bool
    positive: bool


@dataclass(frozen=True)
class AssembledSlide:
    """What one slide is made of."""

    slide_id: str
    group: str
    positive: bool
    pieces: tuple[Piece, ...]
    window_px: int
    """side of the windows, and of the cells they go to"""


def compose(
    slide: AssembledSlide, source: dict[str, SourceImage], pixels: dict[str, npt.NDArray[np.uint8]]
) -> tuple[npt.NDArray[np.uint8], NucleusTable, list[tuple[int, int]]]:
    """Lay a slide's pieces out.

    Returns:
        the slide (h, w, 3) uint8, its nuclei, and the top-left corner (x, y) of each piece's cell; level-0 pixels.
    """
    columns = _columns(len(slide.pieces))
    rows = math.ceil(len(slide.pieces) / columns)
    cell = slide.window_px
    before, behind = 2 * cell, cell
    height, width = (before + n * cell + behind for n in (rows, columns))
    canvas = np.full((height, width, 3), GLASS, np.uint8)
    x, y, kind, inside, corners = [], [], [], [], []
    for number, piece in enumerate(slide.pieces):
        x0, y0 = before + number % columns * cell, before + number // columns * cell
        corners.append((x0, y0))
        canvas[y0 : y0 + cell, x0 : x0 + cell] = _window(pixels[piece.image], piece, cell)
        px, py, own = _window_nuclei(source[piece.image], piece, cell)
        x.append(px + x0)
        y.append(py + y0)
        kind.append(own)
        inside.append(np.full(len(own), piece.positive))
    kinds = np.concatenate(kind)
    nuclei = NucleusTable(
        np.concatenate(x).astype(np.float32),
        np.concatenate(y).astype(np.float32),
        kinds,
        np.zeros(len(kinds), np.uint8),
        np.concatenate(inside),
        CLASSES,
    )
    return canvas, nuclei, corners


def _columns(pieces: int) -> int:
    """An even number of cells side by side, so that regions of two by two cells are full."""
    return max(2, 2 * math.ceil(math.sqrt(pieces) / 2))


def inside_window(image: SourceImage, offset: tuple[int, int], window_px: int) -> npt.NDArray[np.bool_]:
    """Which nuclei of a field lie inside the window at `offset`, (N,)."""
    x, y = image.x_px - offset[0], image.y_px - offset[1]
    return (x >= 0) & (y >= 0) & (x < window_px) & (y < window_px)


def _window(pixels: npt.NDArray[np.uint8], piece: Piece, window_px: int) -> npt.NDArray[np.uint8]:
    x0, y0 = piece.offset_px
    window = np.rot90(pixels[y0 : y0 + window_px, x0 : x0 + window_px], piece.quarter_turns)
    return window[:, ::-1] if piece.mirrored else window


def _window_nuclei(
    image: SourceImage, piece: Piece, window_px: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """Nuclei inside the window, turned and mirrored as its pixels are."""
    inside = inside_window(image, piece.offset_px, window_px)
    x, y = image.x_px[inside] - piece.offset_px[0], image.y_px[inside] - piece.offset_px[1]
    for _ in range(piece.quarter_turns):
        x, y = y, window_px - x
    return (window_px - x if piece.mirrored else x), y, image.kind[inside]
