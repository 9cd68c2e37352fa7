"""Places on the grid, and who touches whom."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.mil.positions import grid_positions, neighbour_edges


@settings(deadline=None, max_examples=40)
@given(
    step=st.floats(20, 3000),
    columns=st.integers(2, 300),
    rows=st.integers(1, 6),
    seed=st.integers(0, 9),
    offset=st.integers(0, 10_000),
)
def test_positions_rounded_to_whole_pixels_give_their_columns_and_rows(
    step: float, columns: int, rows: int, seed: int, offset: int
) -> None:
    cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
    kept = np.random.default_rng(seed).random(len(cells)) < 0.8
    kept[:2] = True  # two neighbours, so that the step is there to be seen
    cells = np.random.default_rng(seed).permutation(cells[kept])
    found = grid_positions(np.round(cells * step).astype(np.int64) + offset)
    assert np.array_equal(found, cells - cells.min(axis=0))


def test_a_large_grid_does_not_drift_apart() -> None:
    """512.4 px a step, rounded: taking the smallest gap, 512, for the step would be wrong by 1 after 1280 columns."""
    cells = np.stack(np.meshgrid(np.arange(3000), [0, 7]), axis=-1).reshape(-1, 2)
    found = grid_positions(np.round(cells * 512.4))
    assert np.array_equal(found, cells)


def test_no_two_in_a_row_never_make_a_vast_grid() -> None:
    assert grid_positions(np.array([[5, 9]])).tolist() == [[0, 0]]
    assert grid_positions(np.array([[0, 0], [100_000, 7]])).tolist() == [[0, 0], [1, 1]]
    assert grid_positions(np.array([[3, 3], [3, 3]])).tolist() == [[0, 0], [0, 0]]


def test_grids_of_two_outlines_share_one_step() -> None:
    one = np.array([[x * 512, y * 512] for x in range(4) for y in range(4)])
    other = one + np.array([10_000, 137])
    found = grid_positions(np.concatenate([one, other]))
    assert found[:16].max() == 3
    assert np.ptp(found[16:], axis=0).tolist() == [3, 3]
    assert found[16:, 0].min() == round(10_000 / 512)


def test_neighbours_touch_by_side_or_corner() -> None:
    cells = np.array([[0, 0], [1, 0], [2, 1], [5, 5]])
    edges, weights = neighbour_edges(cells)
    found = {(int(a), int(b)): float(w) for (a, b), w in zip(edges.T, weights, strict=True)}
    assert set(found) == {(0, 1), (1, 0), (1, 2), (2, 1)}
    assert found[0, 1] == pytest.approx(1 / np.sqrt(1 * 2))
    assert found[0, 1] == found[1, 0]


def test_alone_there_are_no_neighbours() -> None:
    edges, weights = neighbour_edges(np.array([[0, 0]]))
    assert edges.shape == (2, 0)
    assert weights.shape == (0,)
