"""Small encoders to try things on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch

from lrmil.encoders import Encoder, EncoderCard, cards, create_encoder, register_encoder


@pytest.fixture(autouse=True)
def _registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cards that a test registers are gone after it, and no weight variable of the machine reaches it."""
    before = dict(cards._CARDS), dict(cards._NAMES)
    for card in before[0].values():
        monkeypatch.delenv(card.ckpt_variable, raising=False)
    yield
    for registry, saved in zip((cards._CARDS, cards._NAMES), before, strict=True):
        registry.clear()
        registry.update(saved)


@pytest.fixture
def tiny_card() -> Callable[..., EncoderCard]:
    """Make and register a card of a 3-block ViT of width 32; keyword arguments override its fields."""

    numbers = count()

    def make(name: str | None = None, arch: dict[str, Any] | None = None, **fields: Any) -> EncoderCard:
        name = name or f"tiny-{next(numbers)}"
        token_px = fields.get("token_px", 8)
        args = {"patch_size": token_px, "embed_dim": 32, "depth": 3, "num_heads": 4, **(arch or {})}
        known = {"name": name, "title": name, "architecture": "vit_small_patch16_224", "arch_args": args}
        known |= {"width": args["embed_dim"], "depth": args["depth"], "token_px": token_px, "licence": "none"}
        known |= {"table_px": 4 * token_px, "input_px": 4 * token_px}
        return register_encoder(EncoderCard.model_validate(known | fields))

    return make


@pytest.fixture
def tiny(tiny_card: Callable[..., EncoderCard]) -> Callable[..., Encoder]:
    """A tiny encoder with random weights."""

    def make(*, seed: int = 0, options: dict[str, Any] | None = None, **fields: Any) -> Encoder:
        return create_encoder(tiny_card(**fields).name, random_seed=seed, **(options or {}))

    return make


@pytest.fixture
def normal() -> Callable[..., torch.Tensor]:
    """Reproducible normal numbers of a shape."""

    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return make
