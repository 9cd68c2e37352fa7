"""Feature files of STAMP and of the programs around it (mopadi): `feats` (N, D) and `coords` (N, 2).

Three generations. Now: `coords` in micrometres, attributes `tile_size_um`, `tile_size_px`, `unit` = "um". Before:
`tile_size` and `unit` = "um". The oldest, and mopadi's, say nothing about the unit; then only the caller can.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import h5py

from lrmil.bags._foreign_arrays import as_coords_l0, as_features, um_to_l0
from lrmil.bags.bag import Bag
from lrmil.bags.hdf5 import find_dataset
from lrmil.bags.trident_attributes import read_attributes
from lrmil.errors import BagError

CoordsUnit = Literal["px_l0", "um"]


def matches(handle: h5py.File) -> bool:
    """Say whether an open file has STAMP's layout."""
    return "feats" in handle


def read(
    handle: h5py.File,
    mpp_l0: float | None = None,
    *,
    coordinates: bool = True,
    coords_unit: CoordsUnit | None = None,
) -> Bag:
    """Read an open feature file.

    Args:
        handle: the open file.
        mpp_l0: um per level-0 pixel of the slide, which turns micrometres into level-0 pixels.
        coordinates: False reads features alone, for which no mpp is needed.
        coords_unit: what the coordinates are, for files that do not say; without it they are left out.

    Raises:
        BagError: the coordinates are micrometres and no `mpp_l0` is given.
    """
    path = handle.filename
    attributes = read_attributes(handle)
    unit: str | None = "um" if "tile_size_um" in attributes else attributes.get("unit")
    tile_um = attributes.get("tile_size_um", attributes.get("tile_size")) if unit == "um" else None
    patch_px = attributes.get("tile_size_px")
    provenance: dict[str, Any] = {"source": "STAMP", "encoder": attributes.get("extractor"), "attributes": attributes}
    if unit not in ("um", "px_l0"):
        unit = coords_unit
    coords_l0 = None
    if not coordinates or "coords" not in handle:
        pass
    elif unit is None:
        provenance["coords"] = "left out: the file does not say what unit they are in"
    elif unit == "um" and mpp_l0 is None:
        raise BagError(
            f"{path}: its coordinates are micrometres, and the slide's um per pixel is not known.",
            fix="Give it (cohort column mpp, or mpp_l0), or read the features alone (coordinates=False).",
        )
    elif unit == "um":
        assert mpp_l0 is not None
        coords_l0 = um_to_l0(path, find_dataset(handle, "coords")[()], mpp_l0)
    else:
        coords_l0 = as_coords_l0(path, find_dataset(handle, "coords")[()])
    return Bag(
        features=as_features(path, find_dataset(handle, "feats")[()]),
        coords_l0=coords_l0,
        patch_side_l0=None if tile_um is None or mpp_l0 is None else tile_um / mpp_l0,
        mpp=None if tile_um is None or patch_px is None else tile_um / patch_px,
        slide=Path(path).stem,
        mpp_l0=mpp_l0,
        patch_px=patch_px,
        provenance=provenance,
    )
