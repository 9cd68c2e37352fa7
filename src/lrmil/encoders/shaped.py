"""Encoders of another shape than their card: fewer blocks of trained weights, or random weights of any size.

A student of stage 1 may begin so. Keeping every n-th block is how Sanh et al., DistilBERT, 2019, begin theirs.
"""

from __future__ import annotations

from typing import Any

from lrmil.encoders.cards import EncoderCard
from lrmil.encoders.factory import create_encoder, encoder_of_card, resolve_card
from lrmil.encoders.settings import ShapedEncoderSettings
from lrmil.encoders.vit import Encoder, build_pool, build_trunk
from lrmil.errors import EncoderError


def shaped_encoder(settings: ShapedEncoderSettings, input_px: int) -> Encoder:
    """Build the encoder of a config, in eval mode, float32, on the CPU.

    Args:
        settings: see there. Its embedding defaults to the mean of the patch tokens.
        input_px: side of the images, unless `settings` name another.

    Raises:
        EncoderError: the shape is impossible, or more blocks are asked for than there are.
        And what `create_encoder` raises.
    """
    embedding, input_px = settings.embedding or "token_mean", settings.input_px or input_px
    if settings.random_seed is not None:
        card = reshaped_card(resolve_card(settings.name), settings, input_px)
        return encoder_of_card(card, input_px=input_px, embedding=embedding, random_seed=settings.random_seed)
    encoder = create_encoder(settings.name, input_px=input_px, weights=settings.weights, embedding=embedding)
    return encoder if settings.depth is None else with_fewer_blocks(encoder, settings.depth)


def reshaped_card(card: EncoderCard, settings: ShapedEncoderSettings, input_px: int) -> EncoderCard:
    """Return the card of a network of random weights with another width, depth, number of heads or token.

    Raises:
        EncoderError: heads do not divide the width.
    """
    width, token_px = settings.width or card.width, settings.token_px or card.token_px
    card.model_copy(update={"token_px": token_px}).grid_side(input_px)
    shape: dict[str, Any] = {"embed_dim": settings.width, "depth": settings.depth, "num_heads": settings.heads}
    shape |= {"patch_size": settings.token_px}
    changes = {name: value for name, value in shape.items() if value is not None}
    attention: Any = build_trunk(card, empty=True).blocks[0].attn
    heads: int = settings.heads or attention.num_heads
    if width % heads:
        raise EncoderError(
            f"{card.name}: a width of {width} cannot be shared by {heads} attention heads.",
            fix="Choose a number of heads that divides it.",
        )
    return card.model_copy(
        update={
            "name": _named(card, width=settings.width, depth=settings.depth, token_px=settings.token_px),
            "arch_args": card.arch_args | changes,
            "width": width,
            "depth": settings.depth or card.depth,
            "token_px": token_px,
            "table_px": input_px,
            "input_px": input_px,
            # What the weights of that name may be used for does not matter to others.
            "licence": "none, its weights began at random",
            "gated": False,
            "share_derivatives": True,
            "source": None,
            "package_file": None,
            "package_sha256": None,
            "citation": "",
        }
    )


def with_fewer_blocks(encoder: Encoder, depth: int) -> Encoder:
    """Return a new encoder of `depth` of another's blocks, the first and the last among them; all else is copied.

    Raises:
        EncoderError: it has fewer blocks than that.
    """
    card = encoder.card
    if depth > encoder.depth:
        raise EncoderError(
            f"{card.name}: it has {encoder.depth} blocks, so {depth} cannot be kept.", fix="Ask for fewer."
        )
    smaller = card.model_copy(
        update={"name": _named(card, depth=depth), "depth": depth, "arch_args": card.arch_args | {"depth": depth}}
    )
    kept = [matching_block(block, depth, encoder.depth) for block in range(depth)]
    trunk = build_trunk(smaller, encoder.table_px)
    pool = build_pool(smaller, encoder.embedding)
    state = encoder.trunk.state_dict()
    own = {}
    for key in trunk.state_dict():
        room, _, rest = key.partition("blocks.")
        if rest:
            block, _, name = rest.partition(".")
            own[key] = state[f"{room}blocks.{kept[int(block)]}.{name}"]
        else:
            own[key] = state[key]
    trunk.load_state_dict(own)
    if pool is not None and encoder.pool is not None:
        pool.load_state_dict(encoder.pool.state_dict())
    return Encoder(
        smaller,
        trunk,
        pool,
        input_px=encoder.input_px,
        embedding=encoder.embedding,
        position_embedding=encoder.position_embedding,
        weights_source=f"{encoder.weights_source}, blocks {', '.join(map(str, kept))}",
    ).eval()


def matching_block(block: int, depth: int, of_depth: int) -> int:
    """Return the block of a network of `of_depth` blocks at the relative depth of `block` in one of `depth`.

    The first goes to the first and the last to the last; halves are rounded up. One block alone counts as the last.
    """
    if depth == 1:
        return of_depth - 1
    return (2 * block * (of_depth - 1) + depth - 1) // (2 * (depth - 1))


def _named(card: EncoderCard, **shape: int | None) -> str:
    """Name it after its card and what is different."""
    parts = [f"{name[0]}{value}" for name, value in shape.items() if value is not None]
    return "-".join([card.name, *parts])
