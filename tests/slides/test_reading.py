"""Boxes, levels, background and bounds, over a stand-in for OpenSlide's handle that knows every pixel."""

from __future__ import annotations

import numpy as np
import pytest

from lrmil.errors import ConfigError
from lrmil.slides import base, blocks


def halve(image, factor):
    height, width = image.shape[0] // factor, image.shape[1] // factor
    cut = image[: height * factor, : width * factor].astype(np.float64)
    return np.rint(cut.reshape(height, factor, width, factor, -1).mean(axis=(1, 3))).astype(np.uint8)


def test_a_box_is_the_average_of_its_level_0_pixels(fake_slides, picture, block_mean):
    image = picture(640, 480)
    slide = fake_slides(image)
    got = slide.read_box((64, 32, 64 + 256, 32 + 128), (64, 32))
    assert got.dtype == np.uint8
    assert got.shape == (32, 64, 3)
    assert np.abs(got - block_mean(image[32:160, 64:320], 4)).max() <= 0.5


def test_read_is_a_box_of_that_many_micrometres(fake_slides, picture):
    slide = fake_slides(picture(640, 480), mpp=0.25)
    assert (slide.read(40, 24, 50, 30, 1.0) == slide.read_box((40, 24, 240, 144), (50, 30))).all()
    assert slide.read(10, 20, 5, 7, 0.25).shape == (7, 5, 3)
    assert (slide.read(10, 20, 5, 7, 0.25) == picture(640, 480)[20:27, 10:15]).all()


def test_the_level_and_no_finer_one_is_read(fake_slides, picture):
    image = picture(1600, 1280)
    slide = fake_slides(image, halve(image, 4), halve(image, 16), mpp=0.25)
    for wanted_mpp, index in ((0.25, 0), (0.5, 0), (1.0, 1), (2.0, 1), (4.0, 2), (8.0, 2)):
        before = len(fake_slides.handles[0].requests)
        slide.read(0, 0, 10, 10, wanted_mpp)
        assert [request[1] for request in fake_slides.handles[0].requests[before:]] == [index]
        assert slide.level_for(wanted_mpp).index == index
    assert slide.stats.level_reads == {0: 2, 1: 2, 2: 2}
    assert slide.stats.finest_mpp_asked == 0.25


def test_levels_off_by_rounding_are_read_at_the_nominal_place(fake_slides, picture, block_mean):
    """Level 1 is 441 x 321 px under 1767 x 1287: OpenSlide calls that 4.008; far from the origin it would be off."""
    image = picture(1767, 1287)
    slide = fake_slides(image, halve(image, 4), mpp=0.25)
    assert slide.levels[1].downsample == 4.0
    box = (1600, 1200, 1728, 1264)
    got = slide.read_box(box, (16, 8))
    assert np.abs(got.astype(float) - block_mean(image[1200:1264, 1600:1728], 8)).max() <= 1.0
    (location, level, size) = fake_slides.handles[0].requests[-1]
    assert (level, size) == (1, (32, 16))
    own = fake_slides.handles[0].level_downsamples[1]
    assert location == (round(400 * own), round(300 * own))
    assert location != (1600, 1200)


def test_a_level_of_another_size_is_taken_as_it_is(fake_slides, picture):
    image = picture(1000, 800)
    slide = fake_slides(image, picture(300, 240), mpp=0.25)
    assert slide.levels[1].downsample == pytest.approx(10 / 3)
    slide.read_box((100, 100, 100 + 400, 100 + 400), (100, 100))
    (_, level, size) = fake_slides.handles[0].requests[-1]
    assert level == 1
    assert size == (120, 120)


def test_edges_between_level_pixels_are_shared_out(fake_slides):
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 200
    slide = fake_slides(image)
    assert slide.read_box((3.75, 0, 4.75, 8), (1, 1)).ravel().tolist() == [150] * 3


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((-100, -60, 300, 340), 300 * 340 / 160_000),
        ((500, 400, 900, 800), 140 * 80 / 160_000),
        ((-40, 100, 60, 200), 0.6),
        ((2000, 2000, 2400, 2400), 0),
        ((-900, 10, -100, 410), 0),
    ],
)
def test_outside_the_slide_is_background(fake_slides, box, inside):
    slide = fake_slides(np.full((480, 640, 3), 50, np.uint8), properties={"openslide.background-color": "F0E0D0"})
    assert slide.background_rgb == (240, 224, 208)
    size = (20, 20)
    got = slide.read_box(box, size)
    assert got.shape == (20, 20, 3)
    want = 50 * inside + np.array([240, 224, 208]) * (1 - inside)
    np.testing.assert_allclose(got.reshape(-1, 3).mean(0), want, atol=0.6)
    if inside == 0:
        assert not fake_slides.handles[0].requests, "nothing there to ask for"


def test_the_rounded_off_remainder_of_a_level_is_not_whitened(fake_slides):
    """1003 px at 1/4 leave 250 level pixels; the last 3 level-0 columns have tissue and no level pixel."""
    image = np.full((803, 1003, 3), 90, np.uint8)
    slide = fake_slides(image, halve(image, 4), mpp=0.25)
    assert (slide.read_box((923, 723, 1003, 803), (20, 20)) == 90).all()
    assert (slide.read_box((1001, 801, 1003, 803), (1, 1)) == 90).all()
    overview = slide.overview(1.0)
    assert overview.rgb.shape == (201, 251, 3)
    assert (overview.rgb == 90).all()
    assert overview.scanned.all()
    assert (slide.read_box((1004, 0, 1012, 8), (2, 2)) == 255).all()


