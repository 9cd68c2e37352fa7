"""Views: windows, turns, children in their slots, truth of what is inside."""

from __future__ import annotations

import numpy as np
import pytest

from lrmil.errors import CohortError
from lrmil.studies.fields import Field
from lrmil.studies.views import View, cut_children, look, probe_views, training_views, window_of

SIDE, RATIO = 16, 4


def _field(side: int = 20) -> Field:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
    x = np.array([1.0, 15.9, 16.0, 3.0])
    y = np.array([1.0, 2.0, 2.0, 17.0])
    return Field("f", "g", pixels, x, y, {"share": np.array([1.0, 0.0, 1.0, np.nan])})


def test_a_child_lies_at_row_slot_over_ratio_and_column_slot_modulo_ratio() -> None:
    window = _field().pixels[:SIDE, :SIDE]
    children = cut_children(window, RATIO)
    for slot in range(RATIO**2):
        row, column = divmod(slot, RATIO)
        np.testing.assert_array_equal(children[slot], window[4 * row : 4 * row + 4, 4 * column : 4 * column + 4])


def test_children_are_cut_from_the_turned_pixels_and_low_resolution_is_their_mean() -> None:
    """Else a turned region would be matched with children that lie elsewhere."""
    field = _field()
    views = [View(x, y, s) for s in range(8) for x, y in ((0, 0), (3, 2))]
    seen = look(field, views, SIDE // RATIO, RATIO, ("log_count",), 1)
    for view, image, children in zip(views, seen.images, seen.children, strict=True):
        window = window_of(field, view, SIDE)
        np.testing.assert_array_equal(children, cut_children(window, RATIO))
        mean = window.reshape(4, 4, 4, 4, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(image, mean, atol=0.51)
    flat = {window_of(field, View(0, 0, s), SIDE).tobytes() for s in range(8)}
    assert len(flat) == 8
    upright = field.pixels[2 : 2 + SIDE, 3 : 3 + SIDE]
    np.testing.assert_array_equal(window_of(field, View(3, 2, 5), SIDE), np.fliplr(np.rot90(upright)))


def test_truth_counts_the_nuclei_inside_and_leaves_out_those_that_do_not_count() -> None:
    field = _field()
    share, count = field.truth(0, 0, SIDE, ("share", "log_count"), 1)
    assert (share, count) == (0.5, np.log1p(2))
    share, count = field.truth(0, 2, SIDE + 2, ("share", "log_count"), 1)
    assert (share, count) == (0.5, np.log1p(3)), "x 16 inside now; one nucleus has no mark"
    assert np.isnan(field.truth(0, 0, SIDE, ("share",), 3)[0])
    with pytest.raises(CohortError, match="log_count"):
        field.truth(0, 0, SIDE, ("shares",), 1)


def test_training_views_depend_on_field_and_seed_alone() -> None:
    field = _field()
    ten = training_views(field, 10, SIDE, 3)
    assert training_views(field, 4, SIDE, 3) == ten[:4]
    assert training_views(field, 10, SIDE, 4) != ten
    assert all(0 <= v.x_px <= 4 and 0 <= v.y_px <= 4 for v in ten)
    assert probe_views(field, SIDE) == [View(0, 0), View(4, 0), View(0, 4), View(4, 4)]
    assert probe_views(_field(SIDE), SIDE) == [View(0, 0)], "no room: one view"
