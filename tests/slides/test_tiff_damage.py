"""Damaged and malicious files: a clear error for what is damaged, pixels for the rest, never a crash."""

from __future__ import annotations

import contextlib
import pickle
import re
import struct
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrmil.errors import NotASlide, SlideError, UnreadableRegion
from lrmil.slides import open_slide
from lrmil.slides.openslide_facts import _properties
from lrmil.slides.scale import TIFF_TAGS
from lrmil.slides.tiff.file import RandomAccessFile
from lrmil.slides.tiff.layout import tiled_image
from lrmil.slides.tiff.reader import TiffSlide
from lrmil.slides.tiff.structure import NotUnderstood, read_directories


def halved(image):
    return np.ascontiguousarray(image[::2, ::2])


def patch(path, position, data):
    with path.open("r+b") as handle:
        handle.seek(position)
        handle.write(data)


def entry_of(path, tag):
    """Where a classic little-endian TIFF's first directory keeps the entry of a tag."""
    data = path.read_bytes()
    (offset,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[offset : offset + 2])
    for position in range(offset + 2, offset + 2 + 12 * count, 12):
        if struct.unpack("<H", data[position : position + 2])[0] == tag:
            return position
    raise AssertionError(f"no tag {tag}")


@pytest.fixture
def sound(tmp_path, write_tiff, flavours, tissue):
    return write_tiff(tmp_path / "a.tif", [tissue, halved(tissue)], flavours["jpeg-420"])


def refused(path):
    with pytest.raises(NotASlide) as caught:
        open_slide(path, 0.25, reader="tiff")
    return str(caught.value)


def test_directories_in_a_circle(sound):
    with tifffile.TiffFile(sound) as tiff:
        first, second = (page.offset for page in tiff.pages)
        entries = struct.unpack("<H", sound.read_bytes()[second : second + 2])[0]
    patch(sound, second + 2 + 12 * entries, struct.pack("<I", first))
    assert "circle" in refused(sound)


@pytest.mark.parametrize(
    ("tag", "value", "says"),
    [
        (322, 0, "tiles of 0 x"),
        (322, 2**30, "tiles of 1073741824 x"),
        (323, 100, "x 100 px"),
        (256, 2**31, "where .* are due"),
        (256, 0, "0 x 700 px"),
    ],
)
def test_absurd_sizes(sound, tag, value, says):
    patch(sound, entry_of(sound, tag) + 2, struct.pack("<HII", 4, 1, value))
    assert re.search(says, refused(sound))


def test_lists_that_lie_beyond_the_end(sound):
    patch(sound, entry_of(sound, 324) + 8, struct.pack("<I", 2**31))
    assert "tag 324" in refused(sound)


def test_a_list_of_billions_of_tiles(sound):
    patch(sound, entry_of(sound, 324) + 4, struct.pack("<I", 2**32 - 1))
    assert "tag 324" in refused(sound)


def test_a_file_cut_within_its_directory(sound):
    data = sound.read_bytes()
    (offset,) = struct.unpack("<I", data[4:8])
    for length in (3, 8, offset + 1, offset + 30):
        sound.write_bytes(data[:length])
        assert "not read directly" in refused(sound)


