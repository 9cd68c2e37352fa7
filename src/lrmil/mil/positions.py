"""Where instances lie on the grid they were cut from, for heads that ask for rows and columns, or for neighbours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_REGULAR = 0.02
"""how far a gap may be from a whole number of steps, in steps: level-0 positions are rounded to whole pixels"""


def grid_positions(coords: npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> IntArray:
    """Turn positions (N, 2), in any unit, into columns and rows (N, 2) of the grid, both counted from 0.

    The step of the grid is taken from the gaps between instances of one row or column, and is the same in x and y.
    Instances that were cut from several grids, as around separate outlines, may share a place.
    """
    xy = np.asarray(coords, np.float64)
    gaps = np.concatenate([_gaps(xy, along) for along in (0, 1)])
    if not len(gaps):
        # No two instances in one row or column: rank them, which keeps order and never makes a vast empty grid.
        return np.stack([np.unique(xy[:, a], return_inverse=True)[1] for a in (0, 1)], axis=1).astype(np.int64)
    rough = float(np.median(gaps[gaps < 1.5 * gaps.min()]))
    steps = np.round(gaps / rough)
    regular = (steps >= 1) & (np.abs(gaps / rough - steps) <= _REGULAR * steps)
    step = gaps[regular].sum() / steps[regular].sum()
    return np.round((xy - xy.min(axis=0)) / step).astype(np.int64)


def neighbour_edges(cells: IntArray) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """Join places (N, 2) that touch, by a side or a corner.

    Returns:
        Edges (2, E), each pair both ways, and their weights (E,): 1 / sqrt(degree of one x degree of the other).
    """
    from scipy.spatial import KDTree

    pairs = KDTree(cells).query_pairs(1.5, output_type="ndarray")
    edges = np.concatenate([pairs, pairs[:, ::-1]]).T.astype(np.int64)
    degree = np.bincount(edges[0], minlength=len(cells))
    return edges, (degree[edges[0]] * degree[edges[1]]).astype(np.float32) ** -0.5


def _gaps(xy: npt.NDArray[np.float64], along: int) -> npt.NDArray[np.float64]:
    """Distances between successive instances that agree in the other coordinate."""
    order = np.lexsort((xy[:, along], xy[:, 1 - along]))
    moves = np.diff(xy[order], axis=0)
    return moves[(moves[:, 1 - along] == 0) & (moves[:, along] > 0), along]
