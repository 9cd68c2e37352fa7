"""What a distilled embedding varies by, and getting it back through the final norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lrmil.encoders import Encoder, EncoderCard, encoder_cards, load_encoder, save_encoder
from lrmil.encoders.embedding import embed
from lrmil.encoders.vit import build_trunk
from lrmil.errors import ConfigError
from lrmil.training.spread import Spread, embedding_spread, require_restorable_spread, restore_spread
from lrmil.training.stage1 import Stage1Settings

CARD = EncoderCard(
    name="spread-tiny",
    title="tiny",
    architecture="vit_tiny_patch16_224",
    arch_args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    width=24,
    depth=2,
    token_px=8,
    table_px=32,
    input_px=32,
    licence="none",
)


def _encoder(embedding: str = "cls") -> Encoder:
    torch.manual_seed(0)
    return Encoder(CARD, build_trunk(CARD), input_px=32, embedding=embedding, weights_source="drawn")  # type: ignore[arg-type]


def _regions(seed: int, count: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("embedding", ["cls", "token_mean"])
def test_the_embedding_gets_the_moments_it_is_told_to_have_and_says_the_same(tmp_path: Path, embedding: str) -> None:
    encoder, regions = _encoder(embedding), _regions(1)
    found = embedding_spread(encoder, [regions[:15], regions[15:]])
    plain = embed(encoder, regions, token_layers=(1,))
    assert found.mean == pytest.approx(plain.embedding.mean(axis=0), abs=1e-6)
    assert found.sd == pytest.approx(plain.embedding.std(axis=0), rel=1e-4)

    rng = np.random.default_rng(2)
    wanted = Spread(rng.normal(size=24), found.sd * rng.uniform(3, 12, 24))
    restore_spread(encoder, found, wanted)
    restored = embed(encoder, regions, token_layers=(1,))
    assert restored.embedding.mean(axis=0) == pytest.approx(wanted.mean, abs=1e-3)
    assert restored.embedding.std(axis=0) == pytest.approx(wanted.sd, rel=1e-3)
    expected = (plain.embedding - found.mean) / found.sd * wanted.sd + wanted.mean
    assert restored.embedding == pytest.approx(expected, abs=1e-3)
    assert np.array_equal(restored.tokens[1], plain.tokens[1]), "blocks stay as they are"

    loaded = load_encoder(save_encoder(encoder, tmp_path / "encoder"))
    assert embed(loaded, regions).embedding == pytest.approx(restored.embedding, abs=1e-5)


def test_a_dimension_that_never_varies_is_only_moved() -> None:
    encoder, regions = _encoder(), _regions(3)
    with torch.no_grad():
        encoder.trunk.norm.weight[5] = 0.0
        encoder.trunk.norm.bias[5] = 2.0
    found = embedding_spread(encoder, [regions])
    wanted = Spread(found.mean + 1, np.full(24, 0.7))
    restore_spread(encoder, found, wanted)
    after = embedding_spread(encoder, [regions])
    assert after.mean[5] == pytest.approx(3.0, abs=1e-4)
    assert after.sd[5] == pytest.approx(0, abs=1e-6)
    assert np.delete(after.sd, 5) == pytest.approx(np.full(23, 0.7), rel=1e-3)


def test_the_share_is_that_of_root_mean_square_deviations() -> None:
    one = Spread(np.zeros(2), np.array([3.0, 4.0]))
    assert Spread(np.ones(2), np.array([0.3, 0.4])).share_of(one) == pytest.approx(0.1)


def test_what_does_not_end_with_a_norm_is_refused() -> None:
    encoder = _encoder("cls+token_mean")
    moments = embedding_spread(encoder, [_regions(4, 5)])
    with pytest.raises(ConfigError, match="does not end with one"):
        restore_spread(encoder, moments, moments)
    with pytest.raises(ValidationError, match="begins as the HR encoder"):
        Stage1Settings(restore_spread=True, student={"name": "lrmil-small", "depth": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("card", encoder_cards(), ids=lambda card: card.name)
def test_spread_can_be_restored_for_the_class_token_of_every_known_encoder(card: EncoderCard) -> None:
    """`lrmil init` writes `restore_spread: true` beside `embedding: cls`, whatever the encoder."""
    trunk = build_trunk(card, empty=True)
    encoder = Encoder(card, trunk, input_px=card.input_px, embedding="cls", weights_source="none")
    assert require_restorable_spread(encoder).normalized_shape == (encoder.embed_dim,)
