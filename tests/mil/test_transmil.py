"""TransMIL: the original's outputs, and each way of building it wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrmil.errors import CheckpointError, HeadError
from lrmil.mil import MILHead, create_head, head_cards, load_original
from lrmil.mil.transmil import PPEG, TransMIL

RELEASES = {"nystrom0.0.9": "head", "nystrom0.0.14": "tail"}
SMALL: dict[str, Any] = {"dim": 16, "heads": 4, "landmarks": 4}


def _head(in_dim: int = 6, num_classes: int = 3, **options: Any) -> TransMIL:
    torch.manual_seed(0)
    head = create_head("transmil", in_dim, num_classes, **(SMALL | options)).eval()
    assert isinstance(head, TransMIL)
    return head


def _bag(count: int, in_dim: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, in_dim, generator=torch.Generator().manual_seed(seed))


def _original(golden: Callable[[str], Any]) -> tuple[Any, dict[str, Tensor]]:
    arrays = golden("transmil_D1024_C3")
    return arrays, {k: torch.from_numpy(v) for k, v in arrays.under("param/").items()}


@pytest.mark.parametrize("release", RELEASES)
def test_it_gives_the_originals_outputs(golden: Callable[[str], Any], release: str) -> None:
    arrays, state = _original(golden)
    head = load_original("transmil", state, nystrom_keep=RELEASES[release])
    bag = torch.from_numpy(arrays["in/N37/bag"])[0]
    label = torch.from_numpy(arrays["in/N37/label"])
    with torch.no_grad():
        out = head(bag)
        assert isinstance(head, TransMIL)
        first, side = head.embed(bag)
        layer1 = head.layer1(first)
        positions = head.pos_layer(layer1, side)
        layer2 = head.layer2(positions)
    at, close = f"out/N37/{release}/", {"rtol": 1e-3, "atol": 1e-5}
    arrays.expect(at + "layer1", layer1[:8], **close)
    arrays.expect(at + "pos_layer", positions[:8], **close)
    arrays.expect(at + "layer2", layer2[:8], **close)
    arrays.expect(at + "cls_after_norm", out.bag_feature[None], **close)
    arrays.expect(at + "logits", out.logits[None], **close)
    arrays.expect(at + "Y_prob", head.probabilities(out.logits)[None], **close)
    arrays.expect(at + "Y_hat", out.logits.argmax()[None])
    arrays.expect(f"loss/N37/{release}/ce", F.cross_entropy(out.logits[None], label), **close)


def test_its_attention_alone_is_the_originals(golden: Callable[[str], Any]) -> None:
    arrays, state = _original(golden)
    head = load_original("transmil", state, nystrom_keep="tail")
    with torch.no_grad():
        out = head.layer1.attn(torch.from_numpy(arrays["in/nystrom_unit/x"])[0])  # type: ignore[union-attr, operator]
    arrays.expect("out/nystrom_unit/layer1.attn(x)", out[None], rtol=1e-3, atol=1e-5)
    attn = head.layer1.attn  # type: ignore[union-attr]
    q, _ = attn._project(torch.zeros(50, 512), attn.to_qkv.weight[:1024])  # type: ignore[union-attr, operator, index]
    arrays.expect("out/nystrom_unit/attn_shape", [1, len(q), q.shape[1], q.shape[1]])


def test_every_weight_has_a_place(golden: Callable[[str], Any]) -> None:
    arrays, state = _original(golden)
    with pytest.warns(UserWarning, match=r"do not tell all options; assumed nystrom_keep='tail'"):
        head = load_original("transmil", {f"model.{k}": v for k, v in state.items()})
    assert head.describe() == {
        "name": "transmil",
        "in_dim": 1024,
        "num_classes": 3,
        "dim": 512,
        "heads": 8,
        "landmarks": 256,
        "pinv_iterations": 6,
        "dropout": 0.1,
        "nystrom_keep": "tail",
        "order": "given",
        "rollout": True,
    }
    assert len(head.state_dict()) == len(state)
    ours = {k.replace("fc1.", "_fc1.0.").replace("fc2.", "_fc2."): v for k, v in head.state_dict().items()}
    for key in state:
        arrays.expect(f"param/{key}", ours[key.replace("to_out.0.", "to_out.")], rtol=0, atol=0)


def test_checkpoints_that_do_not_fit_are_refused(golden: Callable[[str], Any]) -> None:
    state = _original(golden)[1]
    with pytest.raises(CheckpointError, match=r"norm\.bias: missing"):
        load_original("transmil", {k: v for k, v in state.items() if k != "norm.bias"})
    with pytest.raises(CheckpointError, match=r"not a checkpoint of 'transmil'"):
        load_original("transmil", {"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"res_conv\.weight has shape \(8,\)"):
        load_original("transmil", state | {"layer1.attn.res_conv.weight": torch.zeros(8)})
    with pytest.raises(HeadError, match="nystrom_keep"):
        load_original("transmil", state, nystrom_keep="middle")


@pytest.mark.parametrize(("count", "side"), [(1, 1), (2, 2), (4, 2), (5, 3), (37, 7), (49, 7), (50, 8)])
def test_the_square_is_filled_with_the_first_instances(count: int, side: int) -> None:
    head, bag = _head(), _bag(count)
    tokens, made = head.embed(bag)
    assert made == side
    assert len(tokens) == side * side + 1
    assert torch.equal(tokens[0], head.cls_token[0, 0])
    embedded = torch.relu(head.fc1(bag))
    assert torch.equal(tokens[1:], torch.cat([embedded, embedded])[: side * side])


def test_positions_are_three_convolutions_and_leave_the_class_token_alone() -> None:
    torch.manual_seed(0)
    layer = PPEG(4).double()
    x = torch.randn(26, 4, dtype=torch.float64)
    out = layer(x, 5)
    image = x[1:].T.reshape(1, 4, 5, 5)  # instance i at row i // 5, column i % 5
    wanted = image + layer.proj(image) + layer.proj1(image) + layer.proj2(image)
    torch.testing.assert_close(out[1:], wanted[0].flatten(1).T)
    assert torch.equal(out[0], x[0])
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_the_order_of_instances_matters_unless_sorted_by_position() -> None:
    bag, shuffled = _bag(20), torch.randperm(20, generator=torch.Generator().manual_seed(3))
    coords = torch.tensor([[x * 256, y * 256] for y in range(4) for x in range(5)])
    given, raster = _head(), _head(order="raster")
    assert not torch.allclose(given(bag).logits, given(bag[shuffled]).logits, atol=1e-4)
    assert torch.equal(given(bag).logits, given(bag, coords=coords[shuffled]).logits)
    sorted_out = raster(bag[shuffled], coords=coords[shuffled])
    assert torch.equal(sorted_out.logits, given(bag).logits)  # rows first: y, then x
    attention = given(bag).attention
    assert attention is not None
    assert torch.equal(sorted_out.attention, attention[shuffled])  # back in the order of the bag
    with pytest.raises(HeadError, match="order: raster needs the positions"):
        raster(bag)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 30])
@pytest.mark.parametrize("keep", ["tail", "head"])
def test_attention_is_the_rollout_of_the_whole_matrices(count: int, keep: str) -> None:
    head, bag = _head(nystrom_keep=keep), _bag(count)
    with torch.no_grad():
        tokens, side = head.embed(bag)
        second = head.pos_layer(head.layer1(tokens), side)
        size = len(tokens)

        def through(layer: Any, x: Tensor, row: Tensor) -> Tensor:
            rows = torch.stack([layer.attn.back(layer.norm(x), one) for one in torch.eye(size)])
            taken = (row @ rows).clamp_min(0)
            return row / 2 + taken / taken.sum() / 2

        weights = through(head.layer1, tokens, through(head.layer2, second, torch.eye(size)[0]))[1:]
    wanted = torch.zeros(count)
    for place, weight in enumerate(weights):
        wanted[place % count] += weight  # an instance that fills the square up counts with its copy
    out = head(bag)
    assert out.attention is not None
    torch.testing.assert_close(out.attention, wanted / wanted.sum())
    assert bool((out.attention >= 0).all())


def test_it_does_not_offer_attention_that_can_be_distilled() -> None:
    card = {c.name: c for c in head_cards()}["transmil"]
    out = _head()(_bag(9))
    assert not card.gives_attention
    assert out.attention_logits is None
    assert out.attention is not None
    assert not out.attention.requires_grad
    assert _head(rollout=False)(_bag(9)).attention is None
    assert _head().train()(_bag(9)).attention is None


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_it_trains_on_bags_of_any_size(count: int) -> None:
    head = _head(dropout=0.0).train()
    out = head(_bag(count))
    head.total_loss(out, F.cross_entropy(out.logits, torch.tensor(2))).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert bool((parameter.grad != 0).any()), name


def test_dropout_is_in_training_only_and_repeats_by_seed() -> None:
    head, bag = _head(dropout=0.5), _bag(12)
    assert torch.equal(head(bag).logits, head(bag).logits)
    head.train()
    torch.manual_seed(1)
    once = head(bag).logits
    assert not torch.equal(once, head(bag).logits)
    torch.manual_seed(1)
    assert torch.equal(once, head(bag).logits)


def test_bad_bags_are_refused() -> None:
    bag = _bag(9)
    for value in (math.nan, math.inf, -math.inf):
        bag[4, 2] = value
        with pytest.raises(HeadError, match=r"1 of the 9 instances.*row 4"):
            _head()(bag)
    with pytest.raises(HeadError, match="no instances"):
        _head()(_bag(0))
    with pytest.raises(HeadError, match="width of 15 cannot be split into 4"):
        _head(dim=15)


def test_it_is_built_again_from_its_description() -> None:
    head: MILHead = _head(order="given", landmarks=3)
    again = create_head(**json.loads(json.dumps(head.describe()))).eval()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(_bag(5)).logits, head(_bag(5)).logits)
