"""One tissue scanned at 40x and at 20x: the same regions at low resolution, whatever the pyramids look like."""

from __future__ import annotations

import numpy as np
import pytest

from lrmil.geometry import GridSettings, match_grids
from lrmil.slides import open_slide, write_pyramid

GRID = GridSettings(patch_px=64, lr_mpp=2.0, hr_mpp=0.5)


@pytest.fixture
def tissue(picture):
    return picture(1536, 1024)


def halved(image):
    height, width = image.shape[0] // 2, image.shape[1] // 2
    return np.rint(image.reshape(height, 2, width, 2, 3).mean(axis=(1, 3))).astype(np.uint8)


@pytest.mark.parametrize("fine", [(1, 4, 16), (1, 2, 4, 8), (1,)])
@pytest.mark.parametrize("coarse", [(1, 4, 16), (1,)])
def test_twins_give_equal_regions_and_children(tmp_path, tissue, fine, coarse):
    twin40 = open_slide(write_pyramid(tmp_path / "40.tif", tissue, 0.25, fine, compression="deflate"))
    twin20 = open_slide(write_pyramid(tmp_path / "20.tif", halved(tissue), 0.5, coarse, compression="deflate"))
    grids = [match_grids(GRID, twin.mpp, twin.dimensions) for twin in (twin40, twin20)]
    assert grids[0].num_regions == grids[1].num_regions == 6
    assert (grids[0].region_boxes_l0 == 2 * grids[1].region_boxes_l0).all()
    for kind in ("region_boxes_l0", "child_boxes_l0"):
        for box40, box20 in zip(getattr(grids[0], kind), getattr(grids[1], kind), strict=True):
            a = twin40.read_box(tuple(box40), (64, 64)).astype(int)
            b = twin20.read_box(tuple(box20), (64, 64)).astype(int)
            assert np.abs(a - b).max() <= 1
    level = twin40.level_for(2.0)
    assert level.downsample == max(d for d in fine if d <= 8)


def test_twins_whose_sizes_do_not_divide(tmp_path, picture):
    """Levels of 4.008 instead of 4: OpenSlide interpolates by up to half a level-0 pixel, and no more than that."""
    image = picture(1767, 1287)
    even = image[:1286, :1766]
    twin40 = open_slide(write_pyramid(tmp_path / "40.tif", image, 0.25, (1, 4), compression="deflate"))
    twin20 = open_slide(write_pyramid(tmp_path / "20.tif", halved(even), 0.5, (1,), compression="deflate"))
    assert twin40.levels[1].downsample == 4.0
    for x, y in ((0, 0), (64, 128), (512, 384), (1152, 640)):
        a = twin40.read_box((x, y, x + 512, y + 512), (64, 64)).astype(int)
        b = twin20.read_box((x / 2, y / 2, x / 2 + 256, y / 2 + 256), (64, 64)).astype(int)
        assert np.abs(a - b).mean() < 1.0
        assert np.abs((a - b).mean(axis=(0, 1))).max() < 0.3


def test_a_scale_that_does_not_snap_is_resampled_to_the_same_micrometres(tmp_path, tissue, block_mean):
    """0.35 um/px: a region of 128 um is 365.7 level-0 pixels wide, rounded by the grid to whole ones."""
    slide = open_slide(write_pyramid(tmp_path / "a.tif", tissue, 0.35, (1, 4), compression="deflate"))
    grid = match_grids(GRID, slide.mpp, slide.dimensions)
    assert not grid.scale.snapped
    box = tuple(int(v) for v in grid.region_boxes_l0[1])
    got = slide.read_box(box, (64, 64)).astype(float)
    mean = tissue[box[1] : box[3], box[0] : box[2]].mean(axis=(0, 1))
    np.testing.assert_allclose(got.mean(axis=(0, 1)), mean, atol=0.6)
