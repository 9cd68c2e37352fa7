"""Feature and coordinate files of TRIDENT, which is also what most other tools write today.

`features` (N, D) and `coords` (N, 2) int64, level-0 top-left, in one file; a coordinate file holds `coords` alone.
TRIDENT states magnifications and no mpp, so the mpp of the bag is known only where the caller gives that of level 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lrmil.bags._foreign_arrays import as_coords_l0, as_features, slide_name
from lrmil.bags.bag import Bag
from lrmil.bags.hdf5 import create, find_dataset
from lrmil.bags.trident_attributes import read_attributes, set_coordinate_attributes, set_feature_attributes
from lrmil.errors import BagError


def matches(handle: h5py.File) -> bool:
    """Say whether an open file has TRIDENT's layout."""
    return "coords" in handle and "patch_size_level0" in handle["coords"].attrs


def read(handle: h5py.File, mpp_l0: float | None = None) -> Bag:
    """Read an open feature file, or a coordinate file, whose bag has features of width 0."""
    path = handle.filename
    attributes = read_attributes(find_dataset(handle, "coords"))
    coords_l0 = as_coords_l0(path, handle["coords"][()])
    side_l0, patch_px = attributes.get("patch_size_level0"), attributes.get("patch_size")
    encoder: Any = None
    if "features" in handle:
        encoder = read_attributes(handle["features"]).get("encoder")
        features = as_features(path, handle["features"][()])
    else:
        features = np.empty((len(coords_l0), 0), np.float16)
    size = attributes.get("level0_width"), attributes.get("level0_height")
    mpp = None
    if mpp_l0 is not None and side_l0 is not None and patch_px is not None:
        mpp = side_l0 * mpp_l0 / patch_px
    return Bag(
        features=features,
        coords_l0=coords_l0,
        patch_side_l0=side_l0,
        mpp=mpp,
        slide=slide_name(attributes.get("name"), path),
        mpp_l0=mpp_l0,
        patch_px=patch_px,
        dimensions_l0=None if None in size else (int(size[0]), int(size[1])),  # type: ignore[arg-type]
        provenance={"source": "TRIDENT", "encoder": encoder, "coords_attributes": attributes},
    )


def write_trident_bag(path: str | Path, bag: Bag) -> None:
    """Write a feature file as TRIDENT does: float32 features, int64 coords, chunks of one row, its attributes.

    Our own files already open in TRIDENT's tools; this is for programs that insist on float32 or on resizable datasets.

    Raises:
        BagError: the bag has no features or no coordinates.
        OutputError: it cannot be written.
    """
    path = Path(path)
    if bag.coords_l0 is None or bag.width == 0:
        raise BagError(f"{path}: TRIDENT's layout needs features and coordinates; the bag lacks one of them.")
    slide = bag.slide or path.stem
    with create(path) as handle:
        features = handle.create_dataset(
            "features", data=bag.features.astype(np.float32), chunks=(1, bag.width), maxshape=(None, bag.width)
        )
        coords = handle.create_dataset("coords", data=bag.coords_l0, chunks=(1, 2), maxshape=(None, 2))
        set_feature_attributes(features, bag, slide, path.parent)
        set_coordinate_attributes(coords, bag, slide, path.parent)
