"""Layouts of the original programs' checkpoints, one file a method, collected by the name `load_original` takes."""

from collections.abc import Mapping

from lrmil.mil.layouts.layout import OriginalFormat
from lrmil.mil.layouts.lrmil import LRMIL

LAYOUTS: Mapping[str, tuple[OriginalFormat, ...]] = {
    "abmil": LRMIL,
    "lrmil": LRMIL,
}

__all__ = ["LAYOUTS", "OriginalFormat"]
