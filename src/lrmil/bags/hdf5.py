"""Opening HDF5 files: without locks, with errors that say what happened, and whole or absent when written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import numpy.typing as npt

from lrmil.errors import BagError, CorruptBag, OutputError
from lrmil.files import atomic_path

_MAX_ATTRIBUTE_BYTES = 60_000


@contextmanager
def open_for_reading(path: str | Path) -> Iterator[h5py.File]:
    """Open a finished file without locking it: network folders often refuse locks, and finished files never change.

    Raises:
        BagError: there is no such file.
        CorruptBag: it is not HDF5, or it is truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise BagError(f"{path}: no such feature file.", fix="Check the path, or encode the slide.")
    try:
        handle = h5py.File(path, "r", locking=False)
    except OSError as error:
        reason = "it is truncated" if "truncated" in str(error) else "it is not a readable HDF5 file"
        raise CorruptBag(f"{path}: {reason} ({error}).", fix="Delete it and encode the slide again.") from error
    with handle:
        yield handle


@contextmanager
def create(path: str | Path) -> Iterator[h5py.File]:
    """Create a file that appears under its name only when it is whole.

    HDF5 writes through a Python file, so that a failed write arrives here as an `OSError` with its number, and the
    space of the unfinished file is given back at once. HDF5's own driver keeps the file open after a failure.

    Raises:
        OutputError: the disk is full, there is no permission, or the file cannot be written for another reason.
    """
    try:
        with atomic_path(path) as scratch, _raw_file(scratch) as raw, h5py.File(raw, "w") as handle:
            yield handle
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}).",
            fix="Free some space or choose another output folder, then run the same command again; it resumes.",
        ) from error


def read_array(handle: h5py.File, name: str, rows: Any = ()) -> npt.NDArray[Any]:
    """Read a dataset, all of it or the chosen rows.

    Raises:
        CorruptBag: it is missing, it is a group, or its bytes cannot be read.
    """
    dataset = find_dataset(handle, name)
    try:
        if isinstance(rows, np.ndarray):
            # HDF5's own selection of scattered rows is slow and wants them sorted and unique; the file is contiguous.
            return np.asarray(mapped(dataset)[rows])
        return dataset[rows]
    except OSError as error:
        raise CorruptBag(
            f"{handle.filename}: `{name}` cannot be read ({error}).", fix="Delete the file and encode the slide again."
        ) from error


def find_dataset(handle: h5py.File, name: str) -> h5py.Dataset:
    """Return the dataset of that name; raise `CorruptBag` if there is none."""
    found = handle.get(name)
    if not isinstance(found, h5py.Dataset):
        there = ", ".join(sorted(handle)) or "nothing"
        raise CorruptBag(f"{handle.filename}: there is no dataset `{name}` (there is {there}).")
    return found


def mapped(dataset: h5py.Dataset) -> npt.NDArray[Any]:
    """Return the dataset as a read-only view of the file if it is contiguous there, else read all of it."""
    offset = dataset.id.get_offset()
    if offset is None or dataset.size == 0:
        return dataset[()]
    return np.memmap(dataset.file.filename, dtype=dataset.dtype, mode="r", offset=offset, shape=dataset.shape)


def write_contiguous(handle: h5py.File, name: str, values: npt.NDArray[Any]) -> h5py.Dataset:
    """Write one contiguous, uncompressed dataset. Files in chunks of one row read 10 to 30 times slower."""
    return handle.create_dataset(name, data=np.ascontiguousarray(values))


def set_json(target: Any, name: str, value: Any) -> None:
    """Store `value` as a JSON attribute; what JSON cannot hold is stored as its text."""
    text = json.dumps(value, default=_plain)
    if len(text.encode()) > _MAX_ATTRIBUTE_BYTES:
        raise BagError(f"`{name}` is {len(text)} characters long; HDF5 holds attributes up to {_MAX_ATTRIBUTE_BYTES}.")
    target.attrs[name] = text


def get_json(target: Any, name: str) -> Any:
    """Read a JSON attribute; None if it is absent or not JSON."""
    text = target.attrs.get(name)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return None


def plain_json(value: Any) -> Any:
    """Return `value` as it looks after a trip through JSON: tuples become lists, keys text, numpy numbers plain."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value)


def _raw_file(scratch: Path) -> IO[bytes]:
    return scratch.open("w+b")
