"""Real scans: the same pixels as OpenSlide's own, the mpp rules, and levels of 2.0005."""

from __future__ import annotations

import numpy as np
import openslide
import pytest

from lrmil.errors import ImplausibleMpp, MissingMpp
from lrmil.slides import open_slide
from lrmil.slides.scale import TIFF_TAGS, USER, VENDOR

CMU = "CMU-1-Small-Region.svs"
TCGA = "tcga-cr-7395-01a-01-ts1.svs"
BREAST = "CropBreastSlide.tiff"


def own_pixels(path, location, level, size):
    with openslide.OpenSlide(str(path)) as handle:
        return np.asarray(handle.read_region(location, level, size).convert("RGB"))


def test_mpp_of_real_slides(shared_data):
    slides = shared_data / "slides"
    slide = open_slide(slides / CMU)
    assert (slide.mpp, slide.mpp_source, slide.vendor) == (0.499, VENDOR, "aperio")
    with pytest.raises(MissingMpp, match=f"^{TCGA}: .*--mpp"):
        open_slide(slides / TCGA)
    with pytest.raises(ImplausibleMpp, match=rf"^{BREAST}: 264\.583 um/px \(from: {TIFF_TAGS}\).*--mpp"):
        open_slide(slides / BREAST)
    for name in (TCGA, BREAST):
        slide = open_slide(slides / name, mpp=0.25)
        assert (slide.mpp, slide.mpp_source) == (0.25, USER)


def test_level_0_equals_openslide(shared_data):
    for name in (CMU, TCGA, BREAST):
        path = shared_data / "slides" / name
        slide = open_slide(path, mpp=0.25)
        for x, y, width, height in ((0, 0, 100, 60), (901, 733, 311, 257), (1800, 1400, 200, 100)):
            want = own_pixels(path, (x, y), 0, (width, height))
            assert (slide.read_box((x, y, x + width, y + height), (width, height)) == want).all()


def test_nominal_downsamples(shared_data):
    slide = open_slide(shared_data / "slides" / TCGA, mpp=0.25)
    assert [v.downsample for v in slide.levels] == [1, 2]  # OpenSlide says 2.0005
    slide = open_slide(shared_data / "slides" / BREAST, mpp=0.25)
    assert [v.downsample for v in slide.levels] == [1, 2, 4, 8, 16, 32]  # 32.36


def test_level_1_equals_openslide_at_whole_level_coordinates(shared_data):
    path = shared_data / "slides" / TCGA
    slide = open_slide(path, mpp=0.25, reader="openslide")
    own = openslide.OpenSlide(str(path)).level_downsamples[1]
    for x_px, y_px in ((0, 0), (512, 256), (1700, 1500)):
        want = own_pixels(path, (round(x_px * own), round(y_px * own)), 1, (256, 256))
        got = slide.read_box((2 * x_px, 2 * y_px, 2 * x_px + 512, 2 * y_px + 512), (256, 256))
        # Between whole coordinates OpenSlide's tile seams have alpha 254: one grey level of background shines through.
        assert np.abs(got.astype(int) - want).max() <= 1
        assert (got != want).any(axis=-1).sum() <= 5
    assert slide.stats.level_reads == {1: 3}


def test_far_from_the_origin_level_1_lies_over_level_0(shared_data):
    """Passing nominal coordinates on would shift this place by a pixel; each shift must fit worse than none."""
    slide = open_slide(shared_data / "slides" / TCGA, mpp=0.25)
    x, y = 4100, 3300
    level1 = slide.read_box((x, y, x + 256, y + 256), (128, 128)).astype(float)

    def misfit(dx, dy):
        box = (x + dx, y + dy, x + dx + 256, y + dy + 256)
        return np.abs(slide.sample(slide.levels[0], box, (128, 128)).rgb - level1).mean()

    here = misfit(0, 0)
    assert all(here < misfit(dx, dy) for dx, dy in ((2, 0), (-2, 0), (0, 2), (0, -2)))


def test_5x_from_a_single_20x_level_is_the_box_average(shared_data, block_mean):
    path = shared_data / "slides" / CMU
    slide = open_slide(path, reader="openslide")
    got = slide.read_box((600, 700, 1112, 1212), (128, 128))
    assert np.abs(got - block_mean(own_pixels(path, (600, 700), 0, (512, 512)), 4)).max() <= 0.5
    counts = slide.stats.as_dict()
    assert counts.pop("tiles_decoded") == counts.pop("bytes_read") == 0, "OpenSlide does not tell"
    assert counts == {
        "reads": 1,
        "output_px": 128 * 128,
        "source_px": 512 * 512,
        "level_reads": {"0": 1},
        "unreadable": 0,
        "finest_mpp_asked": pytest.approx(1.996),
    }


def test_past_the_lower_right_edge(shared_data):
    path = shared_data / "slides" / CMU
    slide = open_slide(path)
    got = slide.read_box((2048, 2816, 2048 + 256, 2816 + 256), (256, 256))
    width, height = 2220 - 2048, 2967 - 2816
    assert (got[:height, :width] == own_pixels(path, (2048, 2816), 0, (width, height))).all()
    assert (got[height:] == 255).all()
    assert (got[:, width:] == 255).all()


def test_overviews(shared_data):
    for name in (CMU, TCGA, BREAST):
        slide = open_slide(shared_data / "slides" / name, mpp=0.5)
        overview = slide.overview(8.0)
        width, height = slide.dimensions
        assert overview.downsample_l0 == (16, 16)
        assert overview.rgb.shape == (-(-height // 16), -(-width // 16), 3)
        assert overview.scanned[:-1, :-1].all()
        assert overview.unreadable == 0
        part = slide.read_box((160, 320, 320, 480), (10, 10)).astype(int)
        if len(slide.levels) == 1:
            assert (overview.rgb[20:30, 10:20] == part).all()
        else:  # the block of the overview began at a whole level coordinate, the part between two
            assert np.abs(overview.rgb[20:30, 10:20] - part).mean() < 4
