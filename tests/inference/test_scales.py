"""Methods that choose their patches read and encode what they choose from the slide file, and nothing else."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrmil.encoders import Encoder, EncoderCard, embed
from lrmil.encoders.vit import build_trunk
from lrmil.errors import ConfigError, HeadError, NoTissue, SlideTooCoarse, TooManyUnreadable
from lrmil.geometry import GridSettings, MatchedGrid, match_grids
from lrmil.inference.layouts import CHILD_SCALES, ZOOM_SCALES, layouts_for, patch_reads, scale_mpps
from lrmil.inference.prepare import TileSettings, prepare_slide
from lrmil.inference.scales import THUMBNAIL, SlideScales
from lrmil.inference.selective import answer_slide
from lrmil.inference.stream import child_reads
from lrmil.mil import MultiScaleHead, RecordedSource, StoredScales, create_head
from lrmil.slides import open_slide
from lrmil.slides.recording import RecordingSlide
from lrmil.tissue import TissueSettings

GRID = GridSettings(patch_px=32, lr_mpp=2.0, hr_mpp=0.5)
SLIDES = {"40x": {"mpp": 0.25}, "20x": {"mpp": 0.5, "shrink": 2}}
HEADS = ("zoommil", "hdmil")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """Random and tiny: what it says does not matter, as long as it differs from patch to patch."""
    card = EncoderCard(
        name="tiny",
        title="Tiny",
        architecture="vit_small_patch8_224",
        arch_args={"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
        width=32,
        depth=2,
        token_px=8,
        table_px=32,
        input_px=32,
        licence="Apache-2.0",
        share_derivatives=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder(card, build_trunk(card), input_px=32, embedding="cls", weights_source="drawn at random")


@pytest.fixture(params=SLIDES)
def path(request: pytest.FixtureRequest, write_slide: Callable[..., Path]) -> Path:
    return write_slide(**SLIDES[request.param])


def grid_of(slide: Any) -> MatchedGrid:
    return prepare_slide(slide, GRID, TissueSettings(), TileSettings()).grid


def make_head(name: str, in_dim: int, slide: Any, seed: int = 0) -> MultiScaleHead:
    """A head that takes some patches and leaves others."""
    options: dict[str, Any] = {"zoommil": {"k": 3}, "hdmil": {}}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = create_head(name, in_dim, 3, **options).eval()
    if name == "hdmil":
        # Scores of fresh weights hardly differ: normalise them for this slide, then set each class's threshold high.
        thumbnails = SlideScales(slide, grid_of(slide), None, head.scales).thumbnails()
        with torch.no_grad():
            for norm in (module for module in head.lipn.modules() if isinstance(module, torch.nn.BatchNorm2d)):
                norm.momentum = 1.0
            head.lipn.train()(thumbnails)
            head.eval()
            head.lipn.classifier.bias -= torch.quantile(head.lipn(thumbnails), 0.8, dim=0)
    return head


def features_one_by_one(slide: Any, boxes_l0: np.ndarray, encoder: Any) -> torch.Tensor:
    """Read each patch for itself, and encode it."""
    images = np.stack([slide.read_box(tuple(box), (32, 32)) for box in boxes_l0.tolist()])
    return torch.from_numpy(embed(encoder, images, precision="float32").embedding)


def stored(slide: Any, grid: MatchedGrid, head: MultiScaleHead, encoder: Any) -> StoredScales:
    """Everything precomputed, by other code than that under test: boxes from the region's corner and a side."""
    x0, y0 = grid.region_boxes_l0[:, :2].T
    side = grid.scale.region_side_l0
    assert side == int(side)

    def boxes(x: np.ndarray, y: np.ndarray, side: float) -> np.ndarray:
        return np.stack([x, y, x + side, y + side], axis=1).astype(np.int64)

    if head.scales == CHILD_SCALES:
        thumbnails = [slide.read_box(tuple(box), (2, 2)) for box in grid.child_boxes_l0.tolist()]
        high = features_one_by_one(slide, grid.child_boxes_l0, encoder)
        return StoredScales({"high": high}, thumbnails=torch.from_numpy(np.stack(thumbnails)))
    # (row, column) offsets of the four in one, as in the files of ZoomMIL's program
    order = [(0, 0), (1, 0), (0, 1), (1, 1)]
    low = list(zip(x0, y0, strict=True))
    mid = [(x + c * side / 2, y + r * side / 2) for x, y in low for r, c in order]
    high = [(x + c * side / 4, y + r * side / 4) for x, y in mid for r, c in order]
    scales = {"low": (low, side), "mid": (mid, side / 2), "high": (high, side / 4)}
    features = {
        name: features_one_by_one(slide, boxes(*np.array(corners, float).T, length), encoder)
        for name, (corners, length) in scales.items()
    }
    return StoredScales(features)


