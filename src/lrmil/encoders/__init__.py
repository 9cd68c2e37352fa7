"""Image encoders: cards, weights, one ViT wrapper with taps, batched inference."""

from lrmil.encoders import catalogue as _catalogue
from lrmil.encoders import packaged as _packaged
from lrmil.encoders.cards import EncoderCard, encoder_cards, register_encoder
from lrmil.encoders.embedding import Embedded, embed
from lrmil.encoders.factory import create_encoder, encoder_from_settings, resolve_card
from lrmil.encoders.settings import EncoderSettings
from lrmil.encoders.shaped import shaped_encoder
from lrmil.encoders.store import load_encoder, save_encoder
from lrmil.encoders.vit import Encoder, EncoderOutput

__all__ = [
    "Embedded",
    "Encoder",
    "EncoderCard",
    "EncoderOutput",
    "EncoderSettings",
    "create_encoder",
    "embed",
    "encoder_cards",
    "encoder_from_settings",
    "load_encoder",
    "register_encoder",
    "resolve_card",
    "save_encoder",
    "shaped_encoder",
]

_packaged.register_all()
_catalogue.register_all()
