"""Stage 2 in memory: teacher, student, what they are selected by, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lrmil.distill import Stage2LossSettings
from lrmil.errors import ConfigError, CorruptBag, HeadError, TrainingError
from lrmil.mil import HeadCard, HeadOutput, HeadSettings, MILHead, create_head, register_head, registry
from lrmil.training.stage2 import (
    BagPrediction,
    SlideBag,
    StudentSettings,
    TeacherSettings,
    TeacherSignal,
    TrainedHead,
    predict_bags,
    selection_auc,
    student_head,
    teacher_signal,
    train_student,
    train_teacher,
)

D = 8


def _bags(
    count: int, seed: int, *, classes: int = 2, shift: float = 2.0, size: tuple[int, int] = (4, 12)
) -> list[SlideBag]:
    """Slides in which a quarter of the instances say the class (feature 0 + class is high), the rest nothing."""
    rng = np.random.default_rng(seed)
    bags = []
    for i in range(count):
        label = i % classes
        features = rng.standard_normal((int(rng.integers(*size)), D)).astype(np.float32)
        features[: max(1, len(features) // 4), label] += shift
        bags.append(SlideBag(f"s{seed}_{i}", features, label))
    return bags


def _signals(bags: list[SlideBag], classes: int = 2, seed: int = 0) -> dict[str, TeacherSignal]:
    """A teacher that knows the label and looks at the first quarter of the regions; up to two children a region."""
    rng = np.random.default_rng(seed)
    signals = {}
    for bag in bags:
        region = np.repeat(np.arange(len(bag.features)), 2)[rng.random(2 * len(bag.features)) < 0.8]
        told = region < max(1, len(bag.features) // 4)
        logits = np.where(np.arange(classes) == bag.label, 3.0, 0.0).astype(np.float32)
        signals[bag.slide_id] = TeacherSignal(logits, (3.0 * told).astype(np.float32), region)
    return signals


def _quick(**changes: Any) -> dict[str, Any]:
    return {"learning_rate": 1e-2, "epochs": 10, "patience": 10} | changes


def _weights(trained: TrainedHead) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained.head.parameters()])


def _comparable(trained: TrainedHead) -> list[dict[str, float]]:
    timing = {"seconds", "val_s", "train_loading_s", "train_steps_s"}
    return [{k: v for k, v in record.items() if k not in timing} for record in trained.fit.history]


NOTHING = Stage2LossSettings(lambda_bag=0, lambda_soft=0, lambda_hard=0)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_teacher_learns_and_the_best_epoch_is_what_it_predicts_with(classes: int) -> None:
    train, val = (_bags(n, n, classes=classes, shift=5.0) for n in (30, 18))
    seen: list[Any] = []
    trained = train_teacher(train, val, TeacherSettings(**_quick()), num_classes=classes, seed=0, on_epoch=seen.append)
    assert trained.fit.best.score > 0.8
    assert trained.fit.selected_by == "auc"
    assert seen == trained.fit.history
    json.dumps(trained.fit.history)
    predictions = predict_bags(trained.head, val)
    probabilities = np.stack([p.probabilities for p in predictions])
    labels = np.array([b.label for b in val])
    assert selection_auc(probabilities, labels) == pytest.approx(trained.fit.best.score)
    ce = -np.mean(np.log(probabilities[np.arange(18), labels]))
    assert ce == pytest.approx(trained.fit.best.loss, rel=1e-4)
    best = trained.fit.history[trained.fit.best_epoch - 1]
    assert best["val_accuracy"] == pytest.approx((probabilities.argmax(1) == labels).mean())


def test_all_lambdas_zero_is_the_run_without_a_teacher_bit_for_bit() -> None:
    train, val = _bags(12, 1), _bags(8, 2)
    alone = train_teacher(train, val, TeacherSettings(**_quick()), num_classes=2, seed=5)
    settings = StudentSettings(loss=NOTHING, **_quick())
    student = train_student(train, val, _signals(train), settings, num_classes=2, seed=5)
    assert torch.equal(_weights(alone), _weights(student))
    assert _comparable(alone) == _comparable(student)
    other = train_student(train, val, _signals(train), StudentSettings(**_quick()), num_classes=2, seed=5)
    assert not torch.equal(_weights(alone), _weights(other))


def test_the_released_hard_loss_changes_no_prediction() -> None:
    # Its classifier shares no weight with what predicts: with and without it, the rest trains alike.
    train, val = _bags(12, 1), _bags(8, 2)
    hard = Stage2LossSettings(lambda_bag=0, lambda_soft=0, hard_mode="released")
    without = train_student(
        train, val, _signals(train), StudentSettings(loss=NOTHING, **_quick()), num_classes=2, seed=5
    )
    with_it = train_student(train, val, _signals(train), StudentSettings(loss=hard, **_quick()), num_classes=2, seed=5)
    assert with_it.head.instance_classifier is not None
    for a, b in zip(predict_bags(without.head, val), predict_bags(with_it.head, val), strict=True):
        assert np.array_equal(a.logits, b.logits)
    for mode in ("attention", "hidden"):
        loss = Stage2LossSettings(lambda_bag=0, lambda_soft=0, hard_mode=mode)  # type: ignore[arg-type]
        effective = train_student(
            train, val, _signals(train), StudentSettings(loss=loss, **_quick()), num_classes=2, seed=5
        )
        changed = [
            not np.array_equal(a.logits, b.logits)
            for a, b in zip(predict_bags(without.head, val), predict_bags(effective.head, val), strict=True)
        ]
        assert any(changed), mode


def test_weights_that_became_nan_in_the_last_step_are_told_in_one_sentence() -> None:
    """The loss of a step is computed before its update: the first to meet such weights is the validation."""
    settings = TeacherSettings(**_quick(learning_rate=1e37))
    with pytest.raises(TrainingError, match="validation loss became nan"):
        train_teacher(_bags(1, 1), _bags(4, 2), settings, num_classes=2, seed=0)


def test_a_head_option_against_the_loss_is_refused() -> None:
    head = HeadSettings(options={"instance_classifier": "none", "gated": True})
    with pytest.raises(ConfigError, match="hidden needs the head's instance_classifier: hidden, not none"):
        student_head(StudentSettings(head=head, loss=Stage2LossSettings(hard_mode="hidden")))
    settings = StudentSettings(
        head=HeadSettings(options={"gated": True}), loss=Stage2LossSettings(hard_mode="released")
    )
    assert student_head(settings).options == {"gated": True, "instance_classifier": "features"}


def test_it_reproduces_from_its_seed() -> None:
    train, val = _bags(12, 1), _bags(8, 2)
    settings = StudentSettings(**_quick(epochs=3))
    a, b, c = (train_student(train, val, _signals(train), settings, num_classes=2, seed=s) for s in (1, 1, 2))
    assert _comparable(a) == _comparable(b)
    assert torch.equal(_weights(a), _weights(b))
    assert not torch.equal(_weights(a), _weights(c))


def test_a_teacher_helps_where_labels_are_few() -> None:
    # Noisy labels, a teacher that is right: the student follows the teacher on slides it has never seen.
    train, val, test = _bags(24, 1), _bags(12, 2), _bags(60, 3)
    rng = np.random.default_rng(0)
    flipped = [replace(b, label=1 - b.label) if rng.random() < 0.4 else b for b in train]  # type: ignore[operator]
    labels = np.array([b.label for b in test])
    aucs = {}
    for name, loss in (("alone", NOTHING), ("taught", Stage2LossSettings(lambda_ce=0.1))):
        settings = StudentSettings(loss=loss, **_quick(epochs=20))
        trained = train_student(flipped, val, _signals(train), settings, num_classes=2, seed=0)
        aucs[name] = selection_auc(np.stack([p.probabilities for p in predict_bags(trained.head, test)]), labels)
    assert aucs["taught"] > aucs["alone"]
    assert aucs["taught"] > 0.85


def test_the_student_attends_where_the_teacher_does() -> None:
    # The teacher says: look at feature 7, which the labels do not mention.
    train, val = _bags(20, 1), _bags(8, 2)
    signals = {
        b.slide_id: TeacherSignal(np.zeros(2, np.float32), 2 * b.features[:, 7], np.arange(len(b.features)))
        for b in train
    }
    found = {}
    for term in ("lambda_soft", "lambda_hard"):
        loss = Stage2LossSettings(
            **({"lambda_ce": 0.1, "lambda_bag": 0, "lambda_soft": 0, "lambda_hard": 0} | {term: 5})
        )
        settings = StudentSettings(loss=loss, select_by="loss", **_quick(epochs=15))
        trained = train_student(train, val, signals, settings, num_classes=2, seed=0)
        own = np.concatenate([p.attention_logits - p.attention_logits.mean() for p in predict_bags(trained.head, val)])
        wanted = np.concatenate([b.features[:, 7] - b.features[:, 7].mean() for b in val])
        found[term] = np.corrcoef(own, wanted)[0, 1]
    assert min(found.values()) > 0.7, found


@pytest.mark.parametrize("classes", [2, 7])
def test_odd_slides_are_trained_with(classes: int) -> None:
    """One region; no child at all; children of nobody; half precision."""
    train, val = _bags(14, 1, classes=classes), _bags(14, 2, classes=classes)
    signals = _signals(train, classes)
    train[0] = replace(train[0], features=train[0].features[:1])
    signals[train[0].slide_id] = replace(
        signals[train[0].slide_id], attention_logits=np.ones(2), region=np.zeros(2, int)
    )
    nothing = np.zeros(0, np.float32)
    signals[train[1].slide_id] = replace(
        signals[train[1].slide_id], attention_logits=nothing, region=nothing.astype(np.int64)
    )
    some = signals[train[2].slide_id]
    signals[train[2].slide_id] = replace(some, region=np.full_like(some.region, -1))
    train[3] = replace(train[3], features=train[3].features.astype(np.float16))
    for scores in ("logits", "softmax"):
        loss = Stage2LossSettings(teacher_scores=scores)  # type: ignore[arg-type]
        trained = train_student(
            train, val, signals, StudentSettings(loss=loss, **_quick(epochs=3)), num_classes=classes, seed=0
        )
        assert np.isfinite([r["train_loss"] for r in trained.fit.history]).all()
        assert {"train_ce", "train_bag", "train_soft", "train_hard"} <= trained.fit.history[0].keys()
        assert predict_bags(trained.head, val)[0].logits.shape == (classes,)


def test_a_validation_split_of_one_class_is_selected_by_loss_with_a_warning() -> None:
    val = [b for b in _bags(10, 2) if b.label == 1]
    with pytest.warns(UserWarning, match="class is missing from the validation split"):
        trained = train_teacher(_bags(12, 1), val, TeacherSettings(**_quick()), num_classes=2, seed=0)
    assert trained.fit.selected_by == "loss"
    losses = [r["val_loss"] for r in trained.fit.history]
    assert trained.fit.best_epoch == 1 + int(np.argmin(losses))
    assert all(np.isnan(r["val_auc"]) for r in trained.fit.history)


def test_selection_auc() -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 3, 7):
        p = rng.dirichlet(np.ones(classes), 60)
        y = np.arange(60) % classes
        wanted = roc_auc_score(y, p[:, 1]) if classes == 2 else roc_auc_score(y, p, multi_class="ovr", average="macro")
        assert selection_auc(p, y) == pytest.approx(wanted)
        assert np.isnan(selection_auc(p[y != 1], y[y != 1]))
    assert selection_auc(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])) == 1.0
    assert selection_auc(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([1, 0])) == 0.0


def test_predictions_do_not_depend_on_labels_or_company() -> None:
    torch.manual_seed(0)
    head = create_head("abmil", D, 3)
    bags = _bags(5, 1)
    together = predict_bags(head, bags)
    assert not head.training
    for bag, found in zip(bags, together, strict=True):
        alone = predict_bags(head, [replace(bag, label=None)])[0]
        assert np.array_equal(alone.logits, found.logits)
        assert found.slide_id == bag.slide_id
        assert found.attention is not None
        assert found.attention_logits is not None
        assert found.attention.sum() == pytest.approx(1, rel=1e-5)
        np.testing.assert_allclose(found.probabilities.sum(), 1, rtol=1e-5)
        assert found.logits.dtype == found.attention.dtype == np.float32


def test_confident_slides_do_not_tie() -> None:
    head = create_head("abmil", D, 2)
    with torch.no_grad():
        head.classifier.weight.copy_(torch.tensor([[0.0] * D, [10.0] * D]))  # type: ignore[union-attr, operator]
    bags = [SlideBag(str(x), np.full((1, D), x, np.float32), int(x > 0.3)) for x in (0.25, 0.3, 0.35, 0.4)]
    found = [p.probabilities[1] for p in predict_bags(head, bags)]
    assert len(set(found)) == 4
    assert len({np.float32(p) for p in found}) < 4
    assert selection_auc(np.stack([[1 - p, p] for p in found]), np.array([b.label for b in bags])) == 1.0


def test_a_teachers_prediction_becomes_the_signal() -> None:
    prediction = predict_bags(create_head("abmil", D, 2), _bags(1, 1))[0]
    assert prediction.attention_logits is not None
    region = np.arange(len(prediction.attention_logits))
    signal = teacher_signal(prediction, region)
    assert np.array_equal(signal.attention_logits, prediction.attention_logits), "logits, not softmaxed attention"
    assert np.array_equal(signal.logits, prediction.logits)
    with pytest.raises(HeadError, match="attention values for"):
        teacher_signal(prediction, region[1:])
    without = BagPrediction("s", prediction.logits, prediction.probabilities, None, None)
    assert teacher_signal(without, region).attention_logits is None


def test_a_read_only_array_is_not_written_to_and_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    train, val = _bags(6, 1), _bags(6, 2)
    for bag in train:
        bag.features.setflags(write=False)
    train_teacher(train, val, TeacherSettings(**_quick(epochs=1)), num_classes=2, seed=0)
    assert not [w for w in recwarn if "writable" in str(w.message)]


def test_heads_with_their_own_losses_and_without_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_HEADS", dict(registry._HEADS))

    @register_head(HeadCard("mean", "mean", "nobody", "ours", gives_attention=False))
    class Mean(MILHead):
        bag_loss_weight = 0.5

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.linear = torch.nn.Linear(self.in_dim, self.num_classes)

        def score(self, bag: torch.Tensor, *, label: torch.Tensor | None, coords: torch.Tensor | None) -> HeadOutput:
            losses = {} if label is None else {"own": self.linear.weight.square().sum()}
            return HeadOutput(self.linear(bag.mean(0)), losses=losses)

    train, val = _bags(12, 1), _bags(8, 2)
    head = HeadSettings(name="mean")
    trained = train_teacher(train, val, TeacherSettings(head=head, **_quick(epochs=2)), num_classes=2, seed=0)
    first = trained.fit.history[0]
    assert first["train_loss"] == pytest.approx(0.5 * first["train_ce"] + first["train_own"], rel=1e-5)
    assert predict_bags(trained.head, val)[0].attention is None

    with pytest.raises(ConfigError, match="'mean' weighs no instances"):
        train_student(train, val, _signals(train), StudentSettings(head=head, **_quick()), num_classes=2, seed=0)
    logits_only = StudentSettings(head=head, loss=Stage2LossSettings(lambda_soft=0, lambda_hard=0), **_quick(epochs=1))
    taught = train_student(train, val, _signals(train), logits_only, num_classes=2, seed=0)
    assert "train_bag" in taught.fit.history[0]


def test_bad_bags_and_labels_are_refused_before_training() -> None:
    good = _bags(6, 1)
    nan = good[2].features.copy()
    nan[3, 1] = np.nan
    settings = TeacherSettings(**_quick())
    for bag, error, message in (
        (replace(good[2], features=nan), CorruptBag, "s1_2: features hold NaN or infinity, first in row 3"),
        (replace(good[2], features=nan.astype(np.float16)), CorruptBag, "row 3"),
        (replace(good[2], features=np.zeros((0, D), np.float32)), CorruptBag, r"s1_2: .*\(0, 8\)"),
        (replace(good[2], features=np.zeros((3, D + 1), np.float32)), CorruptBag, r"\(3, 9\); wanted \(N, 8\)"),
        (replace(good[2], label=2), ConfigError, "slide s1_2 has label 2; 2 classes are 0 to 1"),
        (replace(good[2], label=None), ConfigError, "label None"),
    ):
        for train, val in (([*good[:2], bag, *good[3:]], good), (good, [*good[:2], bag])):
            with pytest.raises(error, match=message):
                train_teacher(train, val, settings, num_classes=2, seed=0)
    for train, val, split in (([], good, "training"), (good, [], "validation")):
        with pytest.raises(ConfigError, match=f"{split} split has no slides"):
            train_teacher(train, val, settings, num_classes=2, seed=0)


def test_a_diverging_run_names_the_slide() -> None:
    bags = _bags(6, 1)
    huge = [replace(b, features=b.features * 1e18) for b in bags]
    with pytest.raises(TrainingError, match=r"not finite; first for slide s1_|validation loss became"):
        train_teacher(huge, huge, TeacherSettings(**_quick(learning_rate=1e20)), num_classes=2, seed=0)


def test_teacher_output_that_does_not_fit_is_refused() -> None:
    bags = _bags(6, 1)
    good = _signals(bags)
    one = good["s1_3"]
    count = len(bags[3].features)
    cases = (
        (None, "s1_3 has no teacher output"),
        (replace(one, logits=np.zeros(3, np.float32)), r"s1_3 has \(3,\) logits for 2 outputs"),
        (replace(one, region=one.region[1:]), "attention values for"),
        (replace(one, region=np.where(one.region == 0, count, one.region)), f"0 to {count - 1} exist"),
        (replace(one, attention_logits=one.attention_logits * np.nan), "not finite"),
    )
    for signal, message in cases:
        signals = {k: v for k, v in good.items() if k != "s1_3"} | ({} if signal is None else {"s1_3": signal})
        with pytest.raises(ConfigError, match=message):
            train_student(bags, bags, signals, StudentSettings(**_quick()), num_classes=2, seed=0)


def test_the_validation_split_needs_no_teacher() -> None:
    train, val = _bags(6, 1), _bags(6, 2)
    train_student(train, val, _signals(train), StudentSettings(**_quick(epochs=1)), num_classes=2, seed=0)


def test_unknown_heads_and_options_are_refused() -> None:
    bags = _bags(6, 1)
    for head, message in (
        (HeadSettings(name="nope"), "no head named 'nope'"),
        (HeadSettings(options={"gate": True}), "gate"),
    ):
        with pytest.raises(HeadError, match=message):
            train_teacher(bags, bags, TeacherSettings(head=head, **_quick()), num_classes=2, seed=0)
