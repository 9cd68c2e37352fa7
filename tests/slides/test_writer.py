from __future__ import annotations

import errno

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrmil.errors import ConfigError, OutputError
from lrmil.slides import open_slide, write_pyramid
from lrmil.slides.scale import TIFF_TAGS, VENDOR


@pytest.mark.parametrize("compression", ["deflate", None])
@pytest.mark.parametrize("vendor", ["generic", "aperio"])
def test_lossless_pixels_come_back(tmp_path, picture, block_mean, compression, vendor):
    image = picture(531, 417)
    path = write_pyramid(tmp_path / "a.tif", image, 0.4990, compression=compression, vendor=vendor)
    with open_slide(path) as slide:
        assert slide.dimensions == (531, 417)
        assert slide.mpp == pytest.approx(0.499, rel=1e-5)
        assert slide.mpp_source == (VENDOR if vendor == "aperio" else TIFF_TAGS)
        assert slide.vendor == ("aperio" if vendor == "aperio" else "generic-tiff")
        assert [(v.width_px, v.height_px, v.downsample) for v in slide.levels] == [
            (531, 417, 1),
            (132, 104, 4),
            (33, 26, 16),
        ]
        assert (slide.read_box((0, 0, 531, 417), (531, 417)) == image).all()
        for level, factor in ((1, 4), (2, 16)):
            got = (
                tifffile.imread(path, series=0, level=level)
                if vendor == "generic"
                else tifffile.imread(path, key=level)
            )
            assert np.abs(got - block_mean(image, factor)).max() <= 0.5
    assert (tifffile.imread(path, key=0) == image).all()


@pytest.mark.parametrize("chroma", ["444", "422", "420"])
def test_jpeg(tmp_path, picture, chroma):
    grey = picture(300, 260)[..., :1].repeat(3, axis=2)
    path = write_pyramid(tmp_path / "a.tif", grey, 0.25, (1, 2, 4, 8), chroma=chroma, quality=95)
    slide = open_slide(path)
    assert [v.downsample for v in slide.levels] == [1, 2, 4, 8]
    got = slide.read_box((0, 0, 300, 260), (300, 260)).astype(int)
    assert np.abs(got - grey).mean() < 2
    assert np.abs(tifffile.imread(path, key=0).astype(int) - got).max() <= 2
    with tifffile.TiffFile(path) as tiff:
        sampling = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}[chroma]
        assert tiff.pages.first.tags["YCbCrSubSampling"].value == sampling


def test_quality_counts(tmp_path, picture):
    sizes = [write_pyramid(tmp_path / f"{q}.tif", picture(300, 260), 0.25, quality=q).stat().st_size for q in (30, 90)]
    assert sizes[0] < 0.6 * sizes[1]


def test_jpeg_2000_is_written_as_aperio_does(tmp_path, picture):
    image = picture(300, 260)
    image[:, :128] = 240  # a blank tile must not turn grey
    slide = open_slide(write_pyramid(tmp_path / "a.svs", image, 0.25, (1, 4), tile_px=128, compression="jpeg2000"))
    assert (slide.vendor, slide.mpp, slide.mpp_source) == ("aperio", 0.25, VENDOR)
    got = slide.read_box((0, 0, 300, 260), (300, 260)).astype(int)
    assert np.abs(got - image).mean() < 1.5
    assert np.abs(got[:, :128] - 240).mean() <= 1


def test_one_level(tmp_path, picture):
    slide = open_slide(write_pyramid(tmp_path / "a.tif", picture(300, 260), 0.5, (1,), tile_px=240))
    assert len(slide.levels) == 1


def test_levels_without_a_pixel_are_left_out(tmp_path, picture):
    slide = open_slide(write_pyramid(tmp_path / "a.tif", picture(100, 9), 0.5, (1, 4, 16)))
    assert [v.downsample for v in slide.levels] == [1, 4]
    slide = open_slide(write_pyramid(tmp_path / "b.tif", picture(9, 100), 0.5, (1, 4, 16)))
    assert [v.downsample for v in slide.levels] == [1, 4]


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 90), min_size=1, max_size=8), st.integers(16, 150))
def test_strips_of_any_heights_equal_the_array(tmp_path, picture, heights, width):
    image = picture(width, sum(heights))
    cuts = np.cumsum(heights)[:-1]
    whole = write_pyramid(tmp_path / "w.tif", image, 0.5, tile_px=64, compression="deflate")
    strips = write_pyramid(tmp_path / "s.tif", iter(np.split(image, cuts)), 0.5, tile_px=64, compression="deflate")
    assert whole.read_bytes() == strips.read_bytes()


def test_a_description_is_kept(tmp_path, picture):
    path = write_pyramid(tmp_path / "a.tif", picture(64, 64), 0.5, description="made for a test")
    assert tifffile.TiffFile(path).pages.first.description == "made for a test"
    path = write_pyramid(tmp_path / "a.svs", picture(64, 64), 0.5, description="a|b", vendor="aperio")
    slide = open_slide(path)
    assert slide.properties["aperio.Note"] == "a/b"
    assert slide.properties["aperio.MPP"] == "0.5"


def test_levels_state_their_own_resolution(tmp_path, picture):
    path = write_pyramid(tmp_path / "a.tif", picture(256, 256), 0.25)
    with tifffile.TiffFile(path) as tiff:
        for page, mpp in zip(tiff.pages, (0.25, 1.0, 4.0), strict=True):
            numerator, denominator = page.tags["XResolution"].value
            assert 1e4 * denominator / numerator == pytest.approx(mpp)
            assert page.tags["ResolutionUnit"].value == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"mpp": 0},
        {"mpp": 264.0},
        {"mpp": float("nan")},
        {"downsamples": ()},
        {"downsamples": (2, 4)},
        {"downsamples": (1, 4, 4)},
        {"downsamples": (1, 2.5)},
        {"tile_px": 100},
        {"compression": "gif"},
        {"compression": "jpeg2000", "vendor": "generic"},
        {"compression": "jpeg2000", "quality": 30},
        {"quality": 0},
        {"quality": 101},
    ],
)
def test_wrong_arguments_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=r"a\.tif"):
        write_pyramid(tmp_path / "a.tif", np.zeros((64, 64, 3), np.uint8), **{"mpp": 0.5, **wrong})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.float32),
        [],
        [np.zeros((5, 64, 3), np.uint8), np.zeros((5, 63, 3), np.uint8)],
    ],
)
def test_wrong_pixels_are_refused_and_leave_nothing(tmp_path, image):
    with pytest.raises(ConfigError):
        write_pyramid(tmp_path / "a.tif", image, 0.5)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path, picture, monkeypatch):
    path = write_pyramid(tmp_path / "a.tif", picture(64, 64), 0.5)
    before = path.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tifffile.TiffWriter, "write", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_pyramid(path, picture(128, 128), 0.5)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]