@pytest.mark.parametrize("name", HEADS)
def test_answers_are_those_from_precomputed_features(name: str, path: Path, encoder: Encoder) -> None:
    with open_slide(path) as slide:
        grid = grid_of(slide)
        head = make_head(name, encoder.embed_dim, slide)
        source = SlideScales(slide, grid, encoder, head.scales, precision="float32")
        answer = answer_slide(head, source)
        known = stored(slide, grid, head, encoder)
        with torch.inference_mode():
            expected = head(known)
    assert dict(source.counts) == dict(known.counts)
    np.testing.assert_allclose(answer.logits, expected.logits.numpy(), atol=1e-5)
    np.testing.assert_allclose(answer.probabilities.sum(), 1.0)
    for scale, rows in expected.selected.items():
        np.testing.assert_array_equal(answer.selected[scale], rows.numpy())
        if scale != "low":
            assert 0 < len(rows) < known.counts[scale], "the comparison is only worth something if it chose"


@pytest.mark.parametrize("name", HEADS)
def test_exactly_what_is_selected_is_encoded(
    name: str, path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    images_seen: list[np.ndarray] = []

    def watched(encoder: Any, images: np.ndarray, **options: Any) -> Any:
        images_seen.extend(images.copy())
        return embed(encoder, images, **options)

    monkeypatch.setattr("lrmil.inference.stream.encoding.embed", watched)
    with open_slide(path) as slide:
        head = make_head(name, encoder.embed_dim, slide)
        source = SlideScales(slide, grid_of(slide), encoder, head.scales, batch_size=5)
        recorded = RecordedSource(source)
        with torch.inference_mode():
            output = head(recorded)
        recorded.check(output.selected)
        wanted = []
        for scale, rows in output.selected.items():
            np.testing.assert_array_equal(source.encoded(scale), rows.numpy())
            assert source.costs[scale].patches_encoded == source.costs[scale].patches_read == len(rows)
            wanted += [slide.read_box(tuple(box), (32, 32)) for box in source.layouts[scale].boxes_l0[rows].tolist()]
    # The encoder itself saw these very pictures, whatever the counts say.
    assert sorted(image.tobytes() for image in images_seen) == sorted(image.tobytes() for image in wanted)


def test_pixels_are_read_where_and_as_finely_as_was_chosen(path: Path, encoder: Encoder) -> None:
    with open_slide(path) as plain:
        grid = grid_of(plain)
        head = make_head("zoommil", encoder.embed_dim, plain)
        slide = RecordingSlide(plain)
        answer = answer_slide(head, SlideScales(slide, grid, encoder, head.scales))
        layouts = layouts_for(ZOOM_SCALES, grid)
    for scale, mpp in scale_mpps(ZOOM_SCALES, GRID).items():
        requests = [r for r in slide.requests if r.mpp == pytest.approx(mpp)]
        chosen = layouts[scale].boxes_l0[answer.selected[scale]]
        assert requests
        for request in requests:
            x0, y0, x1, y1 = request.box_l0
            inside = (chosen[:, 0] >= x0) & (chosen[:, 1] >= y0) & (chosen[:, 2] <= x1) & (chosen[:, 3] <= y1)
            assert 2 * inside.sum() > (x1 - x0) * (y1 - y0) / layouts[scale].side_l0 ** 2
    assert {round(r.mpp, 6) for r in slide.requests} == {2.0, 1.0, 0.5}


def test_thumbnails_never_touch_the_patches(path: Path) -> None:
    with open_slide(path) as plain:
        grid = grid_of(plain)
        slide = RecordingSlide(plain)
        source = SlideScales(slide, grid, None, CHILD_SCALES)
        thumbnails = source.thumbnails()
        requests = list(slide.requests)
        source.thumbnails()
        assert len(slide.requests) == len(requests), "read once"
        alone = [plain.read_box(tuple(box), (2, 2)) for box in grid.child_boxes_l0.tolist()]
    assert thumbnails.dtype == torch.uint8
    assert thumbnails.shape == (grid.num_children, 2, 2, 3)
    assert len(requests) == len(np.unique(grid.child_region)), "one read a region"
    assert min(r.mpp for r in requests) == pytest.approx(16 * 0.5)
    np.testing.assert_array_equal(thumbnails.numpy(), np.stack(alone))
    assert source.costs[THUMBNAIL].patches_read == grid.num_children
    assert source.costs[THUMBNAIL].patches_encoded == source.costs["high"].patches_read == 0


def test_a_thumbnail_of_a_patch_of_256_has_16_pixels(write_slide: Callable[..., Path]) -> None:
    with open_slide(write_slide(0.25)) as slide:
        grid = match_grids(GridSettings(), slide.mpp, slide.dimensions)
        thumbnails = SlideScales(slide, grid, None, CHILD_SCALES).thumbnails()
    assert thumbnails.shape[1:] == (16, 16, 3)


class Greedy(MultiScaleHead):
    """Reads more than it says, or says more than it reads."""

    scales = CHILD_SCALES

    def __init__(self, honest: MultiScaleHead, extra: int) -> None:
        super().__init__(honest.in_dim, honest.num_classes, honest.options)
        self.honest, self.extra, self.card = honest, extra, honest.card

    def score(self, source: Any, *, label: torch.Tensor | None) -> Any:
        output = self.honest.score(source, label=label)
        rows = output.selected["high"]
        if self.extra > 0:
            others = torch.tensor([row for row in range(source.counts["high"]) if row not in rows])
            source.fetch("high", others[: self.extra])
        else:
            output.selected["high"] = torch.arange(source.counts["high"])
        return output


@pytest.mark.parametrize(("extra", "fault"), [(1, "encoded but not selected"), (-1, "selected but not encoded")])
def test_a_head_with_a_wrong_account_is_found_out(
    extra: int, fault: str, write_slide: Callable[..., Path], encoder: Encoder
) -> None:
    with open_slide(write_slide(0.5, shrink=2)) as slide:
        head = Greedy(make_head("hdmil", encoder.embed_dim, slide), extra).eval()
        with pytest.raises(HeadError, match=fault):
            answer_slide(head, SlideScales(slide, grid_of(slide), encoder, head.scales))


def test_each_patch_is_encoded_once_however_often_it_is_asked_for(
    write_slide: Callable[..., Path], encoder: Encoder
) -> None:
    with open_slide(write_slide(0.5, shrink=2)) as slide:
        source = SlideScales(slide, grid_of(slide), encoder, CHILD_SCALES)
        first = source.fetch("high", torch.tensor([7, 2, 2, 9]))
        again = source.fetch("high", torch.tensor([9, 7, 4]))
        assert source.costs["high"].patches_encoded == 4
        assert source.fetch("high", torch.tensor([], dtype=torch.int64)).shape == (0, encoder.embed_dim)
    torch.testing.assert_close(first[[3, 0]], again[:2], rtol=0, atol=0)
    torch.testing.assert_close(first[1], first[2], rtol=0, atol=0)
    assert not torch.equal(first[0], first[1])


def test_what_is_known_is_neither_read_nor_counted(write_slide: Callable[..., Path], encoder: Encoder) -> None:
    with open_slide(write_slide(0.5, shrink=2)) as slide:
        source = SlideScales(slide, grid_of(slide), encoder, CHILD_SCALES)
        source.remember("high", np.array([3, 5]), np.full((2, encoder.embed_dim), 7.0))
        got = source.fetch("high", torch.tensor([5, 4, 3]))
        assert source.costs["high"].patches_encoded == source.costs["high"].patches_read == 1
    assert bool((got[[0, 2]] == 7).all())
    assert bool((got[1] != 7).any())


def test_regions_are_those_of_the_grid_and_keep_all_their_children(write_slide: Callable[..., Path]) -> None:
    with open_slide(write_slide(0.25)) as slide:
        grid = grid_of(slide)
    assert grid.num_children < 16 * grid.num_regions, "some children lack tissue, or this says nothing"
    layouts = layouts_for(ZOOM_SCALES, grid)
    assert {scale: len(layout) for scale, layout in layouts.items()} == {
        "low": grid.num_regions,
        "mid": 4 * grid.num_regions,
        "high": 16 * grid.num_regions,
    }
    np.testing.assert_array_equal(layouts["low"].boxes_l0, grid.region_boxes_l0)
    # The grid's own children are all there, at the place that region and slot say.
    high = layouts["high"]
    place = {(r, s): box for r, s, box in zip(high.region, high.slot, high.boxes_l0.tolist(), strict=True)}
    for region, slot, box in zip(grid.child_region, grid.child_slot, grid.child_boxes_l0.tolist(), strict=True):
        assert place[region, slot] == box


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.2271, 0.37])
@pytest.mark.parametrize("lr_mpp", [2.0, 4.0])
def test_children_tile_their_parents_without_gap(mpp: float, lr_mpp: float) -> None:
    grid = match_grids(GridSettings(patch_px=32, lr_mpp=lr_mpp, hr_mpp=0.5), mpp, (3000, 2000), origin_l0=(13, 5))
    layouts = list(layouts_for(ZOOM_SCALES, grid).values())
    for coarse, fine in itertools.pairwise(layouts):
        each = len(fine) // len(coarse)
        boxes = fine.boxes_l0.reshape(len(coarse), each, 4)
        np.testing.assert_array_equal(boxes[..., :2].min(axis=1), coarse.boxes_l0[:, :2])
        np.testing.assert_array_equal(boxes[..., 2:].max(axis=1), coarse.boxes_l0[:, 2:])
        area = (boxes[..., 2:] - boxes[..., :2]).prod(axis=2).sum(axis=1)
        np.testing.assert_array_equal(area, (coarse.boxes_l0[:, 2:] - coarse.boxes_l0[:, :2]).prod(axis=1))
        np.testing.assert_array_equal(np.repeat(coarse.region, each), fine.region)
        assert fine.mpp < coarse.mpp


