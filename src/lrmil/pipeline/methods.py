"""The methods that `lrmil compare` knows: the rows of its tables, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lrmil.errors import ConfigError
from lrmil.pipeline.evaluate import GROUPS, LR_ONLY, LRMIL, MAJORITY

Sees = Literal["nothing", "hr", "chosen", "lr", "lrmil"]
"""hr: all 20x patches. chosen: patches that the method chooses itself. lr: 5x by the frozen encoder. lrmil: the whole
path, 5x by the distilled encoder"""


@dataclass(frozen=True)
class Method:
    """One row."""

    name: str
    """In the config"""
    title: str
    """In tables, as in the paper"""
    group: str
    """Block of the table: Reference, Full HR, SC (selective computation), LR only, Ours"""
    sees: Sees
    head: str = ""
    """Name of its head; of LRMIL and LR-only the config's student says it"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the head that a comparison sets; the config's `compare.options` go before them"""
    in_paper: bool = True


# In comparisons classes exclude each other, which is what CLAM calls subtyping.
_SUBTYPING = {"subtyping": True}

METHODS: tuple[Method, ...] = (
    Method("majority", MAJORITY, GROUPS[MAJORITY], "nothing", in_paper=False),
    Method("max_pool", "Max-P", "Full HR", "hr", "max_pool"),
    Method("mean_pool", "Mean-P", "Full HR", "hr", "mean_pool"),
    Method("instance_max", "Instance max", "Full HR", "hr", "instance_max", in_paper=False),
    Method("abmil", "ABMIL", "Full HR", "hr", "abmil"),
    Method("clam_mb", "CLAM-MB", "Full HR", "hr", "clam_mb", _SUBTYPING),
    Method("clam_sb", "CLAM-SB", "Full HR", "hr", "clam_sb", _SUBTYPING),
    Method("dsmil", "DSMIL", "Full HR", "hr", "dsmil"),
    Method("transmil", "TransMIL", "Full HR", "hr", "transmil", {"rollout": False}),
    Method("dtfd", "DTFD-MIL", "Full HR", "hr", "dtfd"),
    Method("zoommil", "ZOOMMIL", "SC", "chosen", "zoommil"),
    Method("hdmil", "HDMIL", "SC", "chosen", "hdmil"),
    Method("lr_only", LR_ONLY, GROUPS[LR_ONLY], "lr", in_paper=False),
    Method("lrmil", LRMIL, GROUPS[LRMIL], "lrmil"),
)
_OF_TORCHMIL = "torchmil:"


def methods_named(names: Sequence[str]) -> tuple[Method, ...]:
    """Return the methods of these names, in the order of `METHODS`; `torchmil:CLASS` is that class on 20x patches.

    Raises:
        ConfigError: there is no such method, or LRMIL is missing, which all others are compared with.
    """
    known = {method.name: method for method in METHODS}
    wrong = [n for n in names if n not in known and not n.startswith(_OF_TORCHMIL)]
    if wrong:
        raise ConfigError(
            f"compare.methods: there is no method {wrong[0]!r}.",
            fix=f"Choose from {', '.join(known)}, or {_OF_TORCHMIL}CLASS.",
        )
    if LRMIL not in {known[n].title for n in names if n in known}:
        raise ConfigError(
            "compare.methods: lrmil is missing, with which all others are compared.", fix="Add lrmil to the list."
        )
    chosen = [method for method in METHODS if method.name in names]
    foreign = [n for n in dict.fromkeys(names) if n not in known]
    own = [Method(n, n.removeprefix(_OF_TORCHMIL), "Full HR", "hr", n, in_paper=False) for n in foreign]
    return (*chosen, *own)
