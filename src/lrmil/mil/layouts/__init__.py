"""Layouts of the original programs' checkpoints, one file a method, collected by the name `load_original` takes."""

from collections.abc import Mapping

from lrmil.mil.layouts.layout import OriginalFormat
from lrmil.mil.layouts.lrmil import LRMIL
from lrmil.mil.layouts.transmil import TRANSMIL

LAYOUTS: Mapping[str, tuple[OriginalFormat, ...]] = {
    "abmil": LRMIL,
    "lrmil": LRMIL,
    "transmil": TRANSMIL,
}

__all__ = ["LAYOUTS", "OriginalFormat"]
