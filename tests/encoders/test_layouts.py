"""Checkpoint layouts: each conversion is checked by computing, not by looking at names.

The references below are written from the published definitions of DINOv2 (Meta's and the transformers library's),
apart from timm: separate query, key and value; positions for the class token and none for registers; SwiGLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from lrmil.encoders import EncoderCard, create_encoder
from lrmil.encoders.layouts import split_checkpoint, to_timm, unwrap
from lrmil.errors import CheckpointError

State = dict[str, torch.Tensor]
WIDTH, HEADS, DEPTH, TOKEN_PX, SIDE = 32, 4, 3, 8, 4
SWIGLU_HIDDEN = 88  # (int(32 * 4 * 2 / 3) + 7) // 8 * 8
DINO_ARCH = {"init_values": 1e-5}
SWIGLU_ARCH = {**DINO_ARCH, "mlp_layer": "swiglu_packed", "act_layer": "silu", "mlp_ratio": 2 * SWIGLU_HIDDEN / WIDTH}
REGISTER_ARCH = {"reg_tokens": 4, "no_embed_class": True}


def transformers_state(normal: Callable[..., torch.Tensor], *, swiglu: bool, registers: int) -> State:
    """Random weights under the names of transformers' Dinov2Model."""
    seeds = iter(range(10_000))

    def values(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return scale * normal(*shape, seed=next(seeds))

    state = {
        "embeddings.cls_token": values(1, 1, WIDTH),
        "embeddings.mask_token": values(1, WIDTH),
        "embeddings.position_embeddings": values(1, SIDE**2 + 1, WIDTH),
        "embeddings.patch_embeddings.projection.weight": values(WIDTH, 3, TOKEN_PX, TOKEN_PX),
        "embeddings.patch_embeddings.projection.bias": values(WIDTH),
        "layernorm.weight": 1 + values(WIDTH),
        "layernorm.bias": values(WIDTH),
    }
    if registers:
        state["embeddings.register_tokens"] = values(1, registers, WIDTH)
    mlp = {"weights_in": (2 * SWIGLU_HIDDEN, WIDTH), "weights_out": (WIDTH, SWIGLU_HIDDEN)}
    if not swiglu:
        mlp = {"fc1": (4 * WIDTH, WIDTH), "fc2": (WIDTH, 4 * WIDTH)}
    for block in range(DEPTH):
        root = f"encoder.layer.{block}."
        linears = {f"attention.attention.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value")}
        linears |= {"attention.output.dense": (WIDTH, WIDTH)} | {f"mlp.{name}": shape for name, shape in mlp.items()}
        for name, shape in linears.items():
            state |= {f"{root}{name}.weight": values(*shape), f"{root}{name}.bias": values(shape[0])}
        for name in ("norm1", "norm2"):
            state |= {f"{root}{name}.weight": 1 + values(WIDTH), f"{root}{name}.bias": values(WIDTH)}
        state |= {f"{root}layer_scale{i}.lambda1": 1 + values(WIDTH) for i in (1, 2)}
    return state


