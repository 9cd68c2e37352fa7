"""MIL heads: a bag of instances in; logits, attention and named losses out. One file a method."""

from lrmil.mil import abmil as abmil  # enters its head into the registry
from lrmil.mil import transmil as transmil  # enters transmil
from lrmil.mil.base import HeadOutput, MILHead
from lrmil.mil.load import load_original
from lrmil.mil.registry import HeadCard, HeadSettings, create_head, head_cards, register_head

__all__ = [
    "HeadCard",
    "HeadOutput",
    "HeadSettings",
    "MILHead",
    "create_head",
    "head_cards",
    "load_original",
    "register_head",
]
