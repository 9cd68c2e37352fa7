"""Every head with every task: really trained where the table says so, refused by name where it says that."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrmil.distill import Stage2LossSettings
from lrmil.errors import ConfigError
from lrmil.mil import HeadSettings, StoredScales, create_head, head_cards
from lrmil.training import stage2
from lrmil.training.objectives import Classification, Cox, Hazards, Objective, Regression
from lrmil.training.stage2 import (
    SlideBag,
    StudentSettings,
    TeacherSettings,
    predict_bags,
    teacher_signal,
    train_student,
    train_teacher,
)
from lrmil.training.support import MATRIX, fitting_head, support

D = 6
OBJECTIVES: dict[str, Objective] = {
    "classification": Classification(2),
    "regression": Regression(3),
    "cox": Cox(8, 3),
    "hazards": Hazards(3),
}
QUICK: dict[str, dict[str, Any]] = {
    "clam_sb": {"embed_dim": 8, "attention_dim": 8, "k_sample": 2},
    "clam_mb": {"embed_dim": 8, "attention_dim": 8, "k_sample": 2, "subtyping": True},
    "dmin": {"embed_dim": 8, "hidden_dim": 8, "k_sample": 2},
    "dtfd": {"hidden_dim": 8, "attention_dim": 8, "groups": 3},
    "instance_max": {"embed_dim": 8},
    "transmil": {"dim": 16, "heads": 2, "landmarks": 4},
}
CARDS = {card.name: card for card in head_cards()}
ONE_SCALE = [name for name, card in CARDS.items() if card.scales == "one"]


def _bags(count: int, seed: int) -> list[SlideBag]:
    """Slides of which feature 0 tells class, number and survival alike."""
    rng = np.random.default_rng(seed)
    bags = []
    for i in range(count):
        signal = float(rng.standard_normal()) + (i % 2)
        features = rng.standard_normal((int(rng.integers(4, 9)), D)).astype(np.float32)
        features[:, 0] += signal
        bags.append(SlideBag(f"s{seed}_{i}", features, int(i % 2), target=np.array([signal])))
    return bags


def _aim(bags: list[SlideBag], task: str) -> list[SlideBag]:
    aimed = []
    for i, bag in enumerate(bags):
        signal = float(np.asarray(bag.target)[0])
        target: Any = {
            "classification": None,
            "regression": 1000.0 + 50.0 * signal,
            "cox": np.array([float(np.exp(-signal)), float(i % 4 != 3)]),
        }["cox" if task == "hazards" else task]
        aimed.append(replace(bag, label=bag.label if task == "classification" else None, target=target))
    return aimed


def _head(name: str) -> HeadSettings:
    return HeadSettings(name=name, options=QUICK.get(name, {}))


def test_the_table_holds_every_head_and_task() -> None:
    assert set(MATRIX) == set(CARDS)
    assert all(set(row) == set(OBJECTIVES) for row in MATRIX.values())
    assert all(row["classification"].how == "as it is" for row in MATRIX.values())
    assert support("torchmil:SETMIL", "cox").how == "as it is"


@pytest.mark.parametrize("task", list(OBJECTIVES))
@pytest.mark.parametrize("name", ONE_SCALE)
def test_every_head_learns_every_task_or_says_that_it_cannot(name: str, task: str) -> None:
    train, val = _aim(_bags(10, 1), task), _aim(_bags(8, 2), task)
    settings = TeacherSettings(head=_head(name), epochs=2, learning_rate=1e-3)
    objective = OBJECTIVES[task]
    found = MATRIX[name][objective.name]
    if found.how == "refused":
        with pytest.raises(ConfigError, match=rf"head '{name}' cannot learn {task}: .*Choose one of: .*abmil"):
            train_teacher(train, val, settings, objective=objective, seed=0)
        return
    trained = train_teacher(train, val, settings, objective=objective, seed=0)
    first = trained.fit.history[0]
    loss = {"classification": "ce", "regression": "mse", "cox": "cox", "hazards": "nll"}[task]
    assert np.isfinite([first["train_loss"], first[f"train_{loss}"], first["val_loss"]]).all()
    assert len(trained.fit.history) == 2
    assert (found.how == "streams") == (task != "classification" and bool(trained.head.stream_weights))
    for stream in trained.head.stream_weights:
        assert first[f"train_{stream}"] > 0
    if found.how == "bins":
        assert trained.head.instance_classes == 3
        assert first["train_instance"] > 0
    predictions = predict_bags(trained.head, val, readout=trained.readout)
    answer = predictions[0]
    if task == "classification":
        assert answer.probabilities.shape == (2,)
        assert answer.value is None
    else:
        assert answer.probabilities.shape == (0,)
        assert answer.value is not None
        assert np.isfinite(answer.value)
    assert (answer.survival is not None) == (task == "hazards")
    # What is stored beside the weights builds the same head again.
    again = create_head(**trained.head.describe())
    again.load_state_dict(trained.head.state_dict())
    assert predict_bags(again, val[:1], readout=trained.readout)[0].value == answer.value
    # A card tells the truth about attention: others rely on it before anything is trained.
    assert (answer.attention_logits is not None) == CARDS[name].gives_attention


@pytest.mark.parametrize("task", ["regression", "cox", "hazards"])
@pytest.mark.parametrize("name", ["abmil", "clam_sb", "clam_mb", "dsmil", "dtfd"])
def test_teacher_and_student_of_every_task(name: str, task: str) -> None:
    train, val = _aim(_bags(10, 1), task), _aim(_bags(8, 2), task)
    objective = OBJECTIVES[task]
    teacher = train_teacher(train, val, TeacherSettings(head=_head(name), epochs=1), objective=objective, seed=0)
    told = predict_bags(teacher.head, train, readout=teacher.readout)
    signals = {p.slide_id: teacher_signal(p, np.arange(len(p.attention_logits))) for p in told}  # type: ignore[arg-type]
    settings = StudentSettings(head=_head(name), epochs=2)
    student = train_student(train, val, signals, settings, objective=objective, seed=1)
    first = student.fit.history[0]
    assert {"train_bag", "train_soft", "train_hard"} <= first.keys()
    assert first["train_bag"] > 0
    assert "train_ce" not in first


@pytest.mark.parametrize("task", ["regression", "cox", "hazards"])
def test_what_can_be_learned_is_learned(task: str) -> None:
    train, val = _aim(_bags(60, 1), task), _aim(_bags(30, 2), task)
    settings = TeacherSettings(epochs=15, learning_rate=2e-2)
    trained = train_teacher(train, val, settings, objective=OBJECTIVES[task], seed=0)
    name = "r2" if task == "regression" else "c_index"
    assert trained.fit.selected_by == name
    assert trained.fit.best.score > {"r2": 0.6, "c_index": 0.75}[name]
    values = np.array([p.value for p in predict_bags(trained.head, val, readout=trained.readout)])
    if task == "regression":
        wanted = np.array([b.target for b in val])
        assert 1 - np.square(values - wanted).mean() / wanted.var() == pytest.approx(trained.fit.best.score)
    else:
        # Risk falls as survival grows.
        times = np.array([np.asarray(b.target)[0] for b in val])
        assert np.corrcoef(np.log(times), values)[0, 1] < -0.7


def test_cox_steps_hold_at_least_as_many_slides_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = stage2.HeadStep.__call__

    def spy(self: Any, indices: Any) -> Any:
        sizes.append(len(indices))
        return original(self, indices)

    monkeypatch.setattr(stage2.HeadStep, "__call__", spy)
    for count, wanted in ((70, [35, 35]), (20, [20])):
        sizes.clear()
        train_teacher(
            _aim(_bags(count, 1), "cox"), _aim(_bags(8, 2), "cox"), TeacherSettings(epochs=1), objective=Cox(), seed=0
        )
        assert sizes == wanted


@pytest.mark.parametrize(
    ("head", "options", "task", "message"),
    [
        ("dsmil", {"loss": "bce"}, "regression", "'dsmil' with loss: bce cannot learn regression.*Set loss: ce"),
        ("dsmil", {"average": True}, "cox", "with average: true cannot learn cox.*Set average: false"),
        ("dtfd", {"distillation": "maxs"}, "hazards", "distillation: maxs cannot learn hazards.*afs or mas"),
        ("dtfd", {"distillation": "maxmins"}, "cox", "distillation: maxmins"),
        ("dtfd", {"random_splits": 3}, "hazards", "random_splits: 3"),
        ("clam_sb", {"instance_classes": 7}, "cox", "instance_classes: 7, but the task has 3 bins"),
    ],
)
def test_options_that_stand_for_classes_are_refused(
    head: str, options: dict[str, Any], task: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fitting_head(HeadSettings(name=head, options=options), OBJECTIVES[task])
    assert fitting_head(HeadSettings(name=head, options=options), Classification(2)).options == options


def test_averaged_splits_of_dtfd_average_a_number() -> None:
    torch.manual_seed(0)
    head = create_head("dtfd", D, 1, random_splits=4, **QUICK["dtfd"]).eval()
    bag = torch.randn(9, D)
    m = head.reduction(bag)
    each = [head.two_tiers(m, head.attention(m)[0], split).logits for split in head._splits(9)]
    torch.testing.assert_close(head(bag).logits, torch.stack(each).mean(0))


@pytest.mark.parametrize("task", ["regression", "cox", "hazards"])
def test_heads_of_many_scales_pass_the_loss_of_every_task_on(task: str) -> None:
    objective = OBJECTIVES[task]
    aimed = _aim(_bags(8, 1), task)
    fitted = objective.fit(objective.targets(aimed, "training"))
    torch.manual_seed(0)
    head = create_head("zoommil", D, fitted.outputs, k=2, out_dim=8, hidden_dim=8, dropout=0.0)
    slides = [
        StoredScales({"low": torch.randn(3, D), "mid": torch.randn(12, D), "high": torch.randn(48, D)}) for _ in aimed
    ]
    logits = torch.stack([head(slide).logits for slide in slides])
    fitted.loss(logits, fitted.tensor(objective.targets(aimed, "training"))).backward()
    assert bool(head.classifier.weight.grad.any())
    with pytest.raises(ConfigError, match="head 'hdmil' cannot learn"):
        fitting_head(HeadSettings(name="hdmil"), objective)


def test_a_head_that_weighs_nothing_may_teach_and_learn_by_logits() -> None:
    train, val = _aim(_bags(10, 1), "regression"), _aim(_bags(8, 2), "regression")
    mean = HeadSettings(name="mean_pool")
    teacher = train_teacher(train, val, TeacherSettings(head=mean, epochs=1), objective=Regression(), seed=0)
    signals = {p.slide_id: teacher_signal(p, np.zeros(5, np.int64)) for p in predict_bags(teacher.head, train)}
    by_logits = StudentSettings(epochs=1, loss=Stage2LossSettings(lambda_soft=0, lambda_hard=0))
    student = train_student(train, val, signals, by_logits, objective=Regression(), seed=0)
    assert student.fit.history[0]["train_bag"] > 0
    with pytest.raises(ConfigError, match="has no attention, but the loss compares with it"):
        train_student(train, val, signals, StudentSettings(epochs=1), objective=Regression(), seed=0)


def test_the_document_shows_the_table() -> None:
    """docs/tasks.md says of every head and task what the table says."""
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if (name := re.fullmatch(r"`(\w+)`", cells[0])) and len(cells) == 5:
            rows[name[1]] = cells[1:]
    assert rows == {name: [row[task].how for task in OBJECTIVES] for name, row in MATRIX.items()}  # type: ignore[index]
    text = " ".join(text.split())
    for name, row in MATRIX.items():
        for found in row.values():
            assert found.why in text, f"{name}: {found.why}"
            for option, allowed in found.only.items():
                assert f"`{option}: {str(allowed[0]).lower()}`" in text, f"{name}: {option}"


def test_training_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_teacher(
            _aim(_bags(10, 1), "cox"), _aim(_bags(8, 2), "cox"), TeacherSettings(epochs=1), objective=Cox(), seed=0
        )
