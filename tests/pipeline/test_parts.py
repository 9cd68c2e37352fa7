"""Small parts of the pipeline by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lrmil.bags import Bag
from lrmil.mil import create_head
from lrmil.pipeline.baselines import colour_probabilities
from lrmil.pipeline.context import SlideEntry, Split
from lrmil.pipeline.evaluate import TestPredictions
from lrmil.pipeline.figures import true_areas
from lrmil.pipeline.folder import RunFolder
from lrmil.pipeline.heads import store_head, stored_head
from lrmil.pipeline.splits import make_splits
from lrmil.pipeline.student import rows_of_children
from lrmil.pipeline.tile import load_grid, tile_cohort
from lrmil.pipeline.timing import time_answers


def test_a_step_is_done_only_with_its_key_and_only_when_all_is_written(tmp_path: Path) -> None:
    folder, step = RunFolder(tmp_path), tmp_path / "folds" / "0" / "stage1"
    assert not folder.is_done(step, "a")
    folder.mark_done(step, "a", seconds=1)
    assert folder.is_done(step, "a")
    assert not folder.is_done(step, "b")
    assert folder.done_facts(step) == {"key": "a", "seconds": 1}
    folder.begin(step)
    assert not folder.is_done(step, "a")
    folder.begin(step)
    for content in ("", "[]", "{", '"a"'):
        (step / "done.json").write_text(content)
        assert not folder.is_done(step, "a")


def test_a_grid_comes_back_as_it_was_stored(lab: Any, tmp_path: Path) -> None:
    run = lab.parts(tmp_path)
    made, known = tile_cohort(run), tile_cohort(run)
    assert list(made) == [entry.slide_id for entry in run.entries()]
    for slide, grid in made.items():
        for name, value in vars(grid).items():
            assert np.array_equal(value, getattr(known[slide], name)), name
            if isinstance(value, np.ndarray):
                assert value.dtype == getattr(known[slide], name).dtype
        assert run.folder.tiles(slide).with_suffix(".jpg").is_file()
    path = run.folder.tiles("S001")
    assert load_grid(path, "another key") is None
    path.write_bytes(path.read_bytes()[:500])
    assert load_grid(path, "any") is None


def test_a_head_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    head = create_head("abmil", 5, 3, gated=True, hidden_dim=7).eval()
    store_head(head, tmp_path)
    again = stored_head(tmp_path)
    assert again.describe() == head.describe()
    assert all(value.equal(again.state_dict()[name]) for name, value in head.state_dict().items())
    assert not again.training


def bag(region: list[int], slot: list[int] | None = None) -> Bag:
    count = len(region)
    return Bag(
        features=np.zeros((count, 2), np.float16),
        coords_l0=np.zeros((count, 2), np.int64),
        region=np.array(region, np.int64),
        slot=None if slot is None else np.array(slot, np.int64),
    )


def test_children_find_the_row_of_their_region_even_where_regions_are_missing() -> None:
    lr, hr = bag([0, 3, 5]), bag([0, 0, 3, 4, 5, 7], [0, 1, 2, 3, 0, 0])
    assert rows_of_children(lr, hr).tolist() == [0, 0, 1, -1, 2, -1]


@pytest.mark.parametrize(
    ("content", "rings"),
    [
        ({"features": [{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1]], [[9, 9]]]}}]}, 1),
        ({"features": [{"geometry": {"type": "MultiPolygon", "coordinates": [[[[0, 0, 5]]], [[[1, 1, 5]]]]}}]}, 2),
        ([{"geometry": {"type": "Polygon", "coordinates": [[[0, 0]]]}, "properties": None}], 1),
        ({"features": [{"geometry": {"type": "Point", "coordinates": [0, 0]}}, {"geometry": None}]}, 0),
        (
            {
                "features": [
                    {
                        "geometry": {"type": "Polygon", "coordinates": [[[0, 0]]]},
                        "properties": {"classification": {"name": "tissue"}},
                    },
                    {
                        "geometry": {"type": "Polygon", "coordinates": [[[0, 0]]]},
                        "properties": {"classification": None},
                    },
                ]
            },
            1,
        ),
        ({"no": "features"}, 0),
        ("{", 0),
        ({"features": [{"geometry": {"type": "Polygon", "coordinates": []}}]}, 0),
    ],
    ids=range(8),
)
def test_areas_that_are_not_understood_spoil_no_report(tmp_path: Path, content: Any, rings: int) -> None:
    """Annotations beside a slide come from any program; the report shows what it can."""
    (tmp_path / "S.geojson").write_text(content if isinstance(content, str) else json.dumps(content))
    found = true_areas(SlideEntry("S", tmp_path / "S.tif", None))
    assert len(found) == rings
    assert all(ring.shape[1] == 2 for ring in found)


def test_areas_of_the_simulated_cohort_are_found(lab: Any) -> None:
    table = pd.read_csv(lab.table)
    positive = table[table["label"] == "positive"].iloc[0]
    entry = SlideEntry(positive["slide_id"], lab.table.parent / positive["path"], None)
    areas = true_areas(entry)
    assert areas
    assert all((ring >= 0).all() and (ring <= 512).all() for ring in areas)


@pytest.fixture
def split(lab: Any, tmp_path: Path) -> tuple[Any, Split]:
    run = lab.parts(tmp_path / "run")
    return run, make_splits(run, [entry.slide_id for entry in run.entries()])[0][0]


def test_colours_tell_classes_that_differ_in_colour(split: tuple[Any, Split]) -> None:
    run, fold = split
    histograms = {}
    for slide in (*fold.train, *fold.val, *fold.test):
        shares = np.full(216, 0.1)
        shares[run.cohort.label_of(slide)] += 5
        histograms[slide] = shares / shares.sum()
    found = colour_probabilities(run, fold, histograms, fold.test)
    assert found.argmax(axis=1).tolist() == [run.cohort.label_of(slide) for slide in fold.test]
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert colour_probabilities(run, fold, histograms, []).shape == (0, 2)


def test_colours_of_a_fold_with_one_class_say_that_class(split: tuple[Any, Split]) -> None:
    run, fold = split
    one = tuple(slide for slide in fold.train if run.cohort.label_of(slide) == 1)
    fold = Split(fold.name, fold.title, one, fold.val, fold.test)
    histograms = {slide: np.full(216, 1 / 216) for slide in (*fold.train, *fold.test)}
    assert colour_probabilities(run, fold, histograms, fold.test).tolist() == [[0.0, 1.0]] * len(fold.test)


def test_the_majority_answers_with_the_shares_of_the_training_split(split: tuple[Any, Split]) -> None:
    run, fold = split
    found = TestPredictions(run)
    found.add_constant(fold)
    told = found.of("Majority class")
    positive = np.mean([run.cohort.label_of(slide) for slide in fold.train])
    assert sorted(told.slide_ids) == sorted(fold.test)
    np.testing.assert_allclose(told.probabilities, [[1 - positive, positive]] * len(fold.test))


def test_a_method_must_answer_all_test_slides(split: tuple[Any, Split]) -> None:
    """Methods that answered different slides must not stand in one table."""
    run, fold = split
    with pytest.raises(KeyError):
        TestPredictions(run).add("LRMIL", fold, {})


def test_seconds_are_measured_once_and_for_what_takes_them(lab: Any, finished: Any, work: Any, tmp_path: Path) -> None:
    run = lab.parts(finished.copy(tmp_path / "run"))
    entries = [run.entry("S001"), run.entry("S002")]
    encoder, head = run.build_encoder(), stored_head(run.folder.fold("0") / "student")
    first = time_answers(run, "LRMIL", entries, encoder, head, "lr")
    assert work["time"] == 3, "once to warm up, then each"
    assert [cost.slide_id for cost in first] == ["S001", "S002"]
    assert time_answers(run, "LRMIL", entries, encoder, head, "lr") == first
    assert work["time"] == 3
    with np.load(run.folder.tiles("S001")) as grid:
        assert first[0].patches_encoded == len(grid["region_boxes_l0"])
        high = time_answers(run, "HR teacher", entries[:1], encoder, head, "hr")
        assert high[0].patches_encoded == len(grid["child_boxes_l0"])
    for cost in first:
        parts = cost.tissue_s + cost.reading_s + cost.encoding_s + cost.mil_s
        assert cost.total_s == pytest.approx(parts, rel=0.05, abs=0.01)
    work.clear()
    time_answers(run, "LRMIL", entries[:1], encoder, head, "lr")
    assert work["time"] == 2, "other slides, other seconds"
    assert time_answers(run, "LRMIL", [], encoder, head, "lr") == []
