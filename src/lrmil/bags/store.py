"""The feature file: one HDF5 file per slide, contiguous float16, readable by TRIDENT's tools, whole or absent.

features          (N, D) float16, contiguous            attributes name, savetodir, encoder (TRIDENT's)
coords            (N, 2) int64, level-0 top-left (x, y)  attributes of TRIDENT's coordinates
region, slot      (N,) int64, if known
region_tissue     (N,) float32, if known
layer_cls/<l>     (N, W) float16, for every kept layer; float32 where a value of it is beyond 65504
attribute `lrmil` JSON: format, slide, scale, provenance
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from lrmil.bags.bag import Bag, FeatureArray, first_bad_row, within_range
from lrmil.bags.hdf5 import create, find_dataset, get_json, open_for_reading, read_array, set_json, write_contiguous
from lrmil.bags.provenance import SOFTWARE, check_provenance, differences, software_versions
from lrmil.bags.trident_attributes import set_coordinate_attributes, set_feature_attributes
from lrmil.errors import BagError, CorruptBag, ProvenanceMismatch

FORMAT = 1
ATTRIBUTE = "lrmil"
_SCALE = ("patch_side_l0", "mpp", "mpp_l0", "patch_px", "dimensions_l0")
_OPTIONAL = ("region", "slot", "region_tissue")


def write_bag(path: str | Path, bag: Bag) -> None:
    """Write `bag` as a feature file (top of this file), atomically. Features are stored as float16.

    So are class tokens of layers, but for layers in which one is too large for it: these are kept in float32.

    `bag.provenance` is what `bag_is_current` compares; software versions are added if it holds none.

    Raises:
        BagError: the bag has no coordinates.
        CorruptBag: a feature is too large for float16 (the message gives the row).
        OutputError: the disk is full, or there is no permission; no file is left.
    """
    path = Path(path)
    if bag.coords_l0 is None:
        raise BagError(f"{path}: the bag has no coordinates, and a feature file needs them.")
    slide = bag.slide or path.stem
    provenance = {SOFTWARE: software_versions(), **bag.provenance}
    with create(path) as handle:
        features = write_contiguous(handle, "features", _half(path, "features", bag.features))
        coords = write_contiguous(handle, "coords", bag.coords_l0)
        set_feature_attributes(features, bag, slide, path.parent)
        set_coordinate_attributes(coords, bag, slide, path.parent)
        for name in _OPTIONAL:
            if (values := getattr(bag, name)) is not None:
                write_contiguous(handle, name, values)
        for layer, values in sorted(bag.layer_cls.items()):
            name = f"layer_cls/{layer}"
            write_contiguous(handle, name, within_range(values, np.float16))
        scale = {name: getattr(bag, name) for name in _SCALE}
        set_json(handle, ATTRIBUTE, {"format": FORMAT, "slide": slide, **scale, "provenance": provenance})


def read_bag(
    path: str | Path,
    *,
    rows: slice | npt.NDArray[np.int64] | None = None,
    features: bool = True,
    layers: Iterable[int] | None = None,
    expected: Mapping[str, Any] | None = None,
) -> Bag:
    """Read a feature file, or the part of it that is asked for; the rest is not touched on disk.

    Args:
        path: file written by `write_bag`.
        rows: slice or indices (in any order) of the patches wanted; None is all.
        features: False leaves `features` empty, (N, 0): places only.
        layers: which of the kept layers to read; None is all, () none.
        expected: provenance that the file must have; further fields in the file and software versions do not matter.

    Raises:
        BagError: there is no such file, or it is no feature file of lrmil.
        CorruptBag: it is truncated, shapes disagree, or a value is NaN or infinite.
        ProvenanceMismatch: it was made by another encoder or with other settings, or lacks a layer.
    """
    path = Path(path)
    with open_for_reading(path) as handle:
        about = _about(path, handle)
        if expected is not None:
            check_provenance(str(path), about["provenance"], expected)
        kept = stored_layers(handle)
        wanted = kept if layers is None else tuple(layers)
        for layer in wanted:
            if layer not in kept:
                raise ProvenanceMismatch(
                    f"{path}: the CLS tokens of layer {layer} were not kept (kept: {list(kept) or 'none'}).",
                    fix="Encode the slide again with that layer, or distil one of the kept layers.",
                )
        _check_lengths(path, handle)
        chosen: Any = slice(None) if rows is None else rows
        arrays = {name: read_array(handle, name, chosen) for name in _OPTIONAL if name in handle}
        coords = read_array(handle, "coords", chosen)
        dimensions = about.get("dimensions_l0")
        try:
            return Bag(
                features=read_array(handle, "features", chosen) if features else np.empty((len(coords), 0), np.float16),
                coords_l0=coords,
                layer_cls={layer: read_array(handle, f"layer_cls/{layer}", chosen) for layer in wanted},
                provenance=about["provenance"],
                slide=about["slide"],
                patch_side_l0=about.get("patch_side_l0"),
                mpp=about.get("mpp"),
                mpp_l0=about.get("mpp_l0"),
                patch_px=about.get("patch_px"),
                dimensions_l0=None if dimensions is None else (int(dimensions[0]), int(dimensions[1])),
                **arrays,
            )
        except CorruptBag as error:
            raise CorruptBag(f"{path}: {error.message}", fix="Delete it and encode the slide again.") from error


@dataclass(frozen=True)
class StoredRows:
    """One dataset of a feature file, of which rows in any order can be had for no more than the rows themselves.

    The file is open only while rows are read: a cohort has more slides than a process may have open files.
    """

    path: Path
    dtype: np.dtype[Any]
    offset: int
    """where the values begin in the file"""
    shape: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Read these rows."""
        if not all(self.shape):
            return np.empty(self.shape, self.dtype)[rows]
        return np.array(np.memmap(self.path, self.dtype, "r", offset=self.offset, shape=self.shape)[rows])


