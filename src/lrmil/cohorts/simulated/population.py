"""Where every nucleus of a scene lies, what it is and how it looks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from lrmil.cohorts.simulated.architecture import Layout
from lrmil.cohorts.simulated.fields import STEP_UM, Field2D, jittered_grid, sample
from lrmil.cohorts.simulated.nuclei import (
    DUST,
    EPITHELIAL,
    FIBROBLAST,
    LYMPHOCYTE,
    MITOSIS,
    PLASMA,
    PYKNOTIC,
    RED_CELL,
    VACUOLE,
)
from lrmil.cohorts.simulated.settings import NucleusSettings

Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """All nuclei (and red cells) of a scene: arrays (N,), in the order in which they are painted."""

    x_um: npt.NDArray[np.float64]
    y_um: npt.NDArray[np.float64]
    kind: npt.NDArray[np.uint8]
    pattern: npt.NDArray[np.uint8]
    """0: the fine pattern; else the label whose pattern it shows"""
    in_area: npt.NDArray[np.bool_]
    """inside a positive area"""
    sprite: npt.NDArray[np.int64]
    angle: npt.NDArray[np.float64]
    size: npt.NDArray[np.float64]
    darkness: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.x_um)

    def take(self, rows: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Population:
        """Return some of them."""
        return Population(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


def populate(
    rng: np.random.Generator,
    layout: Layout,
    nuclei: NucleusSettings,
    classes: int,
    label: int,
    dust_um: Points | None = None,
) -> Population:
    """Place the nuclei of one scene whose positive areas, if any, show the pattern of `label`."""
    epithelium, gland, normal = _epithelium(rng, layout)
    stroma, stroma_kind, stroma_angle = _stroma(rng, layout)
    count = len(epithelium)
    in_area = layout.glands.positive[gland] if count else np.zeros(0, bool)
    share = np.where(in_area, nuclei.atypical_share, nuclei.background_atypical_share)
    atypical = rng.uniform(size=count) < share
    stray = rng.integers(1, classes, count)
    pattern_of_area = np.where(in_area, label, stray)
    kind = np.full(count, EPITHELIAL)
    draw = rng.uniform(size=count)
    kind[draw < np.where(in_area, nuclei.mitoses, 0.1 * nuclei.mitoses)] = MITOSIS
    kind[draw > 0.992] = PYKNOTIC
    plain = kind == EPITHELIAL
    pattern = np.where(atypical & plain, pattern_of_area, 0)
    size = 1 + nuclei.size_sd * layout.glands.size[gland]
    darkness = 1 + nuclei.absorbance_sd * layout.glands.darkness[gland]
    # what survives at 5x: only this, and it is zero at visibility 0
    shown = (pattern > 0) * nuclei.visibility * nuclei.pattern_strength
    size = size * (1 + 0.22 * shown)
    darkness = darkness * (1 + 0.25 * shown)
    angle = normal + rng.normal(0, 0.35, count)

    vacuoles = _vacuoles(rng, layout)
    dust = np.zeros((0, 2)) if dust_um is None else dust_um
    counts = [len(vacuoles), len(stroma), count, len(dust)]
    ones = [rng.normal(1, 0.06, (2, n)) for n in counts]
    ones[2] = np.stack([size, darkness])
    turns = [rng.uniform(0, math.pi, n) for n in counts]
    turns[1], turns[2] = stroma_angle, angle
    plainly = [np.zeros(n, int) for n in counts]
    x, y = np.concatenate([vacuoles, stroma, epithelium, dust]).T
    population = Population(
        x_um=x,
        y_um=y,
        kind=np.concatenate([plainly[0] + VACUOLE, stroma_kind, kind, plainly[3] + DUST]).astype(np.uint8),
        pattern=np.concatenate([*plainly[:2], pattern, plainly[3]]).astype(np.uint8),
        in_area=np.concatenate([plainly[0] > 0, sample(layout.positive, stroma), in_area, plainly[3] > 0]),
        sprite=rng.integers(0, 1 << 30, len(x)),
        angle=np.concatenate(turns),
        size=np.concatenate([s for s, _ in ones]),
        darkness=np.concatenate([d for _, d in ones]),
    )
    inside = (x >= 0) & (y >= 0) & (x < layout.width_um) & (y < layout.height_um)
    return population.take(inside)


def _epithelium(rng: np.random.Generator, layout: Layout) -> tuple[Points, npt.NDArray[np.int64], Points]:
    """Nuclei in rows that follow the outline of their gland; their glands, and the direction across the wall."""
    points = jittered_grid(rng, layout.width_um, layout.height_um, 6.2, 0.6)
    depth = sample(layout.gland_um, points)
    lumen = sample(layout.lumen_um, points)
    points = points[(depth > 2.5) & (lumen < -3.5)]
    slope_y, slope_x = _gradient(layout.gland_um)
    slope = np.stack([sample(slope_x, points), sample(slope_y, points)], axis=1)
    length = np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 0.3)
    depth = sample(layout.gland_um, points)
    row = np.floor(depth / 9.5)
    wanted = 5.6 + 9.5 * row + rng.normal(0, 1.3, len(points))
    points = points + np.clip((wanted - depth) / length[:, 0], -5, 5)[:, None] * slope / length
    # the first row, along the basement membrane, is the fullest, as in columnar epithelium
    priority = rng.uniform(size=len(points)) + 0.5 * (row == 0)
    spacing = 7.4
    thinned = rng.uniform(size=len(points)) < np.where(row == 0, 1.0, 0.62)
    keep = _thin(points, priority, spacing) & thinned
    keep &= (sample(layout.gland_um, points) > 2.5) & (sample(layout.lumen_um, points) < -2.5)
    points = points[keep]
    gland = sample(layout.gland_id, points).astype(np.int64)
    ok = gland >= 0
    direction = np.arctan2(slope[keep][ok, 1], slope[keep][ok, 0])
    return points[ok], gland[ok], direction


def _vacuoles(rng: np.random.Generator, layout: Layout) -> Points:
    """Droplets of mucin between the nuclei and the lumen of mucinous glands."""
    points = jittered_grid(rng, layout.width_um, layout.height_um, 8.5, 0.35)
    gland = sample(layout.gland_id, points)
    apical = (gland >= 0) & (sample(layout.gland_um, points) > 9) & (sample(layout.lumen_um, points) < -3)
    points, gland = points[apical], gland[apical]
    if not len(points):
        return points
    return points[rng.uniform(size=len(points)) < 1.4 * layout.glands.mucin[gland]]


def _stroma(rng: np.random.Generator, layout: Layout) -> tuple[Points, npt.NDArray[np.int64], Points]:
    """Fibroblasts along the fibres, lymphocytes and plasma cells, red cells in small groups."""
    points = jittered_grid(rng, layout.width_um, layout.height_um, 6.6, 0.85)
    outside = (sample(layout.gland_um, points) < -1.5) & (sample(layout.tissue_um, points) > 4)
    outside &= sample(layout.fat_um, points) < -1.0
    points = points[outside]
    inflamed = sample(layout.inflammation, points)
    fat_near = sample(layout.fat_um, points) > -6
    near_gland = sample(layout.gland_um, points) > -9
    lymph = 0.016 + 0.75 * inflamed**1.5
    fibro = 0.055 + 0.06 * near_gland - 0.03 * fat_near
    draw = rng.uniform(size=len(points))
    kind = np.full(len(points), -1)
    kind[draw < lymph] = LYMPHOCYTE
    kind[(draw >= lymph) & (draw < lymph + fibro)] = FIBROBLAST
    plasma = (kind == LYMPHOCYTE) & (rng.uniform(size=len(points)) < 0.22)
    kind[plasma] = PLASMA
    points, kind = points[kind >= 0], kind[kind >= 0]

    slope_y, slope_x = _gradient(layout.fibre_across_um)
    along = np.arctan2(sample(slope_y, points), sample(slope_x, points)) + math.pi / 2
    angle = along + rng.normal(0, 0.25, len(points))
    round_ones = kind != FIBROBLAST
    angle[round_ones] = rng.uniform(0, math.pi, int(round_ones.sum()))

    red, red_angle = _red_cells(rng, layout)
    points = np.concatenate([red, points])
    kind = np.concatenate([np.full(len(red), RED_CELL), kind])
    return points, kind, np.concatenate([red_angle, angle])


def _red_cells(rng: np.random.Generator, layout: Layout) -> tuple[Points, Points]:
    """Small vessels' worth of red cells: groups along the fibres, in the stroma."""
    area_mm2 = layout.width_um * layout.height_um * 1e-6
    centres = rng.uniform(0, 1, (rng.poisson(26 * area_mm2), 2)) * (layout.width_um, layout.height_um)
    ok = (sample(layout.gland_um, centres) < -7) & (sample(layout.tissue_um, centres) > 14)
    centres = centres[ok & (sample(layout.fat_um, centres) < -3)]
    slope_y, slope_x = _gradient(layout.fibre_across_um)
    angle = np.arctan2(sample(slope_y, centres), sample(slope_x, centres)) + math.pi / 2
    groups = []
    for centre, turn in zip(centres, angle, strict=True):
        number = int(rng.integers(3, 16))
        spread = rng.normal(0, 1, (number, 2)) * (2.2 * math.sqrt(number), 2.6)
        groups.append(centre + spread @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]))
    red = np.concatenate(groups) if groups else np.zeros((0, 2))
    red = red[sample(layout.gland_um, red) < -3] if len(red) else red
    return red, rng.uniform(0, math.pi, len(red))


def _gradient(field: Field2D) -> tuple[Field2D, Field2D]:
    """Slope of a coarse field along y and along x, per um."""
    along_y, along_x = np.gradient(field, STEP_UM)
    return np.asarray(along_y, np.float32), np.asarray(along_x, np.float32)


def _thin(points: Points, priority: npt.NDArray[np.float64], spacing_um: float) -> npt.NDArray[np.bool_]:
    """Keep points no two of which are nearer than `spacing_um`, those of higher priority first."""
    alive = np.ones(len(points), bool)
    kept = np.zeros(len(points), bool)
    pairs = cKDTree(points).query_pairs(spacing_um, output_type="ndarray") if len(points) else np.zeros((0, 2), int)
    while alive.any():
        beaten = np.zeros(len(points), bool)
        a, b = pairs[:, 0], pairs[:, 1]
        first_wins = priority[a] > priority[b]
        beaten[np.where(first_wins, b, a)] = True
        winners = alive & ~beaten
        kept |= winners
        alive &= ~winners
        alive[np.concatenate([b[winners[a]], a[winners[b]]])] = False
        pairs = pairs[alive[a] & alive[b]]
    return kept
