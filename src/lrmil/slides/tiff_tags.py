"""What the tags of a TIFF say: the size of a pixel, and why a file is no slide."""

from __future__ import annotations

from pathlib import Path

import tifffile

from lrmil.slides.scale import TIFF_TAGS, StatedMpp

_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}
"""TIFF 6.0 ResolutionUnit: 2 = inch, 3 = centimetre; 1 = no unit, which says nothing about size."""


def tiff_resolution(path: Path) -> StatedMpp | None:
    """Return the mpp that XResolution, YResolution and ResolutionUnit of the first page state, or None."""
    try:
        with tifffile.TiffFile(path) as tiff:
            tags = tiff.pages.first.tags
            unit = _UM_PER_UNIT.get(int(tags.valueof("ResolutionUnit", 2)))
            per_unit = [_ratio(tags.valueof(name)) for name in ("XResolution", "YResolution")]
    except (tifffile.TiffFileError, OSError, ValueError, TypeError, IndexError):
        return None
    if unit is None or per_unit[0] is None or per_unit[1] is None:
        return None
    return StatedMpp(unit / per_unit[0], unit / per_unit[1], TIFF_TAGS)


def describe_tiff(path: Path) -> str | None:
    """Say in a few words what a TIFF holds that makes it no slide, or None where it is no TIFF at all."""
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            size = f"{page.imagewidth} x {page.imagelength} px"
            kind = f"{page.bitspersample}-bit {getattr(page.photometric, 'name', 'unknown').lower()}"
            tiled, samples = page.is_tiled, page.samplesperpixel
    except (tifffile.TiffFileError, OSError, ValueError, TypeError, IndexError, AttributeError):
        return None
    if kind.split("-")[0] != "8" or samples < 3:
        return f"it is a TIFF of {size}, {kind}, not an 8-bit RGB image"
    if not tiled:
        return f"it is a TIFF of {size}, {kind}, stored without tiles"
    return f"it is a tiled TIFF of {size}, {kind}, of a kind that no reader knows"


def _ratio(value: object) -> float | None:
    if isinstance(value, tuple) and len(value) == 2:
        value = value[0] / value[1] if value[1] else 0.0
    return float(value) if isinstance(value, int | float) and value > 0 else None