def transformers_forward(s: State, images: torch.Tensor) -> torch.Tensor:
    """Last hidden state of a Dinov2Model with these weights, at its native side."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), s[f"{name}.weight"], s[f"{name}.bias"], eps=1e-6)

    def split_heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, HEADS, WIDTH // HEADS).transpose(1, 2)

    patches = "embeddings.patch_embeddings.projection"
    x = F.conv2d(images, s[f"{patches}.weight"], s[f"{patches}.bias"], stride=TOKEN_PX).flatten(2).transpose(1, 2)
    x = torch.cat([s["embeddings.cls_token"].expand(len(x), -1, -1), x], 1) + s["embeddings.position_embeddings"]
    if "embeddings.register_tokens" in s:
        x = torch.cat([x[:, :1], s["embeddings.register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    for block in range(DEPTH):
        root = f"encoder.layer.{block}."
        h = norm(f"{root}norm1", x)
        q, k, v = (split_heads(linear(f"{root}attention.attention.{p}", h)) for p in ("query", "key", "value"))
        attention = (q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        h = linear(f"{root}attention.output.dense", attention.transpose(1, 2).flatten(2))
        x = x + s[f"{root}layer_scale1.lambda1"] * h
        h = norm(f"{root}norm2", x)
        if f"{root}mlp.weights_in.weight" in s:
            gate, up = linear(f"{root}mlp.weights_in", h).chunk(2, dim=-1)
            h = linear(f"{root}mlp.weights_out", F.silu(gate) * up)
        else:
            h = linear(f"{root}mlp.fc2", F.gelu(linear(f"{root}mlp.fc1", h)))
        x = x + s[f"{root}layer_scale2.lambda1"] * h
    return norm("layernorm", x)


def meta_names(s: State) -> State:
    """The same weights under the names of Meta's DinoVisionTransformer."""
    out: State = {}
    for key, value in s.items():
        key = key.replace("embeddings.patch_embeddings.projection.", "patch_embed.proj.")
        key = key.replace("embeddings.position_embeddings", "pos_embed").removeprefix("embeddings.")
        key = key.replace("encoder.layer.", "blocks.").replace("layernorm.", "norm.")
        key = key.replace("attention.output.dense.", "attn.proj.").replace("attention.attention.", "attn.")
        key = key.replace("weights_in.", "w12.").replace("weights_out.", "w3.")
        key = key.replace("layer_scale1.lambda1", "ls1.gamma").replace("layer_scale2.lambda1", "ls2.gamma")
        out[key] = value
    for key in [key for key in out if ".query." in key]:
        out[key.replace("query", "qkv")] = torch.cat(
            [out.pop(key.replace("query", p)) for p in ("query", "key", "value")]
        )
    return out


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("layout", ["transformers", "transformers, with a head", "meta", "meta, in chunks"])
def test_dinov2_layouts_compute_what_they_did(
    tiny_card: Callable[..., EncoderCard],
    normal: Callable[..., torch.Tensor],
    tmp_path: Path,
    layout: str,
    swiglu: bool,
    registers: int,
) -> None:
    reference = transformers_state(normal, swiglu=swiglu, registers=registers)
    state = reference if layout.startswith("transformers") else meta_names(reference)
    if layout == "transformers, with a head":
        state = {f"dinov2.{key}": value for key, value in state.items()} | {"classifier.weight": normal(2, WIDTH)}
    if layout == "meta, in chunks":
        state = {key.replace("blocks.", "blocks.0.", 1): value for key, value in state.items()}
        state["dino_head.mlp.0.weight"] = normal(2, 2)
    save_file(state, tmp_path / "model.safetensors")

    arch = (SWIGLU_ARCH if swiglu else DINO_ARCH) | (REGISTER_ARCH if registers else {})
    encoder = create_encoder(tiny_card(arch=arch).name, weights=tmp_path / "model.safetensors")
    images = normal(2, 3, SIDE * TOKEN_PX, SIDE * TOKEN_PX, seed=77)
    with torch.no_grad():
        wanted = transformers_forward(reference, images)
        out = encoder(images, token_layers=(DEPTH - 1,))
        tokens = encoder.trunk.norm(out.tokens[DEPTH - 1]).flatten(1, 2)
    torch.testing.assert_close(out.embedding, wanted[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens, wanted[:, 1 + registers :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.module.", "backbone.", "module.visual.trunk.", "model.encoder."]
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_prefixes_and_wrappers(tiny: Callable[..., torch.nn.Module], prefix: str, wrapper: str | None) -> None:
    trunk = tiny().trunk.state_dict()
    content: object = {f"{prefix}{key}": value for key, value in trunk.items()}
    if wrapper:
        content = {wrapper: content, "epoch": 3, "step": torch.tensor(100)}
    found, pool = split_checkpoint(unwrap(content, origin="x"), origin="x")
    assert found.keys() == trunk.keys()
    assert not pool


def test_what_is_beside_the_trunk_is_left_alone(tiny: Callable[..., torch.nn.Module]) -> None:
    trunk = tiny().trunk.state_dict()
    state = {f"backbone.{key}": value for key, value in trunk.items()} | {"loss.center": torch.zeros(3)}
    assert split_checkpoint(state, origin="x")[0].keys() == trunk.keys()


def test_two_networks_in_one_file_are_not_guessed_between(tiny: Callable[..., torch.nn.Module]) -> None:
    trunk = tiny().trunk.state_dict()
    state = {f"{who}.backbone.{key}": value for who in ("student", "teacher") for key, value in trunk.items()}
    with pytest.raises(CheckpointError, match=r"several vision transformers.*student\.backbone.*teacher\.backbone"):
        split_checkpoint(state, origin="x")


def test_not_a_vit() -> None:
    with pytest.raises(CheckpointError, match="no patch embedding"):
        split_checkpoint({"conv1.weight": torch.zeros(1)}, origin="resnet.pth")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"state_dict": {"epoch": 1}}, torch.zeros(2)])
def test_nothing_named_in_it(content: object) -> None:
    with pytest.raises(CheckpointError, match="no named tensors"):
        unwrap(content, origin="x.pth")


def test_class_position_is_folded_once_and_only_for_registers() -> None:
    state = {"cls_token": torch.ones(1, 1, 2), "pos_embed": torch.arange(10.0).view(1, 5, 2)}
    kept = to_timm(state, no_embed_class=False)
    assert torch.equal(kept["pos_embed"], state["pos_embed"])
    folded = to_timm(state | {"register_tokens": torch.zeros(1, 4, 2)}, no_embed_class=True)
    assert torch.equal(folded["cls_token"], torch.tensor([[[1.0, 2.0]]]))
    assert folded["pos_embed"].shape == (1, 4, 2)
    assert torch.equal(to_timm(folded, no_embed_class=True)["cls_token"], folded["cls_token"])
