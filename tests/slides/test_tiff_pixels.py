"""The direct reader's pixels are OpenSlide's, bit for bit, on every flavour and on real slides."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import imagecodecs
import numpy as np
import openslide
import pytest

from lrmil.slides import open_slide


def whole_level(path, index):
    """All pixels of a level as OpenSlide reads them: from (0, 0), where it does not interpolate."""
    with openslide.OpenSlide(str(path)) as handle:
        return np.asarray(handle.read_region((0, 0), index, handle.level_dimensions[index]).convert("RGB"))


def halved(image):
    height, width = image.shape[0] // 2, image.shape[1] // 2
    return np.rint(image[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean(axis=(1, 3))).astype(np.uint8)


def check_against_openslide(path, mpp=None):
    direct, other = open_slide(path, mpp, reader="tiff"), open_slide(path, mpp, reader="openslide")
    assert (direct.reader, other.reader) == ("tiff", "openslide")
    for fact in ("name", "vendor", "dimensions", "levels", "mpp", "mpp_source", "background_rgb", "bounds_l0"):
        assert getattr(direct, fact) == getattr(other, fact), fact
    assert direct.describe() | {"reader": ""} == other.describe() | {"reader": ""}
    for level in direct.levels:
        want = whole_level(path, level.index)
        got = direct._read_level(level, 0, 0, level.width_px, level.height_px)
        assert (got == want).all(), f"level {level.index}"
        rng = np.random.default_rng(level.index)
        for _ in range(8):
            x, y = int(rng.integers(level.width_px)), int(rng.integers(level.height_px))
            width = min(int(rng.integers(1, level.width_px - x + 1)), 300)
            height = min(int(rng.integers(1, level.height_px - y + 1)), 300)
            got = direct._read_level(level, x, y, width, height)
            assert (got == want[y : y + height, x : x + width]).all()
    return direct, other


def test_every_flavour(tmp_path, write_tiff, flavour, tissue):
    image = tissue[:391, :517]  # edge tiles on both sides
    path = write_tiff(tmp_path / "a.tif", [image, halved(image)], flavour)
    direct, _ = check_against_openslide(path)
    assert len(direct.levels) == 2
    assert direct.mpp == pytest.approx(0.25)
    # the picture itself came through; what is called YCbCr was not converted before it was written
    if flavour.compression != 33003:
        box = direct.read_box((0, 0, 517, 391), (517, 391)).astype(int)
        assert np.abs(box - image).mean() < (3 if flavour.compression in (7, 33005) else 1e-9)


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "tcga-cr-7395-01a-01-ts1.svs", "CropBreastSlide.tiff"])
def test_real_slides(shared_data, name):
    direct, other = check_against_openslide(shared_data / "slides" / name, None if name.startswith("CMU") else 0.25)
    box = (300, 400, 300 + 517, 400 + 333)
    assert (direct.read_box(box, (517, 333)) == other.read_box(box, (517, 333))).all()


def test_a_plain_request_is_the_same_average(tmp_path, write_tiff, flavours, tissue):
    """Lossless tiles are never reduced while decoding: any box, at any scale, gives what OpenSlide's pixels give."""
    path = write_tiff(tmp_path / "a.tif", [tissue, halved(tissue)], flavours["deflate-differences"])
    direct, other = open_slide(path, reader="tiff"), open_slide(path, reader="openslide")
    for box, size in [
        ((0, 0, 512, 512), (64, 64)),
        ((13, 7, 413, 307), (100, 75)),
        ((-64, -32, 448, 480), (64, 64)),
        ((800, 600, 1056, 856), (64, 64)),
        ((3.3, 4.4, 300.7, 280.1), (31, 17)),
        ((850, 650, 1050, 750), (200, 100)),
        ((5000, 5000, 5100, 5100), (10, 10)),
    ]:
        assert (direct.read_box(box, size) == other.read_box(box, size)).all(), box
    for mpp in (0.25, 0.7, 2.0):
        ours, theirs = direct.overview(mpp), other.overview(mpp)
        assert (ours.rgb == theirs.rgb).all()
        assert (ours.scanned == theirs.scanned).all()
        assert (ours.mpp, ours.downsample_l0) == (theirs.mpp, theirs.downsample_l0)
    ours, theirs = direct.stats.as_dict(), other.stats.as_dict()
    for name in ("reads", "output_px", "source_px", "level_reads", "unreadable", "finest_mpp_asked"):
        assert ours[name] == theirs[name], name


def test_a_marker_does_not_outvote_the_photometric_tag(tmp_path, write_tiff, flavours, tissue):
    """RGB streams that claim, by a JFIF marker, to be YCbCr: OpenSlide believes the tag, and so must we."""
    rgb = flavours["jpeg-rgb"]
    jfif = bytes.fromhex("ffe000104a46494600010101004800480000")
    lying = replace(rgb, encode=lambda tile: b"\xff\xd8" + jfif + rgb.encode(tile)[2:])
    direct, _ = check_against_openslide(write_tiff(tmp_path / "a.tif", [tissue[:200, :200]], lying))
    assert np.abs(direct.read_box((0, 0, 200, 200), (200, 200)).astype(int) - tissue[:200, :200]).mean() < 3


def test_associated_images_are_no_levels(shared_data):
    slide = open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs", reader="tiff")
    assert [(level.width_px, level.height_px) for level in slide.levels] == [(2220, 2967)]


def test_every_colour_of_jpeg_2000s_ycbcr(tmp_path, write_tiff, flavours):
    """All pairs of Cb and Cr, whose conversion has halves to round: one pixel in ten thousand shows another table."""
    blue, red = np.meshgrid(np.arange(256), np.arange(256))
    luma = np.random.default_rng(0).integers(0, 256, (256, 256))
    image = np.stack([luma, blue, red], axis=-1).astype(np.uint8)
    lossless = partial(imagecodecs.jpeg2k_encode, level=0, codecformat="j2k", reversible=True)
    flavour = replace(flavours["jpeg2000-ycbcr"], encode=lambda tile: bytes(lossless(tile)))
    check_against_openslide(write_tiff(tmp_path / "a.svs", [image], flavour))
