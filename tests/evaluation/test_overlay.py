from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps

from lrmil.errors import ConfigError
from lrmil.evaluation.overlay import (
    attention_overlay,
    box_outlines,
    length_label,
    mask_outlines,
    nice_length_um,
    paint_boxes,
    scale_attention,
)
from lrmil.geometry import GridSettings, match_grids

WHITE = np.full((40, 60, 3), 255, np.uint8)


def test_a_region_lands_on_its_own_pixels_and_nowhere_else() -> None:
    # x 320..480 and y 160..240 at 16 level-0 px per pixel: columns 20..30, rows 10..15.
    out = attention_overlay(WHITE, [[320, 160, 480, 240]], [1.0], (16.0, 16.0), opacity=1.0)
    changed = (out != WHITE).any(axis=2)
    wanted = np.zeros((40, 60), bool)
    wanted[10:15, 20:30] = True
    np.testing.assert_array_equal(changed, wanted)


def test_x_and_y_have_their_own_scale_and_origin() -> None:
    painted = paint_boxes([[1100, 260, 1180, 360]], [7.0], (10.0, 20.0), (20, 30), origin_l0=(1000, 200))
    wanted = np.full((20, 30), np.nan)
    wanted[3:8, 10:18] = 7.0
    np.testing.assert_array_equal(painted, wanted)


@given(
    mpp=st.floats(0.2, 0.6),
    downsample=st.floats(12.0, 70.0),
    width=st.integers(2_000, 12_000),
    height=st.integers(2_000, 12_000),
)
@settings(deadline=None, max_examples=30)
def test_a_grid_paints_without_gap_overlap_or_drift(mpp: float, downsample: float, width: int, height: int) -> None:
    grid = match_grids(GridSettings(patch_px=64), mpp, (width, height), min_region_tissue=0.0)
    shape = (int(height / downsample), int(width / downsample))
    painted = paint_boxes(grid.region_boxes_l0, np.arange(grid.num_regions), (downsample, downsample), shape)
    assert np.isfinite(painted).all()
    # The region under each pixel's centre: right to half a pixel everywhere, also at the far corner.
    y, x = ((np.arange(n) + 0.5) * downsample for n in shape)
    side = grid.scale.region_side_l0
    columns = int(grid.region_index[:, 0].max()) + 1
    expected = np.floor(y / side)[:, None] * columns + np.floor(x / side)[None]
    off = painted != expected
    near_x = np.abs(x - np.round(x / side) * side) <= 0.5 * downsample + 1
    near_y = np.abs(y - np.round(y / side) * side) <= 0.5 * downsample + 1
    assert not off[~near_y][:, ~near_x].any()
    assert set(np.unique(painted)) <= set(range(grid.num_regions))


def test_what_was_not_looked_at_keeps_its_pixels_and_low_attention_does_not() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 255, (40, 60, 3)).astype(np.uint8)
    boxes = [[0, 0, 10, 10], [20, 20, 30, 30]]
    out = attention_overlay(rgb, boxes, [0.0, 5.0], (1.0, 1.0))
    untouched = np.ones((40, 60), bool)
    untouched[0:10, 0:10] = untouched[20:30, 20:30] = False
    np.testing.assert_array_equal(out[untouched], rgb[untouched])
    assert (out[0:10, 0:10] != rgb[0:10, 0:10]).any(axis=2).mean() > 0.95
    assert out.dtype == np.uint8
    # Not finite means not looked at.
    none = attention_overlay(rgb, boxes, [np.nan, 5.0], (1.0, 1.0))
    np.testing.assert_array_equal(none[0:10, 0:10], rgb[0:10, 0:10])


