"""What the benchmark's numbers rest on: the slides it writes, the patches it compares, the rules of its targets."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from lrmil.benchmarks.heads import head_rows
from lrmil.benchmarks.material import GLASS, ISLAND, TISSUE, TURNED, Material, find_material
from lrmil.benchmarks.reading import _target, best_level, openslide_patch
from lrmil.benchmarks.results import Check, Column, Part, Table, Target, spread
from lrmil.benchmarks.run import command_of
from lrmil.benchmarks.scaling import _needed_tiles
from lrmil.benchmarks.settings import BenchSettings, RealSlide, given_slides
from lrmil.benchmarks.size import _checks, _spec
from lrmil.benchmarks.timing import PeakMemory, take_turns
from lrmil.benchmarks.tools import PatchDataset, region_grid, stream_seconds
from lrmil.benchmarks.workbench import real_slides
from lrmil.benchmarks.written import SlideSpec, TileStock, cells_with_tissue, full_cells, write_slide
from lrmil.errors import ConfigError, HeadError
from lrmil.slides import open_slide, write_pyramid
from lrmil.tissue import find_tissue

BLOCK = 1024


@pytest.fixture(scope="module")
def stock() -> TileStock:
    rng = np.random.default_rng(5)
    coarse = (rng.random((20, 20, 1)) * np.array([60, 80, 60]) + np.array([150, 60, 110])).astype(np.uint8)
    piece = cv2.resize(coarse, (512, 512), interpolation=cv2.INTER_CUBIC)
    return TileStock(Material(piece, "drawn", BLOCK, seed=0))


@pytest.fixture(scope="module")
def written(stock: TileStock, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = SlideSpec(0.25, (2 * BLOCK - 1, 2 * BLOCK - 1), (1, 4), "JPEG 4:4:4", full_cells(2, 2))
    return write_slide(tmp_path_factory.mktemp("slides") / "full.svs", spec, stock)


def test_levels_of_a_written_slide_are_averages_of_its_first(written: Path) -> None:
    with openslide.OpenSlide(str(written)) as slide:
        assert slide.dimensions == (2047, 2047)
        assert slide.level_dimensions[1] == (512, 512), "rounded up"
        assert slide.level_downsamples[1] == pytest.approx(2047 / 512)
        whole = np.asarray(slide.read_region((0, 0), 0, (2044, 2044)))[..., :3]
        level = np.asarray(slide.read_region((0, 0), 1, (511, 511)))[..., :3]
    mean = cv2.resize(whole, (511, 511), interpolation=cv2.INTER_AREA)
    assert np.abs(mean.astype(int) - level).mean() < 2


def test_a_written_slide_shows_the_blocks_of_its_map(stock: TileStock, tmp_path: Path) -> None:
    cells = ((TISSUE, GLASS), (GLASS, TURNED))
    for codec in ("JPEG 4:4:4", "JPEG 4:2:0", "JPEG 2000"):
        path = write_slide(
            tmp_path / f"{codec[-3:].replace(':', '')}.svs",
            SlideSpec(0.5, (2 * BLOCK, 2 * BLOCK), (1, 4), codec, cells),  # type: ignore[arg-type]
            stock,
        )
        with open_slide(path) as slide:
            assert slide.reader == "tiff"
            assert slide.mpp == pytest.approx(0.5)
            shown = slide.read_box((0, 0, 2 * BLOCK, 2 * BLOCK), (2 * BLOCK, 2 * BLOCK))
        wanted = np.block([[[stock.material.block(kind)] for kind in row] for row in cells])
        assert np.abs(shown.astype(int) - wanted).mean() < 4, codec


def test_tissue_grows_with_its_blocks_and_ragged_ones_are_partly_glass(stock: TileStock, tmp_path: Path) -> None:
    cells = cells_with_tissue(4, 3, 4)
    assert sum(kind != GLASS for row in cells for kind in row) == 4
    assert ISLAND in {kind for row in cells for kind in row}
    path = write_slide(tmp_path / "a.svs", SlideSpec(0.5, (4 * BLOCK, 3 * BLOCK), (1, 4), "JPEG 4:4:4", cells), stock)
    with open_slide(path) as slide:
        mask, _ = find_tissue(slide)
    assert 2.4 / 12 < mask.tissue_share < 3.8 / 12


def test_slides_of_the_size_series() -> None:
    large = _spec(8.0, "same share", 4096)
    assert large.size_px == (100_000, 80_000)
    for gigapixels in (0.1, 1.0, 10.0):
        share, amount = _spec(gigapixels, "same share", 4096), _spec(gigapixels, "same amount", 4096)
        assert share.size_px == amount.size_px
        assert share.gigapixels == pytest.approx(gigapixels, rel=0.1)
        assert amount.tissue_cells == 2
        assert share.tissue_cells == max(1, round(0.1 * len(share.cells) * len(share.cells[0])))


def test_time_that_follows_the_area_misses_its_target() -> None:
    def row(gigapixels: float, series: str, mm2: float, seconds: float) -> dict[str, object]:
        known = {"gigapixels": gigapixels, "series": series, "tissue_mm2": mm2, "total_s": seconds}
        return known | {"width": 1, "height": 1, "peak_mb": 1.0}

    def met(rows: list[dict[str, object]]) -> list[bool]:
        return [check.met for check in _checks(rows)]

    areas = (0.1, 1.0, 10.0)
    assert met([row(a, "same share", a, a) for a in areas] + [row(a, "same amount", 1, 1) for a in areas]) == [True] * 2
    assert met([row(a, "same share", a, a**1.5) for a in areas] + [row(a, "same amount", 1, a) for a in areas]) == [
        False,
        False,
    ]


def test_jobs_take_turns_and_every_other_round_is_reversed() -> None:
    order: list[str] = []

    def job(name: str) -> float:
        order.append(name)
        return float(len(order))

    seconds = take_turns({"a": lambda: job("a"), "b": lambda: job("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert seconds["a"].tolist() == [1, 4, 5]
    assert str(spread([1, 2, 3])) == "1.5..2.5"


def test_peak_memory_sees_what_is_gone_again() -> None:
    peak = PeakMemory()
    held = np.ones(8_000_000)
    del held
    added = peak.added_mb()
    assert added is not None
    assert 60 < added < 120


def test_users_of_openslide_get_the_coarsest_level_that_is_fine_enough() -> None:
    assert best_level((1.0, 3.9995, 15.99), (1024, 1024), 256) == (1, (256, 256))
    assert best_level((1.0, 4.0005), (1024, 1024), 256) == (1, (256, 256)), "a rounded size is no finer level"
    assert best_level((1.0, 4.0, 16.0), (2048, 2048), 256) == (1, (512, 512))
    assert best_level((1.0,), (1024, 1024), 256) == (0, (1024, 1024))


def test_every_tool_is_given_the_same_patches(written: Path) -> None:
    grid = region_grid(written, 64)
    boxes = grid.region_boxes_l0.tolist()
    assert len(boxes) == 16
    with openslide.OpenSlide(str(written)) as slide:
        wanted = openslide_patch(slide, boxes[0], 256)
    shown = PatchDataset("openslide", written, boxes)[0].permute(1, 2, 0).numpy()
    assert shown.shape == (256, 256, 3)
    assert np.abs(shown.astype(int) - wanted).mean() < 3, "Pillow's resize instead of the average"
    assert stream_seconds(written, grid, 1) > 0


def test_bare_decoding_decodes_every_tile_once(written: Path) -> None:
    tiles, side_px = _needed_tiles(written, region_grid(written))
    # 2 x 2 tiles of 256 px hold the level of 512 px; 5x is half of its 10x.
    assert len(tiles) == 4
    assert side_px == 128


@pytest.mark.parametrize(
    ("row", "limit"),
    [
        ({"codec": "JPEG 4:4:4", "scale": "5x", "factor": 4.0, "from": "level 0", "places": "whole"}, 8),
        ({"codec": "JPEG 4:4:4", "scale": "5x", "factor": 2.0, "from": "4x", "places": "fractional"}, 15),
        ({"codec": "JPEG 4:4:4", "scale": "5x", "factor": 2.0, "from": "4x", "places": "whole"}, 5),
        ({"codec": "JPEG 4:2:0", "scale": "5x", "factor": 1.0, "from": "8x", "places": "whole"}, 4),
        ({"codec": "JPEG 4:2:0", "scale": "20x", "factor": 1.0, "from": "level 0", "places": "whole"}, 3),
        ({"codec": "JPEG 2000", "scale": "5x", "factor": 4.0, "from": "level 0", "places": "whole"}, 3),
    ],
)
def test_targets_of_reading(row: dict[str, object], limit: float) -> None:
    assert _target(row | {"reader": "tiff"}).limit == limit
    assert _target(row | {"reader": "openslide"}).limit < 1


def test_targets_and_cells() -> None:
    assert Target(3).met(3)
    assert not Target(3).met(2.9)
    assert Target(1.15, "at most").met(1.15)
    assert not Check("x", 1.2, Target(1.15, "at most")).met
    column = Column("a", "A", "{:.1f}")
    assert [column.text(row) for row in ({"a": 1.25}, {"a": None}, {}, {"a": float("nan")})] == ["1.2", "", "", ""]
    assert Column("a", "A").text({"a": False}) == "NO"
    part = Part("p", "P", [Table("t", "T", [column], [{"a": 1.0}])], [Check("x", 1.0, Target(2.0))])
    assert json.loads(json.dumps(part.as_json()))["checks"][0]["met"] is False


def test_slides_are_named_with_or_without_their_scale(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", np.full((600, 600, 3), 200, np.uint8), 0.5)
    assert given_slides((str(path), f"{path}=0.25")) == [RealSlide(path, None), RealSlide(path, 0.25)]
    for wrong in (f"{path}=x", f"{path}=-1", str(tmp_path / "b.tif")):
        with pytest.raises(ConfigError, match="--slides"):
            given_slides((wrong,))


def test_slides_without_a_scale_are_refused_where_named_and_assumed_where_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slides").mkdir()
    path = write_pyramid(tmp_path / "slides" / "a.tif", np.full((600, 600, 3), 200, np.uint8), 0.5)
    import tifffile

    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for page in tiff.pages:
            page.tags["ResolutionUnit"].overwrite(1)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="=MPP"):
        real_slides((str(path),))
    monkeypatch.setenv("LRMIL_TEST_DATA", str(tmp_path))
    (known,), said = real_slides(None)
    assert known.mpp == 0.25
    assert "0.25" in known.note
    assert "a.tif" in said
    monkeypatch.setenv("LRMIL_TEST_DATA", str(tmp_path / "none"))
    assert real_slides(None)[0] == []


def test_tissue_is_real_where_its_scale_fits_and_simulated_elsewhere(tmp_path: Path) -> None:
    image = np.full((2100, 2100, 3), 240, np.uint8)
    image[900:2050, 800:1900] = (180, 60, 120)
    known = RealSlide(write_pyramid(tmp_path / "a.tif", image, 0.5), None)
    material = find_material(0.5, [known], 2048, 0)
    assert material.source == "real (a.tif)"
    assert material.piece[..., 1].mean() < 75, "the piece is where the stain is"
    assert material.block(TURNED).shape == (2048, 2048, 3)
    assert find_material(0.25, [known], 256, 0).source == "simulated"


def test_rows_of_heads() -> None:
    rows = head_rows(None)
    assert {"abmil", "hdmil", "hdmil:lipn", "zoommil", "dtfd"} <= set(rows)
    with pytest.raises(HeadError):
        head_rows(["abmill"])


def test_the_command_is_told_so_that_it_can_be_repeated() -> None:
    settings = BenchSettings(parts=("heads", "reading"), slides=("a", "b"), quick=True, sizes=(1, 2), threads=3)
    told = command_of(settings)
    assert told == "lrmil bench reading heads --slides a --slides b --sizes 1,2 --quick --threads 3"
    assert command_of(BenchSettings(threads=1)) == "lrmil bench --threads 1"
