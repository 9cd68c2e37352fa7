from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.bags import Bag
from lrmil.bags.bag import first_bad_row
from lrmil.errors import CorruptBag


def test_describes_itself(make_bag):
    bag = make_bag(12, 8)
    assert (bag.num_patches, bag.width) == (12, 8)
    assert repr(bag) == "Bag(slide-1: 12 x 8, 0.5 um/px, layers [0, 1, 11])"


def test_take_keeps_every_array_in_step(make_bag):
    bag = make_bag()
    part = bag.take(np.array([7, 2]))
    for name in ("features", "coords_l0", "region", "slot", "region_tissue"):
        np.testing.assert_array_equal(getattr(part, name), getattr(bag, name)[[7, 2]])
    np.testing.assert_array_equal(part.layer_cls[11], bag.layer_cls[11][[7, 2]])
    assert part.mpp == bag.mpp


def test_an_empty_bag_is_legal(make_bag):
    assert make_bag(0).num_patches == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_nan_and_infinity_are_refused_with_their_row(make_bag, bad, dtype):
    features = np.zeros((12, 8), dtype)
    features[9, 3] = bad
    features[5, 7] = bad
    with pytest.raises(CorruptBag, match=r"bag of slide-1: features holds NaN or infinity, first in row 5"):
        make_bag(features=features)


def test_nan_in_a_layer_is_refused(make_bag):
    cls = np.zeros((12, 6), np.float16)
    cls[3, 0] = np.nan
    with pytest.raises(CorruptBag, match=r"layer_cls/1 .* row 3"):
        make_bag(layer_cls={1: cls})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros(12, np.float32)}, r"features has shape \(12,\)"),
        ({"features": np.zeros((12, 8))}, "features has dtype float64"),
        ({"features": np.zeros((11, 8), np.float32)}, "layer_cls/0 has 12 rows and features has 11"),
        ({"coords_l0": np.zeros((11, 2), np.int64)}, "coords_l0 has 11 rows"),
        ({"coords_l0": np.zeros((12, 3), np.int64)}, r"coords_l0 has shape \(12, 3\)"),
        ({"coords_l0": np.zeros((12, 2), np.float32)}, "coords_l0 has dtype float32"),
        ({"region": np.zeros((12, 2), np.int64)}, r"region has shape \(12, 2\)"),
        ({"slot": np.zeros(12, np.int32)}, "slot has dtype int32"),
        ({"region": np.full(12, -1, np.int64)}, "region holds -1"),
        ({"region_tissue": np.full(12, np.nan, np.float32)}, "region_tissue holds NaN"),
        ({"layer_cls": {3: np.zeros((5, 6), np.float16)}}, "layer_cls/3 has 5 rows"),
        ({"mpp": 0.0}, "mpp is 0.0"),
        ({"mpp_l0": float("nan")}, "mpp_l0 is nan"),
    ],
)
def test_shapes_and_dtypes_are_checked(make_bag, changes, message):
    with pytest.raises(CorruptBag, match=message):
        make_bag(**changes)


def test_the_mpp_of_another_scale_is_refused(make_bag):
    with pytest.raises(CorruptBag, match=r"is 128 um wide, but 256 px at 2 um/px are 512 um"):
        make_bag(mpp=2.0)
    make_bag(mpp=2.0, patch_side_l0=2048.0)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([np.float16, np.float32]),
    st.lists(st.floats(width=16, allow_nan=True, allow_infinity=True), min_size=1, max_size=24),
    st.integers(1, 4),
)
def test_first_bad_row_agrees_with_isfinite(dtype, numbers, width):
    values = np.resize(np.array(numbers, dtype), (len(numbers), width))
    bad = ~np.isfinite(values).all(axis=1)
    assert first_bad_row(values) == (int(np.argmax(bad)) if bad.any() else None)
    assert first_bad_row(values[::2]) == (int(np.argmax(bad[::2])) if bad[::2].any() else None)


def test_a_bag_needs_only_features():
    assert Bag(features=np.ones((3, 2), np.float32), coords_l0=None).provenance == {}
