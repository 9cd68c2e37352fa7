"""An encoder as a folder, encoder.safetensors and encoder.json, that loads without hub and registry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import timm
import torch
from pydantic import Field, ValidationError

from lrmil._version import __version__
from lrmil.encoders.cards import Embedding, EncoderCard
from lrmil.encoders.settings import PositionEmbedding
from lrmil.encoders.vit import Encoder, build_pool, build_trunk, hash_tensors
from lrmil.encoders.weights import fill, read_state_dict
from lrmil.errors import BundleAltered, BundleError, ConfigError
from lrmil.files import read_json, sha256, write_json, write_tensors
from lrmil.settings import Settings

WEIGHTS_FILE = "encoder.safetensors"
RECORD_FILE = "encoder.json"
StoredDtype = Literal["float32", "float16"]


class EncoderRecord(Settings):
    """What encoder.json holds."""

    format: Literal["lrmil-encoder/1"] = Field("lrmil-encoder/1", description="format of this folder")
    card: EncoderCard = Field(description="how the network is built, and whose it is")
    table_px: int = Field(gt=0, description="image side of its position table")
    input_px: int = Field(gt=0, description="side of the images that it reads")
    embedding: Embedding = Field(description="output that stands for an image")
    position_embedding: PositionEmbedding = Field(description="how positions are fitted to a token grid")
    weights_source: str = Field(description="where the weights came from")
    weights_sha256: str = Field(description="checksum of the stored values, see `Encoder.weights_sha256`")
    file_sha256: str = Field(description="checksum of the weight file")
    dtype: StoredDtype = Field(description="type that the weights are stored in")
    versions: dict[str, str] = Field(description="software that wrote it")


def save_encoder(encoder: Encoder, folder: str | os.PathLike[str], *, dtype: StoredDtype = "float32") -> Path:
    """Write an encoder to a folder, whole or not at all, and return the folder.

    Args:
        encoder: on any device; it is not changed.
        folder: made where missing; an encoder in it is replaced.
        dtype: float32 keeps every bit; float16 halves the file and rounds the weights once.

    Raises:
        ConfigError: another dtype.
        OutputError: the folder cannot be written.
    """
    if dtype not in get_args(StoredDtype):
        raise ConfigError(f"an encoder cannot be stored as {dtype!r}.", fix="Choose float32 or float16.")
    folder = Path(folder)
    kind = torch.float32 if dtype == "float32" else torch.float16
    state = {key: value.detach().to("cpu", kind).contiguous() for key, value in encoder.state_dict().items()}
    # The record goes first: a folder is an encoder only while it has one, and a crash in between leaves none.
    (folder / RECORD_FILE).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS_FILE, state)
    record = EncoderRecord(
        card=encoder.card,
        table_px=encoder.table_px,
        input_px=encoder.input_px,
        embedding=encoder.embedding,
        position_embedding=encoder.position_embedding,
        weights_source=encoder.weights_source,
        weights_sha256=encoder.weights_sha256 if dtype == "float32" else hash_tensors(state),
        file_sha256=sha256(folder / WEIGHTS_FILE),
        dtype=dtype,
        versions={"lrmil": __version__, "torch": torch.__version__, "timm": timm.__version__},
    )
    write_json(folder / RECORD_FILE, record.model_dump(mode="json"))
    return folder


def is_saved_encoder(folder: str | os.PathLike[str]) -> bool:
    """Whether `save_encoder` finished writing there."""
    return (Path(folder) / RECORD_FILE).is_file()


def load_encoder(folder: str | os.PathLike[str], *, input_px: int | None = None) -> Encoder:
    """Load what `save_encoder` wrote: in eval mode, float32, on the CPU. Asks no server.

    Args:
        folder: with encoder.json and encoder.safetensors.
        input_px: another side of the images than the saved one.

    Raises:
        BundleError: a file is missing or unreadable.
        BundleAltered: the weights are not the ones that were written.
        GridMismatch: `input_px` is no multiple of the token.
    """
    folder = Path(folder)
    try:
        record = EncoderRecord.model_validate(read_json(folder / RECORD_FILE))
    except FileNotFoundError as error:
        raise BundleError(f"{folder}: there is no {RECORD_FILE}.", fix="Give the folder of a saved encoder.") from error
    except (ValidationError, ValueError) as error:
        raise BundleError(f"{folder / RECORD_FILE}: {error}", fix="Copy the folder again.") from error
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise BundleError(f"{folder}: there is no {WEIGHTS_FILE}.", fix="Copy the folder again.")
    if sha256(weights) != record.file_sha256:
        raise BundleAltered(
            f"{weights}: this is not the file that {RECORD_FILE} was written for.", fix="Copy it again."
        )

    trunk = build_trunk(record.card, record.table_px, empty=True)
    pool = build_pool(record.card, record.embedding, empty=True)
    state = read_state_dict(weights)
    for prefix, part in (("trunk.", trunk), ("pool.", pool)):
        if part is not None:
            entries = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            fill(part, entries, name=record.card.name, origin=str(weights))
    encoder = Encoder(
        record.card,
        trunk,
        pool,
        input_px=input_px or record.input_px,
        embedding=record.embedding,
        position_embedding=record.position_embedding,
        weights_source=record.weights_source,
    )
    return encoder.eval()
