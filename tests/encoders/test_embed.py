"""uint8 patches in, numpy features out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lrmil.encoders import Encoder, EncoderSettings, embed, encoder_from_settings
from lrmil.encoders.embedding import choose_dtype, default_batch
from lrmil.errors import ConfigError, EncoderError

Make = Callable[..., Any]


@pytest.fixture
def patches() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def test_normalise_is_the_usual_formula(tiny: Make, patches: np.ndarray[Any, Any]) -> None:
    encoder: Encoder = tiny(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    floats = encoder.normalise(torch.from_numpy(patches))
    wanted = (patches / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.4, 0.5, 0.6])
    assert floats.shape == (5, 3, 32, 32)
    assert floats.dtype == torch.float32
    # [image, channel, row, column]: rows of the array stay rows.
    np.testing.assert_allclose(floats.numpy(), wanted.transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


def test_other_sizes_are_resampled_and_equal_sizes_are_not(tiny: Make, patches: np.ndarray[Any, Any]) -> None:
    encoder: Encoder = tiny(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    exact = encoder.normalise(torch.from_numpy(patches)).mul(255).round().byte()
    assert np.array_equal(exact.permute(0, 2, 3, 1).numpy(), patches)
    large = np.repeat(np.repeat(patches, 2, axis=1), 2, axis=2)
    small = encoder.normalise(torch.from_numpy(large))
    assert small.shape == (5, 3, 32, 32)
    assert small.min() >= 0
    assert small.max() <= 1
    flat = np.full((1, 64, 64, 3), 200, np.uint8)
    torch.testing.assert_close(encoder.normalise(torch.from_numpy(flat)), torch.full((1, 3, 32, 32), 200 / 255))


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (5, 32, 16, 3), (32, 32, 3)])
def test_wrong_shapes(tiny: Make, shape: tuple[int, ...]) -> None:
    with pytest.raises(EncoderError, match=r"uint8 RGB of shape \(B, P, P, 3\)"):
        tiny().normalise(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(EncoderError, match="float32"):
        tiny().normalise(torch.zeros(1, 32, 32, 3))


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5, 64])
def test_features_do_not_depend_on_the_batches(
    tiny: Make, patches: np.ndarray[Any, Any], batch_size: int | None
) -> None:
    encoder: Encoder = tiny()
    with torch.no_grad():
        wanted = encoder(encoder.normalise(torch.from_numpy(patches)), cls_layers=(0, 2), token_layers=(1,))
    out = embed(encoder, patches, cls_layers=(0, 2), token_layers=[1], batch_size=batch_size, precision="float32")
    np.testing.assert_allclose(out.embedding, wanted.embedding.numpy(), rtol=1e-4, atol=1e-5)
    assert out.cls.keys() == {0, 2}
    for layer in (0, 2):
        np.testing.assert_allclose(out.cls[layer], wanted.cls[layer].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.tokens[1], wanted.tokens[1].numpy(), rtol=1e-4, atol=1e-5)
    assert out.embedding.dtype == out.cls[0].dtype == np.float32


def test_default_batch_follows_the_token_grid(tiny: Make) -> None:
    assert [default_batch(tiny(options={"input_px": side})) for side in (32, 128, 224)] == [16, 8, 4]


def test_no_patches(tiny: Make) -> None:
    out = embed(tiny(), np.empty((0, 32, 32, 3), np.uint8), cls_layers=(1,), token_layers=(1,))
    assert out.embedding.shape == (0, 32)
    assert out.cls[1].shape == (0, 32)
    assert out.tokens[1].shape == (0, 4, 4, 32)


def test_any_memory_layout(tiny: Make, patches: np.ndarray[Any, Any]) -> None:
    encoder = tiny()
    flipped = patches[:, ::-1]
    np.testing.assert_array_equal(embed(encoder, flipped).embedding, embed(encoder, flipped.copy()).embedding)
    frozen = patches.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(embed(encoder, frozen).embedding, embed(encoder, patches).embedding)


def test_nothing_is_kept_or_changed(tiny: Make, patches: np.ndarray[Any, Any]) -> None:
    encoder: Encoder = tiny().train()
    before = patches.copy()
    embed(encoder, patches)
    assert encoder.training
    assert np.array_equal(patches, before)
    encoder(encoder.normalise(torch.from_numpy(patches))).embedding.sum().backward()
    assert encoder.trunk.norm.weight.grad is not None


def test_bfloat16_is_near(tiny: Make, patches: np.ndarray[Any, Any]) -> None:
    encoder = tiny()
    full = embed(encoder, patches, precision="float32").embedding
    half = embed(encoder, patches, precision="bfloat16", cls_layers=(2,))
    cosine = (full * half.embedding).sum(1) / np.linalg.norm(full, axis=1) / np.linalg.norm(half.embedding, axis=1)
    assert cosine.min() > 0.999
    assert half.embedding.dtype == half.cls[2].dtype == np.float32
    assert not np.array_equal(full, half.embedding)


def test_precision_that_is_chosen(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny()
    for has, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("lrmil.encoders.embedding.cpu_has_bfloat16", lambda has=has: has)
        assert choose_dtype(encoder) == wanted
    assert choose_dtype(encoder, "float32") == torch.float32
    with pytest.raises(ConfigError, match="float16"):
        choose_dtype(encoder, "float16")


def test_features_that_are_no_numbers(tiny: Make, patches: np.ndarray[Any, Any]) -> None:
    encoder = tiny()
    with torch.no_grad():
        encoder.trunk.norm.bias[0] = float("inf")
    with pytest.raises(EncoderError, match="not finite"):
        embed(encoder, patches)


def test_settings_are_the_same_words(tiny_card: Make) -> None:
    settings = EncoderSettings(name=tiny_card().name, random_seed=3, embedding="token_mean")
    encoder = encoder_from_settings(settings, input_px=64)
    assert (encoder.input_px, encoder.embedding, encoder.weights_source) == (64, "token_mean", "random, seed 3")
    with pytest.raises(ValidationError, match="exclude each other"):
        EncoderSettings(name="x", weights="y", random_seed=1)
