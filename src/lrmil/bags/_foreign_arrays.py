"""Arrays of other programs, brought to the dtypes of a bag, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrmil.bags.bag import FeatureArray, IntArray
from lrmil.errors import BagError, CorruptBag


def slide_name(stated: Any, path: str) -> str:
    """Return the slide's name as a file states it, without any folders in it, or else the file's own."""
    return Path(str(stated)).name if stated else Path(path).stem


def as_features(where: str, values: npt.NDArray[Any]) -> FeatureArray:
    """Return (N, D) features as float16 (if they are) or float32."""
    if values.ndim == 1:
        raise BagError(
            f"{where}: one vector of width {len(values)}: an embedding of the whole slide, not of its patches.",
            fix="Give the file of patch features.",
        )
    if values.ndim != 2:
        raise CorruptBag(f"{where}: features have shape {values.shape}; they should be (patches, width).")
    if not np.issubdtype(values.dtype, np.floating):
        raise CorruptBag(f"{where}: features have dtype {values.dtype}; they should be floating-point numbers.")
    return values if values.dtype == np.float16 else values.astype(np.float32, copy=False)


def as_coords_l0(where: str, values: npt.NDArray[Any]) -> IntArray:
    """Return (N, 2) coordinates as int64; whole numbers stored as floats are taken, others refused."""
    if values.ndim != 2 or values.shape[1] != 2:
        raise CorruptBag(f"{where}: coordinates have shape {values.shape}; they should be (patches, 2).")
    if not np.issubdtype(values.dtype, np.integer):
        uneven = ~np.isfinite(values).all(axis=1) | (values != np.round(values)).any(axis=1)
        if uneven.any():
            row = int(np.argmax(uneven))
            raise CorruptBag(
                f"{where}: coordinates of row {row} are {values[row].tolist()}, not whole level-0 pixels.",
                fix="If they are micrometres, say so (coords_unit) and give the slide's mpp.",
            )
    return values.astype(np.int64)


def um_to_l0(where: str, coords_um: npt.NDArray[Any], mpp_l0: float) -> IntArray:
    """Turn micrometres into level-0 pixels, to the nearest pixel."""
    return as_coords_l0(where, np.round(coords_um.astype(np.float64) / mpp_l0))
