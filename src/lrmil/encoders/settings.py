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
