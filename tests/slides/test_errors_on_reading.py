"""Pixels that cannot be decoded: raised, counted, named, never whitened, and the next region is read."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openslide
import pytest

from lrmil.errors import SlideError, UnreadableRegion
from lrmil.slides import open_slide, write_pyramid
from lrmil.slides.overview import MAX_SPLITS


def test_a_latched_error_costs_one_region_only(fake_slides, picture):
    image = picture(400, 400)
    slide = fake_slides(image, bad_l0=(100, 100, 150, 150))
    with pytest.raises(UnreadableRegion, match=r"fake: .*x 90\.\.110, y 96\.\.116 \(level 0\).*bogus tile"):
        slide.read_box((90, 96, 110, 116), (10, 10))
    assert slide.stats.unreadable == 1
    assert (slide.read_box((0, 0, 50, 50), (50, 50)) == image[:50, :50]).all()
    assert (slide.read_box((200, 200, 250, 250), (50, 50)) == image[200:250, 200:250]).all()
    assert slide.stats.unreadable == 1
    with pytest.raises(UnreadableRegion):
        slide.read_box((149, 149, 160, 160), (11, 11))
    assert slide.stats.unreadable == 2
    assert slide.stats.reads == 2


def test_large_coordinates_are_spelled_out(fake_slides):
    slide = fake_slides(np.zeros((10, 2_000_000, 3), np.uint8), bad_l0=(0, 0, 2_000_000, 10))
    with pytest.raises(UnreadableRegion, match=r"x 1234567\.\.1234577"):
        slide.read_box((1234567, 0, 1234577, 10), (10, 10))


def test_a_region_that_only_came_after_a_bad_one_is_read(fake_slides, picture):
    """Another thread's bad tile latches the shared handle in the middle of our read; ours is good."""
    image = picture(400, 400)
    slide = fake_slides(image, bad_l0=(100, 100, 150, 150))
    shared = fake_slides.handles[0]

    def fail_elsewhere(_location):
        shared.before_read = None
        with pytest.raises(UnreadableRegion):
            slide.read_box((100, 100, 150, 150), (10, 10))

    shared.before_read = fail_elsewhere
    assert (slide.read_box((0, 0, 50, 50), (50, 50)) == image[:50, :50]).all()
    assert slide.stats.unreadable == 1


def test_a_passing_fault_is_overcome(fake_slides, picture):
    image = picture(100, 100)
    slide = fake_slides(image)
    fake_slides.handles[0].latched = True
    assert (slide.read_box((0, 0, 50, 50), (50, 50)) == image[:50, :50]).all()
    assert (slide.stats.unreadable, slide.reopened) == (0, 1)
    slide.read_box((0, 0, 50, 50), (50, 50))
    assert len(fake_slides.handles) == 2, "the new handle stays in use"


def test_a_file_that_vanishes_is_unreadable_until_it_is_back(tmp_path, picture):
    path = write_pyramid(tmp_path / "a.tif", picture(512, 512), 0.25, compression="deflate")
    slide = open_slide(path, reader="openslide")
    before = slide.read_box((0, 0, 64, 64), (64, 64))
    path.rename(tmp_path / "away.tif")
    slide._handle = None  # as after an error
    with pytest.raises(UnreadableRegion, match="cannot be opened again"):
        slide.read_box((0, 0, 64, 64), (64, 64))
    (tmp_path / "away.tif").rename(path)
    assert (slide.read_box((0, 0, 64, 64), (64, 64)) == before).all()


@pytest.fixture
def damaged(tmp_path, picture):
    """A 1024-px slide whose tile (1, 2), at x 256..512, y 512..768 of level 0, is garbage; and its true pixels."""
    import tifffile

    image = picture(1024, 1024)
    path = write_pyramid(tmp_path / "damaged.tif", image, 0.25, (1, 4), compression="jpeg", quality=95)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        offset, length = page.dataoffsets[2 * 4 + 1], page.databytecounts[2 * 4 + 1]
    with path.open("r+b") as handle:
        handle.seek(offset)
        handle.write(b"\x00" * length)
    return path, image


def test_a_damaged_tile_in_a_real_file(damaged):
    path, image = damaged
    slide = open_slide(path)
    with pytest.raises(UnreadableRegion, match=r"damaged: .*x 300\.\.400, y 600\.\.700"):
        slide.read_box((300, 600, 400, 700), (100, 100))
    good = slide.read_box((600, 600, 700, 700), (100, 100))
    assert np.abs(good.astype(int) - image[600:700, 600:700]).mean() < 3
    with pytest.raises(UnreadableRegion):
        slide.read_box((200, 400, 600, 800), (400, 400))
    assert slide.stats.unreadable == 2
    assert slide.read(0, 512, 256, 128, 1.0).shape == (128, 256, 3), "the coarse level is whole"
    assert slide.stats.unreadable == 2


