"""One picture of a whole cohort: thumbnails with their true areas outlined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.cohorts.truth import Polygon
from lrmil.errors import OutputError
from lrmil.files import atomic_path
from lrmil.slides import open_slide

_CAPTION_PX = 20
_OUTLINE = (20, 150, 60)


@dataclass(frozen=True)
class Tile:
    """One slide on the sheet."""

    path: Path
    caption: str
    areas: Sequence[Polygon]
    """polygons to outline"""


def write_contact_sheet(path: Path, tiles: Sequence[Tile], *, side_px: int = 240, columns: int = 8) -> None:
    """Write a PNG of all slides, each fitted into a square of `side_px`."""
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    sheet = np.full((rows * (side_px + _CAPTION_PX), columns * side_px, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        y, x = number // columns * (side_px + _CAPTION_PX), number % columns * side_px
        cv2.putText(sheet, tile.caption, (x + 4, y + 14), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (0, 0, 0), 1, cv2.LINE_AA)
        thumb = _thumbnail(tile, side_px - 4)
        h, w = thumb.shape[:2]
        sheet[y + _CAPTION_PX : y + _CAPTION_PX + h, x + 2 : x + 2 + w] = thumb
    with atomic_path(path) as scratch:
        if not cv2.imwrite(str(scratch), sheet[..., ::-1]):
            raise OutputError(f"{path}: cannot be written.", fix="Look whether the folder exists and has space.")


def _thumbnail(tile: Tile, side_px: int) -> npt.NDArray[np.uint8]:
    with open_slide(tile.path) as slide:
        width, height = slide.dimensions
        zoom = side_px / max(width, height)
        size = max(1, round(width * zoom)), max(1, round(height * zoom))
        thumb = np.ascontiguousarray(slide.read_box((0, 0, width, height), size))
    rings = [np.round(ring * zoom * 16).astype(np.int32) for polygon in tile.areas for ring in polygon]
    if rings:
        cv2.polylines(thumb, rings, True, _OUTLINE, 1, cv2.LINE_AA, 4)
    return thumb
