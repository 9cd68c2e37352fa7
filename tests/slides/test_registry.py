"""Which reader gets a file, and what a file that is no slide is answered."""

from __future__ import annotations

import pytest

from lrmil.errors import ConfigError, ImplausibleMpp, MissingMpp, NotASlide, UnreadableRegion
from lrmil.slides import ReaderCard, io_counter, open_slide, reader_cards, register_reader, registry, write_pyramid


@pytest.fixture
def cards(monkeypatch):
    """A copy of the registry that the test may fill."""
    monkeypatch.setattr(registry, "_CARDS", dict(registry._CARDS))
    return registry._CARDS


def card(name, priority, open_, **options):
    return ReaderCard(name=name, formats="any", licence="Apache-2.0", priority=priority, open=open_, **options)


def test_the_readers_that_come_with_the_package():
    assert [c.name for c in reader_cards()] == ["tiff", "openslide"]
    with pytest.raises(AttributeError):
        reader_cards()[0].name = "other"  # type: ignore[misc]


def test_readers_are_asked_in_order_until_one_takes_the_file(cards, tmp_path, picture):
    path = write_pyramid(tmp_path / "a.tif", picture(64, 64), 0.5)
    asked = []

    def reader(name, takes):
        def open_(path, mpp):
            asked.append((name, path.name, mpp))
            if not takes:
                raise NotASlide("not mine.", slide=path.name)
            return name

        return open_

    register_reader(card("second", 2, reader("second", True)))
    register_reader(card("first", 1, reader("first", False)))
    register_reader(card("shy", 0, reader("shy", True), automatic=False))
    assert open_slide(path, 0.25) == "second"
    assert asked == [("first", "a.tif", 0.25), ("second", "a.tif", 0.25)]
    assert open_slide(path, reader="shy") == "shy"
    assert open_slide(path, reader="openslide").reader == "openslide"
    with pytest.raises(ConfigError, match="no reader 'third'"):
        open_slide(path, reader="third")
    with pytest.raises(ConfigError, match="registered already"):
        register_reader(card("first", 5, reader("first", True)))


def test_any_other_error_is_final(cards, tmp_path, picture):
    path = write_pyramid(tmp_path / "a.tif", picture(64, 64), 0.5)

    def open_(path, mpp):
        raise MissingMpp("nothing said.", slide=path.name)

    register_reader(card("first", 1, open_))
    with pytest.raises(MissingMpp):
        open_slide(path)


def test_the_most_general_reader_says_why(cards, tmp_path):
    (tmp_path / "a.svs").write_bytes(b"noise" * 100)

    def open_(path, mpp):
        raise NotASlide("special.", slide=path.name)

    register_reader(card("first", 1, open_))
    with pytest.raises(NotASlide, match="OpenSlide"):
        open_slide(tmp_path / "a.svs")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(NotASlide, match=r"gone\.svs: there is no file"):
        open_slide(tmp_path / "gone.svs")
    with pytest.raises(NotASlide, match=r"folder.*\.dcm"):
        open_slide(tmp_path)
    (tmp_path / "empty.svs").touch()
    with pytest.raises(NotASlide, match="empty"):
        open_slide(tmp_path / "empty.svs")


def test_a_file_that_fails_while_it_is_looked_at(tmp_path, monkeypatch):
    path = tmp_path / "a.svs"
    path.write_bytes(b"II*\0")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(NotASlide, match=r"Permission denied.*permissions"):
        open_slide(path)


@pytest.mark.parametrize(
    ("name", "says"),
    [("broken.svs", "no kind that OpenSlide knows"), ("smalltif.tif", r"640 x 480 px, 16-bit .*not an 8-bit RGB")],
)
def test_bad_files_are_no_slides(shared_data, name, says):
    for mpp in (None, 0.5):
        with pytest.raises(NotASlide, match=f"^{name}: .*{says}.*convert it"):
            open_slide(shared_data / "bad" / name, mpp)


def test_an_unreadable_slide_opens_and_raises_on_reading(shared_data):
    slide = open_slide(shared_data / "bad" / "unreadable.svs")
    assert slide.dimensions == (16, 16)
    for _ in range(2):
        with pytest.raises(UnreadableRegion, match=r"unreadable: .*x 0\.\.16.*[Mm]arker"):
            slide.read_box((0, 0, 16, 16), (4, 4))
    assert slide.stats.unreadable == 2
    overview = slide.overview(2.0)
    assert overview.unreadable == 1
    assert not overview.scanned.any()


def test_a_small_slide_opens_and_reads(shared_data):
    slide = open_slide(shared_data / "bad" / "small.svs")
    assert slide.dimensions == (16, 16)
    assert slide.mpp == 0.499
    assert slide.read_box((0, 0, 64, 64), (16, 16)).shape == (16, 16, 3)


def test_boxes_has_no_microscopes_pixels(shared_data):
    with pytest.raises(ImplausibleMpp, match=r"352\.778"):
        open_slide(shared_data / "bad" / "boxes.tiff")


def test_bytes_read_are_counted(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(b"x" * 100_000)
    before = io_counter()
    if before is None:
        pytest.skip("this system does not tell how many bytes a process reads")
    path.read_bytes()
    after = io_counter()
    assert after is not None
    assert 100_000 <= after - before < 200_000