def test_an_overview_loses_the_damaged_tile_and_no_more(damaged):
    path, image = damaged
    slide = open_slide(path)
    overview = slide.overview(0.5)
    assert overview.unreadable == slide.stats.unreadable == 1
    assert overview.unreadable_px == 128 * 128
    want = np.ones((512, 512), bool)
    want[256:384, 128:256] = False
    assert (overview.scanned == want).all()
    assert (overview.rgb[~want] == 255).all()
    assert np.abs(overview.rgb.astype(float) - image.reshape(512, 2, 512, 2, 3).mean((1, 3)))[want].mean() < 3


def test_a_slide_damaged_all_over_gives_up_quartering(fake_slides):
    slide = fake_slides(np.zeros((4096, 8192, 3), np.uint8), bad_l0=(0, 0, 8192, 4096))
    overview = slide.overview(1.0)
    assert not overview.scanned.any()
    assert overview.unreadable_px == 2048 * 1024
    assert 0 < overview.unreadable <= 32 + 3 * MAX_SPLITS
    assert len(fake_slides.handles) < 1000


def test_threads_give_up_on_the_same_blocks_as_one(fake_slides):
    image = np.zeros((3000, 5000, 3), np.uint8)
    found = []
    for threads in (1, 4):
        overview = fake_slides(image, bad_l0=(700, 500, 1900, 2100)).overview(1.0, threads)
        found.append((overview.unreadable, overview.unreadable_px, overview.scanned.tobytes()))
    assert found[0] == found[1]
    assert found[0][0] > 0


def test_threads_share_a_slide_with_a_damaged_tile(damaged):
    path, image = damaged
    slide = open_slide(path)
    boxes = [(x, y, x + 128, y + 128) for y in range(0, 1024, 128) for x in range(0, 1024, 128)] * 3
    barrier = threading.Barrier(4)

    def read(part):
        barrier.wait()
        bad = 0
        for x0, y0, x1, y1 in part:
            try:
                got = slide.read_box((x0, y0, x1, y1), (128, 128))
                assert np.abs(got.astype(int) - image[y0:y1, x0:x1]).mean() < 3
                assert not (256 <= x0 < 512 and 512 <= y0 < 768)
            except UnreadableRegion:
                assert 256 <= x0 < 512
                assert 512 <= y0 < 768
                bad += 1
        return bad

    with ThreadPoolExecutor(4) as pool:
        bad = sum(pool.map(read, (boxes[i::4] for i in range(4))))
    assert bad == slide.stats.unreadable == 4 * 3


def test_a_closed_slide_says_so(fake_slides, picture):
    with fake_slides(picture(50, 50)) as slide:
        slide.read_box((0, 0, 10, 10), (10, 10))
    slide.close()
    with pytest.raises(SlideError, match="closed"):
        slide.read_box((0, 0, 10, 10), (10, 10))


def test_a_forked_child_opens_its_own_handle(fake_slides, picture):
    slide = fake_slides(picture(50, 50))
    slide._pid = -1  # as if the handle had been opened by the parent process
    slide.read_box((0, 0, 10, 10), (10, 10))
    slide.read_box((0, 0, 10, 10), (10, 10))
    assert len(fake_slides.handles) == 2
    assert not fake_slides.handles[0].requests


def test_a_slide_travels_to_another_process(tmp_path, picture):
    slide = open_slide(write_pyramid(tmp_path / "a.tif", picture(300, 200), 0.25, compression="deflate"), mpp=0.5)
    other = pickle.loads(pickle.dumps(slide))
    assert (other.mpp, other.mpp_source) == (0.5, "user")
    assert (other.read_box((0, 0, 64, 64), (64, 64)) == slide.read_box((0, 0, 64, 64), (64, 64))).all()


def test_openslide_errors_do_not_leak(fake_slides, picture):
    slide = fake_slides(picture(50, 50), bad_l0=(0, 0, 50, 50))
    with pytest.raises(UnreadableRegion) as caught:
        slide.read_box((0, 0, 10, 10), (10, 10))
    assert not isinstance(caught.value, openslide.OpenSlideError)
