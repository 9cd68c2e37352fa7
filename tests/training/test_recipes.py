"""The recipe for all methods, and that of a head's own program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lrmil.distill import Stage2LossSettings
from lrmil.errors import ConfigError, HeadError
from lrmil.mil import HeadSettings, head_cards, registry
from lrmil.mil.recipe import Recipe
from lrmil.training import stage2, steps
from lrmil.training.objectives import Classification, Cox, Hazards
from lrmil.training.recipes import training_recipe
from lrmil.training.stage2 import (
    SlideBag,
    StudentSettings,
    TeacherSettings,
    TrainedHead,
    predict_bags,
    teacher_signal,
    train_student,
    train_teacher,
    trainable_pair,
)

D = 5


def _bags(count: int, seed: int, positive: float = 0.5) -> list[SlideBag]:
    rng = np.random.default_rng(seed)
    bags = []
    for i in range(count):
        label = int(i < positive * count)
        features = rng.standard_normal((int(rng.integers(4, 9)), D)).astype(np.float32)
        features[:, label] += 1.0
        target = np.array([float(i + 1), float(i % 3 != 0)])
        bags.append(SlideBag(f"s{seed}_{i}", features, label, target=target))
    return bags


@pytest.fixture
def own_recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give abmil a recipe for a while."""
    monkeypatch.setattr(registry, "_HEADS", dict(registry._HEADS))

    def give(recipe: Recipe) -> TeacherSettings:
        card, head_class = registry._HEADS["abmil"]
        registry._HEADS["abmil"] = (replace(card, recipe=recipe), head_class)
        return TeacherSettings(recipe="original")

    return give


def _weights(trained: TrainedHead) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained.head.parameters()])


def test_every_head_with_a_recipe_is_trained_by_it() -> None:
    for card in head_cards():
        settings = TeacherSettings(head=HeadSettings(name=card.name), recipe="original")
        if card.recipe is None:
            with pytest.raises(ConfigError, match=rf"head '{card.name}' has no original recipe.*recipe: paper"):
                training_recipe(settings)
        else:
            assert training_recipe(settings) is card.recipe
    with pytest.raises(HeadError, match="no head named 'nope'"):
        training_recipe(TeacherSettings(head=HeadSettings(name="nope"), recipe="original"))
    assert training_recipe(StudentSettings(head=HeadSettings(name="clam_sb"), recipe="original")).earliest_stop == 50


def test_the_original_recipes_numbers_win_over_the_configs_and_the_papers_come_from_it() -> None:
    numbers: dict[str, Any] = {"learning_rate": 0.5, "weight_decay": 0.25, "epochs": 3, "patience": 2}
    for name in ("clam_mb", "transmil"):
        head = HeadSettings(name=name)
        original = training_recipe(TeacherSettings(head=head, recipe="original", **numbers))
        assert original == training_recipe(TeacherSettings(head=head, recipe="original"))
        assert original.epochs == 200
        paper = training_recipe(TeacherSettings(head=head, **numbers))
        assert {k: getattr(paper, k) for k in numbers} == numbers
        assert (paper.optimiser, paper.betas, paper.schedule, paper.select_by) == (
            "adam", (0.9, 0.999), "constant", "auc",
        )  # fmt: skip
    assert training_recipe(TeacherSettings(select_by="loss")).select_by == "loss"


def test_paper_is_the_default_and_the_same_as_its_numbers_by_hand(own_recipe: Any) -> None:
    train, val = _bags(10, 1), _bags(6, 2)
    paper = train_teacher(train, val, TeacherSettings(epochs=4, learning_rate=1e-2), num_classes=2, seed=0)
    settings = own_recipe(Recipe(1e-2, epochs=4, patience=20, select_by="auc"))
    assert torch.equal(_weights(paper), _weights(train_teacher(train, val, settings, num_classes=2, seed=0)))


