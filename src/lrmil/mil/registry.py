"""The heads by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from lrmil.errors import HeadError
from lrmil.mil.base import Head
from lrmil.mil.card import HeadCard
from lrmil.settings import Settings


class HeadSettings(Settings):
    """Which head, and its options."""

    name: str = Field("abmil", description="name of a MIL head")
    options: dict[str, Any] = Field(default_factory=dict, description="options of that head, such as gated: true")


HeadClass = TypeVar("HeadClass", bound=type[Head])
_HEADS: dict[str, tuple[HeadCard, type[Head]]] = {}
_TORCHMIL = "torchmil:"


def register_head(card: HeadCard) -> Callable[[HeadClass], HeadClass]:
    """Decorate a subclass of `MILHead` or `MultiScaleHead` to enter it under `card.name`. A name is given once."""

    def enter(head_class: HeadClass) -> HeadClass:
        if card.name in _HEADS:
            raise HeadError(f"two heads are named {card.name!r}.", fix="Choose another name.")
        _HEADS[card.name] = (card, head_class)
        return head_class

    return enter


def head_cards() -> tuple[HeadCard, ...]:
    """Return the cards of all heads, by name."""
    return tuple(_HEADS[name][0] for name in sorted(_HEADS))


def head_card(name: str) -> HeadCard:
    """Return the card of one head; of a `torchmil:` one too, which `head_cards` does not list.

    Raises:
        HeadError: no such head.
    """
    if name.startswith(_TORCHMIL):
        from lrmil.mil import torchmil_heads  # heavy, and optional

        return torchmil_heads.card(name)
    if name not in _HEADS:
        raise _unknown(name)
    return _HEADS[name][0]


def create_head(name: str, in_dim: int, num_classes: int, **options: Any) -> Any:
    """Build a head with freshly drawn weights (torch's global generator), float32, on the CPU, in training mode.

    Args:
        name: see `head_cards()`; or `torchmil:` and the name of a model class of torchmil, where that is installed.
        in_dim: width D of the instances.
        num_classes: number of logits.
        **options: the head's own; its `Options` class lists them.

    Returns:
        A `MILHead`; a `MultiScaleHead` where `HeadCard.scales` is "many".

    Raises:
        HeadError: no such head, or no such option.
    """
    if name.startswith(_TORCHMIL):
        from lrmil.mil import torchmil_heads  # heavy, and optional

        return torchmil_heads.create(name, in_dim, num_classes, **options)
    if name not in _HEADS:
        raise _unknown(name)
    card, head_class = _HEADS[name]
    try:
        chosen = head_class.Options(**options)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors())
        known = ", ".join(head_class.Options.model_fields) or "none"
        raise HeadError(f"head {name!r}: {wrong}.", fix=f"Its options are: {known}.") from error
    head = head_class(in_dim, num_classes, chosen)
    head.card = card
    return head


def _unknown(name: str) -> HeadError:
    return HeadError(f"there is no head named {name!r}.", fix=f"Choose one of: {', '.join(sorted(_HEADS))}.")
