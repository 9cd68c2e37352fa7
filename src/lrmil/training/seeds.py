"""Randomness that reproduces: every stage of every fold has a seed of its own, derived from the one in the config.

Seeds made by adding (seed + fold) overlap between runs; hashing the names of the scope does not, and a stage that draws
more or fewer numbers than before leaves the others as they were.
"""

from __future__ import annotations

import hashlib
import json


def derive_seed(seed: int, *scope: str | int) -> int:
    """Return the seed of a scope, like `derive_seed(0, "stage1", 3)`: 0 to 2**63 - 1, the same on any machine."""
    text = json.dumps([str(part) for part in (seed, *scope)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
