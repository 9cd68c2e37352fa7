"""What is not fully understood is left to OpenSlide; holes and the levels of OME-TIFF are understood."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import tifffile

from lrmil.errors import MissingMpp, NotASlide
from lrmil.slides import open_slide, registry
from lrmil.slides.registry import ReaderCard
from lrmil.slides.scale import OME_XML


@pytest.fixture
def directly_by_default(monkeypatch):
    """The registry with the direct reader asked first, without being told to."""
    cards = {name: card for name, card in registry._CARDS.items() if name != "tiff"}
    monkeypatch.setattr(registry, "_CARDS", cards)
    registry.register_reader(ReaderCard("tiff", "TIFF", "Apache-2.0", 10, registry._open_directly))


def left_to_openslide(path, because):
    with pytest.raises(NotASlide, match=f"not read directly: .*{because}"):
        open_slide(path, 0.25, reader="tiff")
    slide = open_slide(path, 0.25)
    assert slide.reader == "openslide"
    return slide


def halved(image):
    return np.ascontiguousarray(image[::2, ::2])


def test_it_is_chosen_for_what_it_knows(directly_by_default, tmp_path, write_tiff, flavours, tissue):
    path = write_tiff(tmp_path / "a.tif", [tissue], flavours["jpeg-420"])
    assert open_slide(path).reader == "tiff"
    assert open_slide(path, reader="openslide").reader == "openslide"


WRITTEN = {
    "gray": ({"photometric": "minisblack"}, "three samples", 1),
    "alpha": ({"photometric": "rgb", "extrasamples": ["unassalpha"]}, "three samples", 4),
    "planar": ({"photometric": "rgb", "planarconfig": "separate"}, "stored apart", 3),
    "strips": ({"photometric": "rgb", "tile": None}, "without tiles", 3),
    "packbits": ({"photometric": "rgb", "compression": "packbits"}, "compression 32773", 3),
    "turned": ({"photometric": "rgb", "extratags": [(274, 3, 1, 3, True)]}, "turned or mirrored", 3),
}


@pytest.mark.parametrize("kind", sorted(WRITTEN))
def test_kinds_that_are_left_to_others(directly_by_default, tmp_path, tissue, kind):
    options, because, channels = WRITTEN[kind]
    image = np.dstack([tissue, tissue[..., :1]])[:256, :256, :channels].squeeze()
    if kind == "planar":
        image = np.moveaxis(image, -1, 0)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ascontiguousarray(image), **({"tile": (128, 128), "metadata": None} | options))
    with pytest.raises(NotASlide, match=because):
        open_slide(path, 0.25, reader="tiff")
    if kind == "strips":
        with pytest.raises(NotASlide, match=r"it is a TIFF of .* stored without tiles"):
            open_slide(path, 0.25)
    else:
        assert open_slide(path, 0.25).reader == "openslide"


def test_jpeg_of_unusual_sampling(directly_by_default, tmp_path, write_tiff, flavours, tissue):
    def encode(tile):
        return simplejpeg.encode_jpeg(tile, colorspace="RGB", colorsubsampling="440")

    flavour = replace(flavours["jpeg-444"], encode=encode)
    slide = left_to_openslide(write_tiff(tmp_path / "a.tif", [tissue], flavour), "sampled")
    assert slide.read_box((0, 0, 100, 100), (100, 100)).shape == (100, 100, 3)


def test_other_vendors(directly_by_default, tmp_path, write_tiff, flavours, tissue):
    """A generic TIFF is told from vendors that OpenSlide knows by their descriptions."""
    path = tmp_path / "a.tif"
    xml = (
        '<?xml version="1.0"?><DataObject ObjectType="DPUfsImport"><Attribute Name="PIM_DP_SCANNED_IMAGES" PMSVR='
        '"IDataObjectArray"><Array/></Attribute></DataObject>'
    )
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            tissue[:256, :256],
            tile=(128, 128),
            photometric="rgb",
            software="Philips DP v1.0",
            description=xml,
            metadata=None,
        )
    with pytest.raises(NotASlide):
        open_slide(path, 0.25, reader="tiff")


def test_missing_tiles_were_never_scanned(tmp_path, write_tiff, flavours, tissue):
    for name in ("jpeg-rgb-shared-tables", "lzw-differences"):
        flavour = replace(flavours[name], tile_px=(128, 128))
        path = write_tiff(tmp_path / f"{name}.tif", [tissue[:384, :512]], flavour, missing=((1, 0), (3, 2)))
        direct, other = open_slide(path, reader="tiff"), open_slide(path, reader="openslide")
        assert direct.vendor == "aperio"
        for box, size in (((0, 0, 512, 384), (512, 384)), ((3, 5, 203, 205), (50, 50)), ((130, 10, 140, 20), (5, 5))):
            assert (direct.read_box(box, size) == other.read_box(box, size)).all()
        assert (direct.read_box((128, 0, 256, 128), (32, 32)) == 255).all()
        for mpp in (0.25, 1.0, 8.0):
            ours, theirs = direct.overview(mpp), other.overview(mpp)
            assert (ours.scanned == theirs.scanned).all()
            assert np.abs(ours.rgb.astype(float) - theirs.rgb).mean() < 0.5
        assert not direct.overview(1.0).scanned[:32, 32:64].any()
        assert direct.overview(1.0).scanned[:32, :32].all()
        assert not direct.tiles_of((128, 0, 256, 128), (32, 32))


def test_missing_tiles_of_a_generic_tiff(tmp_path, write_tiff, flavours, tissue):
    """OpenSlide calls them damaged; they are holes."""
    path = write_tiff(tmp_path / "a.tif", [tissue[:384, :512]], flavours["jpeg-420"])
    holes = write_tiff(tmp_path / "b.tif", [tissue[:384, :512]], flavours["jpeg-420"], missing=((1, 1),))
    slide, whole = open_slide(holes, reader="tiff"), open_slide(path, reader="tiff")
    got, want = slide.read_box((0, 0, 512, 384), (128, 96)), whole.read_box((0, 0, 512, 384), (128, 96)).copy()
    want[32:64, 32:64] = 255
    assert (got == want).all()
    assert slide.stats.unreadable == 0


def test_holes_in_an_aperio_pyramid_are_left_to_openslide(directly_by_default, tmp_path, write_tiff, flavours, tissue):
    """OpenSlide fills them from the finer level."""
    levels = [tissue[:512, :512], halved(tissue[:512, :512])]
    flavour = replace(flavours["jpeg-rgb-shared-tables"], tile_px=(128, 128))
    left_to_openslide(write_tiff(tmp_path / "a.svs", levels, flavour, missing=((0, 0),)), "Aperio pyramid are missing")


OME = (
    '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID='
    '"Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="900" SizeY="700" SizeC="3" SizeZ="1" '
    'SizeT="1" {sizes}><Channel ID="Channel:0:0" SamplesPerPixel="3"/></Pixels></Image></OME>'
)


@pytest.mark.parametrize(
    ("sizes", "mpp"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', 0.25),
        ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.25" PhysicalSizeYUnit="&#181;m"', None),
        ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.00025" PhysicalSizeYUnit="mm"', 0.25),
        ('PhysicalSizeX="0.25"', None),
        ('PhysicalSizeX="0.25" PhysicalSizeY="a"', None),
        ("", None),
    ],
)
def test_ome_tiff_with_levels_below_the_first(tmp_path, write_tiff, flavours, tissue, sizes, mpp):
    levels = [tissue, halved(tissue), halved(halved(tissue))]
    text = OME.format(sizes=sizes)
    path = write_tiff(tmp_path / "a.ome.tif", levels, flavours["jpeg-rgb"], sub_levels=True, description=text)
    if mpp is None:
        for reader in ("tiff", "openslide"):
            with pytest.raises(MissingMpp):
                open_slide(path, reader=reader)
        return
    direct, other = open_slide(path, reader="tiff"), open_slide(path, reader="openslide")
    assert (direct.mpp, direct.mpp_source) == (other.mpp, other.mpp_source) == (pytest.approx(mpp), OME_XML)
    assert [level.downsample for level in direct.levels] == [1, 2, 4]
    assert len(other.levels) == 1
    for level, image in zip(direct.levels, levels, strict=True):
        got = direct._read_level(level, 0, 0, level.width_px, level.height_px)
        assert np.abs(got.astype(int) - image).mean() < 3
    want = other.read_box((0, 0, 900, 700), (900, 700))
    assert (direct.read_box((0, 0, 900, 700), (900, 700)) == want).all()
    direct.read_box((0, 0, 800, 640), (200, 160))
    assert direct.stats.level_reads == {0: 1, 2: 1}


def test_sub_images_that_are_no_levels(directly_by_default, tmp_path, write_tiff, flavours, tissue):
    odd = [tissue, np.ascontiguousarray(tissue[:100, :800])]
    path = write_tiff(tmp_path / "a.tif", odd, flavours["jpeg-rgb"], sub_levels=True)
    assert left_to_openslide(path, "no level of its pyramid").mpp == 0.25
