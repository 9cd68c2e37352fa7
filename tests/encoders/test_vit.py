"""The wrapper against timm itself, and what it must not mix up: rows and columns, layers, registers, positions."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.encoders import Encoder, EncoderCard, create_encoder, resolve_card, vit
from lrmil.encoders.vit import build_trunk, hash_tensors
from lrmil.errors import EncoderError, GridMismatch, UnknownEncoder

REGISTERS = {"reg_tokens": 4, "init_values": 1e-5}
SWIGLU = {"mlp_layer": "swiglu_packed", "act_layer": "silu", "mlp_ratio": 5.33334}


@pytest.mark.parametrize(
    "arch",
    [
        {},
        REGISTERS,
        {**REGISTERS, "no_embed_class": True},
        {**REGISTERS, **SWIGLU, "no_embed_class": True},
        {"pre_norm": True},
        {"qk_norm": True},
    ],
    ids=["plain", "registers", "registers, no_embed_class", "registers, SwiGLU", "pre-norm", "qk-norm"],
)
@pytest.mark.parametrize("side", [32, 48, 16])
def test_embedding_and_taps_equal_timms(
    tiny: Callable[..., Encoder], normal: Callable[..., torch.Tensor], arch: dict[str, Any], side: int
) -> None:
    encoder = tiny(arch=arch)
    images = normal(2, 3, side, side)
    with torch.no_grad():
        features = encoder.trunk.forward_features(images)
        maps, prefix = zip(
            *encoder.trunk.forward_intermediates(images, [0, 2], True, intermediates_only=True), strict=True
        )
        out = encoder(images, cls_layers=(0, 2), token_layers=(0, 2))
    assert torch.equal(out.embedding, features[:, 0])
    for layer, timm_map, timm_prefix in zip((0, 2), maps, prefix, strict=True):
        assert torch.equal(out.tokens[layer].permute(0, 3, 1, 2), timm_map)
        assert torch.equal(out.cls[layer], timm_prefix[:, 0])
    assert out.tokens[0].shape == (2, side // 8, side // 8, 32)


def test_embeddings_leave_registers_out(tiny: Callable[..., Encoder], normal: Callable[..., torch.Tensor]) -> None:
    encoder = tiny(arch=REGISTERS, embedding="cls+token_mean")
    images = normal(2, 3, 32, 32)
    with torch.no_grad():
        features = encoder.trunk.forward_features(images)
        out = encoder(images).embedding
    assert encoder.embed_dim == 64
    torch.testing.assert_close(out[:, :32], features[:, 0])
    torch.testing.assert_close(out[:, 32:], features[:, 5:].mean(1))
    with_registers = features[:, 1:].mean(1)
    assert not torch.allclose(out[:, 32:], with_registers, atol=1e-3)


def test_networks_with_the_norm_behind_the_mean() -> None:
    """timm's average-pooling ViTs have no class token and norm the mean instead of the tokens."""
    encoder = create_encoder("timm:vit_wee_patch16_reg1_gap_256", input_px=64, random_seed=0)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert encoder.embedding == "token_mean"
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).embedding, encoder.trunk(images))
    with pytest.raises(EncoderError, match="no class token"):
        encoder(images, cls_layers=(0,))
    with pytest.raises(EncoderError, match="no class token"):
        create_encoder("vit_wee_patch16_reg1_gap_256", embedding="cls", random_seed=0)


def test_token_maps_are_rows_first(tiny: Callable[..., Encoder], normal: Callable[..., torch.Tensor]) -> None:
    """A change at image row 3, column 1 changes the token [3, 1] most; not [1, 3]. Without position and attention
    noise: the patch embedding alone decides, so that the first block sees one odd token."""
    encoder = tiny()
    with torch.no_grad():
        encoder.trunk.pos_embed.zero_()
    plain = torch.zeros(1, 3, 32, 32)
    marked = plain.clone()
    marked[:, :, 24:32, 8:16] = normal(3, 8, 8)
    with torch.no_grad():
        change = encoder(marked, token_layers=(0,)).tokens[0] - encoder(plain, token_layers=(0,)).tokens[0]
    size = change[0].norm(dim=-1)
    assert divmod(int(size.argmax()), 4) == (3, 1)
    assert size[3, 1] > 3 * size[1, 3]


