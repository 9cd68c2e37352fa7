"""Stage 1 with a student of another shape: what its maps are for, how they begin, and that they leave no trace."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from lrmil.distill import Stage1LossSettings
from lrmil.encoders import Encoder, shaped_encoder
from lrmil.encoders.settings import ShapedEncoderSettings
from lrmil.errors import ConfigError
from lrmil.training.alignment import Alignment, TeacherShape
from lrmil.training.stage1 import OwnStudentSettings, RegionBatch, Stage1Settings, _Step, distil_encoder, student_layers

RATIO, SIDE_PX = 2, 32


def _vit(width: int, depth: int, seed: int, embedding: str = "token_mean") -> Encoder:
    shape = {"width": width, "depth": depth, "heads": 2, "random_seed": seed, "embedding": embedding}
    return shaped_encoder(ShapedEncoderSettings.model_validate({"name": "lrmil-small"} | shape), SIDE_PX)


class Regions:
    """Random regions, with what a frozen teacher says about their four children."""

    def __init__(self, teacher: Encoder, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 5, 5))).float()
        fine = torch.nn.functional.interpolate(coarse, (2 * SIDE_PX, 2 * SIDE_PX), mode="bicubic").clamp(0, 255)
        self.images = torch.nn.functional.avg_pool2d(fine, RATIO).permute(0, 2, 3, 1).to(torch.uint8).numpy()
        blocks = fine.reshape(count, 3, RATIO, SIDE_PX, RATIO, SIDE_PX).permute(0, 2, 4, 3, 5, 1)
        children = blocks.reshape(-1, SIDE_PX, SIDE_PX, 3).to(torch.uint8)
        with torch.inference_mode():
            out = teacher(teacher.normalise(children), cls_layers=range(teacher.depth))
        self.cls = {layer: values.numpy() for layer, values in out.cls.items()}
        self.embedding = out.embedding.numpy()

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> RegionBatch:
        children = (RATIO**2 * indices[:, None] + np.arange(RATIO**2)).ravel()
        return RegionBatch(
            images=self.images[indices],
            teacher_cls={layer: values[children] for layer, values in self.cls.items()},
            region=np.repeat(np.arange(len(indices)), RATIO**2),
            slot=np.tile(np.arange(RATIO**2), len(indices)),
            teacher_embedding=self.embedding[children],
            teacher_attention=np.full(len(children), 0.01, np.float32),
        )


def _settings(student: dict[str, Any] | None = None, **changes: Any) -> Stage1Settings:
    own = None if student is None else OwnStudentSettings.model_validate({"name": "lrmil-small"} | student)
    return Stage1Settings(student=own, **({"learning_rate": 2e-3, "epochs": 4, "batch_size": 8} | changes))


def _step(student: Encoder, teacher: Encoder, settings: Stage1Settings) -> _Step:
    layers = student_layers(settings, teacher.depth, student.depth)
    return _Step(student, layers, settings, RATIO, torch.device("cpu"), TeacherShape.of(teacher))


@pytest.fixture(scope="module")
def teacher() -> Encoder:
    return _lively(_vit(32, 5, 0, "cls"))


def _lively(encoder: Encoder) -> Encoder:
    """Random weights as they are drawn say nearly the same of every image."""
    with torch.no_grad():
        for weight in encoder.parameters():
            if weight.ndim == 2:
                weight.mul_(6)
    return encoder


def test_a_narrower_and_shallower_student_learns(teacher: Encoder) -> None:
    student, regions = _lively(_vit(16, 3, 1)), Regions(teacher, 32, 1)
    before = copy.deepcopy(student.state_dict())
    settings = _settings({}, learning_rate=1e-3, epochs=12)
    step = _step(student, teacher, settings)
    step.begin(regions)
    with torch.inference_mode():
        untaught = step.measure(regions.batch(np.arange(32)))
    result = distil_encoder(student, regions, regions, settings, ratio=RATIO, seed=0, teacher=TeacherShape.of(teacher))
    assert result.best.loss < 0.9 * untaught["loss"]
    assert {key for key in result.history[0] if key.startswith("val_layer")} == {
        "val_layer0", "val_layer1", "val_layer4",
    }  # fmt: skip
    assert student.state_dict().keys() == before.keys(), "the maps are no part of the student"
    assert not torch.equal(
        student.state_dict()["trunk.blocks.2.mlp.fc2.weight"], before["trunk.blocks.2.mlp.fc2.weight"]
    )


def test_gradients_reach_the_maps_and_every_block_of_the_student(teacher: Encoder) -> None:
    student = _vit(16, 3, 1)
    step = _step(student, teacher, _settings({}, loss=Stage1LossSettings(lambda_attention_feature=1.0)))
    regions = Regions(teacher, 8, 1)
    step.begin(regions)
    terms = step.learn(regions.batch(np.arange(8)))
    maps = list(step.alignment.parameters())
    # Weight and bias, for layers 0, 1, 4 and for the embedding, which is compared with the teacher's own.
    assert [tuple(p.shape) for p in maps] == [(32, 16), (32,)] * 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in maps)
    taught = dict(student.named_parameters())
    for name in ("patch_embed.proj.weight", *(f"blocks.{i}.attn.qkv.weight" for i in range(3)), "norm.weight"):
        assert taught[f"trunk.{name}"].grad.abs().sum() > 0, name
    assert set(terms) == {"loss", "layer0", "layer1", "layer4", "attention_feature"}


def test_maps_begin_at_the_least_squares_fit(teacher: Encoder) -> None:
    """No other start of the maps, the targets' mean included, explains the teacher better on the regions it saw."""
    student, regions = _vit(16, 3, 1), Regions(teacher, 16, 1)
    step = _step(student, teacher, _settings({}))
    step.begin(regions)
    batch = regions.batch(np.arange(16))
    with torch.inference_mode():
        fitted = step.measure(batch)
        for layer, linear in step.alignment.of_layers.items():
            variance = batch.teacher_cls[layer].var(axis=0).mean()
            assert fitted[f"layer{layer}"] < variance
            linear.weight.mul_(1.05)
        worse = step.measure(batch)
    assert all(worse[f"layer{layer}"] > fitted[f"layer{layer}"] for layer in step.alignment.of_layers)


