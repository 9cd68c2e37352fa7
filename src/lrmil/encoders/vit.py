"""One wrapper over timm's VisionTransformer: the embedding of an image, and what any block said about it.

A tap is the raw output of a block: after its residual sum, before the trunk's final norm (METHOD of LRMIL, Eq. 1).
Tokens come back as a map, rows first: `tokens[l][b, v, u]` lies at image row v, column u.

Position table. The network is built with `dynamic_img_size`, so that its patch embedding gives (B, rows, columns, W)
and the table is resampled at run time by timm: bicubic, antialiased, class and register rows left out. That is what
CONCH does for sizes other than 448, too. `legacy_slice` takes the first rows of the table instead, as the released
LRMIL code does with a non-native size: the tokens then get positions of the table's top rows. It exists to load
weights that were trained so, and for nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import timm
import torch
from timm.layers import PatchEmbed, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lrmil.encoders.cards import Embedding, EncoderCard
from lrmil.encoders.conch import ContrastPool
from lrmil.encoders.settings import PositionEmbedding
from lrmil.encoders.transforms import normalise
from lrmil.errors import EncoderError, GridMismatch, UnknownEncoder


def build_trunk(card: EncoderCard, table_px: int | None = None, *, empty: bool = False) -> VisionTransformer:
    """Build the network of a card.

    Args:
        card: what to build.
        table_px: image side of the position table; default: the card's.
        empty: shapes without values, on the meta device, for weights that come from a file.

    Raises:
        UnknownEncoder: timm has no such model, or it is not a plain ViT.
        EncoderError: the card says something else than the network it builds.
    """
    if not timm.is_model(card.architecture):
        raise UnknownEncoder(f"{card.name}: timm {timm.__version__} has no model {card.architecture!r}.")
    args: dict[str, Any] = dict(card.arch_args)
    if args.get("mlp_layer") == "swiglu_packed":
        args["mlp_layer"] = SwiGLUPacked
    args |= {"img_size": table_px or card.table_px, "dynamic_img_size": True}
    if empty:
        args["weight_init"] = "skip"
    try:
        with torch.device("meta") if empty else nullcontext():
            trunk = timm.create_model(card.architecture, pretrained=False, num_classes=0, **args)
    except (TypeError, AssertionError) as error:
        raise UnknownEncoder(
            f"{card.name}: {card.architecture} cannot be built with a token grid of any size ({error}).",
            fix="Choose a plain vision transformer.",
        ) from error
    if not isinstance(trunk, VisionTransformer) or type(trunk.patch_embed) is not PatchEmbed:
        raise UnknownEncoder(
            f"{card.name}: {card.architecture} is not a plain vision transformer.",
            fix="LRMIL needs one token per square of the image: choose a timm model whose name begins with vit_.",
        )
    built = (trunk.embed_dim, len(trunk.blocks), trunk.patch_embed.patch_size)
    if built != (card.width, card.depth, (card.token_px, card.token_px)):
        raise EncoderError(
            f"{card.name}: {card.architecture} has width {built[0]}, {built[1]} blocks and tokens of {built[2]} px; "
            f"the card says {card.width}, {card.depth} and {card.token_px} px.",
            fix="Correct the card.",
        )
    return trunk


def build_pool(card: EncoderCard, embedding: Embedding, *, empty: bool = False) -> ContrastPool | None:
    """Build the attention pool where the embedding needs one."""
    if not embedding.startswith("attention_pool") or card.attention_pool_width is None:
        return None
    with torch.device("meta") if empty else nullcontext():
        return ContrastPool(card.width, card.attention_pool_width, card.attention_pool_heads)


@dataclass
class EncoderOutput:
    """What an encoder says about B images. W is the width of a token, G the tokens along one side."""

    embedding: torch.Tensor
    """(B, E); (B, 0) where it was not asked for"""
    cls: dict[int, torch.Tensor] = field(default_factory=dict)
    """layer: (B, W), class token after that block"""
    tokens: dict[int, torch.Tensor] = field(default_factory=dict)
    """layer: (B, G, G, W), patch tokens after that block, [image row, image column]"""


class Encoder(nn.Module):
    """An image encoder with taps. Made by `create_encoder` and `load_encoder`."""

    def __init__(
        self,
        card: EncoderCard,
        trunk: VisionTransformer,
        pool: ContrastPool | None = None,
        *,
        input_px: int,
        embedding: Embedding,
        position_embedding: PositionEmbedding = "resample",
        weights_source: str,
    ) -> None:
        super().__init__()
        self.card = card
        self.trunk = trunk
        self.pool = pool
        self.input_px = input_px
        self.token_grid_side = card.grid_side(input_px)
        self.embedding: Embedding = embedding
        self.embed_dim = card.embed_dim(embedding)
        self.position_embedding = position_embedding
        self.weights_source = weights_source
        std = torch.tensor(card.std).view(1, 3, 1, 1)
        self.register_buffer("_scale", 1.0 / (255.0 * std), persistent=False)
        self.register_buffer("_shift", -torch.tensor(card.mean).view(1, 3, 1, 1) / std, persistent=False)
        self._check_choices()

    @property
    def trunk_width(self) -> int:
        """W, width of a token."""
        return self.card.width

    @property
    def depth(self) -> int:
        """Number of blocks; layers are counted from 0."""
        return self.card.depth

    @property
    def table_px(self) -> int:
        """Image side that the position table is made for."""
        return int(self.trunk.patch_embed.img_size[0])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.trunk.patch_embed.proj.weight.device

    @property
    def weights_sha256(self) -> str:
        """SHA-256 over names, shapes and float32 values of the weights as they are now; training changes it.

        It does not depend on the file that they came from. Computed at about a gigabyte a second, and kept until a
        weight is written to: see `_marks`.
        """
        state = self.state_dict()
        marks = _marks(state)
        known = _HASHES.get(self)
        if known is None or known[0] != marks:
            known = _HASHES[self] = marks, hash_tensors(state)
        return known[1]

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Turn uint8 RGB (B, P, P, 3) into the (B, 3, input_px, input_px) float32 that `forward` reads.

        Patches that have another side than `input_px` are resampled.
        """
        return normalise(images, self._scale, self._shift, self.input_px)  # type: ignore[arg-type]

    def forward(
        self,
        images: torch.Tensor,
        *,
        cls_layers: Iterable[int] = (),
        token_layers: Iterable[int] = (),
        with_embedding: bool = True,
    ) -> EncoderOutput:
        """Encode normalised images. Differentiable.

        Args:
            images: (B, 3, P, P) from `normalise`; any P that is a multiple of the token.
            cls_layers: blocks, counted from 0, whose class token is wanted.
            token_layers: blocks whose patch tokens are wanted.
            with_embedding: False leaves the embedding out, and with it the blocks above the last one asked for.

        Raises:
            GridMismatch: P is no multiple of the token, or the image is not square.
            EncoderError: no such layer; a class token asked of a network that has none.
        """
        cls_layers, token_layers = frozenset(cls_layers), frozenset(token_layers)
        self._check_request(images, cls_layers, token_layers)
        last = self.depth - 1 if with_embedding else max(cls_layers | token_layers, default=-1)
        out = EncoderOutput(embedding=images.new_empty(len(images), 0))
        if last < 0:
            return out
        trunk = self.trunk
        x = trunk.patch_embed(images)
        side = x.shape[1]
        x = trunk.norm_pre(trunk.patch_drop(self._add_positions(x)))
        recompute = trunk.grad_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(trunk.blocks[: last + 1]):
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if layer in cls_layers:
                out.cls[layer] = x[:, 0]
            if layer in token_layers:
                out.tokens[layer] = x[:, trunk.num_prefix_tokens :].reshape(len(x), side, side, -1)
        if with_embedding:
            out.embedding = self._embed(x)
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their inner results: less memory, a third slower."""
        self.trunk.set_grad_checkpointing(enable)

    def describe(self) -> dict[str, Any]:
        """What produced the features, JSON-able. Equal for equal weights and settings, wherever the file lay."""
        return {
            "name": self.card.name,
            "architecture": self.card.architecture,
            "width": self.trunk_width,
            "depth": self.depth,
            "token_px": self.card.token_px,
            "input_px": self.input_px,
            "token_grid_side": self.token_grid_side,
            "position_embedding": self.position_embedding,
            "embedding": self.embedding,
            "embed_dim": self.embed_dim,
            "mean": list(self.card.mean),
            "std": list(self.card.std),
            "native_mpp": list(self.card.native_mpp),
            "weights_sha256": self.weights_sha256,
            "licence": self.card.licence,
            "gated": self.card.gated,
            "share_derivatives": self.card.share_derivatives,
        }

    def _add_positions(self, x: torch.Tensor) -> torch.Tensor:
        """(B, rows, columns, W) patch embeddings to the (B, prefix + rows * columns, W) sequence."""
        if self.position_embedding == "resample":
            return self.trunk._pos_embed(x)
        cls_token, table = self.trunk.cls_token, self.trunk.pos_embed
        assert cls_token is not None  # see _check_choices
        assert table is not None
        tokens = torch.cat([cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
        if tokens.shape[1] > table.shape[1]:
            raise GridMismatch(
                f"{self.card.name}: legacy_slice needs {tokens.shape[1]} rows of a position table of {table.shape[1]}.",
                fix="Use position_embedding=resample.",
            )
        return tokens + table[:, : tokens.shape[1]]

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        trunk = self.trunk
        if self.pool is not None:
            return self.pool(trunk.norm(x), project=self.embedding == "attention_pool_projected")
        parts = []
        if self.embedding in ("cls", "cls+token_mean"):
            # The norm works token by token: that of one row is the row of the norm.
            parts.append(trunk.fc_norm(trunk.norm(x[:, 0])))
        if self.embedding in ("token_mean", "cls+token_mean"):
            parts.append(trunk.fc_norm(trunk.norm(x[:, trunk.num_prefix_tokens :]).mean(dim=1)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _check_choices(self) -> None:
        trunk, name = self.trunk, self.card.name
        if self.embedding in ("cls", "cls+token_mean") and not trunk.has_class_token:
            raise EncoderError(f"{name}: it has no class token.", fix="Use embedding=token_mean.")
        if self.embedding.startswith("attention_pool") != (self.pool is not None):
            raise EncoderError(f"{name}: the attention pool and embedding={self.embedding} do not go together.")
        if self.position_embedding == "legacy_slice" and (
            trunk.pos_embed is None or trunk.no_embed_class or trunk.num_prefix_tokens != 1
        ):
            raise EncoderError(
                f"{name}: position_embedding=legacy_slice is for networks like CONCH, with a class token in the table "
                "and no registers.",
                fix="Use position_embedding=resample.",
            )

    def _check_request(self, images: torch.Tensor, cls_layers: frozenset[int], token_layers: frozenset[int]) -> None:
        name = self.card.name
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise EncoderError(
                f"{name}: images have shape {tuple(images.shape)} and type {images.dtype}.",
                fix="Give floats of shape (B, 3, P, P), as `normalise` returns them.",
            )
        if images.shape[2] != images.shape[3]:
            raise GridMismatch(f"{name}: images are {images.shape[3]} x {images.shape[2]} px.", fix="Give square ones.")
        self.card.grid_side(images.shape[2])
        wrong = sorted(layer for layer in cls_layers | token_layers if not 0 <= layer < self.depth)
        if wrong:
            raise EncoderError(
                f"{name}: there is no layer {wrong[0]}.",
                fix=f"Its {self.depth} blocks count from 0 to {self.depth - 1}.",
            )
        if cls_layers and not self.trunk.has_class_token:
            raise EncoderError(f"{name}: it has no class token to tap.", fix="Choose an encoder that has one.")


_HASHES: WeakKeyDictionary[Encoder, tuple[bytes, str]] = WeakKeyDictionary()
"""Marks and hash of the weights of each encoder; not in the encoder, since its copies are encoders of their own"""
_SAMPLES = 512


def _marks(state: Mapping[str, torch.Tensor]) -> bytes:
    """Return what is another after any write to weights: their places and versions, and some values of each.

    PyTorch counts writes as versions, but not those of fused optimisers. These write to whole tensors, so that evenly
    spread values of every tensor tell.
    """
    places = [
        (key, tuple(value.shape), str(value.dtype), value.data_ptr(), 0 if value.is_inference() else value._version)
        for key, value in state.items()
    ]
    values = [v.detach().reshape(-1)[:: max(1, v.numel() // _SAMPLES)].float() for v in state.values()]
    return repr(places).encode() + torch.cat(values).cpu().numpy().tobytes()


def hash_tensors(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, in hex, over names, shapes and float32 values, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()
