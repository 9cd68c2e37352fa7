"""Painted slides: empty ones stay empty, full ones full; stains are kept, inks are not; sizes are um2 at any mpp."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from lrmil.slides import Overview
from lrmil.tissue import TissueSettings, segment_tissue

See = Callable[..., Overview]
Paint = Callable[..., np.ndarray]

EOSIN = (205, 110, 155)
PALE_PINK = (232, 205, 222)

STAINS = {
    "eosin": EOSIN,
    "pale eosin": PALE_PINK,
    "strong eosin": (200, 60, 130),
    "haematoxylin": (110, 70, 150),
    "dense nuclei": (80, 40, 100),
    "fold": (74, 23, 67),
    "blue-grey counterstain": (150, 157, 176),
    "pale blue-grey counterstain": (190, 196, 210),
    "dark blue-grey counterstain": (83, 90, 108),
    "DAB": (140, 90, 50),
    "dark DAB": (90, 55, 35),
}

INKS = {
    "green": (53, 163, 143),
    "pale green": (127, 201, 189),
    "green on tissue": (65, 110, 115),
    "blue": (77, 127, 205),
    "red": (185, 25, 30),
    "light red": (209, 55, 75),
    "pink-red": (217, 75, 106),
    "black": (25, 22, 24),
    "black on tissue": (47, 28, 43),
    "red on black": (80, 27, 42),
}


class TestEmptyAndFull:
    @pytest.mark.parametrize(
        "glass",
        [
            (255, 255, 255),
            (243, 241, 243),
            (222, 222, 222),
            (205, 204, 206),
            (242, 239, 228),
            (238, 232, 240),
            (236, 241, 244),
        ],
    )
    @pytest.mark.parametrize("noise", [0.0, 3.0])
    def test_an_empty_slide_has_no_tissue(self, see: See, paint: Paint, glass: tuple[int, ...], noise: float) -> None:
        found = segment_tissue(see(paint(200, 150, {}, glass=glass, noise=noise)))
        assert found.tissue_share == 0
        assert found.pen_share == 0

    def test_uneven_light_is_no_tissue(self, see: See) -> None:
        x, y = np.meshgrid(np.linspace(-1, 1, 300), np.linspace(-1, 1, 200))
        grey = 244 - 60 * (x**2 + y**2) / 2
        rgb = np.dstack([grey, grey - 1, grey]).round().astype(np.uint8)
        assert segment_tissue(see(rgb)).tissue_share == 0

    @pytest.mark.parametrize("fill", [0, 40, 128])
    def test_grey_and_black_fill_is_no_tissue(self, see: See, paint: Paint, fill: int) -> None:
        rgb = paint(200, 150, {(0, 0, 60, 150): (fill, fill, fill), (100, 50, 150, 100): EOSIN})
        found = segment_tissue(see(rgb))
        assert not found.mask[:, :70].any()
        assert found.mask[55:95, 105:145].all()
        assert segment_tissue(see(np.full((50, 50, 3), fill, np.uint8))).tissue_share == 0

    @pytest.mark.parametrize(
        "colour", [EOSIN, PALE_PINK, (232, 210, 225), STAINS["haematoxylin"], STAINS["blue-grey counterstain"]]
    )
    def test_a_slide_without_background_stays_full(self, see: See, paint: Paint, colour: tuple[int, ...]) -> None:
        assert segment_tissue(see(paint(200, 150, {(0, 0, 200, 150): colour}, noise=4.0))).tissue_share > 0.97

    def test_two_tissues_without_background_are_both_tissue(self, see: See, paint: Paint) -> None:
        # Plain Otsu would call the paler one background.
        rgb = paint(200, 150, {(0, 0, 200, 150): EOSIN, (0, 0, 100, 150): PALE_PINK})
        assert segment_tissue(see(rgb)).tissue_share == 1

    @pytest.mark.parametrize("side", [1, 2, 5])
    def test_tiny_views(self, see: See, side: int) -> None:
        full = np.full((side, side + 1, 3), EOSIN, np.uint8)
        assert segment_tissue(see(full)).tissue_share == 1
        assert segment_tissue(see(np.full_like(full, 243))).tissue_share == 0


class TestNeverScanned:
    @pytest.mark.parametrize("fill", [(255, 255, 255), (0, 0, 0), EOSIN, (53, 163, 143)])
    def test_is_never_tissue_nor_pen_and_does_not_bleed(self, see: See, paint: Paint, fill: tuple[int, ...]) -> None:
        scanned = np.ones((150, 200), bool)
        scanned[:, :70] = False
        rgb = paint(200, 150, {(70, 40, 160, 110): EOSIN}, noise=0.0)
        expected = segment_tissue(see(rgb, scanned=scanned)).mask
        rgb[~scanned] = fill
        found = segment_tissue(see(rgb, scanned=scanned))
        assert not found.mask[~scanned].any()
        assert not found.pen.any()
        np.testing.assert_array_equal(found.mask, expected)
        assert found.mask[45:105, 72:155].all()

    def test_a_hole_of_unscanned_pixels_is_not_filled(self, see: See, paint: Paint) -> None:
        scanned = np.ones((60, 60), bool)
        scanned[30:32, 30:33] = False
        found = segment_tissue(see(paint(60, 60, {(10, 10, 50, 50): EOSIN}), scanned=scanned))
        assert found.mask[20:40, 20:40].sum() == 400 - 6

    def test_nothing_scanned_at_all(self, see: See) -> None:
        found = segment_tissue(see(np.full((20, 30, 3), 200, np.uint8), scanned=np.zeros((20, 30), bool)))
        assert found.tissue_share == 0
        assert found.coverage(np.array([[0, 0, 320, 320]])).tolist() == [0]


class TestStainsAndInks:
    @pytest.mark.parametrize("name", STAINS)
    @pytest.mark.parametrize("mpp", [4.0, 16.0])
    def test_stains_are_tissue(self, see: See, paint: Paint, name: str, mpp: float) -> None:
        found = segment_tissue(see(paint(120, 100, {(30, 20, 90, 80): STAINS[name]}), mpp))
        assert not found.pen.any()
        assert found.mask[22:78, 32:88].all()
        assert found.tissue_share == pytest.approx(0.3, abs=0.03)

    @pytest.mark.parametrize("name", INKS)
    @pytest.mark.parametrize("mpp", [4.0, 16.0])
    def test_inks_are_not(self, see: See, paint: Paint, name: str, mpp: float) -> None:
        rgb = paint(240, 200, {(20, 20, 220, 120): EOSIN, (90, 0, 140, 200): INKS[name]})
        rgb = cv2.GaussianBlur(rgb, (0, 0), 2.0)  # pens lie out of focus
        found = segment_tissue(see(rgb, mpp))
        assert found.pen[:, 92:138].all()
        assert not found.mask[:, 90:140].any()
        # Off the stroke, and beyond its margin of 24 um, tissue stays.
        assert found.mask[26:114, 26:76].all()
        assert found.mask[26:114, 154:214].all()
        assert not found.mask[130:].any()

    def test_a_blurred_stroke_on_glass_leaves_no_rim(self, see: See, paint: Paint) -> None:
        for name, ink in INKS.items():
            for sigma_px in (2.0, 8.0):
                rgb = cv2.GaussianBlur(paint(240, 200, {(90, 0, 140, 200): ink}), (0, 0), sigma_px)
                assert segment_tissue(see(rgb)).tissue_share == 0, name

    def test_small_things_of_the_colour_of_ink_are_tissue(self, see: See, paint: Paint) -> None:
        # Erythrocytes and pigment: 40 um wide, in a field of eosin.
        dots = {
            (x, y, x + 5, y + 5): colour for x, colour in ((30, INKS["red"]), (70, INKS["black"])) for y in (30, 60)
        }
        found = segment_tissue(see(paint(120, 100, {(10, 10, 110, 90): EOSIN, **dots})))
        assert not found.pen.any()
        assert found.mask[15:85, 15:105].mean() > 0.99

    def test_an_ink_may_be_allowed(self, see: See, paint: Paint) -> None:
        rgb = paint(120, 100, {(30, 20, 90, 80): INKS["blue"]})
        assert segment_tissue(see(rgb)).tissue_share == 0
        assert segment_tissue(see(rgb), TissueSettings(pens=("red", "black"))).tissue_share == pytest.approx(
            0.3, abs=0.03
        )


class TestSizes:
    @pytest.mark.parametrize("mpp", [2.0, 4.0, 8.0])
    def test_specks_and_holes_are_measured_in_um(self, see: See, mpp: float) -> None:
        side = round(2400 / mpp)
        rgb = np.full((side, side, 3), 243, np.uint8)

        def disk(x_um: float, y_um: float, area_um2: float, colour: tuple[int, ...]) -> tuple[int, int]:
            x, y, radius = round(x_um / mpp), round(y_um / mpp), round((area_um2 / np.pi) ** 0.5 / mpp)
            cv2.circle(rgb, (x, y), radius, colour, -1)
            return y, x

        big = disk(1600, 1600, 1_000_000, EOSIN)
        lumen = disk(1400, 1600, 20_000, (243, 243, 243))
        gap = disk(1800, 1600, 2_000, (243, 243, 243))
        piece = disk(400, 400, 40_000, EOSIN)
        speck = disk(1000, 400, 6_000, EOSIN)
        mask = segment_tissue(see(rgb, mpp)).mask
        assert [bool(mask[at]) for at in (big, lumen, gap, piece, speck)] == [True, False, True, True, False]

    def test_sizes_are_settings(self, see: See, paint: Paint) -> None:
        rgb = paint(100, 100, {(20, 20, 30, 30): EOSIN, (50, 50, 90, 90): EOSIN, (65, 65, 75, 75): (243, 241, 243)})
        everything = segment_tissue(see(rgb), TissueSettings(min_tissue_um2=0, max_hole_um2=0)).mask
        assert everything[25, 25]
        assert not everything[70, 70]
        nothing_small = segment_tissue(see(rgb), TissueSettings(max_hole_um2=10_000)).mask
        assert not nothing_small[25, 25]
        assert nothing_small[70, 70]

    def test_a_gap_at_the_edge_of_the_slide_is_not_filled(self, see: See, paint: Paint) -> None:
        mask = segment_tissue(see(paint(60, 60, {(0, 0, 60, 60): EOSIN, (0, 20, 5, 25): (243, 241, 243)}))).mask
        assert not mask[22, 1]

    def test_the_mask_keeps_the_frame_of_the_overview(self, see: See, paint: Paint) -> None:
        overview = see(paint(90, 40, {(60, 5, 85, 30): EOSIN}), 8.1, downsample_l0=(16.2, 16.4))
        found = segment_tissue(overview)
        assert found.mask.shape == (40, 90)
        assert found.mpp == 8.1
        assert found.downsample_l0 == (16.2, 16.4)
        box = np.array([[62 * 16.2, 7 * 16.4, 83 * 16.2, 28 * 16.4]]).astype(np.int64)
        assert found.coverage(box) == pytest.approx([1.0])


class TestSettings:
    def test_bounds_in_the_wrong_order(self) -> None:
        with pytest.raises(ValidationError, match=r"max_stain=0.03 is below min_stain=0.05"):
            TissueSettings(min_stain=0.05, max_stain=0.03)

    def test_unknown_pen(self) -> None:
        with pytest.raises(ValidationError, match="blue_green"):
            TissueSettings.model_validate({"pens": ["purple"]})

    def test_every_field_is_described(self) -> None:
        assert all(field.description for field in TissueSettings.model_fields.values())
