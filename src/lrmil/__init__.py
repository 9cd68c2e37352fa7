"""Train with 20x, deploy with 5x: cross-resolution knowledge distillation for whole-slide classification.

    import lrmil
    answer = lrmil.load_bundle("runs/first/model").predict("slide.svs")

The names below are loaded when they are first used, so that `import lrmil` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lrmil._version import __version__

if TYPE_CHECKING:
    from lrmil.encoders import create_encoder
    from lrmil.geometry import GridSettings, match_grids
    from lrmil.inference import load_bundle
    from lrmil.mil import create_head, load_original
    from lrmil.slides import open_slide

_ROOMS = {
    "GridSettings": "lrmil.geometry",
    "create_encoder": "lrmil.encoders",
    "create_head": "lrmil.mil",
    "load_bundle": "lrmil.inference",
    "load_original": "lrmil.mil",
    "match_grids": "lrmil.geometry",
    "open_slide": "lrmil.slides",
}

__all__ = [
    "GridSettings",
    "__version__",
    "create_encoder",
    "create_head",
    "load_bundle",
    "load_original",
    "match_grids",
    "open_slide",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'lrmil' has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