@settings(deadline=None, max_examples=25)
@given(row=st.integers(0, 3), column=st.integers(0, 3))
def test_transposing_the_image_transposes_the_map(row: int, column: int) -> None:
    """With a symmetric patch embedding and no positions the network cannot tell rows from columns, so that the maps
    of an image and of its transpose are transposes of each other."""
    encoder = _symmetric()
    image = torch.zeros(1, 3, 32, 32)
    image[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1.0
    with torch.no_grad():
        straight = encoder(image, token_layers=(2,)).tokens[2]
        turned = encoder(image.transpose(2, 3), token_layers=(2,)).tokens[2]
    torch.testing.assert_close(turned, straight.transpose(1, 2))
    if row != column:
        assert not torch.allclose(turned, straight, atol=1e-4)


_SYMMETRIC: list[Encoder] = []


def _symmetric() -> Encoder:
    if not _SYMMETRIC:
        encoder = create_encoder("vit_tiny_patch16_224", random_seed=0)
        card = encoder.card.model_copy(
            update={
                "arch_args": {"patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 4},
                "width": 32,
                "depth": 3,
                "token_px": 8,
                "table_px": 32,
            }
        )
        encoder = Encoder(card, build_trunk(card), input_px=32, embedding="cls", weights_source="random").eval()
        with torch.no_grad():
            encoder.trunk.pos_embed.zero_()
            kernel = encoder.trunk.patch_embed.proj.weight
            kernel.copy_((kernel + kernel.transpose(2, 3)) / 2)
        _SYMMETRIC.append(encoder)
    return _SYMMETRIC[0]


def test_taps_are_raw_and_counted_from_zero(tiny: Callable[..., Encoder], normal: Callable[..., torch.Tensor]) -> None:
    encoder = tiny()
    with torch.no_grad():
        out = encoder(normal(2, 3, 32, 32), cls_layers=(2,), token_layers=(1,))
        assert set(out.cls) == {2}
        assert set(out.tokens) == {1}
        # The last block's class token becomes the embedding only by the final norm.
        assert not torch.allclose(out.cls[2], out.embedding, atol=1e-3)
        torch.testing.assert_close(encoder.trunk.norm(out.cls[2]), out.embedding)


def test_blocks_above_the_last_tap_are_not_run(
    tiny: Callable[..., Encoder], normal: Callable[..., torch.Tensor]
) -> None:
    encoder = tiny()
    ran: list[int] = []
    for number, block in enumerate(encoder.trunk.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    out = encoder(normal(2, 3, 32, 32), token_layers=(1,), with_embedding=False)
    assert ran == [0, 1]
    assert out.embedding.shape == (2, 0)
    full = encoder(normal(2, 3, 32, 32), token_layers=(1,))
    assert ran == [0, 1, 0, 1, 2]
    assert torch.equal(full.tokens[1], out.tokens[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_taps_and_positions(
    tiny: Callable[..., Encoder], normal: Callable[..., torch.Tensor], checkpointing: bool
) -> None:
    encoder = tiny()
    encoder.set_grad_checkpointing(checkpointing)
    encoder(normal(2, 3, 16, 16), token_layers=(1,), with_embedding=False).tokens[1].square().mean().backward()
    # 16 px use a resampled table: it learns through the interpolation.
    assert encoder.trunk.pos_embed.grad.abs().sum() > 0
    assert encoder.trunk.blocks[1].mlp.fc2.weight.grad.abs().sum() > 0
    assert encoder.trunk.blocks[2].mlp.fc2.weight.grad is None


def test_gradient_checkpointing_changes_nothing_else(
    tiny: Callable[..., Encoder], normal: Callable[..., torch.Tensor]
) -> None:
    grads = []
    for enable in (False, True):
        encoder = tiny()
        encoder.set_grad_checkpointing(enable)
        encoder(normal(2, 3, 32, 32)).embedding.sum().backward()
        grads.append(encoder.trunk.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*grads)


def test_positions_are_resampled_antialiased_bicubic(
    tiny: Callable[..., Encoder], normal: Callable[..., torch.Tensor]
) -> None:
    encoder = tiny(table_px=64)
    table = encoder.trunk.pos_embed.detach()
    grid = table[:, 1:].reshape(1, 8, 8, 32).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    with torch.no_grad():
        patches = encoder.trunk.patch_embed(normal(1, 3, 32, 32))
        sequence = encoder._add_positions(patches)
    torch.testing.assert_close(sequence[:, 1:] - patches.flatten(1, 2), wanted.flatten(2).transpose(1, 2))
    torch.testing.assert_close(sequence[:, 0], encoder.trunk.cls_token[:, 0] + table[:, 0])
    blurred = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=False)
    assert not torch.allclose(wanted, blurred, atol=1e-3)


def test_random_weights_are_reproducible_and_leave_the_global_generator_alone(tiny: Callable[..., Encoder]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = tiny(seed=3)
    assert torch.rand(1) == expected
    assert first.weights_sha256 == tiny(seed=3).weights_sha256
    assert first.weights_sha256 != tiny(seed=4).weights_sha256


def test_random_weights_with_layer_scale_still_see_the_image(
    tiny: Callable[..., Encoder], normal: Callable[..., torch.Tensor]
) -> None:
    """At LayerScale's starting value of 1e-5 all images would have nearly the same class token."""
    with torch.no_grad():
        a, b = tiny(arch=REGISTERS)(normal(2, 3, 32, 32)).embedding
    assert (a - b).norm() > 0.05 * a.norm()


def test_weights_sha256_follows_the_weights(tiny: Callable[..., Encoder], normal: Callable[..., torch.Tensor]) -> None:
    encoder = tiny()
    before = encoder.weights_sha256
    assert encoder.weights_sha256 == before
    for fused in (False, True):
        optimiser = torch.optim.Adam(encoder.parameters(), lr=1e-3, fused=fused)
        encoder(normal(2, 3, 32, 32)).embedding.sum().backward()
        optimiser.step()
        after = encoder.weights_sha256
        assert after != before
        before = after
    encoder.load_state_dict(tiny(seed=9).state_dict())
    assert encoder.weights_sha256 == tiny(seed=9).weights_sha256


def test_weights_are_hashed_once_until_one_is_written_to(
    tiny: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []

    def counting(state: Any) -> str:
        hashed.append(1)
        return hash_tensors(state)

    monkeypatch.setattr(vit, "hash_tensors", counting)
    encoder = tiny()
    assert encoder.weights_sha256 == encoder.describe()["weights_sha256"] == hash_tensors(encoder.state_dict())
    assert len(hashed) == 1
    # One number, the second: no sample need hold it.
    with torch.no_grad():
        encoder.trunk.blocks[0].mlp.fc1.weight[0, 1] += 1
    assert encoder.weights_sha256 == hash_tensors(encoder.state_dict())
    assert len(hashed) == 2
    # A write past PyTorch's account of writes, as fused optimisers make them.
    encoder.trunk.blocks[0].mlp.fc1.weight.data.mul_(2)
    assert encoder.weights_sha256 == hash_tensors(encoder.state_dict())
    assert len(hashed) == 3
    assert copy.deepcopy(encoder).weights_sha256 == encoder.weights_sha256


def test_a_copy_is_a_student_of_its_own(tiny: Callable[..., Encoder]) -> None:
    teacher = tiny()
    before = teacher.weights_sha256
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.trunk.norm.bias.add_(1)
    assert teacher.weights_sha256 == before != student.weights_sha256


def test_describe_is_plain_data_and_names_the_choices(tiny: Callable[..., Encoder]) -> None:
    encoder = tiny(options={"input_px": 48})
    facts = json.loads(json.dumps(encoder.describe()))
    assert facts["input_px"] == 48
    assert facts["token_grid_side"] == 6
    assert facts["embedding"] == "cls"
    assert facts["weights_sha256"] == encoder.weights_sha256
    assert {"licence", "gated", "share_derivatives", "native_mpp"} <= facts.keys()


def test_wrong_requests(tiny: Callable[..., Encoder], normal: Callable[..., torch.Tensor]) -> None:
    encoder = tiny()
    with pytest.raises(EncoderError, match="no layer 3"):
        encoder(normal(1, 3, 32, 32), cls_layers=(0, 3))
    with pytest.raises(EncoderError, match="no layer -1"):
        encoder(normal(1, 3, 32, 32), token_layers=(-1,))
    with pytest.raises(GridMismatch, match="multiple of 8, such as 32"):
        encoder(normal(1, 3, 30, 30))
    with pytest.raises(GridMismatch, match="48 x 32"):
        encoder(normal(1, 3, 32, 48))
    with pytest.raises(EncoderError, match="floats"):
        encoder(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(GridMismatch, match="30 px"):
        tiny(options={"input_px": 30})
    with pytest.raises(EncoderError, match="legacy_slice"):
        tiny(arch=REGISTERS, options={"position_embedding": "legacy_slice"})


def test_side_that_does_not_divide_224_with_16(tiny_card: Callable[..., EncoderCard]) -> None:
    with pytest.raises(GridMismatch, match="cannot be cut into tokens of 14 px"):
        create_encoder("dinov2-small", input_px=256, random_seed=0)


@pytest.mark.parametrize("name", ["resnet18", "vit_small_r26_s32_224", "vit_small_patch16_dinov3"])
def test_only_plain_vits(name: str) -> None:
    with pytest.raises(UnknownEncoder, match="plain vision transformer"):
        create_encoder(name, random_seed=0)


def test_a_timm_name_brings_its_facts() -> None:
    card = resolve_card("timm:vit_small_patch14_reg4_dinov2.lvd142m")
    assert (card.width, card.depth, card.token_px, card.table_px) == (384, 12, 14, 518)
    assert card.source == "timm/vit_small_patch14_reg4_dinov2.lvd142m"
    assert card.licence == "apache-2.0"
    assert timm.is_model(card.architecture)
