"""Students to begin with: fewer blocks of trained weights, and random weights of any shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lrmil.encoders import Encoder, load_encoder, save_encoder, shaped_encoder
from lrmil.encoders.settings import ShapedEncoderSettings
from lrmil.encoders.shaped import matching_block, with_fewer_blocks
from lrmil.errors import EncoderError, GridMismatch, UnknownEncoder

TINY = "lrmil-small"


@settings(deadline=None, max_examples=60)
@given(depth=st.integers(1, 40), other=st.integers(1, 40))
def test_blocks_match_by_relative_depth(depth: int, other: int) -> None:
    found = [matching_block(block, depth, other) for block in range(depth)]
    assert found[-1] == other - 1
    assert found == sorted(found)
    if depth > 1:
        assert found[0] == 0
        assert all(abs(f / max(1, other - 1) - b / (depth - 1)) * (other - 1) <= 0.501 for b, f in enumerate(found))
    if depth <= other:
        assert len(set(found)) == depth, "a smaller network keeps no block twice"
    if depth == other:
        assert found == list(range(depth))


def test_halves_go_up_and_not_to_the_even_neighbour() -> None:
    assert [matching_block(block, 5, 3) for block in range(5)] == [0, 1, 1, 2, 2]


def test_kept_blocks_are_those_of_the_trained_network(
    tiny: Callable[..., Encoder], normal: Callable[..., torch.Tensor]
) -> None:
    encoder = tiny(arch={"depth": 7, "reg_tokens": 2, "init_values": 1e-5})
    smaller = with_fewer_blocks(encoder, 3)
    assert (smaller.depth, smaller.trunk_width, smaller.card.name) == (3, 32, f"{encoder.card.name}-d3")
    assert "blocks 0, 3, 6" in smaller.weights_source
    own, whole = smaller.state_dict(), encoder.state_dict()
    for block, of in enumerate((0, 3, 6)):
        for name in ("attn.qkv.weight", "mlp.fc2.bias", "ls1.gamma"):
            assert torch.equal(own[f"trunk.blocks.{block}.{name}"], whole[f"trunk.blocks.{of}.{name}"])
    assert torch.equal(own["trunk.pos_embed"], whole["trunk.pos_embed"])
    images = normal(2, 3, 32, 32)
    with torch.inference_mode():
        # The first block sees the same and does the same.
        first = smaller(images, token_layers=[0]).tokens[0]
        assert torch.equal(first, encoder(images, token_layers=[0]).tokens[0])
        all_kept = with_fewer_blocks(encoder, 7)
        assert torch.equal(all_kept(images).embedding, encoder(images).embedding)


def test_fewer_blocks_of_the_shipped_encoder_and_more_than_it_has() -> None:
    encoder = shaped_encoder(ShapedEncoderSettings(name=TINY, depth=4), 64)
    assert (encoder.depth, encoder.trunk_width, encoder.embedding) == (4, 128, "token_mean")
    with pytest.raises(EncoderError, match="12 blocks, so 13 cannot be kept"):
        shaped_encoder(ShapedEncoderSettings(name=TINY, depth=13), 64)


def test_random_weights_of_any_shape_come_back_from_a_folder(tmp_path: Path) -> None:
    wanted = ShapedEncoderSettings(
        name=TINY, random_seed=3, width=24, depth=2, heads=3, token_px=16, input_px=64, embedding="cls"
    )
    encoder = shaped_encoder(wanted, 256)
    assert (encoder.trunk_width, encoder.depth, encoder.input_px, encoder.token_grid_side) == (24, 2, 64, 4)
    assert encoder.trunk.blocks[0].attn.num_heads == 3
    assert encoder.card.share_derivatives
    assert "random" in encoder.card.licence
    assert encoder.weights_sha256 == shaped_encoder(wanted, 256).weights_sha256
    assert encoder.weights_sha256 != shaped_encoder(wanted.model_copy(update={"random_seed": 4}), 256).weights_sha256
    again = load_encoder(save_encoder(encoder, tmp_path))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(again(images).embedding, encoder(images).embedding)
    assert again.describe() == encoder.describe()


def test_the_mean_of_tokens_stands_for_a_patch_unless_another_output_is_asked_for() -> None:
    given = {"name": TINY, "random_seed": 0, "depth": 1}
    assert shaped_encoder(ShapedEncoderSettings(**given), 64).embedding == "token_mean"
    both = shaped_encoder(ShapedEncoderSettings(**given, embedding="cls+token_mean"), 64)
    assert both.embed_dim == 256


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "lrmil-smal"}, UnknownEncoder, "lrmil-small"),
        ({"random_seed": 0, "heads": 5}, EncoderError, "width of 128 cannot be shared by 5"),
        ({"random_seed": 0, "width": 66}, EncoderError, "width of 66 cannot be shared by 4"),
        ({"random_seed": 0, "token_px": 9}, GridMismatch, "64 px cannot be cut into tokens of 9 px"),
        ({"input_px": 60}, GridMismatch, "60 px cannot be cut into tokens of 8 px"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        shaped_encoder(ShapedEncoderSettings.model_validate({"name": TINY} | changes), 64)


@pytest.mark.parametrize("field", ["width", "heads", "token_px"])
def test_trained_weights_have_their_own_shape(field: str) -> None:
    with pytest.raises(ValidationError, match=f"trained weights have their own {field}"):
        ShapedEncoderSettings.model_validate({"name": TINY, field: 4})
