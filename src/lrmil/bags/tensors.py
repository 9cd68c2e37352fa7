"""Tensor files (.pt) of other programs, read without running anything that they contain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrmil.bags._foreign_arrays import as_features
from lrmil.bags.bag import Bag
from lrmil.errors import BagError, CorruptBag


def load_tensor_file(path: str | Path) -> Any:
    """Load a .pt file of tensors, numpy arrays, numbers, text, lists and dicts; anything else is refused.

    Raises:
        BagError: there is no such file.
        CorruptBag: it is truncated, or it holds a pickle that would run code.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise BagError(f"{path}: no such feature file.", fix="Check the path.")
    try:
        # TRIDENT pickles numpy arrays, whose rebuilding is harmless but not among torch's own safe types.
        with torch.serialization.safe_globals(_numpy_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        unsafe = "weights_only" in str(error) or "Unsupported global" in str(error)
        raise CorruptBag(
            f"{path}: " + ("it holds objects other than plain arrays." if unsafe else f"unreadable ({error})."),
            fix="Only files of tensors are read, since others could run code; save the plain tensor, or use HDF5.",
        ) from error


def read(path: str | Path) -> Bag:
    """Read CLAM's, slide2vec's or TRIDENT's .pt: features alone. Coordinates are not in it and stay None."""
    value = load_tensor_file(path)
    if isinstance(value, Mapping):
        raise BagError(
            f"{path}: a dict of {', '.join(map(str, list(value)[:6]))}, not one tensor.",
            fix="Files of the LRMIL authors are read by lrmil.bags.authors.",
        )
    return Bag(
        features=as_features(str(path), to_array(value)),
        coords_l0=None,
        slide=Path(path).stem,
        provenance={"source": "tensor file"},
    )


def to_array(value: Any) -> npt.NDArray[Any]:
    """Return a tensor, array or list as a numpy array; bfloat16, which numpy lacks, becomes float32."""
    if hasattr(value, "detach"):
        value = value.detach()
        return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    if isinstance(value, list | tuple) and value and hasattr(value[0], "detach"):
        return np.stack([to_array(v) for v in value])
    return np.asarray(value)


def _numpy_types() -> list[Any]:
    from numpy._core import multiarray

    dtypes = [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8")]
    return [multiarray._reconstruct, np.ndarray, np.dtype, *dtypes]
