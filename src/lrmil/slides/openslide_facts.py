"""What OpenSlide knows about a file, and how large its pixels are: the same for every reader of that file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openslide

from lrmil.errors import NotASlide
from lrmil.slides.scale import TIFF_TAGS, VENDOR, StatedMpp, believed_mpp
from lrmil.slides.tiff_tags import describe_tiff, ome_pixel_size, tiff_resolution


@dataclass(frozen=True)
class OpenSlideFacts:
    """A file as OpenSlide describes it."""

    vendor: str
    dimensions: tuple[int, int]
    level_dimensions: tuple[tuple[int, int], ...]
    own_downsamples: tuple[float, ...]
    """OpenSlide's quotient of sizes for each level, 3.9998 where 4 is meant"""
    mpp: float
    mpp_source: str
    background_rgb: tuple[int, int, int]
    bounds_l0: tuple[int, int, int, int]
    properties: Mapping[str, str]


def read_facts(path: Path, mpp: float | None, open_handle: Callable[[str], Any]) -> tuple[OpenSlideFacts, Any]:
    """Return what OpenSlide says about a file, and the handle that said it.

    Args:
        path: file that OpenSlide understands; of a DICOM slide, any one of its files.
        mpp: what the user says about the level-0 um/px; overrides the file.
        open_handle: makes an OpenSlide handle from a path.

    Raises:
        NotASlide: OpenSlide does not understand the file.
        MissingMpp, ImplausibleMpp: see `believed_mpp`.
    """
    try:
        handle = open_handle(str(path))
        dimensions, level_dimensions, own = handle.dimensions, handle.level_dimensions, handle.level_downsamples
        properties = _properties(handle.properties)
    except openslide.OpenSlideUnsupportedFormatError as error:
        reason = describe_tiff(path) or "it is of no kind that OpenSlide knows"
        raise NotASlide(f"{reason}.", slide=path.name, fix=_CONVERT) from error
    except openslide.OpenSlideError as error:
        raise NotASlide(f"the file is damaged ({error}).", slide=path.name, fix="Copy or export it again.") from error
    vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
    stated = (lambda: _stated(properties, vendor), lambda: tiff_resolution(path), lambda: ome_pixel_size(path))
    level0_mpp, source = believed_mpp(path.name, user=mpp, stated=(s for say in stated if (s := say()) is not None))
    facts = OpenSlideFacts(
        vendor=vendor,
        dimensions=dimensions,
        level_dimensions=tuple(level_dimensions),
        own_downsamples=tuple(own),
        mpp=level0_mpp,
        mpp_source=source,
        background_rgb=_background(properties),
        bounds_l0=_bounds(properties, dimensions),
        properties=properties,
    )
    return facts, handle


def _properties(stated: Mapping[str, str]) -> dict[str, str]:
    """Copy what can be told: of a damaged file OpenSlide may name properties that it then has no value of."""
    found = {}
    for name in stated:
        try:
            found[name] = stated[name]
        except (KeyError, UnicodeDecodeError):
            continue
    return found


_CONVERT = "Give a whole-slide image, or convert it to a tiled pyramidal TIFF (8-bit RGB)."


def _stated(properties: Mapping[str, str], vendor: str) -> StatedMpp | None:
    x = _number(properties.get(openslide.PROPERTY_NAME_MPP_X))
    y = _number(properties.get(openslide.PROPERTY_NAME_MPP_Y))
    if x is None or y is None:
        return None
    return StatedMpp(x, y, TIFF_TAGS if vendor == "generic-tiff" else VENDOR)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _background(properties: Mapping[str, str]) -> tuple[int, int, int]:
    colour = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "")
    try:
        red, green, blue = bytes.fromhex(colour)
    except ValueError:
        return 255, 255, 255
    return red, green, blue


def _bounds(properties: Mapping[str, str], dimensions: tuple[int, int]) -> tuple[int, int, int, int]:
    names = ("openslide.bounds-x", "openslide.bounds-y", "openslide.bounds-width", "openslide.bounds-height")
    x, y, width, height = (_number(properties.get(name)) for name in names)
    if x is None or y is None or not width or not height:
        return 0, 0, *dimensions
    right, bottom = min(x + width, dimensions[0]), min(y + height, dimensions[1])
    return max(0, int(x)), max(0, int(y)), int(right), int(bottom)
