from __future__ import annotations

import math

import numpy as np
import pytest

from lrmil.errors import SlideError, UnreadableRegion
from lrmil.geometry import GridSettings, match_grids
from lrmil.slides import RecordingSlide, open_slide, write_pyramid


@pytest.fixture
def recorded(tmp_path, picture):
    path = write_pyramid(tmp_path / "a.tif", picture(2048, 1536), 0.25, (1, 4, 16), compression="jpeg")
    return RecordingSlide(open_slide(path))


def test_nothing_asked_yet(recorded):
    assert recorded.requests == []
    assert recorded.finest_mpp == math.inf
    assert recorded.finest_level is None


def test_every_request_is_listed(recorded):
    plain = open_slide(recorded.path)
    assert (recorded.read_box((0, 0, 512, 512), (64, 64)) == plain.read_box((0, 0, 512, 512), (64, 64))).all()
    assert (recorded.read(100, 60, 32, 16, 1.0) == plain.read(100, 60, 32, 16, 1.0)).all()
    assert (recorded.overview(4.0).rgb == plain.overview(4.0).rgb).all()
    recorded.thumbnail(64)
    boxes = [(r.box_l0, r.size_px, r.mpp, r.level) for r in recorded.requests]
    assert boxes == [
        ((0, 0, 512, 512), (64, 64), 2.0, 1),
        ((100, 60, 228, 124), (32, 16), 1.0, 1),
        ((0, 0, 2048, 1536), (128, 96), 4.0, 2),
        ((0, 0, 2048, 1536), (64, 48), 8.0, 2),
    ]
    assert (recorded.finest_mpp, recorded.finest_level) == (1.0, 1)


def test_it_looks_like_the_slide_and_shares_its_counters(recorded):
    plain = open_slide(recorded.path)
    assert recorded.describe() == plain.describe()
    recorded.read(0, 0, 8, 8, 1.0)
    assert recorded.stats.reads == 1
    assert recorded.stats is recorded._slide.stats


def test_the_finer_direction_counts(recorded):
    recorded.read_box((0, 0, 512, 512), (64, 512))
    assert recorded.requests[0].mpp == 0.25
    assert recorded.finest_level == 0


def test_regions_at_5x_leave_level_0_alone(recorded):
    grid = match_grids(GridSettings(patch_px=64), recorded.mpp, recorded.dimensions)
    recorded.overview(8.0)
    for box in grid.region_boxes_l0:
        recorded.read_box(tuple(box), (64, 64))
    assert len(recorded.requests) == 1 + grid.num_regions
    assert recorded.finest_mpp == 2.0
    assert recorded.finest_level == recorded.level_for(2.0).index == 1
    recorded.read_box(tuple(grid.child_boxes_l0[0]), (64, 64))
    assert recorded.finest_mpp == 0.5, "one look at 20x and the proof fails"


def test_failed_requests_are_listed_too(fake_slides):
    slide = RecordingSlide(fake_slides(np.zeros((64, 64, 3), np.uint8), bad_l0=(0, 0, 64, 64)))
    with pytest.raises(UnreadableRegion):
        slide.read_box((0, 0, 8, 8), (8, 8))
    assert slide.requests[0].mpp == 0.25
    assert slide.stats.unreadable == 1


def test_closing_closes_the_slide(recorded):
    recorded.close()
    with pytest.raises(SlideError, match="closed"):
        recorded.read(0, 0, 8, 8, 1.0)
