"""The picture that people check the mask with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lrmil.slides import Overview
from lrmil.tissue import overlay, segment_tissue
from lrmil.tissue.overlay import BOX_RGB, PEN_RGB, TISSUE_RGB

See = Callable[..., Overview]
Paint = Callable[..., np.ndarray]


def where(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return the box (x0, y0, x1, y1), last pixels included, of all pixels of one colour."""
    y, x = np.nonzero((picture == colour).all(axis=2))
    return int(x.min()), int(y.min()), int(x.max()), int(y.max())


def test_contours_lie_on_the_tissue_and_on_the_pen(see: See, paint: Paint) -> None:
    overview = see(paint(300, 120, {(40, 20, 100, 90): (205, 110, 155), (200, 30, 260, 80): (53, 163, 143)}))
    before = overview.rgb.copy()
    found = segment_tissue(overview)
    picture = overlay(overview.rgb, found)
    assert picture.dtype == np.uint8
    assert picture.shape == (120, 300, 3)
    np.testing.assert_array_equal(overview.rgb, before)
    for part, colour in ((found.mask, TISSUE_RGB), (found.pen, PEN_RGB)):
        y, x = np.nonzero(part)
        assert where(picture, colour) == (x.min(), y.min(), x.max(), y.max())
    # A contour, no flood: the inside shows the slide.
    np.testing.assert_array_equal(picture[30:80, 50:90], before[30:80, 50:90])


def test_tissue_at_the_edge_of_the_slide_has_a_contour(see: See) -> None:
    overview = see(np.full((40, 60, 3), (205, 110, 155), np.uint8))
    assert where(overlay(overview.rgb, segment_tissue(overview)), TISSUE_RGB) == (0, 0, 59, 39)


def test_boxes_are_drawn_from_level_0(see: See, paint: Paint) -> None:
    overview = see(paint(300, 120, {}), downsample_l0=(32.0, 16.0))
    found = segment_tissue(overview)
    picture = overlay(overview.rgb, found, boxes_l0=np.array([[3200, 320, 6400, 1280]]))
    assert where(picture, BOX_RGB) == (100, 20, 200, 80)
    assert not (overlay(overview.rgb, found, boxes_l0=np.empty((0, 4), np.int64)) == BOX_RGB).all(axis=2).any()


def test_a_large_overview_is_shrunk_and_stays_in_place(see: See, paint: Paint) -> None:
    overview = see(paint(1000, 400, {(500, 100, 900, 300): (205, 110, 155)}), downsample_l0=(10.0, 10.0))
    found = segment_tissue(overview)
    boxes = np.array([[5000, 1000, 9000, 3000]])
    picture = overlay(overview.rgb, found, max_side_px=250, boxes_l0=boxes, box_rgb=(1, 2, 3), tissue_rgb=(9, 8, 7))
    assert picture.shape == (100, 250, 3)
    np.testing.assert_allclose(where(picture, (9, 8, 7)), (125, 25, 224, 74), atol=1)
    np.testing.assert_allclose(where(picture, (1, 2, 3)), (125, 25, 225, 75), atol=1)
