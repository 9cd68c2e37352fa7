"""What the tags of a TIFF say: the size of a pixel, and why a file is no slide."""

from __future__ import annotations

import re
from pathlib import Path

import tifffile

from lrmil.slides.scale import OME_XML, TIFF_TAGS, StatedMpp

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


_OME_UM_PER_UNIT = {"µm": 1.0, "um": 1.0, "μm": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
"""Units of OME-XML; micrometre is what is meant where none is named."""


def ome_pixel_size(path: Path) -> StatedMpp | None:
    """Return the mpp that the first Pixels element of an OME-TIFF's XML states, or None."""
    try:
        with tifffile.TiffFile(path) as tiff:
            text = tiff.pages.first.description
    except (tifffile.TiffFileError, OSError, ValueError, TypeError, IndexError, AttributeError):
        return None
    element = re.search(r"<(?:\w+:)?Pixels\s[^>]*>", text) if "<OME" in text or ":OME" in text else None
    if element is None:
        return None
    sides = []
    for axis in "XY":
        size = re.search(rf"\bPhysicalSize{axis}\s*=\s*[\"']([^\"']+)[\"']", element[0])
        unit = re.search(rf"\bPhysicalSize{axis}Unit\s*=\s*[\"']([^\"']+)[\"']", element[0])
        scale = _OME_UM_PER_UNIT.get(unit[1]) if unit else 1.0
        try:
            sides.append(float(size[1]) * scale if size and scale else None)
        except ValueError:
            return None
    return None if sides[0] is None or sides[1] is None else StatedMpp(sides[0], sides[1], OME_XML)


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
