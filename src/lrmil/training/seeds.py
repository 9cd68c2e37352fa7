"""Randomness that reproduces: every stage of every fold has a seed of its own, derived from the one in the config.

Seeds made by adding (seed + fold) overlap between runs; hashing the names of the scope does not, and a stage that draws
more or fewer numbers than before leaves the others as they were.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Generators:
    """Independent random streams of one scope."""

    seed: int
    """What they come from; for libraries that take a number"""
    numpy: np.random.Generator
    torch: torch.Generator
    """On the CPU"""


def derive_seed(seed: int, *scope: str | int) -> int:
    """Return the seed of a scope, like `derive_seed(0, "stage1", 3)`: 0 to 2**63 - 1, the same on any machine."""
    text = json.dumps([str(part) for part in (seed, *scope)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generators(seed: int, *scope: str | int) -> Generators:
    """Return fresh generators of a scope; global state is left alone."""
    import torch

    own = derive_seed(seed, *scope)
    return Generators(
        seed=own,
        numpy=np.random.default_rng(derive_seed(own, "numpy")),
        torch=torch.Generator().manual_seed(derive_seed(own, "torch")),
    )


def seed_everything(seed: int, *scope: str | int) -> Generators:
    """Seed the global generators of Python, numpy and torch (CPU and GPU) for a scope, and return its own generators.

    The global ones are what dropout and weight initialisation draw from; shuffling should use those returned.
    """
    import torch

    own = derive_seed(seed, *scope)
    random.seed(derive_seed(own, "python"))
    np.random.seed(derive_seed(own, "numpy global") % 2**32)  # noqa: NPY002 - other libraries draw from it
    torch.manual_seed(derive_seed(own, "torch global"))
    return generators(seed, *scope)
