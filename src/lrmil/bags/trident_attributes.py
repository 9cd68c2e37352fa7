"""The attributes that TRIDENT writes on `coords` and `features`, which most tools of the field look for.

TRIDENT stores dicts as JSON text and None as the text "None". Magnifications are written for its readers only: lrmil
computes with mpp alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lrmil.bags.bag import Bag

COORDINATE_ATTRIBUTES = (
    "patch_size",
    "patch_size_level0",
    "level0_magnification",
    "target_magnification",
    "overlap",
    "name",
    "savetodir",
    "level0_width",
    "level0_height",
)
_OBJECTIVE = 10.0
"""Magnification times mpp, by the field's convention: 20x is 0.5 um/px."""


def coordinate_attributes(bag: Bag, slide: str, folder: Path) -> dict[str, Any]:
    """Return TRIDENT's nine attributes of `coords`. What the bag does not know is None."""
    width_l0, height_l0 = bag.dimensions_l0 or (None, None)
    side_l0 = bag.patch_side_l0
    known: dict[str, Any] = {
        "patch_size": bag.patch_px,
        "patch_size_level0": None if side_l0 is None else round(side_l0),
        "level0_magnification": magnification_name(bag.mpp_l0),
        "target_magnification": magnification_name(bag.mpp),
        "overlap": 0,
        "level0_width": width_l0,
        "level0_height": height_l0,
    }
    # Read from TRIDENT and written for TRIDENT again: its own words are kept.
    original = bag.provenance.get("coords_attributes", {})
    known |= {k: v for k, v in original.items() if k in known and v is not None}
    return {name: known.get(name) for name in COORDINATE_ATTRIBUTES} | {"name": slide, "savetodir": str(folder)}


def encoder_name(provenance: Mapping[str, Any]) -> str | None:
    """Return the encoder's name from a provenance, which holds it as text or as a description with a `name`."""
    encoder = provenance.get("encoder")
    if isinstance(encoder, Mapping):
        encoder = encoder.get("name")
    return None if encoder is None else str(encoder)


def set_coordinate_attributes(dataset: h5py.Dataset, bag: Bag, slide: str, folder: Path) -> None:
    """Write the attributes of `coords`."""
    for name, value in coordinate_attributes(bag, slide, folder).items():
        dataset.attrs[name] = _stored(value)


def set_feature_attributes(dataset: h5py.Dataset, bag: Bag, slide: str, folder: Path) -> None:
    """Write the attributes of `features`."""
    values = {"name": slide, "savetodir": str(folder), "encoder": encoder_name(bag.provenance)}
    for name, value in values.items():
        dataset.attrs[name] = _stored(value)


def read_attributes(dataset: h5py.Dataset) -> dict[str, Any]:
    """Read all attributes: "None" is None, numpy numbers become plain ones."""
    return {name: _loaded(value) for name, value in dataset.attrs.items()}


def magnification_name(mpp: float | None) -> int | float | None:
    """Return the customary name of a scale (0.5 um/px: 20), from the series 80, 40, 20, 10, 5, 2.5, ..."""
    if mpp is None:
        return None
    steps = round(math.log2(_OBJECTIVE / mpp / 20.0))
    name = 20.0 * 2.0**steps
    return int(name) if name == int(name) else name


def _stored(value: Any) -> Any:
    if value is None:
        return "None"
    return json.dumps(value) if isinstance(value, dict) else value


def _loaded(value: Any) -> Any:
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    return None if value == "None" else value