@pytest.mark.parametrize("name", ["clam_sb", "dsmil", "transmil", "dtfd", "instance_max", "dmin"])
def test_published_recipes_train(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the first epochs of its recipe, for classes and for Cox where it can."""
    monkeypatch.setattr(registry, "_HEADS", dict(registry._HEADS))
    card, head_class = registry._HEADS[name]
    assert card.recipe is not None
    short = replace(card.recipe, epochs=3, first_epoch=min(card.recipe.first_epoch, 2))
    registry._HEADS[name] = (replace(card, recipe=short), head_class)
    options = {
        "transmil": {"dim": 16, "heads": 2, "landmarks": 4},
        "dtfd": {"hidden_dim": 8, "attention_dim": 8},
        "dsmil": {},
        "instance_max": {"embed_dim": 8},
        "dmin": {"embed_dim": 8, "hidden_dim": 8},
    }.get(name, {"embed_dim": 8, "attention_dim": 8})
    settings = TeacherSettings(head=HeadSettings(name=name, options=options), recipe="original")
    train, val = _bags(9, 1), _bags(8, 2)
    trained = train_teacher(train, val, settings, num_classes=2, seed=0)
    assert len(trained.fit.history) == 3
    assert trained.fit.selected_by == {"dsmil": "auc+accuracy", "dtfd": "auc"}.get(name, "loss")
    if name != "dmin":
        cox = train_teacher(train, val, settings, objective=Cox(4), seed=0)
        assert cox.fit.selected_by == ("c_index" if name in ("dsmil", "dtfd") else "loss")


def test_a_balanced_sampler_draws_rare_classes_as_often(own_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = _bags(20, 1, positive=0.1), _bags(6, 2)
    seen: list[int] = []
    original = stage2.HeadStep.__call__

    def spy(self: Any, indices: Any) -> Any:
        seen.extend(train[int(i)].label for i in indices)  # type: ignore[misc]
        return original(self, indices)

    monkeypatch.setattr(stage2.HeadStep, "__call__", spy)
    train_teacher(train, val, own_recipe(Recipe(1e-3, epochs=20, balanced_sampler=True)), num_classes=2, seed=0)
    assert len(seen) == 400
    assert 0.4 < np.mean(seen) < 0.6
    seen.clear()
    train_teacher(train, val, own_recipe(Recipe(1e-3, epochs=20)), num_classes=2, seed=0)
    assert np.mean(seen) == pytest.approx(0.1)


def test_accumulation_schedule_and_weighted_f1_reach_training(own_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = _bags(9, 1), _bags(6, 2)
    rates: list[float] = []
    sizes: list[int] = []
    original = steps.run_epoch

    def spy(count: int, size: int, **named: Any) -> Mapping[str, float]:
        rates.append(named["optimizer"].param_groups[0]["lr"])
        sizes.append(size)
        return original(count, size, **named)

    monkeypatch.setattr(steps, "run_epoch", spy)
    recipe = Recipe(
        1e-3, epochs=4, accumulate=2, schedule="step", schedule_epochs=2, schedule_factor=0.1, select_by="weighted_f1"
    )
    trained = train_teacher(train, val, own_recipe(recipe), num_classes=2, seed=0)
    assert sizes == [2] * 4
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert trained.fit.selected_by == "weighted_f1"
    assert {"val_weighted_f1", "val_auc", "val_accuracy"} <= trained.fit.history[0].keys()


def test_a_student_is_taught_by_an_original_recipe(own_recipe: Any) -> None:
    train, val = _bags(8, 1), _bags(6, 2)
    own_recipe(Recipe(1e-3, epochs=3, shuffle_instances=True, clip_norm=0.5, accumulate=3, select_by="last"))
    signals = {}
    taught = train_teacher(train, val, TeacherSettings(recipe="original"), num_classes=2, seed=0)
    for p in predict_bags(taught.head, train):
        assert p.attention_logits is not None
        signals[p.slide_id] = teacher_signal(p, np.arange(len(p.attention_logits)))
    student = train_student(train, val, signals, StudentSettings(recipe="original"), num_classes=2, seed=1)
    assert student.fit.selected_by == "last"
    assert student.fit.best_epoch == 3
    assert {"train_bag", "train_soft", "train_hard"} <= student.fit.history[0].keys()


def test_what_cannot_be_trained_is_found_before_anything_is() -> None:
    def pair(teacher: str = "abmil", student: str = "abmil", objective: Any = None, **loss: Any) -> Any:
        return trainable_pair(
            TeacherSettings(head=HeadSettings(name=teacher)),
            StudentSettings(head=HeadSettings(name=student), loss=Stage2LossSettings(**loss)),
            objective or Classification(2),
        )

    for name in ("max_pool", "transmil", "dmin", "instance_max", "zoommil"):
        with pytest.raises(ConfigError, match=rf"teacher head '{name}' weighs no instances.*one of: abmil"):
            pair(teacher=name)
        with pytest.raises(ConfigError, match=rf"teacher head '{name}' weighs no instances"):
            pair(teacher=name, lambda_soft=0, hard_mode="hidden")
        pair(teacher=name, lambda_soft=0, lambda_hard=0)
        with pytest.raises(ConfigError, match=f"head '{name}' weighs no instances, so it cannot learn"):
            pair(student=name)
    with pytest.raises(ConfigError, match="bag_temperature is 2"):
        pair(objective=Cox(), bag_temperature=2.0)
    pair(objective=Hazards(), bag_temperature=2.0)
    with pytest.raises(ConfigError, match="'dmin' cannot learn cox"):
        pair(student="dmin", objective=Cox())
    with pytest.raises(ConfigError, match="no original recipe"):
        trainable_pair(TeacherSettings(recipe="original"), StudentSettings(), Cox())
    with pytest.raises(ConfigError, match="no original recipe"):
        trainable_pair(TeacherSettings(), StudentSettings(recipe="original"), Cox())
    teacher, student = pair("clam_mb", "clam_sb", objective=Cox(label_bins=5))
    assert teacher.options == student.options == {"instance_classes": 5}
    hidden = pair(objective=Hazards(), hard_mode="hidden")[1]
    assert hidden.options == {"instance_classifier": "hidden"}


def test_a_head_is_trained_for_classes_or_for_an_objective() -> None:
    bags = _bags(6, 1)
    for both in ({}, {"num_classes": 2, "objective": Cox()}):
        with pytest.raises(ConfigError, match="num_classes or for an objective"):
            train_teacher(bags, bags, TeacherSettings(epochs=1), seed=0, **both)
    by_number = train_teacher(bags, bags, TeacherSettings(epochs=1), num_classes=2, seed=0)
    by_objective = train_teacher(bags, bags, TeacherSettings(epochs=1), objective=Classification(2), seed=0)
    assert torch.equal(_weights(by_number), _weights(by_objective))


@pytest.mark.parametrize("name", ["zoommil", "hdmil"])
def test_heads_of_many_scales_are_not_fed_bags(name: str) -> None:
    bags = _bags(6, 1)
    with pytest.raises(ConfigError, match=f"head '{name}' chooses what it reads from several scales"):
        train_teacher(bags, bags, TeacherSettings(head=HeadSettings(name=name)), num_classes=2, seed=0)
