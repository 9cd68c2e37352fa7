"""`create_encoder`: from a name to a network with weights in it."""

from __future__ import annotations

import difflib
import math
import os
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from lrmil.encoders.cards import Embedding, EncoderCard, find_card, known_names
from lrmil.encoders.conch import ContrastPool
from lrmil.encoders.layouts import StateDict, split_checkpoint, to_timm
from lrmil.encoders.settings import EncoderSettings, PositionEmbedding
from lrmil.encoders.store import is_saved_encoder, load_encoder
from lrmil.encoders.vit import Encoder, build_pool, build_trunk
from lrmil.encoders.weights import PICKLED, fill, load_weights
from lrmil.errors import CheckpointError, ConfigError, UnknownEncoder

_FREE = {"apache-2.0", "mit", "bsd-3-clause"}


def create_encoder(
    name_or_path: str | os.PathLike[str],
    *,
    input_px: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    embedding: Embedding | None = None,
    random_seed: int | None = None,
    position_embedding: PositionEmbedding = "resample",
) -> Encoder:
    """Build an encoder, in eval mode, float32, on the CPU.

    Args:
        name_or_path: a card; a timm ViT, with or without `timm:` before it; or a folder that `save_encoder` wrote.
        input_px: side of the images; a multiple of the token. Default: the card's.
        weights: weight file (.safetensors, or a pickled state dict) of the named encoder, or the folder that holds it.
            Default: the environment variable of the card, the package, or the Hugging Face hub.
        embedding: output that stands for an image. Default: the card's.
        random_seed: random instead of trained weights, equal for equal seeds.
        position_embedding: see `lrmil.encoders.vit`.

    Raises:
        UnknownEncoder: no card, timm model or folder has that name.
        WeightsUnavailable: gated, offline, or no such file.
        CheckpointError: the file is damaged, unsafe, or belongs to another encoder.
        GridMismatch: `input_px` is no multiple of the token.
        EncoderError: the encoder has no such output.
        ConfigError: options that exclude each other.
    """
    if weights is not None and random_seed is not None:
        raise ConfigError("weights and random_seed exclude each other.", fix="Give one of them.")
    if is_saved_encoder(name_or_path):
        return _saved(name_or_path, input_px, embedding, position_embedding, weights is None and random_seed is None)

    return encoder_of_card(
        resolve_card(name_or_path),
        input_px=input_px,
        weights=weights,
        embedding=embedding,
        random_seed=random_seed,
        position_embedding=position_embedding,
    )


def encoder_of_card(
    card: EncoderCard,
    *,
    input_px: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    embedding: Embedding | None = None,
    random_seed: int | None = None,
    position_embedding: PositionEmbedding = "resample",
) -> Encoder:
    """Build the encoder of a card, registered or not; the rest is as in `create_encoder`."""
    embedding = embedding or card.embedding
    card.embed_dim(embedding)
    input_px = card.input_px if input_px is None else input_px
    card.grid_side(input_px)
    if random_seed is not None:
        trunk, pool, source = *_random(card, embedding, random_seed), f"random, seed {random_seed}"
    else:
        state, source = load_weights(card, weights)
        trunk, pool = _trained(card, embedding, state, source)
    encoder = Encoder(
        card,
        trunk,
        pool,
        input_px=input_px,
        embedding=embedding,
        position_embedding=position_embedding,
        weights_source=source,
    )
    return encoder.eval()


def encoder_from_settings(settings: EncoderSettings, input_px: int | None = None) -> Encoder:
    """`create_encoder` with the words of a config."""
    return create_encoder(
        settings.name,
        input_px=input_px,
        weights=settings.weights,
        embedding=settings.embedding,
        random_seed=settings.random_seed,
        position_embedding=settings.position_embedding,
    )


def resolve_card(name: str | os.PathLike[str]) -> EncoderCard:
    """Return the card of a registered encoder, or make one for a timm ViT.

    Raises:
        UnknownEncoder: neither; near names are suggested.
    """
    text = os.fspath(name)
    card = find_card(text)
    if card is not None:
        return card
    model = text.removeprefix("timm:")
    if timm.is_model(model):
        return _timm_card(model)
    if Path(text).exists() or Path(text).suffix in (".safetensors", *PICKLED):
        raise UnknownEncoder(
            f"{text}: a weight file does not say which encoder it belongs to.",
            fix="Name the encoder and give the file as its `weights`.",
        )
    vits = timm.list_models("vit_*")
    near = difflib.get_close_matches(text.lower(), known_names(), n=3, cutoff=0.5)
    near += difflib.get_close_matches(model.split(".")[0], vits, n=3, cutoff=0.7)
    raise UnknownEncoder(
        f"there is no encoder {text!r}.",
        fix=f"Did you mean {' or '.join(near)}?"
        if near
        else "`lrmil encoders` lists them; timm ViTs are known as well.",
    )