def tile_bytes(path, column, row):
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        index = row * -(-page.imagewidth // page.tilewidth) + column
        return page.dataoffsets[index], page.databytecounts[index]


@pytest.mark.parametrize("name", ["jpeg-420", "jpeg-rgb-shared-tables", "jpeg2000-rgb", "deflate-differences", "lzw"])
@pytest.mark.parametrize("harm", ["zeros", "cut", "another size", "beyond the end"])
def test_a_damaged_tile_costs_its_own_boxes(tmp_path, write_tiff, flavours, tissue, name, harm):
    flavour = replace(flavours[name], tile_px=(128, 128))
    number = iter(range(100))

    def encode(tile):
        small = harm == "another size" and next(number) == 1 * 4 + 2
        return flavour.encode(np.ascontiguousarray(tile[:64, :64]) if small else tile)

    levels = [tissue[:384, :512], halved(tissue[:384, :512])]  # OpenSlide looks at the smallest level on opening
    path = write_tiff(tmp_path / "a.tif", levels, replace(flavour, encode=encode))
    offset, length = tile_bytes(path, 2, 1)
    if harm == "zeros":
        patch(path, offset, bytes(length))
    elif harm == "cut":
        _shorten(path, 1 * 4 + 2, length // 3)
    elif harm == "beyond the end":
        _set_offset(path, 1 * 4 + 2, path.stat().st_size - length // 2)
    slide = open_slide(path, reader="tiff")
    for box in ((256, 128, 384, 256), (300, 150, 310, 160), (0, 0, 512, 384)):
        with pytest.raises(UnreadableRegion, match=r"a: .*tile 2, 1"):
            slide.read_box(box, (box[2] - box[0], box[3] - box[1]))
    with pytest.raises(UnreadableRegion):
        slide.read_box((256, 128, 384, 256), (96, 96))
    assert slide.stats.unreadable == 4
    assert slide.read_box((0, 0, 256, 384), (256, 384)).shape == (384, 256, 3)
    assert slide.stats.unreadable == 4
    overview = slide.overview(0.25)
    assert overview.unreadable > 0
    assert not overview.scanned[128:256, 256:384].any()


def _entries(path, tag):
    position = entry_of(path, tag)
    kind, count, where = struct.unpack("<HII", path.read_bytes()[position + 2 : position + 12])
    assert kind in (3, 4)
    assert count * (2 if kind == 3 else 4) > 4
    return kind, where


def _shorten(path, index, length):
    kind, where = _entries(path, 325)
    patch(path, where + index * (2 if kind == 3 else 4), struct.pack("<H" if kind == 3 else "<I", length))


def _set_offset(path, index, offset):
    kind, where = _entries(path, 324)
    assert kind == 4
    patch(path, where + 4 * index, struct.pack("<I", offset))


def huge(data, marker, skip, size):
    """Let a compressed stream say that it is of this size: so many bytes behind its marker."""
    position = data.index(marker) + skip
    return data[:position] + size + data[position + len(size) :]


BOMBS = {
    "deflate": lambda tile, encode: zlib.compress(bytes(20_000_000), 9),
    "lzw": lambda tile, encode: bytes(imagecodecs.lzw_encode(bytes(20_000_000))),
    "jpeg-420": lambda tile, encode: huge(encode(tile), b"\xff\xc0", 5, struct.pack(">HH", 65500, 65500)),
    "jpeg2000-rgb": lambda tile, encode: huge(encode(tile), b"\xff\x51", 6, struct.pack(">II", 2**31, 2**31)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_not_inflated(tmp_path, write_tiff, flavours, tissue, name):
    flavour = replace(flavours[name], tile_px=(128, 128))
    state = iter(range(100))

    def encode(tile):
        return BOMBS[name](tile, flavour.encode) if next(state) == 1 else flavour.encode(tile)

    path = write_tiff(tmp_path / "a.tif", [tissue[:256, :512]], replace(flavour, encode=encode))
    slide = open_slide(path, reader="tiff")
    tracemalloc.start()
    with pytest.raises(UnreadableRegion, match="tile 1, 0: "):
        slide.read_box((128, 0, 384, 128), (10, 10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000
    assert slide.read_box((256, 0, 512, 128), (256, 128)).any()


@pytest.fixture
def tables(tmp_path, write_tiff, flavours, tissue):
    """A slide of shared JPEG tables; where they begin, and their bytes."""
    path = write_tiff(tmp_path / "a.tif", [tissue, halved(tissue)], flavours["jpeg-420-shared-tables"])
    length, where = struct.unpack("<II", path.read_bytes()[entry_of(path, 347) + 4 :][:8])
    return path, where, path.read_bytes()[where : where + length]


def test_shared_tables_that_are_none(tables):
    path, where, data = tables
    patch(path, where, bytes(len(data)))
    assert "shared JPEG tables are damaged" in refused(path)


def test_shared_tables_that_end_early(tables):
    path, _, data = tables
    patch(path, entry_of(path, 347) + 4, struct.pack("<I", len(data) // 2))
    assert "shared JPEG tables are damaged" in refused(path)


@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xc4"], ids=["quantization", "Huffman"])
def test_shared_tables_that_are_impossible(tables, marker):
    """Of a number that does not exist: nothing that a tile says can be trusted then, and nothing of it is shown."""
    path, where, data = tables
    patch(path, where + data.index(marker) + 4, b"\x0f")
    with pytest.raises(UnreadableRegion, match="JPEG: "):
        TiffSlide(path, 0.25).read_box((0, 0, 64, 64), (64, 64))


def test_a_damaged_first_tile_does_not_decide(tmp_path, write_tiff, flavours, tissue):
    path = write_tiff(tmp_path / "a.tif", [tissue], flavours["jpeg-420"])
    offset, length = tile_bytes(path, 0, 0)
    patch(path, offset, bytes(length))
    slide = open_slide(path, reader="tiff")
    with pytest.raises(UnreadableRegion):
        slide.read_box((0, 0, 10, 10), (10, 10))
    assert slide.read_box((256, 256, 512, 512), (64, 64)).shape == (64, 64, 3)


def test_threads(sound):
    slide, other = TiffSlide(sound, cache_bytes=400_000), open_slide(sound, reader="openslide")
    boxes = [(x, y, x + 160, y + 160) for y in range(0, 540, 60) for x in range(0, 740, 60)]
    want = {box: other.read_box(box, (160, 160)) for box in boxes}
    barrier = threading.Barrier(4)

    def read(part):
        barrier.wait()
        return all((slide.read_box(box, (160, 160)) == want[box]).all() for box in part)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, (boxes[i::4] for i in range(4))))
    assert slide.stats.reads == len(boxes)


def test_a_closed_slide_says_so(sound):
    with open_slide(sound, reader="tiff") as slide:
        slide.read_box((0, 0, 10, 10), (10, 10))
    slide.close()
    with pytest.raises(SlideError, match="closed"):
        slide.read_box((0, 0, 10, 10), (10, 10))


def test_it_travels_to_another_process(sound):
    slide = open_slide(sound, 0.5, reader="tiff")
    other = pickle.loads(pickle.dumps(slide))
    assert (other.reader, other.mpp, other.mpp_source) == ("tiff", 0.5, "user")
    assert (other.read_box((0, 0, 64, 64), (64, 64)) == slide.read_box((0, 0, 64, 64), (64, 64))).all()


def test_facts_come_from_the_same_place(sound):
    slide = open_slide(sound, reader="tiff")
    assert (slide.vendor, slide.mpp_source) == ("generic-tiff", TIFF_TAGS)


def test_a_file_that_shrinks_while_it_is_open(sound):
    slide = open_slide(sound, reader="tiff")
    data = sound.read_bytes()
    with sound.open("r+b") as handle:
        handle.truncate(100)
    with pytest.raises(UnreadableRegion, match="cut since it was opened"):
        slide.read_box((300, 300, 310, 310), (10, 10))
    sound.write_bytes(data)


def test_a_system_without_positioned_reads(sound, monkeypatch):
    want = open_slide(sound, reader="tiff").read_box((0, 0, 300, 300), (300, 300))
    monkeypatch.delattr("os.pread")
    assert (open_slide(sound, reader="tiff").read_box((0, 0, 300, 300), (300, 300)) == want).all()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_the_structure_is_an_error_or_harmless(tmp_path_factory, sample_file, data):
    """A few bytes of the header and the directories are overwritten: no exception but the ones that are meant."""
    original, positions = sample_file
    harmed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        harmed[data.draw(st.sampled_from(positions))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "harmed.tif"
    path.write_bytes(harmed)
    with contextlib.suppress(NotUnderstood):
        for directory in read_directories(RandomAccessFile(path)):
            tiled_image(RandomAccessFile(path), directory)
    with contextlib.suppress(SlideError), open_slide(path, 0.25, reader="tiff") as slide:
        assert slide.read_box((0, 0, 64, 64), (16, 16)).shape == (16, 16, 3)


@pytest.fixture(scope="module")
def sample_file(tmp_path_factory, write_tiff, flavours, tissue):
    """A small file, and the positions of all its bytes that are not of tiles."""
    path = tmp_path_factory.mktemp("fuzz") / "a.tif"
    write_tiff(path, [tissue[:300, :300], halved(tissue[:300, :300])], flavours["jpeg-420-shared-tables"])
    data = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        tiles = [
            (offset, length)
            for page in tiff.pages
            for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True)
        ]
    held = {position for offset, length in tiles for position in range(offset, offset + length)}
    return data, [position for position in range(len(data)) if position not in held]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    name=st.sampled_from(["jpeg-420", "jpeg-rgb-shared-tables", "jpeg-progressive", "jpeg2000-rgb", "lzw", "deflate"]),
)
def test_a_damaged_tile_gives_no_other_pixels_than_openslides(
    tmp_path_factory, write_tiff, flavours, tissue, data, name
):
    """Bytes of one tile are overwritten: it is refused, or OpenSlide, too, gives these pixels."""
    path = tmp_path_factory.getbasetemp() / f"{name}.tif"
    image = tissue[:128, :256]
    write_tiff(path, [image, halved(image)], replace(flavours[name], tile_px=(128, 128)))
    offset, length = tile_bytes(path, 1, 0)
    for _ in range(data.draw(st.integers(1, 4))):
        # At 11 and 12 a JPEG may state the revision of its JFIF marker: nothing depends on it, but OpenSlide minds.
        place = data.draw(st.integers(0, length - 1).filter(lambda at: at not in (11, 12)))
        patch(path, offset + place, bytes([data.draw(st.integers(0, 255))]))
    got = []
    for reader in ("tiff", "openslide"):
        try:
            got.append(open_slide(path, reader=reader).read_box((128, 0, 256, 128), (128, 128)))
        except UnreadableRegion:
            got.append(None)
    assert got[0] is None or (got[1] is not None and (got[0] == got[1]).all())


def test_a_property_that_openslide_names_and_cannot_tell():
    """Of a description with damaged bytes OpenSlide lists properties, and then has no value of them."""

    class Torn(dict):
        def __getitem__(self, name):
            if name == "torn":
                raise KeyError
            return super().__getitem__(name)

    assert _properties(Torn(sound="1", torn="2")) == {"sound": "1"}


def test_a_description_with_damaged_bytes(tmp_path, write_tiff, flavours, tissue):
    path = write_tiff(tmp_path / "a.svs", [tissue[:200, :200]], flavours["jpeg-rgb-shared-tables"])
    start = path.read_bytes().index(b"|MPP")
    for value in (0x80, 0xFF, 0xC3):
        patch(path, start + 1, bytes([value]))
        for reader in ("tiff", "openslide"):
            with open_slide(path, 0.25, reader=reader) as slide:
                assert slide.read_box((0, 0, 64, 64), (64, 64)).shape == (64, 64, 3)
