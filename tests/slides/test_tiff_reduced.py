"""Decoding at reduced size: near the area average, only where it is allowed, never with padding in it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import imagecodecs
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lrmil.slides import open_slide, write_pyramid
from lrmil.slides.tiff import reader as tiff_reader

BOUNDS = {"jpeg-444": 0.5, "jpeg-rgb": 0.5, "jpeg-420": 1.5, "jpeg-422": 2.5, "jpeg-rgb-shared-tables": 0.5}


def both(path):
    return open_slide(path, reader="tiff"), open_slide(path, reader="openslide")


@pytest.mark.parametrize("factor", [2, 4, 8, 16, 6])
@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_near_the_area_average(tmp_path, write_tiff, flavours, tissue, name, factor):
    direct, other = both(write_tiff(tmp_path / "a.tif", [tissue], flavours[name]))
    size = 880 // factor, 688 // factor
    box = (8, 8, 8 + size[0] * factor, 8 + size[1] * factor)
    ours, theirs = direct.read_box(box, size).astype(float), other.read_box(box, size).astype(float)
    assert np.abs(ours - theirs).mean() <= BOUNDS[name]
    assert np.abs((ours - theirs).mean(axis=(0, 1))).max() < 0.5, "no channel is shifted"
    reduced = factor % 4 == 0 or name not in ("jpeg-420", "jpeg-422")
    assert (ours != theirs).any() == reduced, "whether tiles were reduced while decoding"


def test_real_slide_at_5x(shared_data):
    direct, other = both(shared_data / "slides" / "CMU-1-Small-Region.svs")
    for x, y in ((0, 0), (504, 1000), (1024, 1848)):
        box = (x, y, x + 1024, y + 1024)
        difference = direct.read_box(box, (256, 256)).astype(float) - other.read_box(box, (256, 256))
        assert np.abs(difference).mean() < 0.15
        assert abs(difference.mean()) < 0.1


def reductions(slide, box, size):
    return {ref.reduction for ref in slide.tiles_of(box, size)}


def test_when_tiles_are_reduced(tmp_path, write_tiff, flavours, tissue):
    slide = open_slide(write_tiff(tmp_path / "a.tif", [tissue[:640, :896]], flavours["jpeg-rgb"]), reader="tiff")
    for factor, reduction in ((1, 1), (2, 2), (4, 4), (8, 8), (16, 8), (12, 4), (6, 2), (3, 1), (5, 1)):
        assert reductions(slide, (0, 0, 240, 240), (240 // factor, 240 // factor)) == {reduction}, factor
    assert reductions(slide, (4, 8, 260, 264), (64, 64)) == {4}
    assert reductions(slide, (2, 8, 258, 264), (64, 64)) == {1}, "not a multiple of 4 along x"
    assert reductions(slide, (8, 2, 264, 258), (64, 64)) == {1}, "not a multiple of 4 along y"
    assert reductions(slide, (0.5, 0, 256.5, 256), (64, 64)) == {1}
    assert reductions(slide, (0, 0, 257, 257), (64, 64)) == {1}
    assert reductions(slide, (0, 0, 256, 256), (64, 128)) == {1}, "steps differ along x and y"
    assert reductions(slide, (1e-9, 0, 256, 256 + 1e-9), (64, 64)) == {4}, "noise of floating point"


def test_unaligned_requests_are_decoded_fully(tmp_path, write_tiff, flavours, tissue):
    direct, other = both(write_tiff(tmp_path / "a.tif", [tissue], flavours["jpeg-420"]))
    for box, size in (((2, 8, 258, 264), (64, 64)), ((0, 0, 250, 250), (64, 64)), ((7, 9, 307, 309), (100, 100))):
        assert (direct.read_box(box, size) == other.read_box(box, size)).all()


@pytest.mark.parametrize(
    ("name", "wanted"), [("jpeg-444", [1, 2, 4, 8]), ("jpeg-420", [1, 1, 4, 8]), ("jpeg-422", [1, 1, 2, 4])]
)
def test_half_chroma_is_decoded_as_features_allow(tmp_path, write_tiff, flavours, tissue, name, wanted):
    slide = open_slide(write_tiff(tmp_path / "a.tif", [tissue], flavours[name]), reader="tiff")
    assert [reductions(slide, (0, 0, 256, 256), (256 // f, 256 // f)) for f in (1, 2, 4, 8)] == [{w} for w in wanted]


@pytest.mark.parametrize(("factor", "reduction", "bound"), [(2, 1, 0.0), (4, 2, 1.0), (8, 2, 0.6)])
def test_jpeg_2000(shared_data, factor, reduction, bound):
    """The wavelet's low band, moved and smoothed into averages; as it comes it is many grey levels off."""
    direct, other = (
        open_slide(shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs", 0.25, reader=reader)
        for reader in ("tiff", "openslide")
    )
    box, size = (1536, 1280, 2304, 2048), (768 // factor, 768 // factor)
    level = direct.levels[0]
    assert direct._request(level, box, size).reduction == reduction
    ours, theirs = (slide.sample(slide.levels[0], box, size).rgb.astype(float) for slide in (direct, other))
    assert np.abs(ours - theirs).mean() <= bound
    assert np.abs((ours - theirs).mean(axis=(0, 1))).max() <= 0.2
    if reduction > 1:  # no shift: any other place fits worse
        inner = theirs[1:-1, 1:-1]
        here = np.abs(ours[1:-1, 1:-1] - inner).mean()
        for moved in (ours[1:-1, :-2], ours[1:-1, 2:], ours[:-2, 1:-1], ours[2:, 1:-1]):
            assert np.abs((3 * ours[1:-1, 1:-1] + moved) / 4 - inner).mean() > 1.5 * here


@pytest.mark.parametrize("name", ["jpeg2000-rgb", "jpeg2000-ycbcr-422"])
def test_other_wavelets_are_decoded_fully(tmp_path, write_tiff, flavours, tissue, name):
    flavour = flavours[name]
    if name == "jpeg2000-rgb":
        lossless = partial(imagecodecs.jpeg2k_encode, level=0, codecformat="j2k", reversible=True)
        flavour = replace(flavour, encode=lambda tile: bytes(lossless(tile)))
    direct, other = both(write_tiff(tmp_path / "a.tif", [tissue], flavour))
    assert reductions(direct, (0, 0, 512, 512), (128, 128)) == {1}
    assert (direct.read_box((0, 0, 512, 512), (128, 128)) == other.read_box((0, 0, 512, 512), (128, 128))).all()


@pytest.mark.parametrize("name", ["jpeg-444", "jpeg-420", "jpeg2000-rgb"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_padding_stays_out(tmp_path, write_tiff, flavours, name, factor):
    """333 x 267 px divide by none of the factors; beyond them the edge tiles hold white."""
    image = np.full((267, 333, 3), 60, np.uint8)
    flavour = flavours[name]
    if flavour.compression == 7:
        flavour = replace(flavour, encode=partial(flavour.encode, quality=98))
    direct, other = both(write_tiff(tmp_path / "a.tif", [image], flavour, padding=255))
    size = -(-333 // factor), -(-267 // factor)
    box = (0, 0, size[0] * factor, size[1] * factor)
    ours, theirs = (slide.read_box(box, size).astype(int) for slide in (direct, other))
    assert np.abs(ours - theirs).max() <= 6  # JPEG rings at the edge of the padding
    assert np.abs(ours[:-1, :-1] - 60).max() <= 8


@pytest.mark.parametrize("box", [(-64, -128, 448, 384), (512, 384, 1024, 896), (-512, -512, 1536, 1536)])
def test_boxes_across_the_edges(tmp_path, write_tiff, flavours, tissue, box):
    direct, other = both(write_tiff(tmp_path / "a.tif", [tissue], flavours["jpeg-rgb"]))
    size = (box[2] - box[0]) // 8, (box[3] - box[1]) // 8
    ours = direct.sample(direct.levels[0], box, size)
    theirs = other.sample(other.levels[0], box, size)
    assert np.abs(ours.rgb.astype(float) - theirs.rgb).mean() < 0.5
    np.testing.assert_allclose(ours.scanned, theirs.scanned, atol=1e-6)
    assert ours.source_px == theirs.source_px
    outside = theirs.scanned == 0
    assert outside.any()
    assert (ours.rgb[outside] == 255).all()


@pytest.mark.parametrize("mpp", [0.5, 1.0, 2.0, 4.0, 8.0, 3.0])
def test_overviews(tmp_path, write_tiff, flavours, tissue, mpp):
    direct, other = both(write_tiff(tmp_path / "a.tif", [tissue[:693, :891]], flavours["jpeg-444"]))
    ours, theirs = direct.overview(mpp), other.overview(mpp)
    assert ours.rgb.shape == theirs.rgb.shape
    assert np.abs(ours.rgb.astype(float) - theirs.rgb).mean() < 0.5
    assert (ours.scanned == theirs.scanned).all()


def test_each_tile_is_decoded_once_in_a_request(tmp_path, write_tiff, flavours, tissue):
    path = write_tiff(tmp_path / "a.tif", [tissue[:391, :517]], flavours["jpeg-rgb"])
    for box, size, tiles in (
        ((0, 0, 128, 128), (128, 128), 1),
        ((64, 64, 320, 320), (256, 256), 9),
        ((0, 0, 512, 384), (128, 96), 12),
        ((0, 0, 520, 392), (65, 49), 20),  # the edge tiles serve whole and cut averages
        ((-128, -128, 640, 512), (96, 80), 20),
        ((600, 500, 700, 600), (10, 10), 0),
    ):
        slide = open_slide(path, reader="tiff")
        refs = slide.tiles_of(box, size)
        assert len({(ref.column, ref.row) for ref in refs}) == len(refs) == tiles
        slide.read_box(box, size)
        assert slide.stats.tiles_decoded == tiles
        assert slide.stats.bytes_read == sum(ref.length for ref in refs)
        slide.read_box(box, size)
        assert slide.stats.tiles_decoded == tiles, "still held"


def test_tiles_are_listed_in_file_order_and_serve_the_boxes(tmp_path, write_tiff, flavours, tissue):
    slide = open_slide(write_tiff(tmp_path / "a.tif", [tissue], flavours["jpeg-444"]), reader="tiff")
    boxes = [(x, y, x + 256, y + 256) for y in range(0, 512, 128) for x in range(0, 512, 128)]
    needed = sorted({ref for box in boxes for ref in slide.tiles_of(box, (64, 64))})
    assert [ref.offset for ref in needed] == sorted(ref.offset for ref in needed)
    for ref in needed:
        tile = slide.read_tile(ref)
        assert tile.shape == (128 // 4, 128 // 4, 3)
        assert not tile.flags.writeable
    decoded = slide.stats.tiles_decoded
    assert decoded == len(needed) == 25
    for box in boxes:
        slide.read_box(box, (64, 64))
    assert slide.stats.tiles_decoded == decoded, "the boxes came from tiles that were held"


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    origin=st.tuples(st.integers(-40, 120), st.integers(-40, 100)),
    count=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    step=st.sampled_from([1, 2, 3, 4, 8, 12, 16]),
    aligned=st.booleans(),
)
@example(origin=(0, -1), count=(1, 2), step=16, aligned=True)  # the first average lies outside in part
def test_any_request(pyramids, origin, count, step, aligned):
    """Tiles listed are the tiles decoded, and the picture is near OpenSlide's, inside, across and outside."""
    unit = 8 if aligned else 7
    x, y = origin[0] * unit, origin[1] * unit
    box = (x, y, x + count[0] * step, y + count[1] * step)
    for direct, other in pyramids:
        direct._tiles.clear()
        before = direct.stats.tiles_decoded
        ours, theirs = direct.read_box(box, count), other.read_box(box, count)
        assert direct.stats.tiles_decoded - before == len(direct.tiles_of(box, count))
        level = direct.level_for(direct.mpp * step).index
        limit = 0 if reductions(direct, box, count) <= {1} and level == 0 else 1.5
        assert np.abs(ours.astype(float) - theirs).mean() <= limit


@pytest.fixture(scope="module")
def pyramids(tmp_path_factory, tissue):
    folder = tmp_path_factory.mktemp("pyramids")
    paths = [
        write_pyramid(folder / f"{chroma}.tif", tissue, 0.25, (1, 4), tile_px=128, chroma=chroma, quality=85)
        for chroma in ("444", "420")
    ]
    return [both(path) for path in paths]


def test_what_is_held_is_bounded(tmp_path, write_tiff, flavours, tissue):
    path = write_tiff(tmp_path / "a.tif", [tissue], flavours["jpeg-444"])
    tile_bytes = 128 * 128 * 3
    slide = tiff_reader.TiffSlide(path, cache_bytes=3 * tile_bytes + 10)
    want = open_slide(path, reader="openslide").read_box((0, 0, 900, 700), (900, 700))
    assert (slide.read_box((0, 0, 900, 700), (900, 700)) == want).all()
    assert slide._tiles.bytes == 3 * tile_bytes
    decoded = slide.stats.tiles_decoded
    slide.read_box((890, 690, 900, 700), (10, 10))
    assert slide.stats.tiles_decoded == decoded, "the last one is held"
    slide.read_box((0, 0, 10, 10), (10, 10))
    assert slide.stats.tiles_decoded == decoded + 1, "the first one is not"
    slide = tiff_reader.TiffSlide(path, cache_bytes=0)
    assert (slide.read_box((0, 0, 900, 700), (900, 700)) == want).all()
    assert slide._tiles.bytes == 0
    slide.close()


@pytest.mark.parametrize("name", ["jpeg-444", "jpeg-420", "jpeg-422"])
def test_regions_find_the_tiles_that_the_overview_has_decoded(tmp_path, write_tiff, flavours, tissue, name):
    height, width = 640, 896
    slide = open_slide(
        write_tiff(tmp_path / "a.tif", [tissue[:height, :width]], flavours[name]), reader="tiff", mpp=0.5
    )
    overview = slide.overview(8.0)
    decoded = slide.stats.tiles_decoded
    boxes = [(x, y, x + 256, y + 256) for y in range(0, height - 255, 128) for x in range(0, width - 255, 128)]
    slide.announce([(box, (64, 64)) for box in boxes])
    regions = [slide.read_box(box, (64, 64)) for box in boxes]
    assert slide.stats.tiles_decoded == decoded
    for (x, y, *_), region in zip(boxes, regions, strict=True):
        seen = overview.rgb[y // 16 : y // 16 + 16, x // 16 : x // 16 + 16].astype(float)
        means = region.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
        assert np.abs(seen - means).max() <= 1, "the mean of the same pixels"


def test_tiles_of_the_overview_that_no_region_needs_are_dropped(tmp_path, write_tiff, flavours, tissue):
    path = write_tiff(tmp_path / "a.tif", [tissue[:640, :896]], flavours["jpeg-444"])
    slide = open_slide(path, reader="tiff", mpp=0.5)
    slide.overview(8.0)
    everything = slide._tiles.bytes
    slide.announce([((0, 0, 256, 256), (64, 64))])
    needed = {(ref.column, ref.row) for ref in slide.tiles_of((0, 0, 256, 256), (64, 64))}
    assert 0 < slide._tiles.bytes < everything
    assert len(slide._tiles._tiles) == len(needed)
    slide.read_box((0, 0, 256, 256), (64, 64))
    assert slide._tiles.bytes == 0