def test_alpha_0_is_background_and_not_scanned(fake_slides):
    rgba = np.full((64, 64, 4), 255, np.uint8)
    rgba[..., :3] = 100
    rgba[:, 32:] = 0  # never scanned: OpenSlide answers transparent black
    slide = fake_slides(rgba, properties={"openslide.background-color": "dcdcdc"})
    got = slide.read_box((0, 0, 64, 64), (8, 8))
    assert (got[:, :4] == 100).all()
    assert (got[:, 4:] == 220).all()
    overview = slide.overview(2.0)
    assert overview.scanned[:, :4].all()
    assert not overview.scanned[:, 4:].any()


def test_half_transparent_pixels_are_mixed(fake_slides):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 3] = 51  # a fifth
    slide = fake_slides(rgba)
    assert (slide.read_box((0, 0, 8, 8), (2, 2)) == 204).all()
    assert not slide.overview(1.0).scanned.any()


def test_outside_the_bounds_is_background_and_not_read(fake_slides, picture):
    image = np.full((400, 600, 3), 80, np.uint8)
    bounds = dict(zip(("x", "y", "width", "height"), ("120", "40", "240", "200"), strict=True))
    slide = fake_slides(image, properties={f"openslide.bounds-{k}": v for k, v in bounds.items()})
    assert slide.bounds_l0 == (120, 40, 360, 240)
    overview = slide.overview(1.0)
    want = np.zeros((100, 150), bool)
    want[10:60, 30:90] = True
    assert (overview.scanned == want).all()
    assert (overview.rgb[want] == 80).all()
    assert (overview.rgb[~want] == 255).all()
    for (x, y), _, (width, height) in fake_slides.handles[0].requests:
        assert x >= 120
        assert y >= 40
        assert x + width <= 360
        assert y + height <= 240


def test_bounds_larger_than_the_slide_are_cut(fake_slides):
    properties = {"openslide.bounds-x": "10", "openslide.bounds-y": "0", "openslide.bounds-width": "999"}
    properties["openslide.bounds-height"] = "30"
    slide = fake_slides(np.full((40, 60, 3), 80, np.uint8), properties=properties)
    assert slide.bounds_l0 == (10, 0, 60, 30)


def test_x_and_y_are_not_swapped(fake_slides):
    image = np.zeros((300, 500, 3), np.uint8)
    image[40:60, 200:400] = 200
    slide = fake_slides(image)
    assert slide.dimensions == (500, 300)
    got = slide.read_box((200, 40, 400, 60), (20, 2))
    assert got.shape == (2, 20, 3)
    assert (got == 200).all()
    assert slide.overview(2.5).rgb.shape == (30, 50, 3)


def test_steps_may_differ_along_x_and_y(fake_slides, picture, block_mean):
    image = picture(512, 512)
    slide = fake_slides(image, halve(image, 4))
    got = slide.read_box((0, 0, 512, 512), (64, 256))
    assert fake_slides.handles[0].requests[-1][1] == 0, "the finer direction decides"
    want = image.astype(float).reshape(256, 2, 64, 8, 3).mean(axis=(1, 3))
    assert np.abs(got - want).max() <= 0.51


def test_large_boxes_are_read_in_blocks_without_seams(fake_slides, picture, monkeypatch):
    image = picture(700, 500)
    whole = fake_slides(image).read_box((3.5, -2.25, 690, 505), (171, 99))
    monkeypatch.setattr(base, "block_sides", lambda step: blocks.block_sides(step, block_px=64))
    slide = fake_slides(image)
    parts = slide.read_box((3.5, -2.25, 690, 505), (171, 99))
    assert slide.stats.reads > 50
    assert max(max(size) for _, _, size in fake_slides.handles[-1].requests) <= 66
    assert np.abs(parts.astype(int) - whole).max() <= 1, "rounding at the half, no more"
    assert slide.stats.output_px == 171 * 99


def test_finer_than_the_scan_repeats_pixels(fake_slides):
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    slide = fake_slides(image)
    assert (slide.read_box((1, 1, 3, 3), (4, 4)) == image[1:3, 1:3].repeat(2, 0).repeat(2, 1)).all()


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 0, 10), (1, 1)),
        ((10, 0, 0, 10), (1, 1)),
        ((0, 0, 10, 10), (0, 5)),
        ((0, 0, float("nan"), 10), (5, 5)),
        ((0, 0, float("inf"), 10), (5, 5)),
    ],
)
def test_empty_requests_are_refused(fake_slides, box, size):
    with pytest.raises(ConfigError, match="fake"):
        fake_slides(np.zeros((20, 20, 3), np.uint8)).read_box(box, size)


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), float("inf")])
def test_reading_at_no_scale_is_refused(fake_slides, mpp):
    slide = fake_slides(np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(ConfigError):
        slide.read(0, 0, 5, 5, mpp)
    with pytest.raises(ConfigError):
        slide.overview(mpp)


def test_numpy_boxes_are_welcome(fake_slides, picture):
    slide = fake_slides(picture(100, 100))
    box = np.array([8, 16, 40, 48], dtype=np.int64)
    assert (slide.read_box(tuple(box), (8, 8)) == slide.read_box((8, 16, 40, 48), (8, 8))).all()


def test_a_description_is_ready_for_json(fake_slides, picture):
    import json

    slide = fake_slides(picture(100, 80), picture(25, 20))
    text = json.loads(json.dumps(slide.describe()))
    assert text["dimensions"] == [100, 80]
    assert text["levels"][1]["mpp"] == 1.0
    slide.read(0, 0, 5, 5, 1.0)
    assert json.loads(json.dumps(slide.stats.as_dict()))["level_reads"] == {"1": 1}
    assert "fake: 100 x 80 px, 0.25 um/px (user)" in repr(slide)
