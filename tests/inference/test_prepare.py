"""Before anything is encoded: tissue, grid, and refusals that say what to do."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from pydantic import ValidationError

from lrmil.errors import MissingMpp, NotASlide, NoTissue, SlideTooCoarse, SlideTooSmall, TooManyUnreadable
from lrmil.geometry import GridSettings
from lrmil.inference.prepare import TileSettings, prepare_slide, survey_slide
from lrmil.slides import RecordingSlide, open_slide, write_pyramid
from lrmil.tissue import TissueSettings

GRID = GridSettings(patch_px=32, lr_mpp=2.0, hr_mpp=0.5)
TISSUE, TILES = TissueSettings(), TileSettings()


@pytest.fixture
def empty_slide(tmp_path):
    rng = np.random.default_rng(0)
    glass = np.clip(rng.normal(241, 2, (1024, 2048, 3)), 0, 255).astype(np.uint8)
    return open_slide(write_pyramid(tmp_path / "glass.tif", glass, 0.5, (1, 4)))


def test_regions_and_children_lie_on_tissue(write_slide):
    prepared = prepare_slide(open_slide(write_slide()), GRID, TISSUE, TILES)
    grid = prepared.grid
    assert (prepared.tissue.coverage(grid.region_boxes_l0) == grid.region_tissue).all()
    assert (grid.region_tissue >= 0.1).all()
    assert (grid.child_tissue >= 0.1).all()
    # The ellipse fills 0.46 of the slide each way: the corners are glass, all other regions are not.
    corners = {(0, 0), (5, 0), (0, 3), (5, 3)}
    assert {tuple(i) for i in grid.region_index.tolist()} == {(x, y) for x in range(6) for y in range(4)} - corners
    assert prepared.seconds > 0


def test_thresholds_are_those_of_the_settings(write_slide):
    slide = open_slide(write_slide())
    strict = TileSettings(min_region_tissue=0.9, min_child_tissue=0.95)
    some, few = prepare_slide(slide, GRID, TISSUE, TILES).grid, prepare_slide(slide, GRID, TISSUE, strict).grid
    assert few.num_regions < some.num_regions
    assert few.region_tissue.min() >= 0.9
    assert few.child_tissue.min() >= 0.95
    with pytest.raises(ValidationError):
        TileSettings(min_regions=0)


def test_a_hopeless_slide_costs_no_pixel(write_slide, tmp_path):
    slide = RecordingSlide(open_slide(write_slide(), mpp=3.0))
    with pytest.raises(SlideTooCoarse, match=r"case: .*3 um.*2 um/px"):
        prepare_slide(slide, GRID, TISSUE, TILES)
    small = write_pyramid(tmp_path / "stamp.tif", np.full((20, 30, 3), 200, np.uint8), 0.5, (1,))
    recorded = RecordingSlide(open_slide(small))
    with pytest.raises(SlideTooSmall, match=r"stamp: .*30 x 20 px"):
        prepare_slide(recorded, GRID, TISSUE, TILES)
    assert slide.requests == recorded.requests == []


def test_no_tissue(empty_slide):
    with pytest.raises(NoTissue) as caught:
        prepare_slide(empty_slide, GRID, TISSUE, TILES)
    text = str(caught.value)
    assert text.startswith("glass: too little tissue: 0.0% of the slide")
    assert "(64 um wide)" in text
    assert "at least 10% of it: 0, needed: 1." in text
    assert "lrmil info SLIDE --picture" in text
    survey = survey_slide(empty_slide, GRID, TISSUE, TILES)
    assert survey.grid.num_regions == survey.grid.num_children == 0
    assert survey.overview.rgb.shape == (64, 128, 3) == (*survey.tissue.mask.shape, 3)


def test_fewer_regions_than_needed(write_slide):
    slide = open_slide(write_slide())
    assert prepare_slide(slide, GRID, TISSUE, TileSettings(min_regions=20)).grid.num_regions == 20
    with pytest.raises(NoTissue, match="10% of it: 20, needed: 21"):
        prepare_slide(slide, GRID, TISSUE, TileSettings(min_regions=21))


def test_pen_that_took_the_tissue_is_named(tmp_path):
    picture = np.full((1024, 1024, 3), 240, np.uint8)
    picture[200:800, 200:800] = (20, 60, 160)
    slide = open_slide(write_pyramid(tmp_path / "pen.tif", picture, 0.5, (1, 4)))
    with pytest.raises(NoTissue, match=r"Taken for pen marks: \d+\.\d%"):
        prepare_slide(slide, GRID, TISSUE, TILES)


def test_an_overview_that_cannot_be_read_is_not_called_empty(tmp_path, write_slide, damage):
    path = tmp_path / "torn.tif"
    shutil.copy(write_slide(), path)
    damage(path, 2)
    with pytest.raises(TooManyUnreadable, match=r"torn: 100% of its overview.*20% are allowed.*Copy the file again"):
        prepare_slide(open_slide(path), GRID, TISSUE, TILES)
    with pytest.raises(NoTissue, match="Blocks of its overview that cannot be decoded: 1"):
        prepare_slide(open_slide(path), GRID, TISSUE, TileSettings(max_unreadable=1.0))


def test_a_hole_in_the_overview_costs_its_regions_only(tmp_path, write_slide, damage):
    """One level at 20x: what is lost to the overview, in blocks of 192 px, is lost to the regions as well."""
    path = tmp_path / "torn.tif"
    shutil.copy(write_slide(0.5, (1,), 2), path)
    damage(path, 0, [(2, 1)])
    prepared = prepare_slide(open_slide(path), GRID, TISSUE, TILES)
    assert prepared.overview.unreadable > 0
    assert (2, 1) not in {tuple(i) for i in prepared.grid.region_index.tolist()}
    assert 15 <= prepared.grid.num_regions < 20


@pytest.mark.parametrize(
    ("mpp", "downsamples"), [(0.25, (1, 4, 16)), (0.5, (1,)), (0.243, (1, 2, 4, 8)), (0.26, (1, 2, 4, 8)), (2.0, (1,))]
)
@pytest.mark.parametrize("tissue_mpp", [1.0, 8.0])
def test_the_overview_stays_at_low_resolution_too(write_slide, mpp, downsamples, tissue_mpp):
    shrink = {0.5: 2, 2.0: 8}.get(mpp, 1)
    slide = RecordingSlide(open_slide(write_slide(mpp, downsamples, shrink)))
    prepare_slide(slide, GRID, TissueSettings(mpp=tissue_mpp), TILES)
    assert slide.finest_mpp >= max(2.0, tissue_mpp) * 0.95
    assert all(request.level >= slide.level_for(2.0).index for request in slide.requests)


@pytest.mark.parametrize("mpp", [0.28, 0.33])
def test_an_overview_does_not_round_to_what_is_finer_than_regions(write_slide, mpp):
    """7 x 0.28 = 1.96 and 6 x 0.33 = 1.98 are whole numbers of pixels near 2.0, and finer."""
    slide = RecordingSlide(open_slide(write_slide(mpp, (1,))))
    prepared = prepare_slide(slide, GRID, TissueSettings(mpp=1.0), TILES)
    assert not prepared.grid.scale.snapped
    assert 2.0 <= slide.finest_mpp <= 2.2


def test_bad_files(shared_data):
    bad = shared_data / "bad"
    for name in ("broken.svs", "smalltif.tif"):
        with pytest.raises(NotASlide, match=name):
            open_slide(bad / name)
    with pytest.raises(SlideTooSmall, match="small: it measures 16 x 16 px"):
        prepare_slide(open_slide(bad / "small.svs"), GRID, TISSUE, TILES)
    with pytest.raises(MissingMpp, match="--mpp"):
        open_slide(shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs")


def test_a_slide_that_opens_and_cannot_be_read(shared_data):
    """It is 16 px small; patches of 8 px fit into it."""
    slide = open_slide(shared_data / "bad" / "unreadable.svs")
    with pytest.raises(TooManyUnreadable, match="unreadable: 100% of its overview cannot be decoded"):
        prepare_slide(slide, GridSettings(patch_px=8), TISSUE, TILES)
