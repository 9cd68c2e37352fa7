"""The truth of a slide on disk: areas as GeoJSON (which QuPath reads), a table of nuclei, and a summary.

truth/S001.geojson        named areas, polygons with holes, level-0 pixels
truth/S001.nuclei.npz     x_l0, y_l0 float32 · kind uint8 (index into `kinds`) · pattern uint8 · in_positive_area
truth/S001.json           label, shares, counts, and what the slide was made from; written last
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.files import atomic_path, read_json, write_json, write_text

FloatArray = npt.NDArray[np.float64]
Polygon = Sequence[FloatArray]
"""Rings (M, 2) of points (x, y) in level-0 pixels, the outer ring first, then its holes."""

_ARRAYS = ("x_l0", "y_l0", "kind", "pattern", "in_positive_area")


@dataclass(frozen=True)
class NucleusTable:
    """All nuclei of a slide, arrays (N,)."""

    x_l0: npt.NDArray[np.float32]
    y_l0: npt.NDArray[np.float32]
    kind: npt.NDArray[np.uint8]
    """index into `kinds`"""
    pattern: npt.NDArray[np.uint8]
    """simulated nuclei: 0 fine chromatin, else the label whose pattern it shows; 0 for real ones"""
    in_positive_area: npt.NDArray[np.bool_]
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.x_l0)


def mask_polygons(mask: npt.NDArray[np.bool_], step_px: float) -> list[Polygon]:
    """Outlines of a coarse mask (h, w) whose samples are `step_px` level-0 pixels wide."""
    fine = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, tree = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [_points(cv2.approxPolyDP(c, 0.8, True)) * (step_px / 2) for c in contours]
    polygons: list[Polygon] = []
    for row, ring in enumerate(rings):
        if tree[0, row, 3] >= 0 or len(ring) < 3:
            continue
        child, holes = int(tree[0, row, 2]), []
        while child >= 0:
            if len(rings[child]) >= 3:
                holes.append(rings[child])
            child = int(tree[0, child, 0])
        polygons.append([ring, *holes])
    return polygons


def box_polygon(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    """A rectangle as a polygon."""
    return [np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)]


def write_truth(
    folder: Path, slide_id: str, areas: Mapping[str, Sequence[Polygon]], nuclei: NucleusTable, summary: dict[str, Any]
) -> None:
    """Write the three files of a slide, the summary last. `areas` maps a name ("positive", "tissue") to polygons."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [_closed(ring) for ring in polygon]},
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for name, polygons in areas.items()
        for polygon in polygons
    ]
    collection = {"type": "FeatureCollection", "features": features}
    write_text(folder / f"{slide_id}.geojson", json.dumps(collection, separators=(",", ":")))
    with atomic_path(folder / f"{slide_id}.nuclei.npz") as scratch:
        np.savez_compressed(scratch, kinds=np.array(nuclei.kinds), **{n: getattr(nuclei, n) for n in _ARRAYS})
    write_json(folder / f"{slide_id}.json", summary)


def forget_truth(folder: Path, slide_id: str) -> None:
    """Take away what says that a slide is finished; to be done before its pixels are written anew."""
    (folder / f"{slide_id}.json").unlink(missing_ok=True)


def read_nuclei(path: Path) -> NucleusTable:
    """Read a table of nuclei."""
    with np.load(path, allow_pickle=False) as arrays:
        return NucleusTable(**{n: arrays[n] for n in _ARRAYS}, kinds=tuple(str(k) for k in arrays["kinds"]))


def read_areas(path: Path, name: str = "positive") -> list[Polygon]:
    """Polygons of one name ("positive", "tissue") of a GeoJSON file."""
    features = read_json(path)["features"]
    chosen = [f for f in features if f["properties"]["classification"]["name"] == name]
    return [[np.asarray(ring, np.float64) for ring in f["geometry"]["coordinates"]] for f in chosen]


def area_mask(areas: Sequence[Polygon], size_px: tuple[int, int], downsample: float) -> npt.NDArray[np.bool_]:
    """Rasterise polygons into a mask of `size_px` (w, h) samples, each `downsample` level-0 pixels wide."""
    mask = np.zeros((size_px[1], size_px[0]), np.uint8)
    for polygon in areas:  # one at a time: within a polygon the even-odd rule leaves its holes empty
        rings = [np.round((ring / downsample - 0.5) * 16).astype(np.int32) for ring in polygon]
        layer = np.zeros_like(mask)
        cv2.fillPoly(layer, rings, 1, shift=4)
        mask |= layer
    return mask > 0


def is_finished(folder: Path, slide_id: str, fingerprint: str) -> bool:
    """Whether the truth of a slide is there and states `fingerprint`."""
    summary = folder / f"{slide_id}.json"
    return summary.is_file() and read_json(summary).get("fingerprint") == fingerprint


def _points(contour: Any) -> FloatArray:
    """Centres of contour pixels (N, 1, 2), measured from the corner of the image."""
    return np.asarray(contour, np.float64)[:, 0, :] + 0.5


def _closed(ring: FloatArray) -> list[list[float]]:
    points: list[list[float]] = np.round(ring, 1).tolist()
    return [*points, points[0]]
