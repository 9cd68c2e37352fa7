"""Reading patches: region by region or child by child the same pixels, in order, bounded, and honest about damage."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.encoders import embed
from lrmil.errors import NoTissue, TooManyUnreadable
from lrmil.geometry import GridSettings, match_grids
from lrmil.inference.stream import ReadingLog, child_reads, encode_patches, region_reads, stream_patches
from lrmil.slides import open_slide, write_pyramid

GRID = GridSettings(patch_px=32, lr_mpp=2.0, hr_mpp=0.5)
PYRAMIDS = {
    "40x 1-4-16": (0.25, (1, 4, 16)),
    "40x 1-2-4-8": (0.25, (1, 2, 4, 8)),
    "20x alone": (0.5, (1,)),
    "80x 1-4": (0.125, (1, 4)),
    "80x 1-2-4": (0.125, (1, 2, 4)),
}


def patches_of(slide, reads, patch_px, **options):
    """Stream everything: {row: pixels}, rows in reading order, and the log."""
    log = ReadingLog()
    batches = list(stream_patches(slide, reads, patch_px, **{"batch_size": 7, "threads": 2, "log": log} | options))
    rows = np.concatenate([b.rows for b in batches]) if batches else np.empty(0, np.int64)
    images = np.concatenate([b.images for b in batches]) if batches else np.empty((0, patch_px, patch_px, 3))
    return rows, images, log


def intersects(boxes, area):
    x0, y0, x1, y1 = area
    return (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)


@pytest.fixture(scope="module")
def noisy_slides(tmp_path_factory):
    """One slide per pyramid, pure noise: any shift or blur of a pixel shows."""
    noise = np.random.default_rng(1).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("noise")
    return {
        name: open_slide(write_pyramid(folder / f"{i}.tif", noise, mpp, steps, compression="deflate"))
        for i, (name, (mpp, steps)) in enumerate(PYRAMIDS.items())
    }


@settings(deadline=None, max_examples=40)
@given(
    pyramid=st.sampled_from(sorted(PYRAMIDS)),
    ratio=st.sampled_from([2, 4, 8]),
    patch_px=st.sampled_from([16, 24]),
    origin=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    data=st.data(),
)
def test_children_cut_from_a_region_equal_single_reads(noisy_slides, pyramid, ratio, patch_px, origin, data):
    slide = noisy_slides[pyramid]
    wanted = GridSettings(patch_px=patch_px, lr_mpp=0.5 * ratio, hr_mpp=0.5)
    # Everything counts as tissue, also what reaches past the slide.
    grid = match_grids(wanted, slide.mpp, slide.dimensions, lambda boxes: np.ones(len(boxes)), origin_l0=origin)
    assert grid.scale.snapped
    region = data.draw(st.integers(0, grid.num_regions - 1))
    reads = child_reads(grid, np.array([region, grid.num_regions - 1]))
    assert {len(read.rows) for read in reads} == {ratio * ratio}, "not read at once"
    rows, images, log = patches_of(slide, reads, patch_px)
    assert (rows == np.flatnonzero(np.isin(grid.child_region, [region, grid.num_regions - 1]))).all()
    assert log.patches == len(rows)
    for box, image in zip(grid.child_boxes_l0[rows].tolist(), images, strict=True):
        assert (image == slide.read_box(tuple(box), (patch_px, patch_px))).all(), box


def test_children_on_a_level_of_rounded_size_differ_by_a_blend_only(tmp_path, tissue_picture):
    """OpenSlide takes such a level for 4.005 times smaller and blends neighbours, differently for each position."""
    path = write_pyramid(tmp_path / "odd.tif", tissue_picture(1539, 1027), 0.125, (1, 4), compression="deflate")
    slide = open_slide(path)
    grid = match_grids(GridSettings(patch_px=16), slide.mpp, slide.dimensions)
    _, images, _ = patches_of(slide, child_reads(grid), 16)
    singly = np.stack([slide.read_box(tuple(box), (16, 16)) for box in grid.child_boxes_l0.tolist()])
    assert slide.stats.level_reads.keys() == {1}
    assert np.abs(images.astype(int) - singly).mean() < 1.0


def test_children_of_a_scale_that_is_not_snapped_are_read_singly(tmp_path, tissue_picture):
    path = write_pyramid(tmp_path / "a.tif", tissue_picture(1200, 900), 0.3, (1, 4), compression="deflate")
    slide = open_slide(path)
    grid = match_grids(GRID, slide.mpp, slide.dimensions)
    assert not grid.scale.snapped
    reads = child_reads(grid)
    assert [r.rows.tolist() for r in reads] == [[row] for row in range(grid.num_children)]
    assert [r.box_l0 for r in reads] == [tuple(box) for box in grid.child_boxes_l0.tolist()]


def test_few_children_are_read_singly_and_many_at_once(write_slide):
    """Half the children of a region or fewer cost less one by one than the whole region at high resolution."""
    slide = open_slide(write_slide())
    side = 64

    def coverage(boxes):
        first_region = (boxes[:, 0] < 256) & (boxes[:, 1] < 256)
        whole = boxes[:, 2] - boxes[:, 0] > side
        few = first_region & (boxes[:, 1] < 2 * side)
        return np.where(whole, 1.0, np.where(first_region, few, 1.0))

    grid = match_grids(GRID, slide.mpp, slide.dimensions, coverage)
    assert grid.children_per_region[:2].tolist() == [8, 16]
    reads = child_reads(grid, np.array([0, 1]))
    assert [len(read.rows) for read in reads] == [1] * 8 + [16]
    assert np.concatenate([read.rows for read in reads]).tolist() == list(range(24))


def test_reads_of_some_regions_only(write_slide):
    slide = open_slide(write_slide())
    grid = match_grids(GRID, slide.mpp, slide.dimensions)
    reads = child_reads(grid, np.array([7, 3]))
    rows = np.concatenate([read.rows for read in reads])
    assert (grid.child_region[rows] == np.repeat([3, 7], 16)).all()


def test_batches_keep_order_and_size(write_slide):
    slide = open_slide(write_slide())
    grid = match_grids(GRID, slide.mpp, slide.dimensions)
    for threads, batch_size in ((1, 5), (4, 5), (3, 24), (2, 100)):
        log = ReadingLog()
        batches = list(stream_patches(slide, region_reads(grid), 32, batch_size=batch_size, threads=threads, log=log))
        assert [len(b.rows) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert np.concatenate([b.rows for b in batches]).tolist() == list(range(24))
        assert all(b.images.shape == (len(b.rows), 32, 32, 3) and b.images.dtype == np.uint8 for b in batches)
        assert (log.patches, log.unreadable, log.first_error) == (24, [], None)


class CountingSlide:
    """Counts reads, and how many patches were started; pixels carry the box they are of."""

    name = "counting"

    def __init__(self):
        self.started = 0
        self._lock = threading.Lock()

    def announce(self, requests):
        pass

    def withdraw(self):
        pass

    def read_box(self, box_l0, size_px, out):
        with self._lock:
            self.started += 1
        out[...] = box_l0[0] % 251
        return out


def test_one_batch_is_read_ahead_and_no_more():
    grid = match_grids(GRID, 0.5, (128 * 100, 128))
    assert grid.num_regions == 100
    slide = CountingSlide()
    log = ReadingLog()
    batches = stream_patches(slide, region_reads(grid), 32, batch_size=10, threads=2, log=log)
    next(batches)
    deadline = threading.Event()
    for _ in range(200):
        if slide.started >= 19:
            break
        deadline.wait(0.01)
    assert 19 <= slide.started <= 20, "the next batch is read while this one is encoded"
    batches.close()
    assert slide.started <= 20


def test_an_error_while_encoding_stops_the_readers():
    slide = CountingSlide()
    grid = match_grids(GRID, 0.5, (128 * 100, 128))

    def consume():
        for _ in stream_patches(slide, region_reads(grid), 32, batch_size=10, threads=2, log=ReadingLog()):
            raise ValueError("the encoder broke")

    with pytest.raises(ValueError, match="the encoder broke"):
        consume()
    assert slide.started <= 20
    assert not [t for t in threading.enumerate() if t.name.startswith("read")]


@pytest.fixture
def damaged(tmp_path, write_slide, damage):
    """A copy of the 40x slide whose level 1 (read for regions) and level 0 (for children) have one bad tile each."""
    path = tmp_path / "damaged.tif"
    shutil.copy(write_slide(), path)
    damage(path, 1, [(1, 0)])
    damage(path, 0, [(5, 3)])
    return open_slide(path)


def test_a_bad_tile_costs_the_regions_that_touch_it(damaged, parts):
    grid = match_grids(GRID, damaged.mpp, damaged.dimensions)
    bad = intersects(grid.region_boxes_l0, (512, 0, 1024, 512))
    assert bad.sum() == 4
    rows, images, log = patches_of(damaged, region_reads(grid), 32)
    assert (rows == np.flatnonzero(~bad)).all()
    assert sorted(log.unreadable) == np.flatnonzero(bad).tolist()
    assert log.patches == 20
    assert "x 512..768, y 0..256" in log.first_error
    assert not log.first_error.startswith("damaged")

    seen = encode_patches(damaged, region_reads(grid), 32, parts[0], batch_size=64, threads=2)
    assert (seen.rows == rows).all()
    assert (seen.embedding == embed(parts[0], images).embedding).all()
    assert sorted(seen.log.unreadable) == np.flatnonzero(bad).tolist()


def test_a_bad_tile_costs_the_children_that_touch_it_and_not_their_region(damaged):
    grid = match_grids(GRID, damaged.mpp, damaged.dimensions)
    bad = intersects(grid.child_boxes_l0, (5 * 128, 3 * 128, 6 * 128, 4 * 128))
    assert bad.sum() == 4
    assert len(set(grid.child_region[bad])) == 1
    rows, images, log = patches_of(damaged, child_reads(grid), 32)
    assert (rows == np.flatnonzero(~bad)).all()
    assert sorted(log.unreadable) == np.flatnonzero(bad).tolist()
    for box, image in zip(grid.child_boxes_l0[rows].tolist(), images, strict=True):
        assert (image == damaged.read_box(tuple(box), (32, 32))).all()


@pytest.mark.parametrize(("limit", "fails"), [(0.0, True), (0.16, True), (0.17, False), (1.0, False)])
def test_too_many_bad_regions(damaged, parts, limit, fails):
    """4 of 24 regions, which is 16.7 %."""
    grid = match_grids(GRID, damaged.mpp, damaged.dimensions)
    reads = region_reads(grid)
    if not fails:
        seen = encode_patches(damaged, reads, 32, parts[0], batch_size=64, threads=2, max_unreadable=limit)
        assert len(seen.rows) == 20
        return
    with pytest.raises(TooManyUnreadable, match=r"4 of 24 patches.*x 512\.\.768.*Copy the file again") as caught:
        encode_patches(damaged, reads, 32, parts[0], batch_size=64, threads=2, max_unreadable=limit)
    assert caught.value.slide == "damaged"
    assert str(caught.value).count("damaged: ") == 1, "the slide is named once"


def test_nothing_readable_is_an_error_whatever_is_allowed(tmp_path, write_slide, damage, parts):
    path = tmp_path / "lost.tif"
    shutil.copy(write_slide(), path)
    damage(path, 1)
    slide = open_slide(path)
    grid = match_grids(GRID, slide.mpp, slide.dimensions)
    with pytest.raises(TooManyUnreadable, match="24 of 24 patches"):
        encode_patches(slide, region_reads(grid), 32, parts[0], batch_size=64, threads=2, max_unreadable=1.0)


def test_nothing_to_read_is_an_error(write_slide, parts):
    with pytest.raises(NoTissue, match=r"case: no patch"):
        encode_patches(open_slide(write_slide()), [], 32, parts[0], batch_size=8, threads=1)


def test_encoding_passes_its_choices_on(write_slide, parts, monkeypatch):
    slide = open_slide(write_slide())
    grid = match_grids(GRID, slide.mpp, slide.dimensions)
    asked, done = [], []

    def spy(encoder, images, **options):
        asked.append((len(images), options["batch_size"], options["precision"], tuple(options["cls_layers"])))
        return embed(encoder, images, **options)

    monkeypatch.setattr("lrmil.inference.stream.encoding.embed", spy)
    seen = encode_patches(
        slide,
        region_reads(grid),
        32,
        parts[0],
        batch_size=10,
        forward_batch=3,
        threads=2,
        precision="float32",
        cls_layers=(2, 11),
        dtype=np.float16,
        on_progress=done.append,
    )
    assert asked == [(n, 3, "float32", (2, 11)) for n in (10, 10, 4)]
    assert done == [10, 20, 24]
    assert seen.embedding.shape == (24, 128)
    assert {layer: v.shape for layer, v in seen.cls.items()} == {2: (24, 128), 11: (24, 128)}
    assert {v.dtype for v in (seen.embedding, *seen.cls.values())} == {np.dtype(np.float16)}
    assert seen.encoding_s > 0


def test_class_tokens_beyond_float16_stay_whole(write_slide, parts, monkeypatch):
    """One batch holds the outlier; rounded to float16 it would be infinite, and the whole slide be refused."""
    slide = open_slide(write_slide())
    grid = match_grids(GRID, slide.mpp, slide.dimensions)
    calls = []

    def outlier(encoder, images, **options):
        out = embed(encoder, images, **options)
        calls.append(len(images))
        if len(calls) == 2:
            out.cls[2][0, 0] = -123456.0
        return out

    monkeypatch.setattr("lrmil.inference.stream.encoding.embed", outlier)
    seen = encode_patches(
        slide, region_reads(grid), 32, parts[0], batch_size=10, threads=1, cls_layers=(2, 11), dtype=np.float16
    )
    assert seen.cls[2].dtype == np.float32
    assert seen.cls[2][10, 0] == -123456.0
    assert np.isfinite(seen.cls[2]).all()
    assert seen.cls[11].dtype == seen.embedding.dtype == np.float16
