"""Stage 1 on a tiny ViT: it learns, the slots are right, and its switches do what they say."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lrmil.distill import Stage1LossSettings, patch_distillation_loss
from lrmil.encoders import create_encoder
from lrmil.errors import ConfigError, GridMismatch, TrainingError
from lrmil.training.stage1 import RegionBatch, Stage1Settings, _Step, distil_encoder, slot_permutations, transformed

RATIO, SIDE_PX, TOKEN_PX, WIDTH = 2, 32, 8, 16


class TinyViT(nn.Module):
    """What stage 1 needs of an encoder, in the smallest form: 4 x 4 tokens, three blocks."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.depth, self.token_grid_side = depth, SIDE_PX // TOKEN_PX
        self.patch = nn.Conv2d(3, WIDTH, TOKEN_PX, TOKEN_PX)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.1)
        self.position = nn.Parameter(torch.randn(1, self.token_grid_side**2 + 1, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True, norm_first=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    def forward(
        self, images: torch.Tensor, *, cls_layers: Any = (), token_layers: Any = (), with_embedding: bool = True
    ) -> Any:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position
        cls, tokens, side = {}, {}, self.token_grid_side
        for layer, block in enumerate(self.blocks):
            x = block(x)
            cls[layer], tokens[layer] = x[:, 0], x[:, 1:].reshape(len(x), side, side, WIDTH)
        return SimpleNamespace(
            embedding=self.norm(x[:, 0]) if with_embedding else None,
            cls={i: cls[i] for i in cls_layers},
            tokens={i: tokens[i] for i in token_layers},
        )


def _encoder(seed: int = 0, depth: int = 3) -> TinyViT:
    torch.manual_seed(seed)
    return TinyViT(depth).eval()


class Regions:
    """Smooth random regions in memory, with what a frozen teacher says about their children; some are missing."""

    def __init__(self, teacher: TinyViT, count: int, seed: int, *, kept: float = 0.9, transposed: bool = False) -> None:
        rng = np.random.default_rng(seed)
        side = SIDE_PX * RATIO
        coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 5, 5))).float()
        fine = nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=False).clamp(0, 255)
        self.images = nn.functional.avg_pool2d(fine, RATIO).permute(0, 2, 3, 1).round().to(torch.uint8).numpy()
        region, slot = np.nonzero(rng.random((count, RATIO**2)) < kept)
        self.region, self.slot = region, slot
        children = []
        for r, k in zip(region, slot, strict=True):
            y, x = (k // RATIO) * SIDE_PX, (k % RATIO) * SIDE_PX
            children.append(fine[r, :, y : y + SIDE_PX, x : x + SIDE_PX])
        pixels = torch.stack(children).round().permute(0, 2, 3, 1).to(torch.uint8)
        with torch.inference_mode():
            out = teacher(teacher.normalise(pixels), cls_layers=range(teacher.depth))
        self.teacher_cls = {i: v.numpy().astype(np.float16) for i, v in out.cls.items()}
        self.embedding = out.embedding.numpy()
        if transposed:
            self.slot = RATIO * (slot % RATIO) + slot // RATIO

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> RegionBatch:
        place = {int(r): i for i, r in enumerate(indices)}
        own = np.isin(self.region, indices)
        return RegionBatch(
            images=self.images[indices],
            teacher_cls={i: v[own] for i, v in self.teacher_cls.items()},
            region=np.array([place[int(r)] for r in self.region[own]], dtype=np.int64),
            slot=self.slot[own],
            teacher_embedding=self.embedding[own],
            teacher_attention=np.full(int(own.sum()), 0.01, np.float32),
        )


def _settings(**changes: Any) -> Stage1Settings:
    defaults: dict[str, Any] = {"learning_rate": 2e-3, "epochs": 8, "batch_size": 8}
    return Stage1Settings(**(defaults | changes))


def _measure(encoder: TinyViT, regions: Regions, **loss: Any) -> dict[str, float]:
    settings = _settings(loss=Stage1LossSettings(**loss))
    layers = {i: i for i in loss.get("layers", range(encoder.depth))}
    with torch.inference_mode():
        return _Step(encoder, layers, settings, RATIO, torch.device("cpu")).measure(
            regions.batch(np.arange(len(regions)))
        )


def test_distillation_lowers_the_loss_on_regions_it_has_not_seen() -> None:
    teacher = _encoder()
    train, val = Regions(teacher, 48, 1), Regions(teacher, 16, 2)
    student = copy.deepcopy(teacher)
    before = _measure(student, val)
    seen: list[dict[str, Any]] = []
    result = distil_encoder(student, train, val, _settings(), ratio=RATIO, seed=0, on_epoch=seen.append)
    after = _measure(student, val)
    assert after["loss"] < 0.7 * before["loss"]
    assert after["loss"] == pytest.approx(result.best.loss, rel=1e-5)
    assert result.best.loss == min(r["val_loss"] for r in result.history)
    assert result.selected_by == "loss"
    assert seen == result.history
    json.dumps(result.history)
    for key in ("loss", "layer0", "layer1", "layer2"):
        assert all(f"{split}_{key}" in result.history[0] for split in ("train", "val"))
    first = result.history[0]
    assert first["val_loss"] == pytest.approx(np.mean([first[f"val_layer{i}"] for i in range(3)]), rel=1e-5)
    assert sum(result.time_shares().values()) == pytest.approx(1, abs=0.1)
    assert not student.training
    # The teacher was not touched.
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), _encoder().parameters(), strict=True))


