"""Which encoder a run uses, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lrmil.encoders.cards import Embedding
from lrmil.settings import Settings

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PositionEmbedding = Literal["resample", "legacy_slice"]


class EncoderSettings(Settings):
    """The encoder of a run. `create_encoder` takes the same words."""

    name: str = Field(
        "lrmil-small", description="card (`lrmil encoders` lists them), timm ViT, or folder of a saved encoder"
    )
    weights: str | None = Field(None, description="local weight file; null: environment variable, package or hub")
    embedding: Embedding | None = Field(None, description="output that stands for a patch; null: the card's")
    position_embedding: PositionEmbedding = Field(
        "resample",
        description="resample: the table is interpolated to the token grid; "
        "legacy_slice: its first rows are taken, as the authors' released LRMIL weights need it",
    )
    random_seed: int | None = Field(None, ge=0, description="random weights from this seed instead of trained ones")
    precision: Precision = Field("auto", description="auto: 16 bit on a GPU, and on a CPU with bfloat16 instructions")
    batch_size: int | None = Field(None, ge=1, description="images at once; null: 4 to 16 on a CPU, 64 on a GPU")

    @model_validator(mode="after")
    def _check(self) -> EncoderSettings:
        if self.weights is not None and self.random_seed is not None:
            raise ValueError("weights and random_seed exclude each other")
        return self


class ShapedEncoderSettings(Settings):
    """A ViT to begin a training with: trained weights, fewer blocks of them, or random ones of any shape."""

    name: str = Field(..., description="card (`lrmil encoders` lists them), timm ViT, or folder of a saved encoder")
    weights: str | None = Field(None, description="local weight file; null: environment variable, package or hub")
    random_seed: int | None = Field(None, ge=0, description="random weights from this seed instead of trained ones")
    depth: int | None = Field(
        None, ge=1, description="number of blocks; of trained ones those are kept that lie evenly, first and last too"
    )
    width: int | None = Field(None, ge=1, description="width of a token; only with random_seed")
    heads: int | None = Field(None, ge=1, description="attention heads, a divisor of width; only with random_seed")
    token_px: int | None = Field(None, ge=1, description="side of a token in pixels; only with random_seed")
    input_px: int | None = Field(None, ge=1, description="side that patches are resampled to; null: as they are")
    embedding: Embedding | None = Field(
        None, description="output that stands for a patch; null: token_mean, since stage 1 teaches tokens, not the CLS"
    )

    @model_validator(mode="after")
    def _check(self) -> ShapedEncoderSettings:
        if self.weights is not None and self.random_seed is not None:
            raise ValueError("weights and random_seed exclude each other")
        given = [name for name in ("width", "heads", "token_px") if getattr(self, name) is not None]
        if given and self.random_seed is None:
            raise ValueError(f"trained weights have their own {given[0]}: leave it out, or give a random_seed")
        return self
