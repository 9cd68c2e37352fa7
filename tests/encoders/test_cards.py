"""Every card builds, and says what it builds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from lrmil.encoders import Encoder, EncoderCard, encoder_cards, register_encoder, resolve_card
from lrmil.encoders.layouts import to_timm
from lrmil.encoders.vit import build_pool, build_trunk
from lrmil.errors import EncoderError, UnknownEncoder

MILLIONS_OF_PARAMETERS = {
    "conch-v1": 86.25,
    "uni": 303.35,
    "uni2-h": 681.39,
    "virchow": 631.23,
    "virchow2": 631.24,
    "prov-gigapath": 1134.95,
    "h-optimus-0": 1134.77,
    "h-optimus-1": 1134.77,
    "phikon-v2": 303.35,
    "midnight": 1134.77,
    "hibou-b": 85.74,
    "hibou-l": 303.66,
    "dinov2-small": 22.06,
    "dinov2-base": 86.58,
    "dinov2-large": 304.37,
}
EMBED_DIM_AND_GRID = {
    "conch-v1": (768, 28),
    "uni": (1024, 14),
    "uni2-h": (1536, 16),
    "virchow": (2560, 16),
    "virchow2": (2560, 16),
    "prov-gigapath": (1536, 14),
    "h-optimus-0": (1536, 16),
    "h-optimus-1": (1536, 16),
    "phikon-v2": (1024, 14),
    "midnight": (3072, 16),
    "hibou-b": (768, 16),
    "hibou-l": (1024, 16),
    "dinov2-small": (384, 16),
    "dinov2-base": (768, 16),
    "dinov2-large": (1024, 16),
}
KEYS = {
    "conch-v1": {"pos_embed": (1, 785, 768), "blocks.11.attn.qkv.weight": (2304, 768)},
    "uni": {"pos_embed": (1, 197, 1024), "blocks.0.ls1.gamma": (1024,)},
    "uni2-h": {"reg_token": (1, 8, 1536), "pos_embed": (1, 256, 1536), "blocks.23.mlp.fc1.weight": (8192, 1536)},
    "virchow": {"pos_embed": (1, 257, 1280)},
    "virchow2": {"pos_embed": (1, 261, 1280), "blocks.31.mlp.fc2.weight": (1280, 3416)},
    "prov-gigapath": {"patch_embed.proj.weight": (1536, 3, 16, 16), "pos_embed": (1, 197, 1536)},
    "h-optimus-0": {"reg_token": (1, 4, 1536), "pos_embed": (1, 256, 1536)},
    "phikon-v2": {"pos_embed": (1, 197, 1024), "blocks.23.mlp.fc1.weight": (4096, 1024)},
    "midnight": {"blocks.39.mlp.fc1.weight": (8192, 1536), "blocks.39.mlp.fc2.weight": (1536, 4096)},
    "hibou-b": {"reg_token": (1, 4, 768), "blocks.0.mlp.fc1.weight": (4096, 768)},
    "hibou-l": {"reg_token": (1, 4, 1024), "blocks.0.mlp.fc1.weight": (5472, 1024)},
    "dinov2-small": {"pos_embed": (1, 1370, 384), "blocks.0.ls2.gamma": (384,)},
}


@pytest.mark.parametrize("card", encoder_cards(), ids=lambda card: card.name)
def test_every_card_builds(card: EncoderCard) -> None:
    trunk, pool = build_trunk(card, empty=True), build_pool(card, card.embedding, empty=True)
    side = card.grid_side()
    with torch.device("meta"):
        encoder = Encoder(card, trunk, pool, input_px=card.input_px, embedding=card.embedding, weights_source="none")
        images = torch.empty(1, 3, card.input_px, card.input_px)
        out = encoder(images, cls_layers=(0,), token_layers=(card.depth - 1,))
    assert out.embedding.shape == (1, card.embed_dim())
    assert out.cls[0].shape == (1, card.width)
    assert out.tokens[card.depth - 1].shape == (1, side, side, card.width)
    shapes = {key: tuple(value.shape) for key, value in trunk.state_dict().items()}
    assert shapes.items() >= KEYS.get(card.name, {}).items()
    if card.package_file is None:
        assert (card.embed_dim(), side) == EMBED_DIM_AND_GRID[card.name]
        parameters = sum(p.numel() for p in trunk.parameters()) / 1e6
        assert parameters == pytest.approx(MILLIONS_OF_PARAMETERS[card.name], abs=0.006)


def test_no_card_is_left_out_of_the_tables() -> None:
    assert {card.name for card in encoder_cards() if card.package_file is None} == EMBED_DIM_AND_GRID.keys()


def test_conch_pool_has_the_official_shapes() -> None:
    pool = build_pool(resolve_card("conch"), "attention_pool", empty=True)
    assert pool is not None
    shapes = {key: tuple(value.shape) for key, value in pool.state_dict().items()}
    assert shapes["attn_pool_contrast.query"] == (1, 512)
    assert shapes["attn_pool_contrast.attn.q_proj_weight"] == (512, 512)
    assert shapes["attn_pool_contrast.attn.k_proj_weight"] == (512, 768)
    assert shapes["attn_pool_contrast.attn.in_proj_bias"] == (1536,)
    assert shapes["attn_pool_contrast.ln_k.weight"] == (768,)
    assert shapes["proj_contrast"] == (512, 512)


def test_what_must_not_be_passed_on() -> None:
    """METHOD 4.1: a student distilled from CONCH is a derivative of it."""
    cards = {card.name: card for card in encoder_cards()}
    assert cards["conch-v1"].share_derivatives is False
    assert cards["conch-v1"].gated
    assert cards["conch-v1"].ckpt_variable == "CONCH_CKPT_PATH"
    assert cards["uni"].ckpt_variable == "UNI_CKPT_PATH"
    assert cards["dinov2-small"].share_derivatives is True
    assert all(card.share_derivatives is not True for card in cards.values() if "CC-BY-NC-ND" in card.licence)


def test_names_and_aliases() -> None:
    assert resolve_card("CONCH_v1").name == "conch-v1"
    assert resolve_card("hoptimus0").name == "h-optimus-0"


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("conhc-v1", "conch"), ("virchow-3", "virchow"), ("vit_smal_patch14_dinov2", "vit_small_patch14_dinov2")],
)
def test_unknown_name_suggests_near_ones(wrong: str, near: str) -> None:
    with pytest.raises(UnknownEncoder, match=f"no encoder '{wrong}'.*Did you mean .*{near}"):
        resolve_card(wrong)


def test_unknown_name_with_nothing_near() -> None:
    with pytest.raises(UnknownEncoder, match="lrmil encoders"):
        resolve_card("qqqqqq")


def test_a_weight_file_is_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(UnknownEncoder, match="Name the encoder"):
        resolve_card(tmp_path / "some.safetensors")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input_px", 30, "multiple of token_px"),
        ("table_px", 30, "multiple of token_px"),
        ("std", (0.0, 0.2, 0.2), "mean and std"),
        ("mean", (123.0, 117.0, 104.0), "mean and std"),
        ("embedding", "attention_pool", "attention_pool_width"),
        ("gated", True, "source"),
        ("source", "not a repository", "owner/name"),
        ("name", "With Space", "pattern"),
        ("licence", "", "licence"),
        ("colour", "red", "colour"),
    ],
)
def test_cards_are_checked(tiny_card: Callable[..., EncoderCard], field: str, value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_card(**{field: value})


def test_a_name_belongs_to_one_card(tiny_card: Callable[..., EncoderCard]) -> None:
    card = tiny_card("mine", aliases=("also-mine",))
    register_encoder(card)
    with pytest.raises(EncoderError, match="belongs to the card 'mine'"):
        tiny_card("other", aliases=("also_mine",))
    assert resolve_card("ALSO_MINE") == card


def test_a_card_that_lies_is_found_out(tiny_card: Callable[..., EncoderCard]) -> None:
    card = tiny_card()
    with pytest.raises(EncoderError, match="the card says 64"):
        build_trunk(card.model_copy(update={"width": 64}))


def test_cards_are_frozen_and_survive_json(tiny_card: Callable[..., EncoderCard]) -> None:
    card = tiny_card(native_mpp=(0.5, 2.0))
    with pytest.raises(ValidationError):
        card.width = 5  # type: ignore[misc]
    assert EncoderCard.model_validate_json(card.model_dump_json()) == card


def test_timm_names_pass_through_the_converter() -> None:
    state = {"blocks.0.mlp.fc1.weight": torch.ones(2), "reg_token": torch.ones(1), "pos_embed": torch.ones(1, 5, 2)}
    assert to_timm(state, no_embed_class=True) == state
