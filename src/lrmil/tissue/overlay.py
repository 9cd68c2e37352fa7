"""The mask drawn onto what was seen, for people to check."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.geometry import IntArray
from lrmil.tissue.mask import BoolArray, TissueMask
from lrmil.tissue.stain import RgbArray

Rgb = tuple[int, int, int]

TISSUE_RGB: Rgb = (0, 160, 0)
PEN_RGB: Rgb = (255, 120, 0)
BOX_RGB: Rgb = (40, 80, 200)


def overlay(
    rgb: RgbArray,
    mask: TissueMask,
    *,
    boxes_l0: IntArray | None = None,
    max_side_px: int = 2048,
    tissue_rgb: Rgb = TISSUE_RGB,
    pen_rgb: Rgb = PEN_RGB,
    box_rgb: Rgb = BOX_RGB,
) -> npt.NDArray[np.uint8]:
    """Return a copy of the overview (h, w, 3) with contours of the tissue and of pen marks, and boxes if given.

    Every boundary is scaled from the mask or from level 0 by itself, so that nothing drifts across the picture.

    Args:
        rgb: the overview that `mask` was made from, (h, w, 3).
        mask: its tissue.
        boxes_l0: regions to outline, (N, 4) x0, y0, x1, y1 in level-0 pixels.
        max_side_px: the picture is shrunk to this.
        tissue_rgb: colour of the tissue contour.
        pen_rgb: colour of the contour of pen marks.
        box_rgb: colour of the boxes.
    """
    height, width = mask.mask.shape
    scale = min(1.0, max_side_px / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = np.array(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA) if scale < 1 else rgb, dtype=np.uint8)
    line_px = max(1, round(max(size) / 700))
    if boxes_l0 is not None:
        per_l0 = np.array([size[0] / width, size[1] / height]) / np.asarray(mask.downsample_l0)
        for x0, y0, x1, y1 in np.rint(boxes_l0 * np.tile(per_l0, 2)).astype(int).tolist():
            cv2.rectangle(picture, (x0, y0), (x1, y1), box_rgb, 1)
    for part, colour in ((mask.mask, tissue_rgb), (mask.pen, pen_rgb)):
        _draw_contours(picture, part, colour, line_px)
    return picture


def _draw_contours(picture: RgbArray, part: BoolArray, colour: Rgb, line_px: int) -> None:
    """Outline `part` (h, w), which may be larger than the picture, on the picture."""
    height, width = picture.shape[:2]
    small = cv2.resize(part.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    # One pixel of background all round, so that tissue at the edge of the slide gets a line, too.
    framed = cv2.copyMakeBorder(small, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    contours, _ = cv2.findContours(framed, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, colour, line_px, offset=(-1, -1))