def test_transposed_slots_teach_worse() -> None:
    teacher = _encoder()
    val = Regions(teacher, 16, 2)
    losses = []
    for transposed in (False, True):
        student = copy.deepcopy(teacher)
        train = Regions(teacher, 48, 1, transposed=transposed)
        distil_encoder(student, train, val, _settings(epochs=5), ratio=RATIO, seed=0)
        losses.append(_measure(student, val)["layer0"])
    assert losses[0] < losses[1]


@pytest.mark.parametrize("augment", [False, True])
def test_it_reproduces_from_its_seed(augment: bool) -> None:
    teacher = _encoder()
    train, val = Regions(teacher, 16, 1), Regions(teacher, 8, 2)
    weights = []
    for seed in (3, 3, 4):
        student = copy.deepcopy(teacher)
        distil_encoder(student, train, val, _settings(epochs=2, augment=augment), ratio=RATIO, seed=seed)
        weights.append(torch.cat([p.flatten() for p in student.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_micro_batches_give_the_gradients_of_the_whole_batch() -> None:
    teacher = _encoder()
    batch = Regions(teacher, 7, 1, kept=0.4).batch(np.array([4, 0, 6, 1, 5, 2, 3]))
    assert len(np.unique(batch.region)) < 7, "some region should have no child"
    gradients, losses = [], []
    for size in (None, 1, 3, 7):
        student = _encoder(seed=9)
        settings = _settings(micro_batch=size, loss=Stage1LossSettings(lambda_attention_feature=0.5))
        losses.append(_Step(student, {0: 0, 1: 1, 2: 2}, settings, RATIO, torch.device("cpu")).learn(batch))
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)
        for key in ("loss", "layer0", "attention_feature"):
            torch.testing.assert_close(loss[key], losses[0][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_symmetries_move_slots_with_their_pixels(ratio: int) -> None:
    # Every pixel of child k of region r holds 16 r + k, so a child is told by its pixels, wherever it went.
    side, regions = 6 * ratio, 8
    k = np.kron(np.arange(ratio**2).reshape(ratio, ratio), np.ones((6, 6), int))
    images = np.stack([np.repeat((16 * r + k)[..., None], 3, axis=2) for r in range(regions)]).astype(np.uint8)
    region, slot = (a.ravel() for a in np.meshgrid(np.arange(regions), np.arange(ratio**2), indexing="ij"))
    batch = RegionBatch(images, {0: np.zeros((len(region), 1))}, region, slot)
    moved = transformed(batch, np.arange(8), ratio)
    assert moved.images.shape == (regions, side, side, 3)
    for r, old, new in zip(moved.region, slot, moved.slot, strict=True):
        row, col = divmod(int(new), ratio)
        block = moved.images[r, 6 * row : 6 * row + 6, 6 * col : 6 * col + 6]
        assert (block == 16 * r + old).all()
    assert (
        len({images.tobytes() for images in moved.images - 16 * np.arange(8, dtype=np.uint8)[:, None, None, None]}) == 8
    )
    assert sorted(map(tuple, slot_permutations(ratio)))[0] == tuple(range(ratio**2))
    assert all(sorted(p) == list(range(ratio**2)) for p in slot_permutations(ratio).tolist())


def test_symmetry_of_one_region_leaves_the_others_alone() -> None:
    batch = Regions(_encoder(), 3, 1).batch(np.arange(3))
    moved = transformed(batch, np.array([0, 5, 0]), RATIO)
    for r in (0, 2):
        assert np.array_equal(moved.images[r], batch.images[r])
        assert np.array_equal(moved.slot[moved.region == r], batch.slot[batch.region == r])
    assert not np.array_equal(moved.images[1], batch.images[1])
    assert np.array_equal(transformed(moved, np.array([0, 5, 0]), RATIO).images, batch.images), "5 undoes itself"


def test_augmentation_is_off_by_default_and_learns_when_on() -> None:
    assert not Stage1Settings().augment
    teacher = _encoder()
    val = Regions(teacher, 16, 2)
    student = copy.deepcopy(teacher)
    distil_encoder(student, Regions(teacher, 32, 1), val, _settings(augment=True), ratio=RATIO, seed=0)
    assert _measure(student, val)["layer0"] < _measure(teacher, val)["layer0"]


def test_blocks_above_the_last_distilled_one_are_left_and_reported() -> None:
    teacher = _encoder(depth=4)
    train, val = Regions(teacher, 8, 1), Regions(teacher, 8, 2)
    student = copy.deepcopy(teacher)
    settings = _settings(epochs=1, loss=Stage1LossSettings(layers=(0, 2)))
    with pytest.warns(UserWarning, match="block 3 and the final norm get no gradient"):
        result = distil_encoder(student, train, val, settings, ratio=RATIO, seed=0)
    assert len(result.notes) == 1
    for name, value in student.state_dict().items():
        same = torch.equal(value, teacher.state_dict()[name])
        assert same == name.startswith(("blocks.3.", "norm.")), name
    assert {k for k in result.history[0] if "layer" in k} == {
        "train_layer0", "train_layer2", "val_layer0", "val_layer2",
    }  # fmt: skip


def test_a_real_encoder_with_the_layers_of_the_released_code() -> None:
    student = create_encoder("vit_tiny_patch16_224", input_px=64, random_seed=0)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    rng = np.random.default_rng(0)

    class FewRegions:
        def __len__(self) -> int:
            return 4

        def batch(self, indices: np.ndarray) -> RegionBatch:
            count = len(indices) * 16
            return RegionBatch(
                images=rng.integers(0, 255, (len(indices), 64, 64, 3), dtype=np.uint8),
                teacher_cls={i: rng.standard_normal((count, 192)).astype(np.float16) for i in (0, 1, 10)},
                region=np.repeat(np.arange(len(indices)), 16),
                slot=np.tile(np.arange(16), len(indices)),
            )

    settings = _settings(epochs=1, batch_size=2, loss=Stage1LossSettings(layers=(0, 1, 10)))
    with pytest.warns(UserWarning, match="block 11 and the final norm"):
        distil_encoder(student, FewRegions(), FewRegions(), settings, ratio=4, seed=0)
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert not [k for k in changed if k.startswith(("trunk.blocks.11.", "trunk.norm."))]
    assert {f"trunk.blocks.{i}.attn.qkv.weight" for i in range(11)} <= changed
    assert {"trunk.pos_embed", "trunk.patch_embed.proj.weight"} <= changed


def test_the_extra_loss_of_the_release_trains_the_rest_too(recwarn: pytest.WarningsRecorder) -> None:
    teacher = _encoder()
    train, val = Regions(teacher, 8, 1), Regions(teacher, 8, 2)
    student = copy.deepcopy(teacher)
    settings = _settings(epochs=1, loss=Stage1LossSettings(layers=(0,), lambda_attention_feature=2.0))
    result = distil_encoder(student, train, val, settings, ratio=RATIO, seed=0)
    assert not torch.equal(student.norm.weight, teacher.norm.weight)
    assert not [w for w in recwarn if "no gradient" in str(w.message)]
    last = result.history[-1]
    assert last["val_loss"] == pytest.approx(last["val_layer0"] + 2 * last["val_attention_feature"], rel=1e-5)


def test_settings_reach_the_loss() -> None:
    teacher = _encoder()
    regions = Regions(teacher, 8, 1)
    batch = regions.batch(np.arange(8))
    with torch.inference_mode():
        tokens = teacher(teacher.normalise(torch.from_numpy(batch.images)), token_layers=(0, 1)).tokens
    targets = {i: torch.from_numpy(batch.teacher_cls[i]) for i in (0, 1)}
    for changes in ({"layer_aggregation": "sum"}, {"layer_norm_targets": True}):
        wanted = patch_distillation_loss(
            tokens, targets, torch.from_numpy(batch.region), torch.from_numpy(batch.slot), ratio=RATIO, **changes
        )
        assert _measure(teacher, regions, layers=(0, 1), **changes)["loss"] == pytest.approx(
            float(wanted.total), rel=1e-4
        )


def test_bfloat16_is_close_to_float32() -> None:
    teacher = _encoder()
    batch = Regions(teacher, 8, 1).batch(np.arange(8))
    losses = {}
    for precision in ("float32", "auto", "bfloat16"):
        step = _Step(_encoder(9), {0: 0, 1: 1, 2: 2}, _settings(precision=precision), RATIO, torch.device("cpu"))
        losses[precision] = float(step.learn(batch)["loss"])
    assert losses["auto"] == losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


class Broken(Regions):
    """Regions whose batches are changed on the way."""

    def __init__(self, teacher: TinyViT, **changes: Any) -> None:
        super().__init__(teacher, 8, 1)
        self.changes = changes

    def batch(self, indices: np.ndarray) -> RegionBatch:
        found = vars(super().batch(indices))
        return RegionBatch(**(found | {k: change(found[k]) for k, change in self.changes.items()}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot": lambda s: s + 1}, "slots from . to 4, where 0 to 3 exist"),
        ({"region": lambda r: r + 1}, "regions that are not in it"),
        ({"slot": lambda s: s[:-1]}, "different lengths"),
        ({"teacher_cls": lambda t: {0: t[0]}}, r"no teacher targets of blocks \[1, 2\]"),
        (
            {"teacher_cls": lambda t: {i: v * np.nan for i, v in t.items()}},
            "not finite; first for the batch of regions",
        ),
    ],
)
def test_bad_batches_are_refused(changes: dict[str, Any], message: str) -> None:
    teacher = _encoder()
    with pytest.raises(TrainingError, match=message):
        distil_encoder(teacher, Broken(teacher, **changes), Regions(teacher, 8, 2), _settings(), ratio=RATIO, seed=0)


def test_bad_calls_are_refused() -> None:
    teacher = _encoder()
    some, none = Regions(teacher, 8, 1), Regions(teacher, 8, 2)
    none.images = none.images[:0]
    with pytest.raises(ConfigError, match="validation split has no region"):
        distil_encoder(teacher, some, none, _settings(), ratio=RATIO, seed=0)
    with pytest.raises(ConfigError, match="training split has no region"):
        distil_encoder(teacher, none, some, _settings(), ratio=RATIO, seed=0)
    with pytest.raises(GridMismatch, match="3 x 3"):
        distil_encoder(teacher, some, some, _settings(), ratio=3, seed=0)
    with pytest.raises(ConfigError, match="3 blocks"):
        distil_encoder(teacher, some, some, _settings(loss=Stage1LossSettings(layers=(0, 11))), ratio=RATIO, seed=0)
    lacking = Broken(teacher, teacher_attention=lambda a: None)
    settings = _settings(loss=Stage1LossSettings(lambda_attention_feature=1.0))
    with pytest.raises(TrainingError, match=r"lack the teacher's.*stage 2\.1"):
        distil_encoder(teacher, lacking, some, settings, ratio=RATIO, seed=0)


def test_a_region_without_children_in_a_batch_does_no_harm() -> None:
    teacher = _encoder()
    train = Regions(teacher, 6, 1)
    train.region, train.slot = train.region[train.region > 0], train.slot[train.region > 0]
    for name in ("teacher_cls", "embedding"):
        value = getattr(train, name)
        rows = len(train.region)
        setattr(train, name, {i: v[-rows:] for i, v in value.items()} if isinstance(value, dict) else value[-rows:])
    result = distil_encoder(
        copy.deepcopy(teacher), train, train, _settings(epochs=1, batch_size=1), ratio=RATIO, seed=0
    )
    assert np.isfinite(result.best.loss)
