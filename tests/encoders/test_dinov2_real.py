"""The real DINOv2 ViT-S/14 file against plain timm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from lrmil.encoders import Encoder, create_encoder, embed
from lrmil.errors import CheckpointError

FILE = "weights/vit_small_patch14_dinov2_fp16.safetensors"


@pytest.fixture(scope="module")
def weights(shared_data: Path) -> Path:
    return shared_data / FILE


@pytest.fixture(scope="module")
def plain(weights: Path) -> torch.nn.Module:
    """timm's own way of loading it, with its own image-size handling."""
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518, dynamic_img_size=True)
    model.load_state_dict({key: value.float() for key, value in load_file(weights).items()}, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def encoder(weights: Path) -> Encoder:
    return create_encoder("dinov2-small", weights=weights)


@pytest.mark.parametrize("side", [224, 112])
def test_equals_plain_timm(encoder: Encoder, plain: torch.nn.Module, side: int) -> None:
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(side))
    with torch.no_grad():
        features = plain.forward_features(images)
        blocks = plain.forward_intermediates(images, [0, 11], norm=False, output_fmt="NLC", intermediates_only=True)
        out = encoder(images, token_layers=(0, 11))
    assert torch.equal(out.embedding, features[:, 0])
    for layer, wanted in zip((0, 11), blocks, strict=True):
        assert torch.equal(out.tokens[layer].flatten(1, 2), wanted)
    assert out.tokens[0].shape == (1, side // 14, side // 14, 384)


def test_facts(encoder: Encoder, weights: Path) -> None:
    assert (encoder.input_px, encoder.token_grid_side, encoder.table_px) == (224, 16, 518)
    assert encoder.trunk.cls_token.dtype == torch.float32
    assert encoder.weights_source == f"file {weights.name}"
    assert not encoder.training
    timm_named = create_encoder("timm:vit_small_patch14_dinov2.lvd142m", weights=weights, input_px=224)
    assert timm_named.weights_sha256 == encoder.weights_sha256


def test_uint8_in_features_out(weights: Path) -> None:
    """Normalisation is that of ImageNet."""
    images = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8)
    small = create_encoder("dinov2-small", input_px=112, weights=weights)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    floats = torch.from_numpy(((images / 255 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = small(floats).embedding.numpy()
    np.testing.assert_allclose(embed(small, images, precision="float32").embedding, wanted, rtol=1e-3, atol=1e-4)


def test_it_is_not_another_encoder(weights: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit dinov2-base.*is \(.*384.*should be \(.*768"):
        create_encoder("dinov2-base", weights=weights)
