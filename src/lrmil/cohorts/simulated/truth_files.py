"""The truth of a slide on disk: GeoJSON areas (as QuPath reads them), a table of nuclei, and a summary.

truth/S001.geojson        tissue and positive areas, polygons with holes, level-0 pixels
truth/S001.nuclei.npz     x_l0, y_l0 float32 · kind uint8 (index into `kinds`) · pattern uint8 · in_positive_area
truth/S001.json           label, shares, counts, and what the slide was made from; written last
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.cohorts.simulated.nuclei import KINDS
from lrmil.cohorts.simulated.slide import Truth
from lrmil.files import atomic_path, read_json, write_json, write_text


@dataclass(frozen=True)
class NucleusTable:
    """All nuclei of a slide, arrays (N,)."""

    x_l0: npt.NDArray[np.float32]
    y_l0: npt.NDArray[np.float32]
    kind: npt.NDArray[np.uint8]
    pattern: npt.NDArray[np.uint8]
    in_positive_area: npt.NDArray[np.bool_]
    kinds: tuple[str, ...]


def polygons_l0(mask: npt.NDArray[np.bool_], step_px: float) -> list[list[list[list[float]]]]:
    """Outlines of a coarse mask (h, w): polygons, each an outer ring and its holes, closed, points (x, y)."""
    fine = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, tree = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [_ring(np.asarray(cv2.approxPolyDP(c, 0.8, True)), step_px / 2) for c in contours]
    polygons = []
    for row, ring in enumerate(rings):
        if tree[0, row, 3] >= 0 or len(ring) < 4:
            continue
        child, holes = int(tree[0, row, 2]), []
        while child >= 0:
            if len(rings[child]) >= 4:
                holes.append(rings[child])
            child = int(tree[0, child, 0])
        polygons.append([ring, *holes])
    return polygons


def write_truth(folder: Path, slide_id: str, truth: Truth, summary: dict[str, Any]) -> None:
    """Write the three files of a slide, the summary last."""
    features = []
    for name, mask in (("tissue", truth.tissue), ("positive", truth.positive)):
        for polygon in polygons_l0(mask, truth.mask_step_px):
            features.append(
                {
                    "type": "Feature",
                    "geometry": {"type": "Polygon", "coordinates": polygon},
                    "properties": {"objectType": "annotation", "classification": {"name": name}},
                }
            )
    areas = {"type": "FeatureCollection", "features": features}
    write_text(folder / f"{slide_id}.geojson", json.dumps(areas, separators=(",", ":")))
    with atomic_path(folder / f"{slide_id}.nuclei.npz") as scratch:
        np.savez_compressed(
            scratch,
            x_l0=truth.x_px,
            y_l0=truth.y_px,
            kind=truth.kind,
            pattern=truth.pattern,
            in_positive_area=truth.in_positive_area,
            kinds=np.array(KINDS),
        )
    write_json(folder / f"{slide_id}.json", summary)


def read_nuclei(path: Path) -> NucleusTable:
    """Read a table of nuclei."""
    with np.load(path, allow_pickle=False) as arrays:
        return NucleusTable(
            **{n: arrays[n] for n in ("x_l0", "y_l0", "kind", "pattern", "in_positive_area")},
            kinds=tuple(str(k) for k in arrays["kinds"]),
        )


def read_areas(path: Path, name: str = "positive") -> list[list[npt.NDArray[np.float64]]]:
    """Polygons of one name ("positive", "tissue") of a GeoJSON file: lists of rings (M, 2), the outer ring first."""
    features = read_json(path)["features"]
    chosen = [f for f in features if f["properties"]["classification"]["name"] == name]
    return [[np.asarray(ring, np.float64) for ring in f["geometry"]["coordinates"]] for f in chosen]


def area_mask(
    areas: list[list[npt.NDArray[np.float64]]], size_px: tuple[int, int], downsample: float
) -> npt.NDArray[np.bool_]:
    """Rasterise polygons into a mask of `size_px` (w, h) samples, each `downsample` level-0 pixels wide."""
    mask = np.zeros((size_px[1], size_px[0]), np.uint8)
    rings = [np.round((r / downsample - 0.5) * 16).astype(np.int32) for polygon in areas for r in polygon]
    if rings:
        cv2.fillPoly(mask, rings, 1, shift=4)  # the even-odd rule leaves holes empty
    return mask > 0


def _ring(contour: npt.NDArray[Any], step_px: float) -> list[list[float]]:
    points = (contour[:, 0, :].astype(np.float64) + 0.5) * step_px
    ring: list[list[float]] = np.round(points, 1).tolist()
    return [*ring, ring[0]]
