"""Coverage of boxes: exact, also where an edge cuts through a mask pixel, and never with x and y swapped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.geometry import GridSettings, match_grids
from lrmil.tissue import TissueMask


def tissue_mask(mask: np.ndarray, downsample_l0: tuple[float, float] = (1.0, 1.0)) -> TissueMask:
    return TissueMask(np.asarray(mask, bool), downsample_l0, 8.0, np.zeros_like(mask, bool), 0.05, (245.0,) * 3)


def overlap(a0: float, a1: float, b0: float, b1: float) -> float:
    return max(0.0, min(a1, b1) - max(a0, b0))


@st.composite
def masks(draw: st.DrawFn) -> TissueMask:
    width, height = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    bits = draw(st.lists(st.booleans(), min_size=width * height, max_size=width * height))
    downsample = st.sampled_from([1.0, 2.0, 7.0, 31.99, 12.5])
    return tissue_mask(np.array(bits).reshape(height, width), (draw(downsample), draw(downsample)))


@settings(deadline=None, max_examples=80)
@given(masks(), st.data())
def test_against_brute_force(tissue: TissueMask, data: st.DataObject) -> None:
    (height, width), (dx, dy) = tissue.mask.shape, tissue.downsample_l0
    x = st.integers(-10, int(width * dx) + 10)
    y = st.integers(-10, int(height * dy) + 10)
    corners = data.draw(st.lists(st.tuples(x, y, st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=6))
    boxes = np.array([(x0, y0, x0 + w, y0 + h) for x0, y0, w, h in corners], dtype=np.int64)
    wanted = [
        sum(
            overlap(x0, x1, j * dx, (j + 1) * dx) * overlap(y0, y1, i * dy, (i + 1) * dy)
            for i, j in np.argwhere(tissue.mask)
        )
        / ((x1 - x0) * (y1 - y0))
        for x0, y0, x1, y1 in boxes
    ]
    found = tissue.coverage(boxes)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_x_is_a_column_and_y_a_row() -> None:
    mask = np.zeros((2, 4), bool)
    mask[0, 3] = True  # top right
    tissue = tissue_mask(mask, (10.0, 20.0))
    boxes = np.array([[30, 0, 40, 20], [0, 20, 10, 40], [35, 10, 45, 30], [20, 0, 40, 40]])
    np.testing.assert_allclose(tissue.coverage(boxes), [1, 0, 0.25, 0.25])


def test_outside_is_no_tissue() -> None:
    tissue = tissue_mask(np.ones((3, 5)), (8.0, 8.0))
    boxes = np.array(
        [[0, 0, 40, 24], [-40, 0, 40, 24], [0, 0, 40, 48], [32, 16, 48, 32], [40, 0, 80, 24], [-9, -9, -1, -1]]
    )
    np.testing.assert_allclose(tissue.coverage(boxes), [1, 0.5, 0.5, 0.25, 0, 0])


def test_no_boxes_and_boxes_without_area() -> None:
    tissue = tissue_mask(np.ones((3, 5)))
    assert tissue.coverage(np.empty((0, 4), np.int64)).shape == (0,)
    assert tissue.coverage(np.array([[1, 1, 1, 3], [2, 2, 1, 1]])).tolist() == [0, 0]


def test_stays_exact_on_a_large_mask() -> None:
    # Beyond 2**24 pixels of tissue single precision would no longer count them one by one.
    tissue = tissue_mask(np.ones((4200, 4200), bool), (16.0, 16.0))
    far = 4200 * 16
    boxes = np.array([[far - 3, far - 5, far, far], [far - 1, far - 1, far + 1, far + 1]])
    np.testing.assert_allclose(tissue.coverage(boxes), [1, 0.25])


def test_drives_the_matched_grid() -> None:
    # Tissue is one region wide strip at the right edge of a slide of 3 x 1 regions, in its upper half.
    mask = np.zeros((32, 96), bool)
    mask[:16, 64:] = True
    tissue = tissue_mask(mask, (32.0, 32.0))
    matched = match_grids(GridSettings(), 0.5, (3072, 1024), tissue.coverage)
    assert matched.region_index.tolist() == [[2, 0]]
    assert matched.region_tissue == pytest.approx([0.5])
    assert matched.child_slot.tolist() == [*range(8)]


def test_shares_and_areas() -> None:
    mask = np.zeros((10, 20), bool)
    mask[:5, :10] = True
    tissue = tissue_mask(mask)
    assert tissue.tissue_share == 0.25
    assert tissue.tissue_mm2 == pytest.approx(50 * 64e-6)
    assert tissue.pen_share == 0