def _timm_card(model: str) -> EncoderCard:
    """A card for a ViT of timm, from what timm knows about it."""
    architecture = model.split(".")[0]
    config = timm.get_pretrained_cfg(model)
    if not timm.models.is_model_in_modules(architecture, ["vision_transformer", "deit"]):
        raise UnknownEncoder(
            f"{model} is not a plain vision transformer.", fix="Choose a timm model whose name begins with vit_."
        )
    with torch.device("meta"):
        trunk = timm.create_model(architecture, pretrained=False, num_classes=0)
    assert isinstance(trunk, VisionTransformer)
    token_px, table_px = trunk.patch_embed.patch_size[0], trunk.patch_embed.img_size[0]
    fields = {
        "name": model,
        "title": model,
        "architecture": architecture,
        "width": trunk.embed_dim,
        "depth": len(trunk.blocks),
        "token_px": token_px,
        "table_px": table_px,
        "input_px": table_px,
        "embedding": "cls" if trunk.has_class_token else "token_mean",
        "licence": (config and config.license) or "not stated by timm",
    }
    if config is not None:
        fields |= {"mean": config.mean, "std": config.std, "source": config.hf_hub_id or None}
        fields |= {"share_derivatives": True if config.license in _FREE else None}
        if config.hf_hub_filename:
            fields["files"] = (config.hf_hub_filename,)
    return EncoderCard.model_validate(fields)


def _random(card: EncoderCard, embedding: Embedding, seed: int) -> tuple[VisionTransformer, ContrastPool | None]:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        trunk, pool = build_trunk(card), build_pool(card, embedding)
    # LayerScale begins training at 1e-5, where a block does next to nothing and all images get one class token.
    with torch.no_grad():
        for name, value in trunk.named_parameters():
            if name.endswith(("ls1.gamma", "ls2.gamma")):
                value.fill_(1.0)
    return trunk, pool


def _trained(
    card: EncoderCard, embedding: Embedding, state: StateDict, origin: str
) -> tuple[VisionTransformer, ContrastPool | None]:
    trunk_state, pool_state = split_checkpoint(state, origin=f"{card.name}: {origin}")
    trunk, pool = build_trunk(card, empty=True), build_pool(card, embedding, empty=True)
    trunk_state = to_timm(trunk_state, no_embed_class=trunk.no_embed_class)
    # The table is taken as it is and resampled when images come, whatever side it was trained for.
    if "pos_embed" in trunk_state and trunk.pos_embed is not None:
        rows = trunk_state["pos_embed"].shape[1] - (0 if trunk.no_embed_class else trunk.num_prefix_tokens)
        side = math.isqrt(max(rows, 0))
        if side * side == rows and rows and side * card.token_px != card.table_px:
            trunk = build_trunk(card, side * card.token_px, empty=True)
    fill(trunk, trunk_state, name=card.name, origin=origin)
    if pool is not None:
        if not pool_state:
            raise CheckpointError(
                f"{card.name}: {origin} holds no attention pool.", fix="Use embedding=cls, or the complete checkpoint."
            )
        fill(pool, pool_state, name=f"the attention pool of {card.name}", origin=origin)
    return trunk, pool


def _saved(
    folder: str | os.PathLike[str],
    input_px: int | None,
    embedding: Embedding | None,
    position_embedding: PositionEmbedding,
    complete: bool,
) -> Encoder:
    encoder = load_encoder(folder, input_px=input_px)
    same = embedding in (None, encoder.embedding) and position_embedding in ("resample", encoder.position_embedding)
    if not (complete and same):
        raise ConfigError(
            f"{folder}: a saved encoder has its own weights, its embedding ({encoder.embedding}) and its "
            f"position_embedding ({encoder.position_embedding}).",
            fix="Leave these options out.",
        )
    return encoder
