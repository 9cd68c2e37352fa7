"""The matched grid: one rule of scale, children generated from their regions, x never swapped with y."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lrmil.errors import ConfigError, GridMismatch, SlideTooCoarse, SlideTooSmall
from lrmil.geometry import (
    GridSettings,
    IntArray,
    MatchedGrid,
    SlideScale,
    check_token_grid,
    match_by_containment,
    match_grids,
    resolve_scale,
    token_blocks,
)

quick = settings(deadline=None, max_examples=60)


@st.composite
def grids(draw: st.DrawFn) -> GridSettings:
    """Any ratio, any scale, any patch side that the ratio divides."""
    ratio = draw(st.sampled_from([2, 3, 4, 8]))
    hr_mpp = draw(st.sampled_from([0.25, 0.5, 1.0]) | st.floats(0.1, 2.0))
    patch_px = ratio * draw(st.integers(math.ceil(8 / ratio), 512 // ratio))
    return GridSettings(patch_px=patch_px, hr_mpp=hr_mpp, lr_mpp=ratio * hr_mpp)


@st.composite
def cases(draw: st.DrawFn) -> tuple[GridSettings, float, tuple[int, int]]:
    """A grid, the mpp of a slide, and its size: wide or tall, rarely a whole number of regions."""
    grid = draw(grids())
    relative = draw(st.sampled_from([0.25, 0.5, 1.0, 0.986 / 2, 0.7]) | st.floats(0.1, 1.04))
    mpp_l0 = grid.hr_mpp * relative
    side_l0 = resolve_scale(grid, mpp_l0).region_side_l0
    width, height = (math.ceil(side_l0 * draw(st.floats(0.3, 4.0))) + 1 for _ in range(2))
    assume(min(width, height) >= side_l0 / grid.ratio)
    return grid, mpp_l0, (width, height)


def everything(boxes: IntArray) -> np.ndarray:
    return np.ones(len(boxes))


def marked(width_l0: int, height_l0: int, box: tuple[int, int, int, int]) -> object:
    """Return a coverage function of a slide of which only `box` (x0, y0, x1, y1) is tissue, painted pixel by pixel."""
    picture = np.zeros((height_l0, width_l0), dtype=np.int64)
    picture[box[1] : box[3], box[0] : box[2]] = 1

    def coverage(boxes: IntArray) -> np.ndarray:
        return np.array(
            [picture[max(0, y0) : y1, max(0, x0) : x1].sum() / ((x1 - x0) * (y1 - y0)) for x0, y0, x1, y1 in boxes]
        )

    return coverage


class TestChildrenAndRegions:
    @quick
    @given(cases())
    def test_children_tile_their_region_without_gap_or_overlap(
        self, case: tuple[GridSettings, float, tuple[int, int]]
    ) -> None:
        grid, mpp_l0, size = case
        matched = match_grids(grid, mpp_l0, size, everything)
        ratio = grid.ratio
        assert matched.num_children == matched.num_regions * ratio**2
        region = matched.region_boxes_l0[matched.child_region]
        child = matched.child_boxes_l0
        assert (child[:, :2] >= region[:, :2]).all()
        assert (child[:, 2:] <= region[:, 2:]).all()
        assert (child[:, 2:] > child[:, :2]).all()
        # Boxes of (region, row, column): each ends where the next begins, the first and last at the region's edges.
        child = child.reshape(-1, ratio, ratio, 4)
        x0, y0, x1, y1 = np.moveaxis(child, 3, 0)
        assert (x1[:, :, :-1] == x0[:, :, 1:]).all()
        assert (y1[:, :-1, :] == y0[:, 1:, :]).all()
        assert (x0[:, :, 0] == matched.region_boxes_l0[:, None, 0]).all()
        assert (x1[:, :, -1] == matched.region_boxes_l0[:, None, 2]).all()
        assert (y0[:, 0, :] == matched.region_boxes_l0[:, None, 1]).all()
        assert (y1[:, -1, :] == matched.region_boxes_l0[:, None, 3]).all()

    @quick
    @given(cases())
    def test_regions_share_boundaries_and_cover_the_slide(
        self, case: tuple[GridSettings, float, tuple[int, int]]
    ) -> None:
        grid, mpp_l0, (width, height) = case
        matched = match_grids(grid, mpp_l0, (width, height), everything)
        columns, rows = matched.region_index.max(axis=0) + 1
        boxes = matched.region_boxes_l0.reshape(rows, columns, 4)
        np.testing.assert_array_equal(
            matched.region_index.reshape(rows, columns, 2), np.dstack(np.meshgrid(np.arange(columns), np.arange(rows)))
        )
        assert (boxes[:, :-1, 2] == boxes[:, 1:, 0]).all()
        assert (boxes[:-1, :, 3] == boxes[1:, :, 1]).all()
        assert (boxes[0, 0, :2] == 0).all()
        # The last one begins inside the slide and ends at its edge or beyond.
        assert boxes[-1, -1, 0] < width <= boxes[-1, -1, 2]
        assert boxes[-1, -1, 1] < height <= boxes[-1, -1, 3]

    @quick
    @given(cases())
    def test_sides_differ_by_at_most_one_pixel_and_not_at_all_when_snapped(
        self, case: tuple[GridSettings, float, tuple[int, int]]
    ) -> None:
        grid, mpp_l0, size = case
        matched = match_grids(grid, mpp_l0, size, everything)
        for boxes, wanted in (
            (matched.child_boxes_l0, matched.scale.child_side_l0),
            (matched.region_boxes_l0, matched.scale.region_side_l0),
        ):
            sides = boxes[:, 2:] - boxes[:, :2]
            assert np.abs(sides - wanted).max() <= 1
            assert sides.max() - sides.min() <= (0 if matched.scale.snapped else 1)

    @quick
    @given(cases())
    def test_effective_mpp(self, case: tuple[GridSettings, float, tuple[int, int]]) -> None:
        grid, mpp_l0, _ = case
        scale = resolve_scale(grid, mpp_l0)
        assert scale.lr_mpp == pytest.approx(scale.hr_mpp * grid.ratio)
        if scale.snapped:
            assert scale.child_side_l0 == int(scale.child_side_l0)
            assert math.log2(scale.child_side_l0 / grid.patch_px) % 1 == 0
            assert scale.hr_mpp == pytest.approx(grid.hr_mpp, rel=grid.mpp_tolerance + 1e-6)
        else:
            assert scale.hr_mpp == pytest.approx(grid.hr_mpp, rel=1e-9)

    @quick
    @given(cases(), st.integers(0, 3), st.integers(0, 3))
    def test_x_is_a_column_and_y_a_row(
        self, case: tuple[GridSettings, float, tuple[int, int]], col: int, row: int
    ) -> None:
        grid, mpp_l0, _ = case
        side = resolve_scale(grid, mpp_l0).region_side_l0
        # Always wider than tall, so that a swap cannot hide behind symmetry.
        matched = match_grids(grid, mpp_l0, (round(side * 6), round(side * 4)), everything)
        ratio = grid.ratio
        col, row = col % ratio, row % ratio
        middle = (matched.child_boxes_l0[:, :2] + matched.child_boxes_l0[:, 2:]) / 2
        corner = matched.region_boxes_l0[matched.child_region, :2]
        place = np.floor((middle - corner) / matched.scale.child_side_l0).astype(int)
        at = matched.child_slot == ratio * row + col
        assert at.sum() == matched.num_regions
        assert (place[at] == (col, row)).all()

    def test_a_wide_slide_gets_wide_coordinates(self) -> None:
        matched = match_grids(GridSettings(), 0.5, (1024 * 5, 1024 * 2))
        assert matched.num_regions == 10
        assert matched.region_boxes_l0[:, 0].max() == 4 * 1024
        assert matched.region_boxes_l0[:, 1].max() == 1024
        assert matched.region_index.max(axis=0).tolist() == [4, 1]

    def test_asymmetric_coverage_picks_the_right_region_and_children(self) -> None:
        grid = GridSettings(patch_px=8)  # at mpp 0.5 a region is 32 px wide
        # Tissue only in the region at column 2, row 0: its lowest row of children, second to fourth.
        coverage = marked(96, 64, (64 + 8, 24, 96, 32))
        matched = match_grids(grid, 0.5, (96, 64), coverage)
        assert matched.region_boxes_l0.tolist() == [[64, 0, 96, 32]]
        assert matched.region_index.tolist() == [[2, 0]]
        assert matched.region_tissue == pytest.approx([3 / 16])
        assert matched.child_slot.tolist() == [13, 14, 15]
        assert matched.child_boxes_l0[0].tolist() == [72, 24, 80, 32]
        assert matched.child_tissue.tolist() == [1, 1, 1]
        assert matched.children_per_region.tolist() == [3]


class TestScale:
    def test_ordinary_scans_snap_and_odd_ones_do_not(self) -> None:
        grid = GridSettings()
        snapped = resolve_scale(grid, 0.2465)
        assert snapped.snapped
        assert snapped.child_side_l0 == 512
        assert snapped.hr_mpp == pytest.approx(0.493)
        assert snapped.lr_mpp == pytest.approx(1.972)
        odd = resolve_scale(grid, 0.35)
        assert not odd.snapped
        assert odd.child_side_l0 == pytest.approx(256 * 0.5 / 0.35)
        assert odd.hr_mpp == pytest.approx(0.5)

    @pytest.mark.parametrize(("mpp", "snapped"), [(0.525, True), (0.5251, False), (0.475, True), (0.4749, False)])
    def test_the_tolerance_is_inclusive_on_both_sides(self, mpp: float, snapped: bool) -> None:
        assert resolve_scale(GridSettings(), mpp).snapped is snapped

    def test_the_tolerance_is_a_setting(self) -> None:
        assert resolve_scale(GridSettings(mpp_tolerance=0.0), 0.25).snapped
        assert not resolve_scale(GridSettings(mpp_tolerance=0.0), 0.2465).snapped
        assert not resolve_scale(GridSettings(mpp_tolerance=0.1), 0.22).snapped
        assert resolve_scale(GridSettings(mpp_tolerance=0.15), 0.22).snapped

    def test_unsnapped_boundaries_round_half_up_from_the_slide_origin(self) -> None:
        scale = SlideScale(mpp_l0=0.35, child_side_l0=2.5, ratio=4, patch_px=8, snapped=False, has_hr=True)
        assert scale.child_boundary_l0([0, 1, 2, 3, 4, 5]).tolist() == [0, 3, 5, 8, 10, 13]
        assert scale.child_boundary_l0(np.array([[1], [4]])).shape == (2, 1)

    def test_rounding_does_not_add_up_over_a_long_slide(self) -> None:
        matched = match_grids(GridSettings(), 0.35, (300_000, 2_000), everything)
        wanted = matched.region_index[:, 0] * 4 * 256 * 0.5 / 0.35
        assert np.abs(matched.region_boxes_l0[:, 0] - wanted).max() <= 0.5

    def test_too_coarse_for_anything(self) -> None:
        with pytest.raises(SlideTooCoarse, match=r"case 7.*2\.2 um.*2 um/px") as caught:
            resolve_scale(GridSettings(), 2.2, slide="case 7")
        assert caught.value.slide == "case 7"
        with pytest.raises(SlideTooCoarse):
            match_grids(GridSettings(), 2.2, (10_000, 10_000))
        assert resolve_scale(GridSettings(), 2.1).has_hr is False

    def test_coarse_slide_has_regions_and_no_children(self) -> None:
        matched = match_grids(GridSettings(), 1.0, (1500, 600))
        assert not matched.scale.has_hr
        assert matched.scale.region_side_l0 == 512
        assert matched.num_regions == 6
        assert matched.num_children == 0
        assert matched.child_boxes_l0.shape == (0, 4)
        assert matched.children_per_region.tolist() == [0] * 6

    def test_half_a_pixel_is_no_step(self) -> None:
        # At 1 um/px a child of 9 px at 0.5 um/px is 4.5 level-0 pixels wide: in scale, and yet not to be snapped.
        scale = resolve_scale(GridSettings(patch_px=9, lr_mpp=1.5), 1.0)
        assert not scale.snapped
        assert scale.child_boundary_l0([0, 1, 2, 3]).tolist() == [0, 5, 9, 14]

    def test_ratio_three(self) -> None:
        grid = GridSettings(patch_px=24, lr_mpp=1.5, hr_mpp=0.5)
        assert (grid.ratio, grid.children_per_region) == (3, 9)
        matched = match_grids(grid, 0.25, (144 * 2, 144))
        assert matched.scale.snapped
        assert matched.num_regions == 2
        assert matched.child_slot.tolist() == [*range(9)] * 2
        assert matched.child_boxes_l0[5].tolist() == [96, 48, 144, 96]


class TestTwins:
    """One slide scanned at 40x and at 20x."""

    @quick
    @given(cases())
    def test_twins_get_the_same_regions(self, case: tuple[GridSettings, float, tuple[int, int]]) -> None:
        grid, mpp_20x, (width, height) = case
        coarse = match_grids(grid, mpp_20x, (width, height), everything)
        fine = match_grids(grid, mpp_20x / 2, (2 * width, 2 * height), everything)
        assert coarse.scale.snapped == fine.scale.snapped
        assert coarse.scale.hr_mpp == pytest.approx(fine.scale.hr_mpp)
        if coarse.scale.snapped:
            np.testing.assert_array_equal(fine.region_boxes_l0, 2 * coarse.region_boxes_l0)
            np.testing.assert_array_equal(fine.child_boxes_l0, 2 * coarse.child_boxes_l0)
            np.testing.assert_array_equal(fine.child_slot, coarse.child_slot)
            return
        # A region that begins within a pixel of the edge may be there in one twin only; it holds nothing.
        common = self._rows(coarse) & self._rows(fine)
        assert len(common) >= (coarse.region_index.max(axis=0)).prod()
        of_coarse, of_fine = self._boxes(coarse), self._boxes(fine)
        for place in common:
            assert np.abs(of_fine[place] / 2 - of_coarse[place]).max() <= 1

    @staticmethod
    def _rows(matched: MatchedGrid) -> set[tuple[int, ...]]:
        return {tuple(place) for place in matched.region_index.tolist()}

    @staticmethod
    def _boxes(matched: MatchedGrid) -> dict[tuple[int, ...], IntArray]:
        places = (tuple(p) for p in matched.region_index.tolist())
        return dict(zip(places, matched.region_boxes_l0, strict=True))


class TestEdges:
    def test_smaller_than_one_child(self) -> None:
        with pytest.raises(SlideTooSmall, match=r"tiny: it measures 255 x 9000 px"):
            match_grids(GridSettings(), 0.5, (255, 9000), slide="tiny")
        assert match_grids(GridSettings(), 0.5, (256, 256)).children_per_region.tolist() == []
        whole = match_grids(GridSettings(), 0.5, (256, 256), min_region_tissue=0.0)
        assert whole.children_per_region.tolist() == [1]

    def test_regions_at_the_edge_count_what_is_outside_as_no_tissue(self) -> None:
        # 1,500 x 1,100 px: the second column is 476 px wide inside the slide, the second row 76 px tall.
        matched = match_grids(GridSettings(), 0.5, (1500, 1100))
        assert matched.region_index.tolist() == [[0, 0], [1, 0]]
        np.testing.assert_allclose(matched.region_tissue, [1, 476 / 1024])
        assert matched.children_per_region.tolist() == [16, 8]
        assert matched.child_slot[16:].tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
        np.testing.assert_allclose(matched.child_tissue[16:18], [1, 220 / 256])
        everywhere = match_grids(GridSettings(), 0.5, (1500, 1100), min_region_tissue=0.0, min_child_tissue=0.0)
        assert everywhere.num_regions == 4
        assert everywhere.num_children == 64
        assert everywhere.region_boxes_l0[-1].tolist() == [1024, 1024, 2048, 2048]

    def test_some_children_and_none(self) -> None:
        grid = GridSettings(patch_px=8)
        # Left region: a 12 x 8 piece in slots 0 and 1. Right region: thin everywhere, in no child enough.
        left = marked(64, 32, (0, 0, 12, 8))

        def coverage(boxes: IntArray) -> np.ndarray:
            return np.where(boxes[:, 0] < 32, left(boxes), np.where(boxes[:, 2] - boxes[:, 0] > 8, 0.3, 0.05))

        matched = match_grids(grid, 0.5, (64, 32), coverage, min_region_tissue=0.09)
        assert matched.num_regions == 2
        assert matched.children_per_region.tolist() == [2, 0]
        assert matched.child_slot.tolist() == [0, 1]
        np.testing.assert_allclose(matched.child_tissue, [1, 0.5])
        assert matched.child_region.tolist() == [0, 0]

    def test_no_tissue_at_all(self) -> None:
        matched = match_grids(GridSettings(), 0.5, (4096, 4096), lambda boxes: np.zeros(len(boxes)))
        assert (matched.num_regions, matched.num_children) == (0, 0)
        assert matched.region_boxes_l0.shape == (0, 4)
        assert matched.children_per_region.tolist() == []

    @quick
    @given(cases(), st.integers(0, 700), st.integers(0, 700))
    def test_an_origin_moves_every_box_and_nothing_else(
        self, case: tuple[GridSettings, float, tuple[int, int]], x: int, y: int
    ) -> None:
        grid, mpp_l0, (width, height) = case
        plain = match_grids(grid, mpp_l0, (width, height), everything)
        moved = match_grids(grid, mpp_l0, (width + x, height + y), everything, origin_l0=(x, y))
        np.testing.assert_array_equal(moved.region_boxes_l0, plain.region_boxes_l0 + np.array([x, y, x, y]))
        np.testing.assert_array_equal(moved.child_boxes_l0, plain.child_boxes_l0 + np.array([x, y, x, y]))
        np.testing.assert_array_equal(moved.region_index, plain.region_index)

    def test_an_origin_outside_the_slide_leaves_nothing(self) -> None:
        assert match_grids(GridSettings(), 0.5, (2048, 2048), origin_l0=(5000, 0)).num_regions == 0

    def test_a_coverage_function_of_the_wrong_shape(self) -> None:
        with pytest.raises(ConfigError, match=r"shape \(4, 1\) for 4 boxes"):
            match_grids(GridSettings(), 0.5, (2048, 2048), lambda boxes: np.ones((len(boxes), 1)))


class TestTokens:
    @pytest.mark.parametrize(("side", "ratio"), [(16, 4), (16, 2), (16, 8), (12, 3), (8, 8), (32, 4)])
    def test_against_the_definition(self, side: int, ratio: int) -> None:
        block = side // ratio
        found = token_blocks(side, ratio)
        assert found.shape == (ratio**2, block**2)
        for k in range(ratio**2):
            row, col = divmod(k, ratio)
            omega = [
                side * u + v
                for u in range(side)
                for v in range(side)
                if block * row <= u < block * row + block and block * col <= v < block * col + block
            ]
            assert found[k].tolist() == omega

    def test_a_pattern_that_differs_along_x_and_y(self) -> None:
        u, v = np.mgrid[:16, :16]
        tokens = (100 * (u // 4) + v // 4).ravel()  # hundreds: row of the child, units: its column
        means = tokens[token_blocks(16, 4)].mean(axis=1)
        assert means.tolist() == [100 * row + col for row in range(4) for col in range(4)]
        transposed = (100 * (v // 4) + u // 4).ravel()
        assert transposed[token_blocks(16, 4)].mean(axis=1).tolist() != means.tolist()

    def test_slots_and_tokens_mean_the_same_place(self) -> None:
        matched = match_grids(GridSettings(), 0.5, (1024, 1024))
        token_px = 1024 // 16
        for slot, (x0, y0, x1, y1) in zip(matched.child_slot, matched.child_boxes_l0, strict=True):
            u, v = np.divmod(token_blocks(16, 4)[slot], 16)
            assert (v.min() * token_px, (v.max() + 1) * token_px) == (x0, x1)
            assert (u.min() * token_px, (u.max() + 1) * token_px) == (y0, y1)

    @pytest.mark.parametrize(("side", "ratio"), [(14, 4), (16, 3), (7, 2)])
    def test_a_grid_that_cannot_be_cut(self, side: int, ratio: int) -> None:
        with pytest.raises(GridMismatch, match=f"{side} x {side}"):
            token_blocks(side, ratio)
        with pytest.raises(GridMismatch, match=f"multiple of {ratio}"):
            check_token_grid(side, ratio)


points = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=25)


class TestContainment:
    @quick
    @given(points, points, st.integers(8, 24), st.integers(1, 8), st.sampled_from([0.0, 0.4]))
    def test_against_brute_force(
        self,
        regions: list[tuple[int, int]],
        children: list[tuple[int, int]],
        region_side: int,
        child_side: int,
        part: float,
    ) -> None:
        region_coords = np.array(regions, dtype=np.int64).reshape(-1, 2)
        child_coords = np.array(children, dtype=np.int64).reshape(-1, 2)
        found = match_by_containment(region_coords, child_coords, region_side + part, child_side)
        wanted = [
            (r, c, x - X, y - Y)
            for r, (X, Y) in enumerate(regions)
            for c, (x, y) in enumerate(children)
            if 0 <= x - X <= region_side + part - child_side and 0 <= y - Y <= region_side + part - child_side
        ]
        rows = np.column_stack([found.region, found.child, found.offset_l0])
        assert [tuple(row) for row in rows.tolist()] == wanted

    @pytest.mark.parametrize(("mpp", "ratio"), [(0.25, 4), (0.5, 2), (0.5, 8)])
    def test_agrees_with_the_matched_grid(self, mpp: float, ratio: int) -> None:
        grid = GridSettings(patch_px=64, lr_mpp=0.5 * ratio)
        matched = match_grids(grid, mpp, (5000, 3000))
        side = matched.scale.child_side_l0
        shuffled = np.random.default_rng(0).permutation(matched.num_children)
        found = match_by_containment(
            matched.region_boxes_l0[:, :2], matched.child_boxes_l0[shuffled, :2], ratio * side, side
        )
        assert len(found.child) == matched.num_children
        rows = shuffled[found.child]
        np.testing.assert_array_equal(matched.child_region[rows], found.region)
        col, row = (found.offset_l0 // int(side)).T
        np.testing.assert_array_equal(matched.child_slot[rows], ratio * row + col)

    def test_x_and_y_offsets_are_not_swapped(self) -> None:
        found = match_by_containment(np.array([[100, 500]]), np.array([[868, 500], [100, 756]]), 1024, 256)
        assert found.offset_l0.tolist() == [[768, 0], [0, 256]]
        assert match_by_containment(np.array([[100, 500]]), np.array([[500, 100]]), 1024, 256).child.size == 0

    def test_nothing_to_match(self) -> None:
        none = np.empty((0, 2), dtype=np.int64)
        for a, b in ((none, none), (none, np.array([[0, 0]])), (np.array([[0, 0]]), none)):
            found = match_by_containment(a, b, 1024, 256)
            assert found.offset_l0.shape == (0, 2)
            assert found.region.shape == found.child.shape == (0,)


class TestGridSettings:
    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"lr_mpp": 0.5}, "at least 2"),
            ({"lr_mpp": 1.2}, r"whole number of at least 2 \(2, 4, 8\); it is 2.4"),
            ({"lr_mpp": 0.5, "hr_mpp": 2.0}, "it is 0.25"),
            ({"patch_px": 250}, "patch_px=250 is not divisible by lr_mpp / hr_mpp = 4"),
            ({"patch_px": 4}, "patch_px"),
            ({"mpp_tolerance": 0.5}, "mpp_tolerance"),
            ({"hr_mpp": 0.0}, "hr_mpp"),
            ({"patch": 256}, "patch"),
        ],
    )
    def test_what_is_refused(self, values: dict[str, float], words: str) -> None:
        with pytest.raises(ValidationError, match=words):
            GridSettings.model_validate(values)

    def test_defaults_are_the_papers(self) -> None:
        grid = GridSettings()
        assert (grid.patch_px, grid.ratio, grid.children_per_region) == (256, 4, 16)
