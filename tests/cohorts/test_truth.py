"""Truth on disk: what is written is what is read, and polygons are the mask they came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.cohorts.truth import (
    NucleusTable,
    area_mask,
    box_polygon,
    is_finished,
    mask_polygons,
    read_areas,
    read_nuclei,
    write_truth,
)


def _blobs(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:60, :90]
    mask = np.zeros((60, 90), bool)
    for _ in range(4):
        cx, cy, r = rng.uniform(10, 80), rng.uniform(10, 50), rng.uniform(4, 16)
        mask |= (x - cx) ** 2 + (y - cy) ** 2 < r**2
        mask &= ~((x - cx) ** 2 + (y - cy) ** 2 < (r / 2) ** 2)
    return mask


@given(seed=st.integers(0, 10_000), step=st.sampled_from([2.0, 4.0, 8.0]))
@settings(deadline=None, max_examples=25)
def test_polygons_cover_the_mask_holes_left_out(seed: int, step: float) -> None:
    mask = _blobs(seed)
    again = area_mask(mask_polygons(mask, step), (mask.shape[1], mask.shape[0]), step)
    union = (mask | again).sum()
    assert (mask & again).sum() >= 0.85 * union


def test_a_ring_keeps_its_hole_and_its_place() -> None:
    mask = np.zeros((40, 40), bool)
    mask[5:25, 10:38] = True
    mask[10:20, 15:30] = False
    (polygon,) = mask_polygons(mask, 4.0)
    assert len(polygon) == 2
    assert np.abs(polygon[0].min(0) - (40, 20)).max() <= 2  # (x, y) level-0 px, within half a sample
    assert np.abs(polygon[0].max(0) - (152, 100)).max() <= 2
    again = area_mask([polygon], (160, 160), 1.0)
    assert not again[60, 90]
    assert again[30, 90]


def test_files_round_trip(tmp_path: Path) -> None:
    nuclei = NucleusTable(
        np.array([1.5, 2.5], np.float32),
        np.array([3.0, 4.0], np.float32),
        np.array([0, 1], np.uint8),
        np.array([0, 2], np.uint8),
        np.array([True, False]),
        ("a", "b"),
    )
    areas = {"positive": [box_polygon(0, 0, 10, 20)], "tissue": [box_polygon(0, 0, 99, 99), box_polygon(1, 1, 5, 5)]}
    assert not is_finished(tmp_path, "S1", "abc")
    write_truth(tmp_path, "S1", areas, nuclei, {"fingerprint": "abc"})
    assert is_finished(tmp_path, "S1", "abc")
    assert not is_finished(tmp_path, "S1", "other")
    read = read_nuclei(tmp_path / "S1.nuclei.npz")
    assert read.kinds == ("a", "b")
    for name in ("x_l0", "y_l0", "kind", "pattern", "in_positive_area"):
        assert np.array_equal(getattr(read, name), getattr(nuclei, name))
    (area,) = read_areas(tmp_path / "S1.geojson")
    assert area[0].max(0).tolist() == [10, 20]
    assert (area[0][0] == area[0][-1]).all()  # GeoJSON wants closed rings
    assert len(read_areas(tmp_path / "S1.geojson", "tissue")) == 2
