"""The negative controls that take seconds: after stage 1 a student finds its children where they truly lie, unless the
match it was taught was broken."""

from __future__ import annotations

import copy
from typing import get_args

import numpy as np
import pytest
import torch
from tests.studies.conftest import PATCH_PX, RATIO, SIDE_PX, TINY, paint

from lrmil.distill import Stage1LossSettings
from lrmil.encoders import Encoder, create_encoder, embed
from lrmil.errors import ConfigError
from lrmil.slides.resample import area_resample
from lrmil.studies.matches import MatchedViews, broken_match, slot_retrieval, student_blocks
from lrmil.studies.settings import Children
from lrmil.studies.taught import TaughtViews
from lrmil.studies.views import cut_children
from lrmil.training.stage1 import Stage1Settings, distil_encoder

K = RATIO**2


def _views(teacher: Encoder, count: int, seed: int) -> TaughtViews:
    rng = np.random.default_rng(seed)
    windows = [paint(rng, SIDE_PX, 0.0) for _ in range(count)]
    box = (0.0, 0.0, float(SIDE_PX), float(SIDE_PX))
    children = np.concatenate([cut_children(w, RATIO) for w in windows])
    seen = embed(teacher, children, cls_layers=(0, 1), precision="float32")
    return TaughtViews(
        images=np.stack([area_resample(w, box, (PATCH_PX, PATCH_PX)) for w in windows]),
        truth=np.zeros((count, 1)),
        cls={layer: v.reshape(count, K, -1).astype(np.float16) for layer, v in seen.cls.items()},
        embedding=np.zeros((count, 1), np.float32),
        field=np.arange(count),
    )


@pytest.fixture(scope="module")
def teacher() -> Encoder:
    """Random weights, larger than usual, so that the class token depends on what the image shows."""
    encoder = create_encoder(TINY, random_seed=1)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if weight.ndim >= 2 and "pos_embed" not in name:
                weight.mul_(4)
    return encoder


@pytest.fixture(scope="module")
def views(teacher: Encoder) -> tuple[TaughtViews, TaughtViews, TaughtViews]:
    return _views(teacher, 96, 1), _views(teacher, 16, 2), _views(teacher, 32, 3)


def _found(student: Encoder, test: TaughtViews) -> float:
    return float(slot_retrieval(student_blocks(student, test.images, RATIO, 1, "float32"), test.cls[1]).mean())


def _after_stage1(
    teacher: Encoder, views: tuple[TaughtViews, TaughtViews, TaughtViews], children: Children
) -> tuple[float, float]:
    """The share of its own children that a student finds, and its validation loss, the last over the first."""
    train, val, test = views
    student = copy.deepcopy(teacher)
    settings = Stage1Settings(
        loss=Stage1LossSettings(layers=(0, 1)), batch_size=16, learning_rate=3e-3, epochs=10, patience=10
    )
    matched = [MatchedViews(part, RATIO, children, seed) for seed, part in enumerate((train, val))]
    losses = [record["val_loss"] for record in distil_encoder(student, *matched, settings, ratio=RATIO, seed=0).history]
    return _found(student, test), losses[-1] / losses[0]


def test_a_distilled_student_finds_its_children(
    teacher: Encoder, views: tuple[TaughtViews, TaughtViews, TaughtViews]
) -> None:
    assert _found(teacher, views[2]) < 1 / K + 0.03, "by chance before stage 1"
    assert _after_stage1(teacher, views, "own")[0] > 0.5


def test_taught_transposed_slots_it_finds_at_most_those_of_the_diagonal(
    teacher: Encoder, views: tuple[TaughtViews, TaughtViews, TaughtViews]
) -> None:
    """4 of 16 slots stay in place when rows and columns are swapped: the commonest error in matching the two scales.

    From those it learns something: a student that learned nothing would be at chance, and no control. Two blocks cannot
    learn to look at the transposed place.
    """
    found, loss = _after_stage1(teacher, views, "transposed")
    assert 1 / K + 0.1 < found <= 1 / RATIO + 0.03
    assert loss < 0.2


def test_taught_shuffled_slots_it_finds_them_by_chance(
    teacher: Encoder, views: tuple[TaughtViews, TaughtViews, TaughtViews]
) -> None:
    found, loss = _after_stage1(teacher, views, "shuffled")
    assert found < 1 / K + 0.1
    assert loss < 0.2, "what all children of a region share, it learned"


def test_retrieval_of_known_matches() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((50, K, 24))
    shift, scale = rng.standard_normal((50, 1, 24)) * 9, 1e-3
    np.testing.assert_array_equal(slot_retrieval(scale * teacher + shift, teacher), 1.0)
    transposed = RATIO * (np.arange(K) % RATIO) + np.arange(K) // RATIO
    np.testing.assert_allclose(slot_retrieval(teacher[:, transposed], teacher), RATIO / K)
    assert slot_retrieval(rng.standard_normal(teacher.shape), teacher).mean() == pytest.approx(1 / K, abs=0.02)


@pytest.mark.parametrize("children", get_args(Children))
def test_each_control_breaks_what_it_says_and_no_more(children: Children) -> None:
    field = np.repeat(np.arange(6), 4)
    source, slot = broken_match(field, RATIO, children, seed=2)
    again = broken_match(field, RATIO, children, seed=2)
    assert (source == again[0]).all(), "fixed for each region"
    assert (slot == again[1]).all()
    np.testing.assert_array_equal(np.sort(slot, axis=1), np.tile(np.arange(K), (24, 1)))
    in_place = (slot == np.arange(K)).mean(axis=1)
    if children == "foreign":
        assert (field[source] != field).all()
    else:
        assert (source == np.arange(24)).all()
    if children in ("own", "foreign"):
        assert (in_place == 1).all()
    elif children == "transposed":
        assert (in_place == RATIO / K).all()
    else:
        assert in_place.mean() < 0.15
        assert len({tuple(row) for row in slot}) == 24, "another permutation for each region"


def test_foreign_children_need_another_image() -> None:
    with pytest.raises(ConfigError, match="more than one image"):
        broken_match(np.zeros(5, np.int64), RATIO, "foreign", 0)
