from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.slides.resample import area_mean, area_resample, over_background, snap

quick = settings(deadline=None, max_examples=40)


def brute_force(
    pixels: npt.NDArray[np.uint8], box: tuple[float, float, float, float], size: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """Every output pixel by looping over every input pixel that it touches."""
    x0, y0, x1, y1 = box
    step_x, step_y = (x1 - x0) / size[0], (y1 - y0) / size[1]
    out = np.zeros((size[1], size[0], pixels.shape[2]))
    for j in range(size[1]):
        for i in range(size[0]):
            left, right = x0 + i * step_x, x0 + (i + 1) * step_x
            top, bottom = y0 + j * step_y, y0 + (j + 1) * step_y
            for y in range(int(np.floor(top)), min(int(np.ceil(bottom)), pixels.shape[0])):
                for x in range(int(np.floor(left)), min(int(np.ceil(right)), pixels.shape[1])):
                    area = max(0, min(right, x + 1) - max(left, x)) * max(0, min(bottom, y + 1) - max(top, y))
                    out[j, i] += area * pixels[y, x]
    return out / (step_x * step_y)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[float, float, float, float], tuple[int, int]]:
    width, height = draw(st.integers(3, 24)), draw(st.integers(3, 24))
    x0, y0 = draw(st.floats(0, width - 2)), draw(st.floats(0, height - 2))
    x1, y1 = draw(st.floats(x0 + 1, width)), draw(st.floats(y0 + 1, height))
    return (width, height), (x0, y0, x1, y1), (draw(st.integers(1, 9)), draw(st.integers(1, 9)))


@quick
@given(boxes(), st.integers(0, 2**32 - 1))
def test_any_box_equals_the_brute_force_average(case, seed):
    (width, height), box, size = case
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    np.testing.assert_allclose(area_mean(pixels, box, size), brute_force(pixels, box, size), atol=0.02)
    assert np.abs(area_resample(pixels, box, size) - brute_force(pixels, box, size)).max() <= 0.55


@quick
@given(boxes(), st.integers(0, 255))
def test_a_constant_image_stays_constant(case, value):
    (width, height), box, size = case
    pixels = np.full((height, width, 3), value, np.uint8)
    assert (area_resample(pixels, box, size) == value).all()


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_whole_factors_preserve_the_mean(width, height, factor_x, factor_y, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height * factor_y, width * factor_x, 3), dtype=np.uint8)
    box = (0, 0, width * factor_x, height * factor_y)
    assert area_mean(pixels, box, (width, height)).mean() == pytest.approx(pixels.mean(), abs=1e-2)
    whole = area_resample(pixels, box, (width, height))
    assert np.abs(whole.astype(float) - brute_force(pixels, box, (width, height))).max() <= 0.501


def test_whole_factors_equal_block_averages_exactly(block_mean):
    pixels = np.random.default_rng(1).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    for factor in (2, 4, 8):
        got = area_resample(pixels, (0, 0, 48, 64), (48 // factor, 64 // factor))
        assert np.abs(got - block_mean(pixels, factor)).max() <= 0.5


def test_the_fast_and_the_general_path_agree():
    pixels = np.random.default_rng(2).integers(0, 256, (80, 96, 3), dtype=np.uint8)
    general = area_mean(pixels, (8, 4, 88, 68), (20, 16))
    assert np.abs(area_resample(pixels, (8, 4, 88, 68), (20, 16)) - general).max() <= 0.51


def test_x_and_y_are_not_swapped():
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[3:6, 20:40] = 250  # a bar that lies flat
    got = area_resample(pixels, (0.5, 0.5, 48.5, 28.5), (12, 7))
    assert got.shape == (7, 12, 3)
    rows, columns = np.nonzero(got[..., 0])
    assert set(rows) <= {0, 1}
    assert columns.min() >= 4
    assert columns.max() >= 9


def test_a_sub_pixel_box_takes_the_pixel_that_it_lies_in():
    pixels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert (area_resample(pixels, (1.2, 2.3, 1.6, 2.7), (2, 2)) == pixels[2, 1]).all()


def test_floating_point_noise_is_no_fraction():
    assert snap(4.0000000001) == 4.0
    assert snap(4.01) == 4.01
    assert snap(-0.00000001) == 0.0


def test_composition_over_the_background():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]], [[100, 100, 100, 128], [0, 0, 0, 255]]], np.uint8)
    rgb, alpha = over_background(rgba, (240, 230, 220))
    assert rgb[0, 0].tolist() == [10, 20, 30]
    assert rgb[0, 1].tolist() == [240, 230, 220]
    assert rgb[1, 0].tolist() == [170, 165, 160]
    assert alpha is not None
    np.testing.assert_allclose(alpha, [[1, 0], [128 / 255, 1]])
    assert over_background(rgba[:1, :1], (0, 0, 0))[1] is None
