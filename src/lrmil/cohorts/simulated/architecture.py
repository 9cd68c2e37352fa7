"""The layout of a piece of tissue, in um: outline, glands, fat, lymphocytes, fibres, positive areas.

A layout knows nothing of pixels, so that it can be painted at any pixel size and in any window (`painter`). Glands, fat
cells and the parcels that hold them are cells of warped Voronoi diagrams; half the difference between the distances to
the nearest and to the second nearest seed serves as distance from the wall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from lrmil.cohorts.simulated.fields import STEP_UM, Field2D, fractal_noise, jittered_grid, sample, smooth_noise
from lrmil.cohorts.simulated.settings import TissueSettings

Points = npt.NDArray[np.float64]
PARCEL_UM = 215.0
GLANDULAR, STROMAL, FATTY, INFLAMED = range(4)


@dataclass(frozen=True)
class Glands:
    """Properties of each gland, arrays (G,)."""

    centre_um: Points
    positive: npt.NDArray[np.bool_]
    disorder: npt.NDArray[np.float32]
    """0 orderly .. 1 crowded, irregular, with narrow or several lumina"""
    wall_um: npt.NDArray[np.float32]
    """thickness of the epithelium"""
    mucin: npt.NDArray[np.float32]
    """0 to 1, how full of mucin droplets its cells are"""
    content: npt.NDArray[np.float32]
    """0 to 1, how full of secretion its lumen is"""
    size: npt.NDArray[np.float32]
    """factor on the size of its nuclei, whatever its class"""
    darkness: npt.NDArray[np.float32]
    """factor on the absorbance of its nuclei, whatever its class"""


@dataclass(frozen=True)
class Layout:
    """Fields (h, w) on the coarse grid. Lengths in um."""

    width_um: float
    height_um: float
    tissue_um: Field2D
    """distance inside the outline of the tissue, about; negative outside"""
    gland_um: Field2D
    """distance inside the outline of the gland; negative outside glands"""
    lumen_um: Field2D
    """distance inside the lumen; negative outside lumina"""
    gland_id: npt.NDArray[np.int32]
    """row in `glands`, -1 outside glands"""
    lumen_content: Field2D
    """0 to 1, how full of secretion lumina are here"""
    fat_um: Field2D
    """distance inside a fat cell; negative outside fat cells"""
    inflammation: Field2D
    """0 to 1, how densely lymphocytes lie"""
    looseness: Field2D
    """0 to 1, how loose the stroma is"""
    fibre_along_um: Field2D
    fibre_across_um: Field2D
    """coordinates along and across the fibres of the stroma"""
    glands: Glands
    positive: npt.NDArray[np.bool_]
    """(h, w) inside a positive area"""


@dataclass(frozen=True)
class Wish:
    """What a scene is to hold. `lay_out` comes as near as the tissue allows."""

    positive_share: float
    """share of the tissue that is positive"""
    foci: int
    outline: Literal["pieces", "whole", "edge"] = "pieces"
    """whole pieces on glass; or, as in a tile cut from a slide, tissue everywhere or up to one edge"""
    pieces: int = 1
    spacing_factor: float = 1.0


def lay_out(rng: np.random.Generator, tissue: TissueSettings, width_um: float, height_um: float, wish: Wish) -> Layout:
    """Draw the layout of one scene."""
    shape = (math.ceil(height_um / STEP_UM), math.ceil(width_um / STEP_UM))
    outline = _outline(rng, shape, tissue.tissue_share, wish)
    grid = _grid(shape)
    warp = np.stack([smooth_noise(rng, shape, s) for s in (60, 60, 25, 25)], axis=-1)

    parcel_seed = jittered_grid(rng, width_um, height_um, PARCEL_UM, 0.8)
    parcel_type = _parcel_types(rng, parcel_seed, tissue)
    warped = grid + 26 * warp[..., :2] + 6 * warp[..., 2:]
    _, nearest = cKDTree(parcel_seed).query(warped.reshape(-1, 2), k=1)
    parcel = parcel_type[nearest].reshape(shape)
    inside = outline > 0

    spacing = tissue.gland_spacing_um * wish.spacing_factor
    stretch = _stretch(rng)
    seeds = _stretched_grid(rng, width_um, height_um, spacing, stretch)
    held = (sample(parcel, seeds) == GLANDULAR) & (sample(outline, seeds) > 0.15 * spacing)
    seeds = seeds[held]
    # a stream of its own, so that twins with and without positive areas agree in everything else
    focus_rng = np.random.default_rng(int(rng.integers(1 << 62)))
    positive = _choose_positive(focus_rng, seeds, inside, spacing, wish)
    glands = _draw_glands(rng, seeds, positive, tissue, shape)
    gland_um, lumen_um, gland_id = _gland_fields(rng, glands, grid, warp, spacing, stretch, shape)
    gland_um = np.minimum(gland_um, outline - 6)
    gland_id[gland_um <= 0] = -1
    lumen_um = np.where(gland_id >= 0, lumen_um, -50).astype(np.float32)
    content = np.zeros(shape, np.float32)
    content[gland_id >= 0] = glands.content[gland_id[gland_id >= 0]]

    fat_um = _fat(rng, grid, warp, parcel == FATTY, width_um, height_um)
    fat_um = np.minimum(fat_um, -gland_um - 4)
    inflamed = cv2.GaussianBlur((parcel == INFLAMED).astype(np.float32), (0, 0), 14 / STEP_UM)
    inflammation = np.clip(inflamed * (0.75 + 0.35 * smooth_noise(rng, shape, 60)), 0, 1)
    near_gland = np.clip(1 + gland_um / 30, 0, 1)
    looseness = np.clip(0.42 + 0.22 * fractal_noise(rng, shape, 220, 3) + 0.25 * near_gland, 0, 1)
    along, across = _fibres(rng, grid, shape, gland_um)

    area = _positive_area(gland_id, glands.positive) & inside
    # fields that end in a cliff would ring when they are interpolated to pixels
    outline, gland_um, lumen_um, fat_um = (np.clip(f, -9, 60) for f in (outline, gland_um, lumen_um, fat_um))
    return Layout(
        width_um, height_um, outline, gland_um, lumen_um, gland_id, content, fat_um, inflammation.astype(np.float32),
        looseness.astype(np.float32), along, across, glands, area,
    )  # fmt: skip


def _grid(shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    return np.stack([(x + 0.5) * np.float32(STEP_UM), (y + 0.5) * np.float32(STEP_UM)], axis=-1)


def _outline(rng: np.random.Generator, shape: tuple[int, int], share: float, wish: Wish) -> Field2D:
    """Distance inside the tissue; pieces together cover `share` of the field."""
    if wish.outline == "whole":
        return np.full(shape, 1e3, np.float32)
    h, w = shape[0] * STEP_UM, shape[1] * STEP_UM
    grid = _grid(shape)
    if wish.outline == "edge":
        turn, cut = rng.uniform(0, 2 * math.pi), rng.uniform(-0.15, 0.4)
        along = (grid[..., 0] / w - 0.5) * math.cos(turn) + (grid[..., 1] / h - 0.5) * math.sin(turn)
        return np.asarray((along + cut) * min(h, w) + 9 * fractal_noise(rng, shape, 110, 4), np.float32)
    pieces = wish.pieces
    rough = 0.06 * min(h, w) * fractal_noise(rng, shape, 0.3 * min(h, w), 4) + 2.5 * fractal_noise(rng, shape, 24, 3)
    level = np.full(shape, -np.inf, np.float32)
    tilt = rng.uniform(0, math.pi)
    for piece in range(pieces):
        # pieces lie side by side across the direction of `tilt`
        offset = (piece - (pieces - 1) / 2) * 0.92 / pieces
        cx = w * (0.5 - offset * math.sin(tilt)) + rng.normal(0, 0.02 * w)
        cy = h * (0.5 + offset * math.cos(tilt)) + rng.normal(0, 0.02 * h)
        turn = tilt + rng.normal(0, 0.15)
        along = (grid[..., 0] - cx) * math.cos(turn) + (grid[..., 1] - cy) * math.sin(turn)
        across = -(grid[..., 0] - cx) * math.sin(turn) + (grid[..., 1] - cy) * math.cos(turn)
        half_along, half_across = 0.46 * max(h, w), 0.46 * max(h, w) / pieces**1.15
        radius = (np.abs(along / half_along) ** 2.6 + np.abs(across / half_across) ** 2.6) ** (1 / 2.6)
        level = np.maximum(level, (1 - radius) * np.float32(half_across))
    level += rough
    border = np.minimum.reduce([grid[..., 0], grid[..., 1], w - grid[..., 0], h - grid[..., 1]])
    level = np.minimum(level, border - 12 + 0.4 * rough)
    return (level - np.quantile(level, 1 - share)).astype(np.float32)


def _parcel_types(rng: np.random.Generator, seeds: Points, tissue: TissueSettings) -> npt.NDArray[np.int64]:
    """Deal types to parcels by quota, so that every scene has its share of each, in patches of neighbours."""
    gland, fat, inflamed = tissue.gland_share, tissue.fat_share, tissue.inflamed_share
    score = rng.uniform(0, 1, len(seeds))
    edges = np.cumsum([gland, 1 - gland - fat - inflamed, fat])
    order = (np.argsort(np.argsort(score)) + rng.uniform()) / len(seeds)
    types: npt.NDArray[np.int64] = np.searchsorted(edges, order % 1.0, side="right").astype(np.int64)
    return np.minimum(types, INFLAMED)


def _choose_positive(
    rng: np.random.Generator, seeds: Points, inside: npt.NDArray[np.bool_], spacing: float, wish: Wish
) -> npt.NDArray[np.bool_]:
    """Mark the glands nearest to a few foci until their cells make up the wanted share of the tissue."""
    chosen = np.zeros(len(seeds), bool)
    if wish.positive_share <= 0 or not len(seeds):
        return chosen
    area_um2 = inside.sum() * STEP_UM**2
    cell_um2 = spacing**2 * math.sqrt(3) / 2
    wanted = min(max(1, round(wish.positive_share * area_um2 / cell_um2)), len(seeds))
    foci = seeds[rng.choice(len(seeds), min(wish.foci, len(seeds)), replace=False)]
    distance = np.linalg.norm(seeds[:, None] - foci[None], axis=-1) / rng.uniform(0.7, 1.3, len(foci))
    nearest = distance.min(1) + rng.normal(0, 0.2 * spacing, len(seeds))
    chosen[np.argsort(nearest)[:wanted]] = True
    return chosen


def _draw_glands(
    rng: np.random.Generator,
    seeds: Points,
    positive: npt.NDArray[np.bool_],
    tissue: TissueSettings,
    shape: tuple[int, int],
) -> Glands:
    count = len(seeds)
    # disorder and nuclear look drift over hundreds of um in every slide: benign variation that a reader has to see past
    drift = [sample(smooth_noise(rng, shape, 330), seeds) for _ in range(4)]
    disorder = 0.32 + 0.17 * drift[0] + rng.normal(0, 0.10, count) + 0.55 * tissue.architecture * positive
    disorder = np.clip(disorder, 0, 1)
    wall = rng.normal(15.5, 2.0, count) + 15 * disorder
    return Glands(
        centre_um=seeds,
        positive=positive,
        disorder=disorder.astype(np.float32),
        wall_um=wall.astype(np.float32),
        mucin=np.clip(0.9 * drift[3] - 0.55 + rng.normal(0, 0.15, count), 0, 1).astype(np.float32),
        content=np.clip(rng.uniform(-2.0, 1.0, count), 0, 1).astype(np.float32),
        size=np.clip(drift[1] * 0.7 + rng.normal(0, 0.7, count), -2.5, 2.5).astype(np.float32),
        darkness=np.clip(drift[2] * 0.7 + rng.normal(0, 0.7, count), -2.5, 2.5).astype(np.float32),
    )


def _gland_fields(
    rng: np.random.Generator,
    glands: Glands,
    grid: npt.NDArray[np.float32],
    warp: npt.NDArray[np.float32],
    spacing: float,
    stretch: Points,
    shape: tuple[int, int],
) -> tuple[Field2D, Field2D, npt.NDArray[np.int32]]:
    """Distance inside the gland, inside its lumen, and its row."""
    gland_um = np.full(shape, -50, np.float32)
    lumen_um = np.full(shape, -50, np.float32)
    gland_id = np.full(shape, -1, np.int32)
    if len(glands.centre_um) < 2:
        return gland_um, lumen_um, gland_id
    near = cv2.distanceTransform(_away(glands.centre_um, shape), cv2.DIST_L2, 3) < 1.1 * spacing / STEP_UM
    points = grid[near] + 5.0 * warp[near][:, :2] + 3.0 * warp[near][:, 2:]
    relax = np.linalg.inv(stretch)
    distance, index = _two_nearest(glands.centre_um @ relax, points @ relax)
    first = index[:, 0]
    disorder = glands.disorder[first]
    septum = 5.5 - 4.3 * disorder
    reach = spacing * (0.52 + 0.08 * disorder)
    rough = fractal_noise(rng, shape, 26, 2)[near]
    inside = np.minimum((distance[:, 1] - distance[:, 0]) / 2 - septum, reach - distance[:, 0])
    inside = inside + (0.8 + 3.2 * disorder) * rough
    # disordered glands have small extra lumina instead of one round one
    holes = smooth_noise(rng, shape, 22)[near]
    lumen = np.maximum(inside - glands.wall_um[first], (holes - 2.0 + 0.5 * disorder) * 8)
    lumen = np.minimum(lumen, inside - 8)
    gland_um[near] = inside
    lumen_um[near] = lumen
    gland_id[near] = np.where(inside > 0, first, -1)
    return gland_um, lumen_um, gland_id


def _two_nearest(seeds: Points, points: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Distances (P, 2) of points from their two nearest seeds, and the seeds' rows (P, 2)."""
    distance, index = cKDTree(seeds).query(points, k=2)
    return np.asarray(distance), np.asarray(index)


