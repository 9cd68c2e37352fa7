"""What stage 1 learns from: the same whether it is cached or computed, in memory or in files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrmil.bags import read_bag
from lrmil.errors import ConfigError
from lrmil.pipeline.pixels import RegionPixels, colour_histogram
from lrmil.pipeline.regions import CachedTargets, CohortRegions, LiveTargets, of_other_slides
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.study import Study
from lrmil.pipeline.tile import tile_cohort


def history(out: Path, fold: int = 0) -> list[dict[str, Any]]:
    return json.loads((out / "folds" / str(fold) / "stage1" / "history.json").read_text())["epochs"]


@pytest.fixture
def made(lab: Any, finished: Any, tmp_path: Path) -> Any:
    """A run with tiles and 20x features, its grids, and the pixels of its regions."""
    run = lab.parts(finished.copy_features(tmp_path / "made"))
    grids = tile_cohort(run)
    return run, grids, RegionPixels(run, grids, 1e9)


def test_targets_computed_on_the_fly_give_the_loss_of_cached_ones(
    lab: Any, finished: Any, watch: Any, tmp_path: Path
) -> None:
    out = finished.copy_features(tmp_path / "run")
    computed: list[str] = []
    watch("lrmil.pipeline.regions.encode_patches", lambda slide, *args, **kwargs: computed.append(slide.name))
    lab.run_until("distill", out, targets="on_the_fly")
    assert set(computed) == {path.stem for path in (lab.table.parent / "slides").glob("*.tif")}
    for fold in range(3):
        cached, live = history(finished.out, fold)[0], history(out, fold)[0]
        for name in ("train_loss", "val_loss", "val_layer0", "val_layer2"):
            assert live[name] == pytest.approx(cached[name], rel=2e-3), name


def test_on_the_fly_keeps_no_layers(lab: Any, tmp_path: Path) -> None:
    lab.run_until("encode", tmp_path / "run", targets="on_the_fly")
    bag = read_bag(next((tmp_path / "run" / "features" / "tiny_0.5mpp").glob("*.h5")))
    assert not bag.layer_cls


def test_live_targets_name_the_same_children(made: Any) -> None:
    """Every row, slot and position as in the cache; the CLS equal up to float16. Rows asked for out of order."""
    run, grids, _ = made
    slide = next(iter(grids))
    path = run.folder.bag("tiny_0.5mpp", slide)
    attention = np.linspace(0, 1, len(read_bag(path, layers=()).features), dtype=np.float32)
    cached = CachedTargets(path, (0, 2), attention)
    live = LiveTargets(
        path,
        (0, 2),
        attention,
        entry=run.entry(slide),
        grid=grids[slide],
        teacher=run.build_encoder(),
        settings=run.settings.encoder,
    )
    rows = cached.rows_with_children()
    assert np.array_equal(rows, live.rows_with_children())
    rows = rows[::-1][:3]
    one, other = _sorted(cached.of(rows)), _sorted(live.of(rows))
    for name in ("region", "slot", "embedding", "attention"):
        assert np.array_equal(one[name], other[name]), name
    for layer in (0, 2):
        np.testing.assert_allclose(one[layer], other[layer], rtol=2e-3, atol=2e-3)


def _sorted(targets: Any) -> dict[Any, Any]:
    order = np.lexsort((targets.slot, targets.region))
    named = {name: getattr(targets, name)[order] for name in ("region", "slot", "embedding", "attention")}
    return named | {layer: values[order].astype(np.float32) for layer, values in targets.cls.items()}


def test_a_batch_brings_each_region_with_its_own_children(made: Any) -> None:
    run, grids, pixels = made
    slides = list(grids)[:3]
    paths = {slide: run.folder.bag("tiny_0.5mpp", slide) for slide in slides}
    regions = CohortRegions([(pixels[slide], CachedTargets(paths[slide], (1,))) for slide in slides], "train")
    where = [(slide, row) for slide in slides for row in np.unique(read_bag(paths[slide], layers=()).region)]
    assert len(regions) == len(where)
    indices = np.random.default_rng(0).permutation(len(regions))[:7]
    batch = regions.batch(indices)
    assert batch.images.shape == (7, 32, 32, 3)
    assert batch.teacher_embedding is None
    for position, index in enumerate(indices):
        slide, row = where[index]
        found = pixels[slide]
        assert np.array_equal(batch.images[position], found.images[np.flatnonzero(found.rows == row)][0])
        bag, own = read_bag(paths[slide], layers=(1,)), batch.region == position
        assert np.array_equal(batch.slot[own], bag.slot[bag.region == row])
        assert np.array_equal(batch.teacher_cls[1][own], bag.layer_cls[1][bag.region == row])


def test_foreign_children_are_all_of_one_region_of_another_slide(made: Any) -> None:
    run, grids, pixels = made
    slides = list(grids)[:4]
    paths = {slide: run.folder.bag("tiny_0.5mpp", slide) for slide in slides}
    sources = [(pixels[slide], CachedTargets(paths[slide], (1,))) for slide in slides]
    own, foreign = CohortRegions(sources, "train"), CohortRegions(sources, "train", foreign_seed=0)
    bags = {slide: read_bag(paths[slide], layers=(1,)) for slide in slides}
    where = [(slide, row) for slide in slides for row in np.unique(bags[slide].region)]
    known = {}
    for slide, row in where:
        inside = bags[slide].region == row
        known[bags[slide].layer_cls[1][inside].tobytes()] = slide, row, bags[slide].slot[inside]
    indices = np.random.default_rng(1).permutation(len(foreign))
    batch = foreign.batch(indices)
    assert np.array_equal(batch.images, own.batch(indices).images), "the pictures stay"
    dealt = set()
    for position, index in enumerate(indices):
        taught = batch.region == position
        slide, row, slots = known[batch.teacher_cls[1][taught].tobytes()]
        assert slide != where[index][0]
        assert np.array_equal(batch.slot[taught], slots)
        dealt.add((slide, row))
    assert dealt == set(where), "each region's children are given once"
    again = CohortRegions(sources, "train", foreign_seed=0).batch(indices)
    assert np.array_equal(again.teacher_cls[1], batch.teacher_cls[1])
    with pytest.raises(ConfigError, match="more than half of the regions of the val split"):
        CohortRegions(sources[:1], "val", foreign_seed=0)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=9), st.integers(0, 9))
def test_other_slides_are_drawn_whenever_there_are_enough(counts: list[int], seed: int) -> None:
    slide = np.repeat(np.arange(len(counts)), counts)
    if 2 * max(counts) > sum(counts):
        with pytest.raises(ConfigError, match="more than half"):
            of_other_slides(slide, seed, "train")
        return
    drawn = of_other_slides(slide, seed, "train")
    assert sorted(drawn) == list(range(len(slide)))
    assert not (slide[drawn] == slide).any()


def test_pixels_in_files_equal_pixels_in_memory(lab: Any, made: Any, tmp_path: Path) -> None:
    run, grids, in_memory = made
    slide, other = list(grids)[:2]
    room = in_memory[slide].images[:].nbytes + 1
    in_files = RegionPixels(run, grids, 0)
    run.folder.tiles(slide).with_suffix(".regions.npz").unlink()
    run.folder.tiles(other).with_suffix(".regions.npz").unlink()
    assert np.array_equal(in_files[slide].rows, in_memory[slide].rows)
    assert np.array_equal(in_files[slide].images[:], in_memory[slide].images[:])
    assert np.array_equal(in_files[slide].images[np.array([3, 0])], in_memory[slide].images[np.array([3, 0])])
    assert len(in_files[slide].images) == len(in_memory[slide].rows)
    assert run.folder.tiles(slide).with_suffix(".pixels.npy").is_file()
    # Memory is shared out in the order of asking: the first slide fits, the second does not.
    run.folder.tiles(slide).with_suffix(".pixels.npy").unlink()
    tight = RegionPixels(run, grids, room)
    assert isinstance(tight[slide].images, np.ndarray)
    assert not isinstance(tight[other].images, np.ndarray)


def test_pixels_of_another_file_are_read_again(made: Any, work: Any) -> None:
    run, grids, _ = made
    slide = next(iter(grids))
    run.folder.tiles(slide).with_suffix(".regions.npz").unlink(missing_ok=True)
    first = RegionPixels(run, grids, 0)[slide].images[:]
    assert work["read 5x"] == 1
    RegionPixels(run, grids, 0)[slide]
    assert work["read 5x"] == 1, "kept in a file"
    run.entry(slide).identity["mpp"] = 0.499
    again = RegionPixels(run, grids, 1e9)
    assert np.array_equal(again[slide].images[:], first)
    assert work["read 5x"] == 2
    assert not run.folder.tiles(slide).with_suffix(".pixels.npy").exists(), "pixels without a record that vouches"


def test_the_colour_histogram_is_that_of_numpy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    images[0, 0, 0] = 255
    counts, _ = np.histogramdd(images.reshape(-1, 3), bins=6, range=[(0, 256)] * 3)
    found = colour_histogram(images)
    np.testing.assert_allclose(found, counts.ravel() / counts.sum())
    assert found.sum() == pytest.approx(1)


def test_teachers_that_stage_1_had_trained_are_not_announced_again() -> None:
    told = io.StringIO()
    run: Any = SimpleNamespace(settings=None, reporter=Reporter(stream=told))
    fold: Any = SimpleNamespace(name="0")
    study = Study(run, None, folds=[fold], teacher_answers={"0": {}})  # type: ignore[arg-type]
    study.do("teacher")
    assert told.getvalue() == ""


@pytest.mark.parametrize("targets", ["cached", "on_the_fly"])
def test_the_released_extra_loss_has_the_teacher_head_trained_first(
    lab: Any, finished: Any, watch: Any, tmp_path: Path, targets: str
) -> None:
    out = finished.copy_features(tmp_path / "run")
    order: list[str] = []
    watch("lrmil.pipeline.teacher.train_teacher", lambda *args, **kwargs: order.append("teacher"))
    watch("lrmil.pipeline.distill.distil_encoder", lambda *args, **kwargs: order.append("stage 1"))
    lab.run_until("distill", out, stage1={"loss": {"lambda_attention_feature": 1.0}}, targets=targets)
    assert order == ["teacher"] * 3 + ["stage 1"] * 3
    epoch = history(out)[0]
    assert epoch["train_attention_feature"] > 0
    assert epoch["train_loss"] == pytest.approx(
        np.mean([epoch[f"train_layer{layer}"] for layer in (0, 1, 2)]) + epoch["train_attention_feature"], rel=1e-3
    )
