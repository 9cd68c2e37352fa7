from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.slides import Level
from lrmil.slides.levels import coarsest_level, nominal_downsample


@pytest.mark.parametrize(
    ("full", "level", "meant"),
    [
        ((46000, 32914), (11500, 8228), 4.0),  # 4.00012
        ((46000, 32914), (2875, 2057), 16.0),
        ((17760, 13283), (4441, 3321), 4.0),  # 3.9994, rounded up
        ((4443, 3567), (2221, 1783), 2.0),  # 2.0005
        ((2033, 1525), (63, 47), 32.0),  # 32.36 after five halvings
        ((2033, 1525), (254, 190), 8.0),
        ((3000, 2400), (1000, 800), 3.0),
        ((300, 200), (100, 67), 3.0),
        ((320, 320), (8, 8), 40.0),  # exact, although 32 is within 2 px too
        ((1000, 1000), (1000, 1000), 1.0),
    ],
)
def test_rounded_sizes_are_explained(full, level, meant):
    assert nominal_downsample(full, level) == meant


def test_a_size_that_rounding_does_not_explain_is_taken_as_it_is():
    assert nominal_downsample((10_000, 8_000), (3_000, 2_400)) == pytest.approx(10 / 3)
    # 3.98 over 10,000 px: 12 px from a quarter, no rounding does that.
    assert nominal_downsample((10_000, 10_000), (2_512, 2_512)) == pytest.approx(3.98, abs=0.01)


@settings(deadline=None, max_examples=60)
@given(st.integers(500, 90_000), st.integers(500, 90_000), st.sampled_from([1, 2, 4, 8, 16, 32]), st.booleans())
def test_cut_off_or_rounded_up_remainders_of_any_size(width, height, factor, up):
    level = tuple(-(-side // factor) if up else side // factor for side in (width, height))
    assert nominal_downsample((width, height), level) == factor


@settings(deadline=None, max_examples=60)
@given(st.integers(1000, 90_000), st.integers(1000, 90_000), st.integers(1, 5))
def test_halving_again_and_again(width, height, times):
    w, h = width, height
    for _ in range(times):
        w, h = w // 2, h // 2
    assert nominal_downsample((width, height), (w, h)) == 2.0**times


def pyramid(*downsamples: float) -> list[Level]:
    return [Level(i, int(20_000 / d), int(16_000 / d), d) for i, d in enumerate(downsamples)]


@pytest.mark.parametrize(
    ("levels", "wanted", "index"),
    [
        ((1, 4, 16), 8.0, 1),
        ((1, 4, 16), 4.0, 1),
        ((1, 4, 16), 3.9, 0),
        ((1, 4, 16), 3.99, 1),  # a child side that was rounded to whole pixels
        ((1, 4, 16), 15.0, 1),
        ((1, 4, 16), 64.0, 2),
        ((1, 2, 4, 8), 8.0, 3),
        ((1, 2, 4, 8), 7.9, 2),
        ((1,), 8.0, 0),
        ((1, 4), 0.5, 0),  # finer than the scan: level 0 is all there is
        ((1, 10 / 3), 3.3333, 1),
    ],
)
def test_the_coarsest_level_that_is_fine_enough(levels, wanted, index):
    assert coarsest_level(pyramid(*levels), wanted).index == index


def test_levels_in_any_order():
    assert coarsest_level(pyramid(1, 4, 16)[::-1], 8.0).downsample == 4
    assert coarsest_level(pyramid(1, 4, 16)[::-1], 0.1).downsample == 1
