"""Numbers cut into bins that hold about as many training slides each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lrmil.geometry import IntArray

FloatArray = npt.NDArray[np.floating]


def quantile_edges(values: FloatArray, bins: int) -> tuple[float, ...]:
    """Return the bins - 1 inner edges, ascending: quantiles 1/bins, 2/bins, ... of `values`, interpolated linearly.

    Edges may coincide where values do; the bin between them is then empty, for training slides and for all others.
    """
    return tuple(float(edge) for edge in np.quantile(values, np.arange(1, bins) / bins))


def bin_of(values: FloatArray, edges: tuple[float, ...]) -> IntArray:
    """Return the bins (S,) of values (S,): bin j goes from edge j-1 to just below edge j, the outer ones on."""
    return np.searchsorted(np.asarray(edges), values, side="right").astype(np.int64)
