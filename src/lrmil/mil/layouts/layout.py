"""How one layout of an original program's checkpoint is recognised and what its keys are called here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrmil.errors import CheckpointError

State = dict[str, Tensor]
HeadShape = tuple[int, int, dict[str, Any]]
"""in_dim, num_classes, options"""


@dataclass(frozen=True)
class OriginalFormat:
    """One layout of one original program."""

    title: str
    head: str
    """Name of our head"""
    marks: frozenset[str]
    """Keys that this layout alone has"""
    names: Mapping[str, str]
    """Original key: our key"""
    shape: Callable[[State], HeadShape]
    """Sizes and options, read off the weights"""
    ignored: frozenset[str] = frozenset()
    """Keys that carry nothing"""
    ignored_prefixes: tuple[str, ...] = ()
    """Beginnings of keys that are not the head's, such as those of a feature extractor"""
    untold: tuple[str, ...] = ()
    """Options that change the answer and that no weight tells; `load_original` warns of those it is not given"""
    remark: Callable[[State], str | None] = lambda state: None
    """What a user must know about this very checkpoint; `load_original` warns of it"""


def with_bias(names: Mapping[str, str]) -> dict[str, str]:
    """Return `names` with `.weight` and `.bias` behind both sides of each pair."""
    return {f"{old}.{part}": f"{new}.{part}" for old, new in names.items() for part in ("weight", "bias")}


def matrix_shape(state: State, key: str) -> tuple[int, int]:
    """Return rows and columns of the matrix `key` of `state`."""
    if key not in state or state[key].ndim != 2:
        raise CheckpointError(f"the checkpoint has no matrix {key}.", fix="Is it of another method?")
    rows, columns = state[key].shape
    return rows, columns


def left_out(state: State, prefix: str, advice: str) -> str | None:
    """Return a remark on the keys of a feature extractor that begin with `prefix`, or None if there are none."""
    count = sum(key.startswith(prefix) for key in state)
    if not count:
        return None
    return f"its feature extractor ({count} tensors {prefix}*) is not read; {advice}."
