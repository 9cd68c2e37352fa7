"""Feature and coordinate files of CLAM.

`h5_files/<slide>.h5`: `features` (N, D), `coords` (N, 2), level-0 top-left, no attributes: how large a patch is stands
only in `patches/<slide>.h5`, whose `coords` carry `patch_size` (pixels at `patch_level`), `downsample` of that level in
x and y, and, in derived tools, `custom_downsample`. Older files hold `imgs` (N, P, P, 3) and its attributes instead.
Neither states an mpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lrmil.bags._foreign_arrays import as_coords_l0, as_features, slide_name
from lrmil.bags.bag import Bag
from lrmil.bags.trident_attributes import read_attributes
from lrmil.errors import CorruptBag

_ANISOTROPY = 0.02


def matches_patches(handle: h5py.File) -> bool:
    """Say whether an open file is a coordinate file."""
    return "coords" in handle and _carrier(handle) is not None


def matches_features(handle: h5py.File) -> bool:
    """Say whether an open file is a feature file: `features` and `coords`, and nothing said about them."""
    return "features" in handle and "coords" in handle and not handle["coords"].attrs


def read_patches(handle: h5py.File, mpp_l0: float | None = None) -> Bag:
    """Read the places of an open coordinate file: a bag with features of width 0."""
    path = handle.filename
    carrier = _carrier(handle)
    if carrier is None:
        raise CorruptBag(f"{path}: neither `coords` nor `imgs` says at which level the patches were taken.")
    attributes = read_attributes(carrier)
    patch_px = int(carrier.shape[1]) if "imgs" in handle else attributes.get("patch_size")
    if patch_px is None:
        raise CorruptBag(f"{path}: no `patch_size` beside `patch_level`, so the side of a patch is unknown.")
    side_l0 = patch_px * _downsample(path, attributes)
    coords_l0 = as_coords_l0(path, handle["coords"][()])
    return Bag(
        features=np.empty((len(coords_l0), 0), np.float16),
        coords_l0=coords_l0,
        patch_side_l0=side_l0,
        mpp=None if mpp_l0 is None else side_l0 * mpp_l0 / patch_px,
        slide=slide_name(attributes.get("name") or attributes.get("wsi_name"), path),
        mpp_l0=mpp_l0,
        patch_px=patch_px,
        provenance={"source": "CLAM patches"},
    )


def read_features(handle: h5py.File) -> Bag:
    """Read an open feature file. The side of a patch is unknown until it is joined with the coordinate file."""
    path = handle.filename
    return Bag(
        features=as_features(path, handle["features"][()]),
        coords_l0=as_coords_l0(path, handle["coords"][()]),
        slide=Path(path).stem,
        provenance={"source": "CLAM"},
    )


def _carrier(handle: h5py.File) -> h5py.Dataset | None:
    """The dataset whose attributes tell the level."""
    for name in ("imgs", "coords"):
        if name in handle and "patch_level" in handle[name].attrs:
            return handle[name]
    return None


def _downsample(path: str, attributes: dict[str, Any]) -> float:
    if "downsample" not in attributes:
        raise CorruptBag(f"{path}: no `downsample` beside `patch_level`, so the side of a patch at level 0 is unknown.")
    x, y = np.broadcast_to(np.asarray(attributes["downsample"], dtype=np.float64), 2)
    if abs(x / y - 1.0) > _ANISOTROPY:
        raise CorruptBag(f"{path}: the level is {x:.4g} times smaller in x and {y:.4g} times in y.")
    return float((x + y) / 2 * float(np.max(attributes.get("custom_downsample", 1))))
