from __future__ import annotations

import math

import numpy as np
import pytest
import tifffile

from lrmil.errors import ImplausibleMpp, MissingMpp
from lrmil.slides import open_slide, write_pyramid
from lrmil.slides.scale import TIFF_TAGS, USER, VENDOR, StatedMpp, believed_mpp
from lrmil.slides.tiff_tags import describe_tiff, tiff_resolution

VENDOR_HALF = StatedMpp(0.5, 0.5, VENDOR)


def test_the_user_overrides_the_file():
    assert believed_mpp("s", user=0.25, stated=[VENDOR_HALF]) == (0.25, USER)
    assert believed_mpp("s", user=0.25, stated=[StatedMpp(264, 264, TIFF_TAGS)]) == (0.25, USER)


def test_the_first_statement_is_believed():
    assert believed_mpp("s", user=None, stated=[VENDOR_HALF, StatedMpp(0.25, 0.25, TIFF_TAGS)]) == (0.5, VENDOR)


def test_an_absurd_first_statement_is_not_replaced_by_a_weaker_one():
    with pytest.raises(ImplausibleMpp, match="vendor metadata"):
        believed_mpp("s", user=None, stated=[StatedMpp(264, 264, VENDOR), StatedMpp(0.25, 0.25, TIFF_TAGS)])


def test_nothing_said_is_missing_and_tells_what_to_do():
    with pytest.raises(MissingMpp, match=r"slide-7.*column `mpp`.*--mpp"):
        believed_mpp("slide-7", user=None, stated=[])


@pytest.mark.parametrize("mpp", [0.05, 0.25, 20.0])
def test_the_limits_are_believed(mpp):
    assert believed_mpp("s", user=mpp, stated=[])[0] == mpp
    assert believed_mpp("s", user=None, stated=[StatedMpp(mpp, mpp, VENDOR)])[0] == mpp


@pytest.mark.parametrize("mpp", [0.0, -0.5, 0.0499, 20.01, 264.58, math.inf, math.nan])
def test_what_no_microscope_has_is_refused_from_anybody(mpp):
    with pytest.raises(ImplausibleMpp):
        believed_mpp("s", user=mpp, stated=[])
    with pytest.raises(ImplausibleMpp, match=r"column `mpp`.*--mpp"):
        believed_mpp("s", user=None, stated=[StatedMpp(mpp, mpp, VENDOR)])


def test_two_percent_between_x_and_y_is_the_limit():
    assert believed_mpp("s", user=None, stated=[StatedMpp(0.500, 0.509, VENDOR)])[0] == pytest.approx(0.5045)
    for x, y in ((0.500, 0.511), (0.511, 0.500)):
        with pytest.raises(ImplausibleMpp, match=r"not square.*x.*y"):
            believed_mpp("s", user=None, stated=[StatedMpp(x, y, VENDOR)])


def write_tiff(path, resolution=None, unit=None, dtype=np.uint8, tile=(64, 64), channels=3):
    shape = (100, 120, channels) if channels > 1 else (100, 120)
    tifffile.imwrite(
        path,
        np.full(shape, 200, dtype),
        tile=tile,
        photometric="rgb" if channels == 3 else "minisblack",
        resolution=resolution,
        resolutionunit=unit,
    )
    return path


@pytest.mark.parametrize(("per_unit", "unit", "mpp"), [(50_800, "INCH", 0.5), (40_000, "CENTIMETER", 0.25)])
def test_resolution_tags_in_both_units(tmp_path, per_unit, unit, mpp):
    path = write_tiff(tmp_path / "a.tif", (per_unit, per_unit), unit)
    stated = tiff_resolution(path)
    assert stated is not None
    assert (stated.x, stated.y) == pytest.approx((mpp, mpp))
    slide = open_slide(path)
    assert slide.mpp == pytest.approx(mpp)
    assert slide.mpp_source == TIFF_TAGS


def test_x_and_y_resolution_are_not_swapped_and_refused_when_apart(tmp_path):
    path = write_tiff(tmp_path / "a.tif", (40_000, 20_000), "CENTIMETER")
    stated = tiff_resolution(path)
    assert stated is not None
    assert (stated.x, stated.y) == pytest.approx((0.25, 0.5))
    with pytest.raises(ImplausibleMpp, match=r"0\.25 um/px along x and 0\.5 along y"):
        open_slide(path)
    assert open_slide(path, mpp=0.25).mpp == 0.25


def test_tags_without_a_unit_say_nothing(tmp_path):
    path = write_tiff(tmp_path / "a.tif", (40_000, 40_000), "NONE")
    assert tiff_resolution(path) is None
    with pytest.raises(MissingMpp):
        open_slide(path)


def aperio_without_mpp(path, objective, **tags):
    """A file of that vendor whose description says the objective's power, and no um per pixel."""
    tifffile.imwrite(
        path,
        np.full((100, 120, 3), 200, np.uint8),
        tile=(64, 64),
        photometric="rgb",
        description=f"Aperio Image Library\r\n120x100 (64x64)|AppMag = {objective}",
        metadata=None,
        **tags,
    )
    return path


def test_tags_stand_in_where_openslide_finds_no_vendor_mpp(tmp_path):
    """An Aperio description without MPP: OpenSlide gives none, the resolution tags do."""
    tags = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    slide = open_slide(aperio_without_mpp(tmp_path / "a.svs", objective=20, **tags))
    assert (slide.vendor, slide.mpp_source) == ("aperio", TIFF_TAGS)
    assert slide.mpp == pytest.approx(0.5)


def test_an_objective_power_is_no_scale(tmp_path):
    path = aperio_without_mpp(tmp_path / "a.svs", objective=40)
    with pytest.raises(MissingMpp):
        open_slide(path)


def test_vendor_metadata_comes_before_tags(tmp_path):
    path = write_pyramid(tmp_path / "a.svs", np.full((64, 64, 3), 9, np.uint8), 0.5, vendor="aperio")
    assert open_slide(path).mpp_source == VENDOR


def test_what_a_file_is_that_is_no_slide(tmp_path):
    assert "16-bit" in (describe_tiff(write_tiff(tmp_path / "a.tif", dtype=np.uint16)) or "")
    assert "8-bit minisblack" in (describe_tiff(write_tiff(tmp_path / "b.tif", channels=1)) or "")
    assert "without tiles" in (describe_tiff(write_tiff(tmp_path / "c.tif", tile=None)) or "")
    (tmp_path / "d.svs").write_bytes(b"not a TIFF")
    assert describe_tiff(tmp_path / "d.svs") is None
    assert tiff_resolution(tmp_path / "d.svs") is None
