"""Eqs. 1 and 2 against loops over regions, children and tokens, and what is commonly got wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lrmil.distill import (
    Stage1LossSettings,
    attention_feature_loss,
    linear_fit,
    map_layers,
    patch_distillation_loss,
    pool_token_blocks,
    resolve_layers,
)
from lrmil.distill.patch import token_windows, window_distillation_loss
from lrmil.errors import ConfigError, GridMismatch
from lrmil.geometry import token_blocks

Case = tuple[dict[int, torch.Tensor], dict[int, torch.Tensor], torch.Tensor, torch.Tensor, int]


def _case(seed: int, regions: int, ratio: int, block: int, kept: float, width: int = 3) -> Case:
    """Random tokens and targets; each child exists with probability `kept`; rows in random order."""
    rng = np.random.default_rng(seed)
    side = ratio * block
    tokens = {i: torch.from_numpy(rng.standard_normal((regions, side, side, width))).float() for i in (0, 2)}
    region, slot = np.nonzero(rng.random((regions, ratio**2)) < kept)
    order = rng.permutation(len(region))
    teacher = {i: torch.from_numpy(rng.standard_normal((len(region), width))).float() for i in (0, 2)}
    return tokens, teacher, torch.from_numpy(region[order]), torch.from_numpy(slot[order]), ratio


def _by_loops(case: Case) -> dict[int, float]:
    """Eq. 2 read literally."""
    tokens, teacher, region, slot, ratio = case
    result = {}
    for layer in tokens:
        of_regions = []
        for r in range(len(tokens[layer])):
            own = [m for m in range(len(region)) if region[m] == r]
            if not own:
                continue
            total = 0.0
            for m in own:
                row, col = divmod(int(slot[m]), ratio)
                block = tokens[layer].shape[1] // ratio
                pooled = np.zeros(tokens[layer].shape[-1])
                for u in range(block * row, block * row + block):
                    for v in range(block * col, block * col + block):
                        pooled += tokens[layer][r, u, v].numpy() / block**2
                total += float(np.mean((pooled - teacher[layer][m].numpy()) ** 2))
            of_regions.append(total / len(own))
        result[layer] = float(np.mean(of_regions)) if of_regions else 0.0
    return result


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    regions=st.integers(1, 5),
    ratio=st.sampled_from([2, 4]),
    block=st.integers(1, 3),
    kept=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_it_is_eq_2_with_missing_children_and_regions(
    seed: int, regions: int, ratio: int, block: int, kept: float
) -> None:
    case = _case(seed, regions, ratio, block, kept)
    expected = _by_loops(case)
    loss = patch_distillation_loss(*case[:4], ratio=ratio)
    for layer, value in expected.items():
        assert float(loss.per_layer[layer]) == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert float(loss.total) == pytest.approx(np.mean(list(expected.values())), rel=1e-4, abs=1e-6)
    summed = patch_distillation_loss(*case[:4], ratio=ratio, layer_aggregation="sum")
    assert float(summed.total) == pytest.approx(np.sum(list(expected.values())), rel=1e-4, abs=1e-6)


def test_a_region_with_few_children_counts_as_much_as_a_full_one() -> None:
    tokens = {0: torch.zeros(3, 2, 2, 1)}
    region, slot = torch.tensor([0, 0, 0, 0, 2]), torch.tensor([0, 1, 2, 3, 1])
    teacher = {0: torch.tensor([[1.0], [1.0], [1.0], [1.0], [3.0]])}
    # Region 0: 1, region 1: nothing, region 2: 9. A mean over children would be 13/5, over all regions 10/3.
    assert patch_distillation_loss(tokens, teacher, region, slot, ratio=2).total == 5.0


@settings(deadline=None, max_examples=20)
@given(ratio=st.sampled_from([2, 3, 4]), block=st.integers(1, 4))
def test_pooling_agrees_with_the_blocks_of_geometry(ratio: int, block: int) -> None:
    tokens = torch.randn(2, ratio * block, ratio * block, 5)
    blocks = torch.from_numpy(token_blocks(ratio * block, ratio))
    torch.testing.assert_close(pool_token_blocks(tokens, ratio), tokens.reshape(2, -1, 5)[:, blocks].mean(2))


def test_rows_and_columns_are_not_swapped() -> None:
    # Token (row u, column v) holds (u, v). Child right of the corner: slot 1, rows 0-1, columns 2-3.
    u, v = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    tokens = torch.stack([u, v], dim=-1)[None]
    assert pool_token_blocks(tokens, 2)[0].tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
    right = {0: torch.tensor([[0.5, 2.5]])}
    assert patch_distillation_loss({0: tokens}, right, torch.tensor([0]), torch.tensor([1]), ratio=2).total == 0
    assert patch_distillation_loss({0: tokens}, right, torch.tensor([0]), torch.tensor([2]), ratio=2).total == 4
    # The same child by its offset (x, y) = (2, 0) tokens: window at row 0, column 2.
    start, inside = token_windows(torch.tensor([[2, 0]]), 1, 4, 2, window="contained")
    assert start.tolist() == [[0, 2]]
    assert inside.all()
    assert window_distillation_loss({0: tokens}, right, torch.tensor([0]), start, block=2).total == 0


def test_gradients_reach_the_tokens_of_matched_children_only() -> None:
    tokens = torch.randn(2, 4, 4, 3, requires_grad=True)
    teacher = torch.randn(1, 3, requires_grad=True)
    loss = patch_distillation_loss({5: tokens}, {5: teacher}, torch.tensor([1]), torch.tensor([2]), ratio=2)
    loss.total.backward()
    assert teacher.grad is None
    assert tokens.grad is not None
    touched = tokens.grad.abs().sum(-1) > 0
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[1, 2:, :2] = True
    assert torch.equal(touched, expected)


def test_a_batch_without_children_has_loss_zero_and_can_be_stepped() -> None:
    tokens = torch.randn(2, 4, 4, 3, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = patch_distillation_loss({0: tokens}, {0: torch.zeros(0, 3)}, nothing, nothing, ratio=2)
    loss.total.backward()
    assert loss.total == 0
    assert tokens.grad is not None
    assert not tokens.grad.any()


def test_layer_norm_makes_scale_and_shift_irrelevant() -> None:
    tokens, teacher, region, slot, ratio = _case(0, 3, 2, 2, 0.8, width=8)
    scaled = {i: 50 * t + 7 for i, t in teacher.items()}
    kwargs = {"ratio": ratio, "layer_norm_targets": True}
    plain = patch_distillation_loss(tokens, teacher, region, slot, **kwargs)
    other = patch_distillation_loss(tokens, scaled, region, slot, **kwargs)
    torch.testing.assert_close(plain.total, other.total, rtol=1e-3, atol=0.0)
    same = {i: pool_token_blocks(tokens[i], ratio)[region, slot] * 3 for i in tokens}
    assert patch_distillation_loss(tokens, same, region, slot, **kwargs).total < 1e-5


def test_half_precision_inputs_are_compared_in_float32() -> None:
    tokens, teacher, region, slot, ratio = _case(1, 3, 2, 2, 0.8)
    low = patch_distillation_loss(
        {i: t.bfloat16() for i, t in tokens.items()},
        {i: t.half() for i, t in teacher.items()},
        region,
        slot,
        ratio=ratio,
    )
    assert low.total.dtype == torch.float32
    torch.testing.assert_close(
        low.total, patch_distillation_loss(tokens, teacher, region, slot, ratio=ratio).total, rtol=0.02, atol=0.0
    )


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), window=st.sampled_from(["contained", "released"]))
def test_windows_of_children_off_the_grid(seed: int, window: str) -> None:
    # 8x8 tokens of 64 px (region 512 px), children of 256 px = 4 tokens.
    rng = np.random.default_rng(seed)
    offset = torch.from_numpy(rng.integers(-100, 520, size=(12, 2)))
    start, inside = token_windows(offset, 64, 8, 4, window=window)  # type: ignore[arg-type]
    reach = 256 if window == "contained" else 256 + 63
    assert inside.tolist() == [0 <= x <= reach and 0 <= y <= reach for x, y in offset.tolist()]
    tokens = torch.randn(1, 8, 8, 2)
    teacher = torch.randn(12, 2)[inside]
    expected = []
    for (x, y), target in zip(offset[inside].tolist(), teacher, strict=True):
        block = tokens[0, y // 64 : y // 64 + 4, x // 64 : x // 64 + 4]
        assert block.shape == (4, 4, 2)
        expected.append(float((block.mean((0, 1)) - target).square().mean()))
    region = torch.zeros(len(teacher), dtype=torch.int64)
    loss = window_distillation_loss({0: tokens}, {0: teacher}, region, start[inside], block=4)
    assert float(loss.total) == pytest.approx(np.mean(expected) if expected else 0.0, rel=1e-4, abs=1e-6)


def test_attention_feature_loss_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    teacher = torch.tensor([[2.0, 0.0], [0.0, 4.0], [1.0, 3.0]])
    region = torch.tensor([0, 0, 1])
    # Errors 2, 8, 2. Region 0 with weights 3:1 gives 3.5, region 1 gives 2, region 2 has no child.
    loss = attention_feature_loss(student, teacher, torch.tensor([0.3, 0.1, 0.6]), region)
    torch.testing.assert_close(loss, torch.tensor(2.75))
    # Where the attention vanishes the weights are uniform: (5 + 2) / 2, and nothing is divided by 0.
    loss = attention_feature_loss(student.requires_grad_(), teacher, torch.zeros(3), region)
    torch.testing.assert_close(loss, torch.tensor(3.5))
    loss.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_layers_are_resolved_and_checked() -> None:
    assert resolve_layers(Stage1LossSettings().layers, 12) == (0, 1, 11)
    assert resolve_layers(Stage1LossSettings().layers, 24) == (0, 1, 23)
    assert resolve_layers((10, 0, 1), 12) == (0, 1, 10)
    assert resolve_layers((0, -2, 0), 2) == (0,)
    for wrong in ((12,), (-13,), ()):
        with pytest.raises(ConfigError, match="12 blocks"):
            resolve_layers(wrong, 12)
    with pytest.raises(ValidationError):
        Stage1LossSettings(layer_aggregation="median")  # type: ignore[arg-type]


def test_a_grid_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(GridMismatch, match=r"14 x 14.*4 x 4"):
        pool_token_blocks(torch.zeros(1, 14, 14, 2), 4)


@settings(deadline=None, max_examples=40)
@given(depth=st.integers(2, 30), student=st.integers(2, 30), data=st.data())
def test_layers_of_another_depth_keep_their_order_and_their_ends(depth: int, student: int, data: st.DataObject) -> None:
    layers = data.draw(st.lists(st.integers(-depth, depth - 1), min_size=1, max_size=5))
    found = map_layers(layers, depth, student)
    assert tuple(found) == resolve_layers(layers, depth)
    assert list(found.values()) == sorted(found.values())
    assert all(0 <= block < student for block in found.values())
    ends = map_layers((0, -1), depth, student)
    assert ends == {0: 0, depth - 1: student - 1}
    if depth == student:
        assert all(own == block for own, block in found.items())


@pytest.mark.parametrize("pair", [(2, 1), (12, 0), (11, 6), (11, -7)])
def test_pairs_of_blocks_that_do_not_exist_or_are_not_distilled_are_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"layer_pairs: \[{pair[0]}, {pair[1]}\] pairs no distilled block"):
        map_layers((0, 1, -1), 12, 6, [pair])


def test_a_linear_fit_finds_the_map_that_made_the_targets() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=draw) + 40
    weight, bias = torch.randn(3, 5, generator=draw), torch.tensor([1e3, -7.0, 0.0])
    found, shift = linear_fit(x, x @ weight.T + bias, ridge=0.0)
    torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shift, bias, rtol=1e-3, atol=0.1)
    # The ridge holds where there are fewer rows than channels, and nothing varies.
    found, shift = linear_fit(torch.ones(2, 5), torch.tensor([[2.0], [4.0]]))
    assert found.abs().max() == 0
    assert shift.item() == pytest.approx(3)


def test_projected_tokens_are_compared_as_projecting_every_token_would() -> None:
    tokens, _, region, slot, ratio = _case(4, 3, 2, 2, 0.8)
    draw = torch.Generator().manual_seed(1)
    maps = {layer: torch.nn.Linear(3, 7) for layer in tokens}
    teacher = {layer: torch.randn(len(region), 7, generator=draw) for layer in tokens}
    found = patch_distillation_loss(tokens, teacher, region, slot, ratio=ratio, projections=maps)
    wide = {layer: maps[layer](values) for layer, values in tokens.items()}
    wanted = patch_distillation_loss(wide, teacher, region, slot, ratio=ratio)
    torch.testing.assert_close(found.total, wanted.total)
    found.total.backward()
    assert all(maps[layer].weight.grad.abs().sum() > 0 for layer in maps)