def _stretch(rng: np.random.Generator) -> Points:
    """A symmetric matrix (2, 2) of determinant 1 that draws all glands of a scene out in one direction."""
    turn, factor = rng.uniform(0, math.pi), math.sqrt(rng.uniform(1.0, 1.6))
    axis = np.array([math.cos(turn), math.sin(turn)])
    along = np.outer(axis, axis)
    return factor * along + (np.eye(2) - along) / factor


def _stretched_grid(
    rng: np.random.Generator, width_um: float, height_um: float, spacing: float, stretch: Points
) -> Points:
    side = 1.3 * math.hypot(width_um, height_um)
    points = (jittered_grid(rng, side, side, spacing, 0.55) - side / 2) @ stretch + (width_um / 2, height_um / 2)
    near = (points > -spacing).all(1) & (points < (width_um + spacing, height_um + spacing)).all(1)
    return points[near]


def _away(points: Points, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """1 everywhere but at the points (which may lie outside, and are then left out)."""
    image = np.ones(shape, np.uint8)
    cell = (points / STEP_UM).astype(np.int64)
    ok = (cell[:, 0] >= 0) & (cell[:, 1] >= 0) & (cell[:, 0] < shape[1]) & (cell[:, 1] < shape[0])
    image[cell[ok, 1], cell[ok, 0]] = 0
    return image


def _fat(
    rng: np.random.Generator,
    grid: npt.NDArray[np.float32],
    warp: npt.NDArray[np.float32],
    fatty: npt.NDArray[np.bool_],
    width_um: float,
    height_um: float,
) -> Field2D:
    """Distance inside fat cells, which fill the fatty parcels."""
    fat_um = np.full(fatty.shape, -50, np.float32)
    if not fatty.any():
        return fat_um
    seeds = jittered_grid(rng, width_um, height_um, 58, 0.7)
    distance, _ = _two_nearest(seeds, grid[fatty] + 3.0 * warp[fatty][:, 2:])
    fat_um[fatty] = (distance[:, 1] - distance[:, 0]) / 2 - 0.7
    # Where all is fat there is no edge, and the distance to it is the largest float.
    edge = np.minimum(cv2.distanceTransform(fatty.astype(np.uint8), cv2.DIST_L2, 3), 1e6) * STEP_UM
    return np.minimum(fat_um, edge - 4).astype(np.float32)


def _fibres(
    rng: np.random.Generator, grid: npt.NDArray[np.float32], shape: tuple[int, int], gland_um: Field2D
) -> tuple[Field2D, Field2D]:
    """Coordinates along and across wavy fibres that bend around glands."""
    tilt = rng.uniform(0, math.pi)
    around = cv2.GaussianBlur(np.clip(gland_um, -40, 10), (0, 0), 20 / STEP_UM)
    bend = [smooth_noise(rng, shape, s) * a for s, a in ((420, 110), (420, 110), (90, 9), (38, 2.6))]
    along = grid[..., 0] * math.cos(tilt) + grid[..., 1] * math.sin(tilt) + bend[0]
    across = -grid[..., 0] * math.sin(tilt) + grid[..., 1] * math.cos(tilt) + bend[1] + bend[2] + bend[3]
    return along.astype(np.float32), (across + 1.1 * around).astype(np.float32)


def _positive_area(gland_id: npt.NDArray[np.int32], positive: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Positive glands with the stroma between them."""
    if not positive.any():
        return np.zeros(gland_id.shape, bool)
    mask = ((gland_id >= 0) & positive[np.maximum(gland_id, 0)]).astype(np.uint8)
    side = 2 * round(12 / STEP_UM) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    closed = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel)
    other = (gland_id >= 0) & (mask == 0)
    return (closed > 0) & ~other
