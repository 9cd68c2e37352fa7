from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lrmil.bags import Bag


@pytest.fixture
def make_bag() -> Callable[..., Bag]:
    """`make_bag(n, width, **fields)`: HR patches of a 40x slide, four to a region, x unlike y."""

    def make(n: int = 12, width: int = 8, seed: int = 0, **changes: Any) -> Bag:
        rng = np.random.default_rng(seed)
        index = np.arange(n)
        fields: dict[str, Any] = {
            "features": rng.normal(size=(n, width)).astype(np.float16),
            "coords_l0": np.stack([512 * (index % 4), 512 * (index // 4) + 4096], axis=1).astype(np.int64),
            "patch_side_l0": 512.0,
            "mpp": 0.5,
            "mpp_l0": 0.25,
            "patch_px": 256,
            "dimensions_l0": (40_000, 30_000),
            "region": (index // 4).astype(np.int64),
            "slot": (index % 4).astype(np.int64),
            "region_tissue": rng.uniform(size=n).astype(np.float32),
            "layer_cls": {layer: rng.normal(size=(n, 6)).astype(np.float16) for layer in (0, 1, 11)},
            "provenance": {
                "config_hash": "0123456789ab",
                "encoder": {"name": "vit", "weights_sha256": "ff"},
                "mpp": 0.5,
            },
            "slide": "slide-1",
        }
        return Bag(**(fields | changes))

    return make
