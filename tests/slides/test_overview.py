from __future__ import annotations

import numpy as np
import pytest

from lrmil.slides import open_slide, write_pyramid


def test_a_whole_factor_near_the_wanted_scale_is_taken(fake_slides, picture, block_mean):
    image = picture(1600, 1200)
    overview = fake_slides(image, mpp=0.499).overview(4.0)  # 8.016 level-0 pixels
    assert overview.downsample_l0 == (8.0, 8.0)
    assert overview.mpp == pytest.approx(3.992)
    assert overview.rgb.shape == (150, 200, 3)
    assert np.abs(overview.rgb - block_mean(image, 8)).max() <= 0.5


def test_any_other_scale_is_met_exactly(fake_slides, picture):
    image = picture(1000, 700)
    slide = fake_slides(image, mpp=0.5)
    overview = slide.overview(1.25)
    assert overview.downsample_l0 == (2.5, 2.5)
    assert overview.mpp == pytest.approx(1.25)
    assert overview.rgb.shape == (280, 400, 3)
    assert (overview.rgb[:100, :100] == slide.read_box((0, 0, 250, 250), (100, 100))).all()


def test_pixels_lie_where_the_downsample_says(fake_slides):
    """The drift of overlays to the lower right comes from sizes that were rounded and then divided."""
    image = np.full((2999, 3999, 3), 255, np.uint8)
    image[2800:2816, 3600:3616] = 0
    overview = fake_slides(image, mpp=0.25).overview(4.0)
    rows, columns = np.nonzero(overview.rgb[..., 0] < 128)
    assert (set(rows), set(columns)) == ({2800 // 16}, {3600 // 16})
    assert overview.downsample_l0 == (16.0, 16.0)
    assert overview.rgb.shape[:2] == (188, 250)


def test_the_last_column_and_row_may_reach_past_the_slide(fake_slides):
    overview = fake_slides(np.full((33, 46, 3), 10, np.uint8), mpp=0.25).overview(4.0)
    assert overview.rgb.shape == (3, 3, 3)
    assert overview.scanned.tolist() == [[True, True, True], [True, True, True], [False, False, False]]
    assert (overview.rgb[0, 0] == 10).all()


def test_never_finer_than_the_scan(fake_slides, picture):
    image = picture(60, 40)
    overview = fake_slides(image, mpp=4.0).overview(0.5)
    assert overview.mpp == 4.0
    assert (overview.rgb == image).all()


def test_a_slide_of_one_level_is_read_in_blocks_of_bounded_memory(tmp_path, picture, block_mean):
    image = np.tile(picture(512, 448), (6, 5, 1))[:2600, :2500]
    slide = open_slide(write_pyramid(tmp_path / "a.tif", image, 0.5, (1,), compression=None))
    biggest = 0
    read_level = slide._read_level

    def watched(level, x, y, width, height):
        nonlocal biggest
        biggest = max(biggest, width * height)
        return read_level(level, x, y, width, height)

    slide._read_level = watched
    overview = slide.overview(8.0)
    assert biggest <= 1024 * 1024
    assert slide.stats.reads == 9
    assert overview.rgb.shape == (163, 157, 3)
    assert np.abs(overview.rgb[:162, :156] - block_mean(image, 16)).max() <= 0.51


@pytest.mark.parametrize("reader", ["tiff", "openslide"])
def test_threads_see_what_one_sees(tmp_path, picture, reader):
    image = np.tile(picture(512, 448), (6, 5, 1))[:2600, :2500]
    path = write_pyramid(tmp_path / "a.tif", image, 0.5, (1,))
    alone, together = (open_slide(path, reader=reader).overview(8.0, threads) for threads in (1, 4))
    assert (alone.rgb == together.rgb).all()
    assert (alone.scanned == together.scanned).all()
    assert (alone.unreadable, alone.unreadable_px) == (together.unreadable, together.unreadable_px) == (0, 0)


def test_the_smallest_useful_level_is_read(tmp_path, picture):
    slide = open_slide(write_pyramid(tmp_path / "a.tif", picture(2048, 2048), 0.25, (1, 4, 16)))
    slide.overview(8.0)
    assert slide.stats.level_reads == {2: 1}
    assert slide.stats.source_px == 128 * 128


def test_a_thumbnail_is_about_as_large_as_asked(fake_slides, picture):
    assert max(fake_slides(picture(3000, 2000)).thumbnail(300).shape) == 300
