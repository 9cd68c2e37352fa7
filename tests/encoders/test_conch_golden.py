"""CONCH's image tower against the outputs of the original program (random weights, width 48, native side 128)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrmil.encoders import Encoder, EncoderCard, create_encoder, register_encoder
from lrmil.encoders.conch import AttentionPool
from lrmil.errors import CheckpointError, GridMismatch

GOLDEN = "conch_tiny_visual"
SIDES = (128, 64)


@pytest.fixture
def arrays(golden: Callable[[str], Any]) -> Any:
    return golden(GOLDEN)


@pytest.fixture
def official(arrays: Any) -> dict[str, torch.Tensor]:
    """The checkpoint in official names."""
    return {key: torch.from_numpy(value) for key, value in arrays.under("param/").items()}


@pytest.fixture
def checkpoint(official: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """As published: wrapped, and with the text tower in it."""
    path = tmp_path / "pytorch_model.bin"
    wrapped = {f"module.{key}": value for key, value in official.items()}
    torch.save(
        {"state_dict": wrapped | {"module.text.cls_emb": torch.zeros(32), "module.logit_scale": torch.ones(())}}, path
    )
    return path


@pytest.fixture
def conch(checkpoint: Path) -> Callable[..., Encoder]:
    # The card says that the table is for 448 px; the file knows better, and is believed.
    register_encoder(
        EncoderCard(
            name="conch-golden",
            title="CONCH at width 48",
            architecture="vit_base_patch16_224",
            arch_args={"embed_dim": 48, "num_heads": 4},
            width=48,
            depth=12,
            token_px=16,
            table_px=448,
            input_px=128,
            attention_pool_width=32,
            licence="none",
        )
    )

    def make(weights: Path = checkpoint, **options: Any) -> Encoder:
        return create_encoder("conch-golden", weights=weights, **options)

    return make


@pytest.mark.parametrize("side", SIDES)
def test_blocks_and_norm(conch: Callable[..., Encoder], arrays: Any, side: int) -> None:
    encoder = conch(input_px=side)
    images = torch.from_numpy(arrays[f"in/S{side}/image"])
    layers = (0, 1, 10, 11)
    with torch.no_grad():
        patches = encoder.trunk.patch_embed(images)
        out = encoder(images, cls_layers=layers, token_layers=layers)
    arrays.expect(f"out/S{side}/patch_embed_shape", np.array(patches.shape))
    for layer in layers:
        sequence = torch.cat([out.cls[layer][:, None], out.tokens[layer].flatten(1, 2)], dim=1)
        arrays.expect(f"out/S{side}/block{layer}", sequence, atol=1e-4)
    with torch.no_grad():
        normed = encoder.trunk.norm(sequence)
    arrays.expect(f"out/S{side}/trunk_normed", normed, atol=1e-5)
    assert encoder.embedding == "cls"
    assert encoder.embed_dim == 48
    torch.testing.assert_close(out.embedding, normed[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", SIDES)
def test_both_image_encodings(conch: Callable[..., Encoder], arrays: Any, side: int) -> None:
    images = torch.from_numpy(arrays[f"in/S{side}/image"])
    with torch.no_grad():
        pooled = conch(embedding="attention_pool")(images).embedding
        projected = conch(embedding="attention_pool_projected")(images).embedding
    arrays.expect(f"out/S{side}/encode_image_noproj_nonorm", pooled, atol=1e-5)
    arrays.expect(f"out/S{side}/encode_image_proj_norm", projected, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_the_pool_has_the_official_names_and_any_number_of_queries(
    official: dict[str, torch.Tensor], arrays: Any, side: int
) -> None:
    """The caption pool of the checkpoint is the same module with 4 queries and equal widths."""
    state = {k.removeprefix("visual.attn_pool_caption."): v for k, v in official.items() if "attn_pool_caption" in k}
    pool = AttentionPool(token_width=48, out_width=48, queries=4, heads=8)
    pool.load_state_dict(state, strict=True)
    norm = torch.nn.LayerNorm(48)
    norm.load_state_dict({k.removeprefix("visual.ln_caption."): v for k, v in official.items() if "ln_caption" in k})
    with torch.no_grad():
        tokens = norm(pool(torch.from_numpy(arrays[f"out/S{side}/trunk_normed"])))
    arrays.expect(f"out/S{side}/caption_tokens", tokens, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_legacy_slice_is_what_the_released_lrmil_computes(
    conch: Callable[..., Encoder], arrays: Any, side: int
) -> None:
    images = torch.from_numpy(arrays[f"in/S{side}/image"])
    with torch.no_grad():
        out = conch(position_embedding="legacy_slice")(images, token_layers=(0,))
    arrays.expect(f"out/S{side}/LRMIL_sliced_posembed/final", out.embedding, atol=1e-5)
    arrays.expect(f"out/S{side}/LRMIL_sliced_posembed/layer0_tokens", out.tokens[0], atol=1e-5)


def test_the_default_resamples_and_does_not_slice(conch: Callable[..., Encoder], arrays: Any) -> None:
    """METHOD 1.8 row 13: equal at the native side, far apart at another."""
    with torch.no_grad():
        for side, equal in ((128, True), (64, False)):
            images = torch.from_numpy(arrays[f"in/S{side}/image"])
            resampled, sliced = (
                conch(position_embedding=how)(images).embedding for how in ("resample", "legacy_slice")
            )
            assert torch.allclose(resampled, sliced, atol=1e-5) is equal


def test_legacy_slice_cannot_stretch_the_table(
    conch: Callable[..., Encoder], normal: Callable[..., torch.Tensor]
) -> None:
    with pytest.raises(GridMismatch, match="position table"):
        conch(position_embedding="legacy_slice", input_px=144)(normal(1, 3, 144, 144))


def test_released_stage1_file_loads_through_its_alias(
    conch: Callable[..., Encoder], official: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """METHOD 1.7: conch_model.visual.trunk.<k> and, for the same tensors, visual.<k>."""
    whole = {f"conch_model.{key}": value for key, value in official.items()}
    alias = {key.replace("visual.trunk.", "visual."): v for key, v in official.items() if ".trunk." in key}
    torch.save(whole | alias, tmp_path / "stage1_best.pth")
    for embedding in ("cls", "attention_pool"):
        released = conch(tmp_path / "stage1_best.pth", embedding=embedding)
        assert released.weights_sha256 == conch(embedding=embedding).weights_sha256


def test_trunk_alone_has_no_attention_pool(
    conch: Callable[..., Encoder], official: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save({k: v for k, v in official.items() if ".trunk." in k}, tmp_path / "trunk.pth")
    assert conch(tmp_path / "trunk.pth").embed_dim == 48
    with pytest.raises(CheckpointError, match="no attention pool"):
        conch(tmp_path / "trunk.pth", embedding="attention_pool")
