"""Many slides through one pool of readers: the same features as slide by slide, full batches, failures kept apart."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import torch

from lrmil.encoders import embed
from lrmil.errors import ConfigError, EncoderError, NotASlide, NoTissue
from lrmil.geometry import GridSettings, match_grids
from lrmil.inference.stream import SlideReads, child_reads, encode_patches, encode_slides, region_reads
from lrmil.inference.stream.batches import Batch
from lrmil.inference.stream.feed import Feed
from lrmil.inference.stream.upload import Ahead, Uploaded, uploaded
from lrmil.slides import open_slide, write_pyramid

GRID = GridSettings(patch_px=32, lr_mpp=2.0, hr_mpp=0.5)
SIZES = {"a": (1024, 512), "b": (512, 256), "c": (768, 768), "d": (256, 256)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    noise = np.random.default_rng(3)
    return [
        write_pyramid(folder / f"{name}.tif", noise.integers(0, 256, (h, w, 3), dtype=np.uint8), 0.25, (1, 4))
        for name, (w, h) in SIZES.items()
    ]


def source(path, ask=region_reads):
    slide = open_slide(path)
    return SlideReads(slide, ask(match_grids(GRID, slide.mpp, slide.dimensions)), note=path.stem)


def broken():
    raise NotASlide("it is noise.", slide="broken")


@pytest.mark.parametrize("ask", [region_reads, child_reads])
@pytest.mark.parametrize(("batch_size", "threads"), [(7, 1), (16, 3), (200, 2)])
def test_features_are_those_of_each_slide_alone(files, parts, ask, batch_size, threads):
    encoder = parts[0]
    options = {"batch_size": batch_size, "threads": threads, "cls_layers": (2,), "precision": "float32"}
    results = list(encode_slides([partial(source, path, ask) for path in files], 32, encoder, **options))
    assert [result.index for result in results] == [0, 1, 2, 3]
    assert [result.opened.note for result in results] == list(SIZES)
    for result, path in zip(results, files, strict=True):
        opened = source(path, ask)
        alone = encode_patches(opened.slide, opened.reads, 32, encoder, **options)
        assert (result.encoded.rows == alone.rows).all()
        # A batch of another size may be summed in another order: equal up to rounding.
        np.testing.assert_allclose(result.encoded.embedding, alone.embedding, atol=1e-5)
        np.testing.assert_allclose(result.encoded.cls[2], alone.cls[2], atol=1e-4)
        assert result.encoded.log == alone.log
        assert result.encoded.encoding_s > 0


def test_batches_are_full_and_span_slides(files):
    with Feed([partial(source, path) for path in files], 32, batch_size=6, threads=2) as feed:
        seen = []
        for batch in feed:
            seen.append((batch.slides.tolist(), batch.rows.tolist(), [end.index for end in batch.ends]))
            feed.free(batch)
    assert [len(slides) for slides, _, _ in seen] == [6, 6, 6, 2]
    assert [i for slides, _, _ in seen for i in slides] == [0] * 8 + [1] * 2 + [2] * 9 + [3]
    assert [i for _, rows, _ in seen for i in rows] == [*range(8), *range(2), *range(9), 0]
    assert [ends for _, _, ends in seen] == [[], [0, 1], [], [2, 3]]


def test_failures_stay_with_their_slide(files, parts):
    empty = partial(source, files[1], lambda grid: [])
    sources = [broken, partial(source, files[0]), empty, broken, partial(source, files[2]), broken]
    results = list(encode_slides(sources, 32, parts[0], batch_size=8, threads=2))
    assert [type(result.error) for result in results] == [
        NotASlide,
        type(None),
        NoTissue,
        NotASlide,
        type(None),
        NotASlide,
    ]
    assert [len(result.encoded.rows) for result in results if result.encoded] == [8, 9]


def test_an_encoder_that_overflows_costs_the_slide_that_it_overflows_on(files, parts, monkeypatch):
    with open_slide(files[1]) as slide:
        victim = slide.read_box((256, 0, 512, 256), (32, 32))

    def overflow(encoder, images, **options):
        if any((image == victim).all() for image in images):
            raise EncoderError("features are not finite.")
        return embed(encoder, images, **options)

    monkeypatch.setattr("lrmil.inference.stream.encoding.embed", overflow)
    sources = [partial(source, path) for path in files]
    results = list(encode_slides(sources, 32, parts[0], batch_size=20, threads=2))
    assert [type(result.error) for result in results] == [type(None), EncoderError, type(None), type(None)]


def test_a_wrong_setting_ends_all(files, parts):
    def wrong():
        raise ConfigError("no such reader.")

    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="no such reader"):
        list(encode_slides([partial(source, files[0]), wrong], 32, parts[0], batch_size=8, threads=2))
    assert set(threading.enumerate()) <= before


def test_slides_are_open_while_they_are_answered_and_closed_after(files, parts):
    opened = []

    def watched(path):
        opened.append(source(path))
        return opened[-1]

    results = encode_slides([partial(watched, path) for path in files], 32, parts[0], batch_size=4, threads=2)
    for result in results:
        assert result.opened.slide.read_box((0, 0, 8, 8), (8, 8)).shape == (8, 8, 3)
        if result.index == 2:
            break
    results.close()
    assert all(one.slide._file.closed for one in opened)


def test_the_next_slides_are_opened_meanwhile_and_no_more(files):
    opened = []

    def watched(path):
        opened.append(path)
        return source(path)

    with Feed([partial(watched, path) for path in [*files, *files]], 32, batch_size=3, threads=1) as feed:
        first = next(iter(feed))
        deadline = threading.Event()
        for _ in range(100):
            if len(opened) >= 3:
                break
            deadline.wait(0.01)
        assert first.slides.tolist() == [0] * 3
        # Two batches hold a part of the first slide; the two after it are ready.
        assert len(opened) == 3


def test_each_tile_is_decoded_once_whatever_the_number_of_threads(files):
    """Patches of 256 px on tiles of 240: four patches and more share a tile."""
    noise = np.random.default_rng(5).integers(0, 256, (1600, 1600, 3), dtype=np.uint8)
    path = write_pyramid(files[0].parent / "odd.tif", noise, 2.0, (1,), tile_px=240, quality=50)
    grid = GridSettings(patch_px=256, lr_mpp=2.0, hr_mpp=1.0)
    for threads in (1, 4):
        with open_slide(path) as slide:
            reads = region_reads(match_grids(grid, slide.mpp, slide.dimensions))
            needed = {ref for read in reads for ref in slide.tiles_of(read.box_l0, read.size_px)}
            with Feed([lambda: SlideReads(slide, reads)], 256, batch_size=8, threads=threads) as feed:  # noqa: B023
                for batch in feed:
                    for row, image in zip(batch.rows, batch.images, strict=True):
                        x, y = reads[row].box_l0[:2]
                        assert batch.slides[0] == 0
                        assert image.shape == (256, 256, 3), (x, y)
                    feed.free(batch)
            assert slide.stats.tiles_decoded == len(needed) == 49
            assert slide._tiles.bytes == 0, "nothing is kept that nobody needs"


def test_copies_are_made_ahead_and_memory_is_given_back_at_once(files):
    """What a GPU does, with an ordinary copy in place of one that crosses the bus."""
    copied = []

    def copy(batch: Batch) -> Uploaded:
        copied.append(threading.current_thread().name)
        return Uploaded(batch, batch.images.copy())

    sources = [partial(source, path) for path in files]
    with Feed(sources, 32, batch_size=6, threads=2, batches=3, reuse=True) as feed:
        got = [(item.batch.slides, item.batch.rows, item.ready()) for item in Ahead(feed, copy)]
    assert copied == ["upload"] * 4
    with Feed(sources, 32, batch_size=6, threads=2, reuse=True) as feed:
        for i, item in enumerate(uploaded(feed, torch.device("cpu"))):
            assert (item.batch.slides == got[i][0]).all()
            assert (item.ready() == got[i][2]).all()


def test_a_copy_that_fails_and_a_consumer_that_leaves_end_the_threads(files):
    def fails(batch: Batch) -> Uploaded:
        raise RuntimeError("out of memory")

    sources = [partial(source, path) for path in files]
    with Feed(sources, 32, batch_size=2, threads=2) as feed, pytest.raises(RuntimeError, match="out of memory"):
        list(Ahead(feed, fails))
    with Feed(sources, 32, batch_size=2, threads=2) as feed:
        ahead = iter(Ahead(feed, lambda batch: Uploaded(batch, batch.images.copy())))
        next(ahead)
        ahead.close()
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("read", "open", "upload"))]