def test_paint_is_the_colour_map_over_the_grey_slide() -> None:
    rgb = np.full((4, 4, 3), (200, 100, 150), np.uint8)
    out = attention_overlay(rgb, [[0, 0, 2, 4], [2, 0, 4, 4]], [1.0, 9.0], (1, 1), opacity=0.5, colormap="magma")
    grey = 0.299 * 200 + 0.587 * 100 + 0.114 * 150
    for column, rank in ((0, 0.25), (3, 0.75)):
        wanted = 0.5 * 255 * np.array(colormaps["magma"](rank)[:3]) + 0.5 * grey
        np.testing.assert_allclose(out[0, column], wanted, atol=0.51)


def test_rank_scaling_shows_order_where_raw_weights_are_all_near_zero() -> None:
    logits = np.linspace(0, 30, 11)
    weights = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(scale_attention(weights), (np.arange(11) + 0.5) / 11)
    np.testing.assert_allclose(scale_attention(logits), scale_attention(weights))
    assert (scale_attention(weights, "range")[:-1] < 0.06).all()


def test_scaling_of_ties_single_regions_and_missing_values() -> None:
    np.testing.assert_allclose(scale_attention([2.0, 2.0, 2.0]), 0.5)
    np.testing.assert_allclose(scale_attention([4.0]), 0.5)
    np.testing.assert_allclose(scale_attention([1.0, np.nan, 3.0]), [0.25, np.nan, 0.75])
    np.testing.assert_allclose(scale_attention([3.0, 3.0], "range"), 0.5)
    np.testing.assert_allclose(scale_attention([-1.0, 0.0, 3.0], "range"), [0, 0.25, 1])
    assert np.isnan(scale_attention([np.nan, np.inf])).all()


def test_boxes_outside_tiny_or_overlapping() -> None:
    painted = paint_boxes([[-50, -50, -10, -10], [1000, 0, 1100, 10], [3, 3, 4, 4]], [1, 2, 3], (8, 8), (5, 5))
    assert np.isfinite(painted).sum() == 1
    assert painted[0, 0] == 3
    both = paint_boxes([[0, 0, 20, 10], [10, 0, 30, 10]], [1, 3], (10, 10), (1, 3))
    np.testing.assert_array_equal(both, [[1, 2, 3]])


def test_one_value_for_each_box() -> None:
    with pytest.raises(ConfigError, match="2 boxes"):
        attention_overlay(WHITE, [[0, 0, 1, 1], [1, 1, 2, 2]], [1.0], (1, 1))


def test_mask_outline_runs_along_the_pixels_edges() -> None:
    mask = np.zeros((10, 12), bool)
    mask[2:5, 3:9] = True
    (outline,) = mask_outlines(mask, (10.0, 20.0), origin_l0=(1000, 0))
    assert {tuple(p) for p in outline.tolist()} == {(1030, 40), (1090, 40), (1090, 100), (1030, 100)}


def test_mask_outline_of_a_hole_and_of_single_pixels() -> None:
    mask = np.ones((9, 9), bool)
    mask[3:6, 4:7] = False
    corners = {frozenset(map(tuple, o.tolist())) for o in mask_outlines(mask, (1, 1))}
    assert frozenset({(0, 0), (9, 0), (9, 9), (0, 9)}) in corners
    hole = next(c for c in corners if (0, 0) not in c)
    assert {p[0] for p in hole} == {4, 7}
    assert {p[1] for p in hole} == {3, 6}
    dot = np.zeros((4, 4), bool)
    dot[2, 1] = True
    assert {tuple(p) for p in mask_outlines(dot, (1, 1))[0].tolist()} == {(1, 2), (2, 2), (2, 3), (1, 3)}


def test_box_outline_has_its_four_corners() -> None:
    (outline,) = box_outlines([[1, 2, 5, 8]])
    assert outline.tolist() == [[1, 2], [5, 2], [5, 8], [1, 8]]


@pytest.mark.parametrize(
    ("available", "length", "label"), [(260, 200, "200 µm"), (5000, 5000, "5 mm"), (1999, 1000, "1 mm")]
)
def test_scale_bar_lengths(available: float, length: float, label: str) -> None:
    assert nice_length_um(available) == pytest.approx(length)
    assert length_label(nice_length_um(available)) == label
