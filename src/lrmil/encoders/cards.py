"""Cards: what is known about an encoder before any weight is read. Frozen, and checked when they are registered.

A card says how the network is built, what it wants to see, where its weights come from, and what may be done with
them. The registry holds the cards of `catalogue.py` and of `packaged.py`; users add theirs with `register_encoder`.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lrmil.errors import EncoderError, GridMismatch
from lrmil.settings import Settings

Embedding = Literal["cls", "token_mean", "cls+token_mean", "attention_pool", "attention_pool_projected"]
"""What one image is turned into.

`cls`: class token after the final norm. `token_mean`: mean of the patch tokens after it (no class, no register
tokens). `cls+token_mean`: both, concatenated. `attention_pool`: CONCH's contrast pool with its norm, as used for bags.
`attention_pool_projected`: that, projected and of length 1, as compared with text.
"""

Rgb = tuple[float, float, float]
IMAGENET_MEAN: Rgb = (0.485, 0.456, 0.406)
IMAGENET_STD: Rgb = (0.229, 0.224, 0.225)


class EncoderCard(Settings):
    """One encoder. Everything a listing shows, and everything needed to build it without asking any server."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="name in configs and folder names")
    title: str = Field(description="name as its authors write it")
    aliases: tuple[str, ...] = Field((), description="further names that are understood")

    architecture: str = Field(description="timm model that the network is built from")
    arch_args: dict[str, int | float | bool | str] = Field(
        default_factory=dict, description="arguments that differ from that model's own"
    )
    width: int = Field(gt=0, description="width of a token")
    depth: int = Field(gt=0, description="number of blocks")
    token_px: int = Field(gt=0, description="side of a patch token, in pixels of the input")
    table_px: int = Field(gt=0, description="image side that the position table was trained for")
    input_px: int = Field(gt=0, description="image side used unless another is asked for")
    embedding: Embedding = Field("cls", description="output that stands for an image, unless another is asked for")
    attention_pool_width: int | None = Field(None, description="width of the attention pool, where there is one")
    attention_pool_heads: int = Field(8, gt=0, description="its heads")

    mean: Rgb = Field(IMAGENET_MEAN, description="mean that is subtracted, of RGB in 0..1")
    std: Rgb = Field(IMAGENET_STD, description="deviation that is divided by")
    native_mpp: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="um per pixel of the training images; empty for photographs"
    )
    gpu_precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float16", description="precision that `auto` chooses on a GPU"
    )

    licence: str = Field(min_length=1, description="licence of the weights")
    gated: bool = Field(False, description="the hub asks for an account that was granted access")
    share_derivatives: bool | None = Field(
        None,
        description="whether a distilled or fine-tuned version may be passed on; null: not known, read the licence",
    )
    source: str | None = Field(None, description="repository on the Hugging Face hub, owner/name")
    files: tuple[str, ...] = Field(
        ("model.safetensors", "pytorch_model.bin"), description="weight files there, first choice first"
    )
    package_file: str | None = Field(None, description="weight file that this package ships, relative to the room")
    package_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="checksum of that file")
    ckpt_variable: str = Field("", description="environment variable that may name a local weight file")
    citation: str = Field("", description="what to cite")

    @model_validator(mode="before")
    @classmethod
    def _name_variable(cls, values: object) -> object:
        if isinstance(values, dict) and not values.get("ckpt_variable"):
            stem = re.sub(r"[^A-Z0-9]+", "_", str(values.get("name", "")).upper()).strip("_")
            return {**values, "ckpt_variable": f"{stem}_CKPT_PATH"}
        return values

    @model_validator(mode="after")
    def _check(self) -> EncoderCard:
        for field in ("table_px", "input_px"):
            if getattr(self, field) % self.token_px:
                raise ValueError(f"{field}={getattr(self, field)} is not a multiple of token_px={self.token_px}")
        if not all(0 <= m <= 1 for m in self.mean) or not all(0 < s <= 1 for s in self.std):
            raise ValueError("mean and std are those of RGB values in 0..1")
        if self.embedding.startswith("attention_pool") and self.attention_pool_width is None:
            raise ValueError(f"embedding={self.embedding} needs attention_pool_width")
        if self.gated and self.source is None:
            raise ValueError("a gated encoder needs its source")
        if self.source is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.source):
            raise ValueError(f"source={self.source!r} is not owner/name")
        return self

    @property
    def embeddings(self) -> tuple[Embedding, ...]:
        """Outputs to choose from (those with `cls` only where the network has a class token)."""
        plain: tuple[Embedding, ...] = ("cls", "token_mean", "cls+token_mean")
        pooled: tuple[Embedding, ...] = ("attention_pool", "attention_pool_projected")
        return plain + pooled if self.attention_pool_width else plain

    def embed_dim(self, embedding: Embedding | None = None) -> int:
        """Width E of an embedding.

        Raises:
            EncoderError: this encoder has no such output.
        """
        embedding = embedding or self.embedding
        if embedding not in self.embeddings:
            raise EncoderError(
                f"{self.name}: there is no embedding {embedding!r}.", fix=f"Choose one of {', '.join(self.embeddings)}."
            )
        if embedding.startswith("attention_pool"):
            return self.attention_pool_width or 0
        return self.width * (2 if embedding == "cls+token_mean" else 1)

    def grid_side(self, input_px: int | None = None) -> int:
        """Patch tokens along one side of an image of `input_px` (default: the card's).

        Raises:
            GridMismatch: the side is no multiple of a token.
        """
        side_px = self.input_px if input_px is None else input_px
        if side_px < self.token_px or side_px % self.token_px:
            near = max(1, round(side_px / self.token_px)) * self.token_px
            raise GridMismatch(
                f"{self.name}: an image of {side_px} px cannot be cut into tokens of {self.token_px} px.",
                fix=f"Use a multiple of {self.token_px}, such as {near}.",
            )
        return side_px // self.token_px


_CARDS: dict[str, EncoderCard] = {}
_NAMES: dict[str, str] = {}


def register_encoder(card: EncoderCard) -> EncoderCard:
    """Add a card to the registry and return it. Registering an equal card again does nothing.

    Raises:
        EncoderError: its name or an alias of it belongs to another card.
    """
    for name in (card.name, *card.aliases):
        owner = _NAMES.get(_key(name))
        if owner is not None and _CARDS[owner] != card:
            raise EncoderError(
                f"the encoder name {name!r} belongs to the card {owner!r} already.", fix="Choose another name."
            )
    _CARDS[card.name] = card
    _NAMES.update({_key(name): card.name for name in (card.name, *card.aliases)})
    return card


def encoder_cards() -> tuple[EncoderCard, ...]:
    """All registered cards, in the order of registration."""
    return tuple(_CARDS.values())


def find_card(name: str) -> EncoderCard | None:
    """Return the card of that name or alias (case and `_` / `-` do not matter), or None."""
    found = _NAMES.get(_key(name))
    return _CARDS[found] if found else None


def known_names() -> list[str]:
    """All names and aliases, for suggestions."""
    return sorted({name for card in _CARDS.values() for name in (card.name, *card.aliases)})


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "-")