def test_an_equal_architecture_has_no_maps_and_trains_as_without_them(teacher: Encoder) -> None:
    train, val = Regions(teacher, 16, 1), Regions(teacher, 8, 2)
    weights, losses = [], []
    for shape in (None, TeacherShape.of(teacher)):
        student = copy.deepcopy(teacher)
        result = distil_encoder(student, train, val, _settings(epochs=2), ratio=RATIO, seed=3, teacher=shape)
        weights.append(torch.cat([p.flatten() for p in student.parameters()]))
        losses.append([record["train_loss"] for record in result.history])
    assert torch.equal(*weights)
    assert losses[0] == losses[1]
    assert not Alignment.between(teacher, TeacherShape.of(teacher), [0, 1], with_embedding=True).is_needed


def test_only_widths_that_differ_are_mapped(teacher: Encoder) -> None:
    wide = _vit(32, 3, 1, "cls+token_mean")
    found = Alignment.between(wide, TeacherShape.of(teacher), [0, 4], with_embedding=True)
    assert found.of_layers == {}
    assert [tuple(p.shape) for p in found.parameters()] == [(32, 64), (32,)]
    assert found.of_embedding(torch.ones(2, 64)).shape == (2, 32)


def test_a_seed_gives_the_same_student_whatever_was_drawn_before(teacher: Encoder) -> None:
    train, weights = Regions(teacher, 16, 1), []
    for noise in (0, 5):
        torch.manual_seed(noise)
        student = _vit(16, 2, 1)
        distil_encoder(
            student, train, train, _settings({}, epochs=1), ratio=RATIO, seed=3, teacher=TeacherShape.of(teacher)
        )
        weights.append(torch.cat([p.flatten() for p in student.parameters()]))
    assert torch.equal(*weights)


def test_layers_go_by_relative_depth_unless_paired() -> None:
    assert student_layers(_settings({}), 12, 12) == {0: 0, 1: 1, 11: 11}
    assert student_layers(_settings({}), 12, 6) == {0: 0, 1: 0, 11: 5}
    assert student_layers(_settings({"layer_pairs": [[1, 1], [-1, 4]]}), 12, 6) == {0: 0, 1: 1, 11: 4}


def test_random_blocks_that_nothing_teaches_are_refused() -> None:
    released = Stage1LossSettings(layers=(0, 1, 10))
    message = r"blocks \[0, 1, 10\] of the teacher teach blocks \[0, 1, 10\].*above 10 would stay random"
    with pytest.raises(ConfigError, match=message):
        student_layers(_settings({"random_seed": 0}, loss=released), 12, 12)
    assert student_layers(_settings({}, loss=released), 12, 12)[10] == 10, "trained ones may stay as they are"
