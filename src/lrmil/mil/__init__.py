"""MIL heads: a bag of instances in; logits, attention and named losses out. One file a method."""

from lrmil.mil import abmil as abmil  # enters its head into the registry
from lrmil.mil import abmil_original as abmil_original  # enters abmil_original
from lrmil.mil import clam as clam  # enters clam_sb, clam_mb
from lrmil.mil import dmin as dmin  # enters dmin
from lrmil.mil import dsmil as dsmil  # enters dsmil
from lrmil.mil import dtfd as dtfd  # enters dtfd
from lrmil.mil import hdmil as hdmil  # enters hdmil
from lrmil.mil import instance_max as instance_max  # enters instance_max
from lrmil.mil import pooling as pooling  # enters mean_pool, max_pool
from lrmil.mil import transmil as transmil  # enters transmil
from lrmil.mil import zoommil as zoommil  # enters zoommil
from lrmil.mil.base import HeadOutput, MILHead
from lrmil.mil.card import HeadCard
from lrmil.mil.load import load_original
from lrmil.mil.multi_scale import MultiScaleHead, MultiScaleOutput
from lrmil.mil.registry import HeadSettings, create_head, head_card, head_cards, register_head
from lrmil.mil.scales import PatchSource, RecordedSource, StoredScales

__all__ = [
    "HeadCard",
    "HeadOutput",
    "HeadSettings",
    "MILHead",
    "MultiScaleHead",
    "MultiScaleOutput",
    "PatchSource",
    "RecordedSource",
    "StoredScales",
    "create_head",
    "head_card",
    "head_cards",
    "load_original",
    "register_head",
]