def test_four_children_stand_down_then_across() -> None:
    grid = match_grids(GRID, 0.5, (300, 300))
    mid = layouts_for(ZOOM_SCALES, grid)["mid"]
    x0, y0 = grid.region_boxes_l0[0, :2]
    half = grid.scale.region_side_l0 / 2
    assert [((y - y0) / half, (x - x0) / half) for x, y in mid.boxes_l0[:4, :2]] == [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("snapped", [True, False])
def test_reads_cut_what_is_wanted_and_nothing_else(snapped: bool) -> None:
    grid = match_grids(GRID, 0.5 if snapped else 0.37, (900, 700))
    assert grid.scale.snapped == snapped
    layout = layouts_for(ZOOM_SCALES, grid)["high"]
    rng = np.random.default_rng(0)
    for share in (0.05, 0.3, 0.6, 0.9, 1.0):
        rows = rng.permutation(len(layout))[: int(share * len(layout))]
        reads = patch_reads(layout, rows, 32, snapped=snapped)
        assert sorted(np.concatenate([read.rows for read in reads]).tolist()) == sorted(rows.tolist())
        for read in reads:
            # Each cut lies in the picture where its own box lies in the picture's.
            x0, y0, x1, _y1 = read.box_l0
            np.testing.assert_array_equal(read.boxes_l0, layout.boxes_l0[read.rows])
            step = (x1 - x0) / read.size_px[0]
            np.testing.assert_allclose((read.boxes_l0[:, :2] - (x0, y0)) / step, read.corners_px)
            assert 2 * len(read.rows) * 32**2 > np.prod(read.size_px)
        if share == 1.0:
            assert len(reads) == (grid.num_regions if snapped else len(layout))


def test_reading_all_children_costs_no_more_than_for_the_teacher(write_slide: Callable[..., Path]) -> None:
    with open_slide(write_slide(0.25)) as slide:
        grid = grid_of(slide)
    layout = layouts_for(CHILD_SCALES, grid)["high"]
    assert len(patch_reads(layout, np.arange(len(layout)), 32, snapped=True)) <= len(child_reads(grid))


@pytest.fixture
def damaged(write_slide: Callable[..., Path], damage: Callable[..., None], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the 20x slide, 768 x 512 px, of which tiles of 128 px (one region each) cannot be decoded."""

    def make(level: int, tiles: list[tuple[int, int]] | None) -> Path:
        path = tmp_path / "damaged.tif"
        shutil.copy(write_slide(0.5, downsamples=(1, 4), shrink=2), path)
        damage(path, level, tiles)
        return path

    return make


def test_a_region_with_an_undecodable_part_is_left_out_at_all_scales(
    damaged: Callable[..., Path], write_slide: Callable[..., Path], encoder: Encoder
) -> None:
    with open_slide(write_slide(0.5, downsamples=(1, 4), shrink=2)) as whole:
        grid = grid_of(whole)
        head = make_head("zoommil", encoder.embed_dim, whole)
        chosen = answer_slide(head, SlideScales(whole, grid, encoder, head.scales)).selected["high"]
        region = int(layouts_for(ZOOM_SCALES, grid)["high"].region[chosen[0]])
        kept = np.delete(np.arange(grid.num_regions), region)
        # What the slide would answer if this region were not there
        source = SlideScales(whole, without_region(grid, kept), encoder, head.scales, precision="float32")
        expected = answer_slide(head, source)
    column, row = grid.region_index[region].tolist()
    with open_slide(damaged(0, [(column, row)])) as slide:
        source = SlideScales(slide, grid, encoder, head.scales, precision="float32", max_unreadable=0.5)
        answer = answer_slide(head, source)
    assert source.lost > 0
    assert source.counts == {"low": len(kept), "mid": 4 * len(kept), "high": 16 * len(kept)}
    np.testing.assert_allclose(answer.logits, expected.logits, atol=1e-5)
    assert region not in source.layouts["high"].region[answer.selected["high"]]


def without_region(grid: MatchedGrid, kept: np.ndarray) -> MatchedGrid:
    from dataclasses import replace

    return replace(
        grid,
        region_boxes_l0=grid.region_boxes_l0[kept],
        region_index=grid.region_index[kept],
        region_tissue=grid.region_tissue[kept],
        **{name: getattr(grid, name)[:0] for name in ("child_boxes_l0", "child_region", "child_slot", "child_tissue")},
    )


def test_children_whose_thumbnail_or_patch_cannot_be_decoded_are_left_out(
    damaged: Callable[..., Path], encoder: Encoder
) -> None:
    path = damaged(0, [(3, 1)])
    with open_slide(path) as slide:
        grid = grid_of(slide)
        lost = np.flatnonzero(grid.child_region == int(np.flatnonzero((grid.region_index == (3, 1)).all(axis=1))[0]))
        head = make_head("hdmil", encoder.embed_dim, slide)
        with torch.no_grad():
            head.lipn.classifier.bias += 100  # takes all
        source = SlideScales(slide, grid, encoder, head.scales)
        answer = answer_slide(head, source)
        assert np.isfinite(answer.logits).all()
        np.testing.assert_array_equal(answer.selected["high"], np.setdiff1d(np.arange(grid.num_children), lost))


def test_a_slide_that_lost_too_much_is_given_up(damaged: Callable[..., Path], encoder: Encoder) -> None:
    with open_slide(damaged(0, None)) as slide:
        grid = grid_of(slide)
        head = make_head("zoommil", encoder.embed_dim, slide)
        with pytest.raises(TooManyUnreadable, match="max_unreadable"):
            answer_slide(head, SlideScales(slide, grid, encoder, head.scales, max_unreadable=0.1))


def test_what_cannot_be_laid_out_is_refused_by_name() -> None:
    with pytest.raises(SlideTooCoarse):
        layouts_for(ZOOM_SCALES, match_grids(GRID, 1.0, (900, 900)))
    with pytest.raises(ConfigError, match="middle"):
        layouts_for(ZOOM_SCALES, match_grids(GridSettings(patch_px=32, lr_mpp=1.0, hr_mpp=0.5), 0.5, (900, 900)))
    with pytest.raises(ConfigError, match="low"):
        layouts_for(("low",), match_grids(GRID, 0.5, (900, 900)))
    empty = match_grids(GRID, 0.5, (900, 900), lambda boxes: np.zeros(len(boxes)))
    with pytest.raises(NoTissue):
        layouts_for(ZOOM_SCALES, empty)
