"""Feature files of other programs: which program wrote this one, and its bag."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from lrmil.bags import clam, stamp, store, tensors, trident
from lrmil.bags.bag import Bag
from lrmil.bags.hdf5 import open_for_reading
from lrmil.bags.stamp import CoordsUnit
from lrmil.errors import BagError, CorruptBag

_TENSOR_SUFFIXES = (".pt", ".pth")


def read_foreign_bag(
    path: str | Path,
    *,
    mpp_l0: float | None = None,
    patches: str | Path | None = None,
    coordinates: bool = True,
    coords_unit: CoordsUnit | None = None,
) -> Bag:
    """Read a feature file of TRIDENT, CLAM, STAMP, mopadi or lrmil, or a .pt file; the layout tells which it is.

    A coordinate file (TRIDENT's or CLAM's `patches`) gives a bag with features of width 0. What a file does not say
    stays None: coordinates of a .pt file, the mpp where only a magnification is stated, coordinates of unknown unit.

    Args:
        path: .h5 or .pt file.
        mpp_l0: um per level-0 pixel of the slide, where known.
        patches: coordinate file of the same slide, or the folder that holds it as `<slide>.h5` or `<slide>_patches.h5`.
            It tells the side of CLAM's patches, and where the rows of a .pt file lie.
        coordinates: False reads features alone; then coordinates in micrometres need no mpp.
        coords_unit: "px_l0" or "um", for files whose coordinates have no stated unit.

    Raises:
        BagError: no such file, an unknown layout, or coordinates in micrometres without `mpp_l0`.
        CorruptBag: truncated, wrong shapes, NaN or infinity, or `patches` belongs to other features.
    """
    path = Path(path)
    try:
        if path.suffix.lower() in _TENSOR_SUFFIXES:
            bag = tensors.read(path)
        else:
            with open_for_reading(path) as handle:
                bag = _read_open(path, handle, mpp_l0, coordinates, coords_unit)
    except CorruptBag as error:
        if error.message.startswith(str(path)):
            raise
        raise CorruptBag(f"{path}: {error.message}", fix="Make the file again with the program it is from.") from error
    if patches is not None:
        bag = _join(path, bag, read_foreign_bag(_patches_file(path, Path(patches)), mpp_l0=mpp_l0))
    return bag if coordinates else replace(bag, coords_l0=None)


def detect_format(handle: h5py.File) -> str | None:
    """Say which program wrote an open HDF5 file: lrmil, trident, clam_patches, clam, stamp, or None."""
    tests = (
        ("lrmil", store.is_own),
        ("trident", trident.matches),
        ("clam_patches", clam.matches_patches),
        ("clam", clam.matches_features),
        ("stamp", stamp.matches),
    )
    return next((name for name, fits in tests if fits(handle)), None)


def _read_open(
    path: Path, handle: h5py.File, mpp_l0: float | None, coordinates: bool, coords_unit: CoordsUnit | None
) -> Bag:
    written_by = detect_format(handle)
    if written_by == "lrmil":
        return store.read_bag(path)
    if written_by == "trident":
        return trident.read(handle, mpp_l0)
    if written_by == "clam_patches":
        return clam.read_patches(handle, mpp_l0)
    if written_by == "clam":
        return clam.read_features(handle)
    if written_by == "stamp":
        return stamp.read(handle, mpp_l0, coordinates=coordinates, coords_unit=coords_unit)
    raise BagError(
        f"{path}: unknown layout (it holds {', '.join(sorted(handle)) or 'nothing'}).",
        fix="Known are files of TRIDENT (features, coords), CLAM (features, coords), STAMP (feats, coords) and lrmil.",
    )


def _patches_file(path: Path, patches: Path) -> Path:
    if not patches.is_dir():
        return patches
    names = (f"{path.stem}.h5", f"{path.stem}_patches.h5")
    found = [patches / name for name in names if (patches / name).is_file()]
    if not found:
        raise BagError(f"{patches}: no coordinates of {path.stem} there (looked for {' and '.join(names)}).")
    return found[0]


def _join(path: Path, bag: Bag, places: Bag) -> Bag:
    """Take the places of a coordinate file, whose rows must be the rows of the features."""
    assert places.coords_l0 is not None
    if places.num_patches != bag.num_patches:
        raise CorruptBag(
            f"{path}: {bag.num_patches} rows of features, but the coordinate file has {places.num_patches}.",
            fix="Give the coordinate file from which these features were made.",
        )
    if bag.coords_l0 is not None and not np.array_equal(bag.coords_l0, places.coords_l0):
        row = int(np.argmax((bag.coords_l0 != places.coords_l0).any(axis=1)))
        raise CorruptBag(
            f"{path}: row {row} lies at {bag.coords_l0[row].tolist()}, in the coordinate file at "
            f"{places.coords_l0[row].tolist()}.",
            fix="Give the coordinate file from which these features were made.",
        )
    return replace(
        bag,
        coords_l0=places.coords_l0,
        patch_side_l0=places.patch_side_l0,
        mpp=places.mpp,
        mpp_l0=places.mpp_l0,
        patch_px=places.patch_px,
        dimensions_l0=places.dimensions_l0,
    )
