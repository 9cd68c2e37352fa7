"""Real tiles, thumbnails and slides: shares of tissue as seen by eye, pens cut out where they lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from lrmil.slides import Overview, RecordingSlide, open_slide
from lrmil.tissue import TissueMask, TissueSettings, find_tissue, segment_tissue

# name: (assumed um per pixel, least and greatest share of tissue, least and greatest share of pen)
CASES: dict[str, tuple[float, tuple[float, float], tuple[float, float]]] = {
    "pil-images-rgb_diagnostic-slide-thumb-rgb": (32, (0.38, 0.55), (0.20, 0.33)),
    "pil-images-rgb_tcga-green-pen": (2, (0.72, 0.86), (0.14, 0.24)),
    "pil-images-rgb_tcga-red-pen": (4, (0.47, 0.61), (0.26, 0.40)),
    "pil-images-rgb_wsi-blue-pen": (32, (0.22, 0.36), (0.02, 0.06)),
    "pil-images-rgba_tcga-lung": (0.25, (0.85, 1.0), (0, 0)),
    "tiles_almost-white-1": (2, (0, 0), (0, 0)),
    "tiles_almost-white-ihc": (8, (0, 0.01), (0, 0)),
    "tiles_high-nuclei-score-level0": (0.25, (0.97, 1.0), (0, 0)),
    "tiles_high-nuclei-score-red-pen-level1": (1, (0.80, 1.0), (0, 0.15)),
    "tiles_kidney-ihc-level0-310-500-360-530": (8, (0.70, 0.90), (0, 0)),
    "tiles_kidney-ihc-level0-340-520-390-550": (8, (0.75, 0.92), (0, 0)),
    "tiles_kidney-ihc-level0-350-530-360-540": (8, (0.95, 1.0), (0, 0)),
    "tiles_liver-level2-20914-13715-21714-14515": (8, (0.14, 0.20), (0, 0)),
    "tiles_liver-level2-38626-13514-39426-14315": (8, (0, 0), (0, 0)),
    "tiles_low-nuclei-score-level0": (0.25, (0, 0.15), (0, 0)),  # fat
    "tiles_low-nuclei-score-level1": (1, (0, 0.20), (0, 0)),  # fat
    "tiles_medium-nuclei-score-level0": (0.25, (0.90, 1.0), (0, 0)),
    "tiles_medium-nuclei-score-level1-2": (1, (0.97, 1.0), (0, 0)),
    "tiles_medium-nuclei-score-level2": (4, (0.75, 0.86), (0, 0)),
    "tiles_no-tissue-green-pen": (1, (0, 0.01), (0.7, 0.95)),
    "tiles_no-tissue-red-pen": (1, (0, 0.01), (0.6, 0.9)),
    "tiles_no-tissue": (1, (0, 0), (0, 0)),
    "tiles_tissue-level0-4302-10273-4814-10785": (0.5, (0.75, 1.0), (0, 0)),
    "tiles_tissue-level0-7352-11762-7864-12274": (0.5, (0.80, 0.92), (0, 0)),
    "tiles_tissue-level2-3000-7666-7096-11763": (4, (0.65, 0.80), (0, 0)),
    "tiles_tissue-level2-4640-4649-8736-8746": (4, (0.68, 0.80), (0, 0)),
    "tiles_very-low-nuclei-score-level0": (0.25, (0.97, 1.0), (0, 0)),  # pale, and no background at all
    "tiles_very-low-nuclei-score-red-pen-level1": (1, (0, 0.10), (0.45, 0.70)),  # pen on fat
}

See = Callable[..., Overview]
Look = Callable[[str], Overview]


@pytest.fixture(scope="module")
def look(shared_data: Path, see: See) -> Look:
    def load(name: str) -> Overview:
        with Image.open(shared_data / "tissue_cases" / f"histolab_{name}.png") as image:
            return see(np.asarray(image.convert("RGB")), CASES[name][0])

    return load


def at_mpp(overview: Overview, mpp: float, see: See) -> Overview:
    """Return the same picture by area average at a coarser scale."""
    height, width = overview.rgb.shape[:2]
    size = max(1, round(width * overview.mpp / mpp)), max(1, round(height * overview.mpp / mpp))
    return see(cv2.resize(overview.rgb, size, interpolation=cv2.INTER_AREA), overview.mpp * width / size[0])


def at(part: np.ndarray, x: float, y: float) -> bool:
    """Return the pixel at relative place (x, y)."""
    height, width = part.shape
    return bool(part[int(y * height), int(x * width)])


def test_every_case_has_an_expectation(shared_data: Path) -> None:
    found = {p.stem.removeprefix("histolab_") for p in (shared_data / "tissue_cases").glob("histolab_*.png")}
    assert found == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_shares_are_what_the_eye_sees(name: str, look: Look) -> None:
    _, tissue, pen = CASES[name]
    found = segment_tissue(look(name))
    assert tissue[0] <= found.tissue_share <= tissue[1]
    assert pen[0] <= found.pen_share <= pen[1]
    assert not (found.mask & found.pen).any()


@pytest.mark.parametrize(
    "name",
    [
        "pil-images-rgb_diagnostic-slide-thumb-rgb",
        "pil-images-rgb_tcga-green-pen",
        "pil-images-rgb_tcga-red-pen",
        "pil-images-rgb_wsi-blue-pen",
        "tiles_kidney-ihc-level0-310-500-360-530",
        "tiles_liver-level2-20914-13715-21714-14515",
        "tiles_low-nuclei-score-level1",
        "tiles_medium-nuclei-score-level2",
        "tiles_no-tissue-red-pen",
        "tiles_tissue-level0-7352-11762-7864-12274",
        "tiles_tissue-level2-3000-7666-7096-11763",
    ],
)
def test_the_same_picture_at_another_mpp_gives_the_same_area(name: str, look: Look, see: See) -> None:
    fine = look(name)
    coarse = at_mpp(fine, max(8.0, 2 * fine.mpp), see)
    of_fine, of_coarse = segment_tissue(fine), segment_tissue(coarse)
    area = fine.rgb.shape[0] * fine.rgb.shape[1] * fine.mpp**2 / 1e6
    assert of_fine.tissue_mm2 == pytest.approx(of_coarse.tissue_mm2, rel=0.05, abs=0.02 * area)
    height, width = of_coarse.mask.shape
    shrunk = cv2.resize(of_fine.mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) > 0.5
    assert (shrunk != of_coarse.mask).mean() < 0.06


# Places (x, y) from the left upper corner, 0..1: on the pen, and on clean tissue.
PENS = {
    "pil-images-rgb_tcga-green-pen": ([(0.50, 0.20), (0.33, 0.80)], [(0.80, 0.50), (0.15, 0.25)]),
    "pil-images-rgb_tcga-red-pen": ([(0.20, 0.40), (0.15, 0.70)], [(0.85, 0.60), (0.60, 0.55)]),
    "pil-images-rgb_wsi-blue-pen": ([(0.93, 0.54), (0.90, 0.85)], [(0.55, 0.50), (0.10, 0.62)]),
    # red arc at the right, green below, black ring in the middle; tissue between the rings
    "pil-images-rgb_diagnostic-slide-thumb-rgb": (
        [(0.972, 0.60), (0.50, 0.92), (0.235, 0.25), (0.52, 0.60)],
        [(0.85, 0.70), (0.60, 0.35)],
    ),
}


@pytest.mark.parametrize("name", PENS)
def test_pens_are_cut_out_where_they_lie(name: str, look: Look) -> None:
    found = segment_tissue(look(name))
    on_pen, on_tissue = PENS[name]
    assert [at(found.pen, *place) for place in on_pen] == [True] * len(on_pen)
    assert [at(found.mask, *place) for place in on_pen] == [False] * len(on_pen)
    assert [at(found.mask, *place) for place in on_tissue] == [True] * len(on_tissue)


def test_pens_stay_where_they_are_not_asked_for(look: Look) -> None:
    name = "tiles_no-tissue-green-pen"
    kept = segment_tissue(look(name), TissueSettings(pens=("red", "black")))
    assert kept.pen_share == 0
    assert kept.tissue_share > 0.7


def test_lumen_stays_open_and_small_gaps_are_closed(look: Look) -> None:
    found = segment_tissue(look("tiles_tissue-level2-3000-7666-7096-11763"))
    assert not at(found.mask, 0.65, 0.75)  # gland of 1 mm
    assert not at(found.mask, 0.05, 0.95)  # glass outside
    assert at(found.mask, 0.70, 0.60)


def test_no_labelled_tissue_passes_for_pen(shared_data: Path, see: See) -> None:
    images = sorted((shared_data / "crchisto" / "images").iterdir())
    assert len(images) == 60
    shares = {}
    for path in images:
        with Image.open(path) as image:
            found = segment_tissue(at_mpp(see(np.asarray(image.convert("RGB")), 0.5), 8.0, see))
        assert found.pen_share == 0, path.name
        shares[path.stem] = found.tissue_share
    assert max(shares[name] for name in ("img27", "img28", "img34")) < 0.15  # fat
    assert min(shares[name] for name in ("img23", "img29", "img33", "img43", "img44")) > 0.95
    assert np.mean([share > 0.5 for share in shares.values()]) > 0.75


class TestSlides:
    @pytest.mark.parametrize(
        ("name", "mpp", "share"),
        [
            ("CMU-1-Small-Region.svs", None, (0.32, 0.42)),
            ("tcga-cr-7395-01a-01-ts1.svs", 0.5, (0.58, 0.68)),
            ("CropBreastSlide.tiff", 0.25, (0.95, 1.0)),
        ],
    )
    def test_shares_are_what_the_eye_sees(
        self, shared_data: Path, name: str, mpp: float | None, share: tuple[float, float]
    ) -> None:
        with open_slide(shared_data / "slides" / name, mpp=mpp) as slide:
            found, overview = find_tissue(slide)
            assert share[0] <= found.tissue_share <= share[1]
            assert found.pen_share == 0
            assert found.mask.shape == overview.rgb.shape[:2]
            assert found.mpp == overview.mpp == pytest.approx(8.0, rel=0.05)
            # Mask and slide agree about where things end.
            width, height = slide.dimensions
            assert found.mask.shape[1] * found.downsample_l0[0] == pytest.approx(width, abs=found.downsample_l0[0])
            assert found.mask.shape[0] * found.downsample_l0[1] == pytest.approx(height, abs=found.downsample_l0[1])

    def test_coverage_lies_where_the_tissue_is(self, shared_data: Path) -> None:
        with open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
            found, _ = find_tissue(slide)
        # The piece is tall, right of the middle, and cut off by the lower edge.
        boxes = np.array([[900, 1500, 1100, 1700], [700, 2600, 1500, 2950], [0, 0, 600, 900], [2000, 1000, 2200, 2900]])
        inside, foot, above, beside = found.coverage(boxes)
        assert inside > 0.9
        assert foot > 0.9
        assert above == 0
        assert beside == 0

    @pytest.mark.parametrize(("wanted", "finest"), [(8.0, 2.0), (1.0, 2.0), (1.0, 4.0)])
    def test_reads_nothing_finer_than_allowed(self, shared_data: Path, wanted: float, finest: float) -> None:
        with open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
            recording = RecordingSlide(slide)
            found, _ = find_tissue(recording, TissueSettings(mpp=wanted), finest_mpp=finest)
        asked = max(wanted, finest)
        assert recording.requests
        assert recording.finest_mpp == pytest.approx(asked, rel=0.05)
        assert found.mpp == pytest.approx(asked, rel=0.05)

    def test_a_slide_coarser_than_the_overview_is_taken_as_it_is(self, shared_data: Path) -> None:
        with open_slide(shared_data / "slides" / "CropBreastSlide.tiff", mpp=10.0) as slide:
            found, _ = find_tissue(slide)
            assert found.mpp == 10.0
            assert found.mask.shape == slide.dimensions[::-1]

    def test_masks_of_two_scales_agree(self, shared_data: Path) -> None:
        def look_at(mpp: float) -> TissueMask:
            with open_slide(shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs", mpp=0.5) as slide:
                return find_tissue(slide, TissueSettings(mpp=mpp))[0]

        coarse, fine = look_at(16.0), look_at(4.0)
        assert coarse.tissue_mm2 == pytest.approx(fine.tissue_mm2, rel=0.03)
        boxes = np.array([[x, y, x + 512, y + 512] for x in range(0, 4096, 512) for y in range(0, 3072, 512)])
        assert np.abs(coarse.coverage(boxes) - fine.coverage(boxes)).max() < 0.15