def map_rows(path: str | Path, names: Iterable[str]) -> dict[str, StoredRows]:
    """Find datasets of a feature file, for training on more than memory holds.

    Possible because datasets are contiguous; values were checked when written.

    Args:
        path: file written by `write_bag`.
        names: datasets, like "features", "region" or "layer_cls/11".

    Raises:
        BagError: there is no such file or dataset, or it is not contiguous.
    """
    path = Path(path)
    found: dict[str, StoredRows] = {}
    with open_for_reading(path) as handle:
        _about(path, handle)
        for name in names:
            dataset = find_dataset(handle, name)
            offset = dataset.id.get_offset()
            if dataset.size and offset is None:
                raise BagError(f"{path}: {name} is not stored in one piece.", fix="Encode the slide again.")
            found[name] = StoredRows(path, dataset.dtype, offset or 0, dataset.shape)
    return found


def bag_is_current(path: str | Path, expected: Mapping[str, Any], *, layers: Iterable[int] = ()) -> bool:
    """Say whether `path` is a whole feature file whose provenance holds everything in `expected`. Reads no features.

    It must also keep the CLS tokens of `layers`; further layers do no harm.

    A missing, truncated or foreign file is not current: whoever asks makes it again.
    """
    path = Path(path)
    try:
        with open_for_reading(path) as handle:
            about = _about(path, handle)
            _check_lengths(path, handle)
            return set(layers) <= set(stored_layers(handle)) and not differences(about["provenance"], expected)
    except BagError:
        return False


def is_own(handle: h5py.File) -> bool:
    """Say whether an open file was written by `write_bag`."""
    return ATTRIBUTE in handle.attrs


def stored_layers(handle: h5py.File) -> tuple[int, ...]:
    """Return the layers whose CLS tokens an open file keeps, in ascending order."""
    return tuple(sorted(int(name) for name in handle.get("layer_cls", {})))


def _about(path: Path, handle: h5py.File) -> dict[str, Any]:
    about = get_json(handle, ATTRIBUTE)
    if not isinstance(about, dict) or not isinstance(about.get("provenance"), dict):
        raise BagError(
            f"{path}: not a feature file of lrmil.",
            fix="Files of TRIDENT, CLAM and STAMP are read by `lrmil import`, or `read_foreign_bag`.",
        )
    if about.get("format") != FORMAT:
        raise BagError(
            f"{path}: feature file of format {about.get('format')}; this version of lrmil reads {FORMAT}.",
            fix="Encode the slide again, or use the version of lrmil that wrote it.",
        )
    return about


def _check_lengths(path: Path, handle: h5py.File) -> None:
    """Every dataset must have one row a patch. Cheap: only headers are read."""
    names = ["features", "coords", *(n for n in _OPTIONAL if n in handle)]
    names += [f"layer_cls/{layer}" for layer in stored_layers(handle)]
    shapes = {name: find_dataset(handle, name).shape for name in names}
    lengths = {shape[0] if shape else None for shape in shapes.values()}
    if len(lengths) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise CorruptBag(f"{path}: rows do not correspond: {listed}.", fix="Delete it and encode the slide again.")


def _half(path: Path, name: str, values: FeatureArray) -> npt.NDArray[np.float16]:
    if values.dtype == np.float16:
        return values.astype(np.float16, copy=False)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    row = first_bad_row(half)
    if row is not None:
        raise CorruptBag(
            f"{path}: {name} row {row} holds {float(np.abs(values[row]).max()):.4g}; float16 ends at 65504.",
            fix="Another layer or embedding has smaller values; or check the encoder's weights.",
        )
    return half
