"""Nuclei as sprites: shape, chromatin, membrane and nucleoli, drawn once per cohort and pasted thousands of times.

The fine evidence lives here. Chromatin patterns differ in grain, clumping, membrane and nucleoli, while each sprite is
scaled until the *light* that passes through it is the one drawn for it from one and the same distribution. Equal
light, rather than equal absorbance, is what makes patterns equal to a detector that averages over the nucleus: light is
averaged after the exponential of Beer and Lambert, so that a clumped nucleus of equal absorbance would look paler from
afar.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.cohorts.simulated.settings import NucleusSettings

FloatArray = npt.NDArray[np.float32]

KINDS = ("epithelial", "fibroblast", "lymphocyte", "plasma", "mitosis", "pyknotic")
EPITHELIAL, FIBROBLAST, LYMPHOCYTE, PLASMA, MITOSIS, PYKNOTIC = range(6)
RED_CELL, VACUOLE, DUST = 6, 7, 8
"""Not nuclei, and no part of the truth: red blood cells and droplets of mucin, which hold no haematoxylin; dust."""

SPRITE_STEP_UM = 0.25
SPRITE_SIDE = 80
_PREFILTER_UM = 0.15
_DETECTOR = 0.68
"""Optical density per unit of haematoxylin, averaged over red and green, where nuclei absorb."""


@dataclass(frozen=True)
class Chromatin:
    """One chromatin pattern. Lengths in um, amplitudes relative to the mean absorbance."""

    grain_um: float = 0.30
    grain: float = 0.17
    clump_um: float = 0.4
    clump: float = 0.12
    stripe: float = 1.0
    """elongation of the grain along the nucleus"""
    membrane: float = 0.0
    """contrast of the rim, beyond the one that all nuclei have"""
    nucleoli: float = 0.7
    """mean number"""
    nucleolus_um: float = 0.42
    nucleolus: float = 0.5


FINE = Chromatin()
POSITIVE_PATTERNS = (
    Chromatin(clump_um=0.38, clump=0.80, membrane=0.25, nucleoli=1.6, nucleolus_um=0.70, nucleolus=2.6),
    Chromatin(clump=0.05, membrane=0.8, nucleoli=1.0, nucleolus_um=1.1, nucleolus=2.6),
    Chromatin(grain_um=0.42, grain=0.55, membrane=0.1, nucleoli=0.0),
    Chromatin(grain=0.02, clump=0.02, membrane=-0.3, nucleoli=0.0),
    Chromatin(grain_um=0.38, grain=0.50, stripe=5.0, membrane=0.1, nucleoli=0.0),
    Chromatin(grain=0.10, membrane=0.1, nucleoli=4.5, nucleolus_um=0.6, nucleolus=1.3),
)
"""Patterns of labels 1, 2, ...: coarse clumps with nucleoli; vesicular with one large nucleolus; salt and pepper;
smudged; barred; many small nucleoli."""

COARSE_UM = 0.45
"""Gaussian width of what counts as coarse texture: half the contrast of a period of 3.4 um and four fifths of one
of 6 um. 5x resolves periods above 4 um."""


@dataclass(frozen=True)
class Atlas:
    """Sprites (n, side, side, 2) of one kind: coverage 0..1, and coverage x stain concentration. Long axis along x."""

    sprites: FloatArray

    def __len__(self) -> int:
        return len(self.sprites)


def blend(strength: float, pattern: Chromatin) -> Chromatin:
    """Return the pattern `strength` of the way from the fine one to `pattern`; 0 gives the fine one."""
    names = Chromatin.__dataclass_fields__
    values = {n: getattr(FINE, n) + strength * (getattr(pattern, n) - getattr(FINE, n)) for n in names}
    floors = {"membrane": -0.3, "grain_um": 0.2, "clump_um": 0.3, "stripe": 1.0, "nucleolus_um": 0.2}
    return Chromatin(**{n: max(v, floors.get(n, 0.0)) for n, v in values.items()})


@lru_cache(maxsize=4)
def build_atlases(settings: NucleusSettings, classes: int, seed: int) -> dict[tuple[int, int], Atlas]:
    """Draw all sprites of a cohort. Keys are (kind, pattern); pattern 0 is the fine one, others belong to labels."""
    atlases: dict[tuple[int, int], Atlas] = {}
    for pattern in range(classes):
        chromatin = FINE if pattern == 0 else blend(settings.pattern_strength, POSITIVE_PATTERNS[pattern - 1])
        # the same shapes and the same light for every pattern; only what is inside is drawn anew
        rng, inner = np.random.default_rng([seed, 71]), np.random.default_rng([seed, 73, pattern])
        atlases[EPITHELIAL, pattern] = Atlas(
            draw_nuclei(
                rng, settings.shapes, 4.9, 3.7, 0.11, 0.50, 0.15, chromatin, coarse=settings.visibility, inner=inner
            )
        )
    rng = np.random.default_rng([seed, 72])
    few = max(settings.shapes // 3, 8)
    dense = Chromatin(grain_um=0.45, grain=0.12, clump_um=0.8, clump=0.28, nucleoli=0.0)
    spindle = Chromatin(grain_um=0.35, grain=0.15, clump=0.12, nucleoli=0.0)
    atlases[FIBROBLAST, 0] = Atlas(draw_nuclei(rng, few, 5.8, 1.5, 0.22, 0.60, 0.18, spindle, pointed=0.55))
    atlases[LYMPHOCYTE, 0] = Atlas(draw_nuclei(rng, few, 3.2, 2.95, 0.07, 0.80, 0.12, dense))
    atlases[PLASMA, 0] = Atlas(draw_nuclei(rng, few, 3.5, 3.0, 0.08, 0.70, 0.12, dense))
    atlases[MITOSIS, 0] = Atlas(draw_nuclei(rng, few, 3.9, 1.5, 0.20, 1.15, 0.10, blend(0, FINE), ragged=0.28))
    atlases[PYKNOTIC, 0] = Atlas(draw_nuclei(rng, few, 2.1, 1.8, 0.20, 1.15, 0.10, POSITIVE_PATTERNS[3], ragged=0.15))
    atlases[RED_CELL, 0] = Atlas(draw_nuclei(rng, few, 3.4, 3.1, 0.06, 0.50, 0.12, POSITIVE_PATTERNS[3]))
    atlases[VACUOLE, 0] = Atlas(draw_nuclei(rng, few, 4.4, 3.8, 0.15, 0.045, 0.30, POSITIVE_PATTERNS[3]))
    atlases[DUST, 0] = Atlas(draw_nuclei(rng, few, 3.0, 1.6, 0.40, 1.6, 0.20, dense, ragged=0.3))
    return atlases


def draw_nuclei(
    rng: np.random.Generator,
    count: int,
    long_um: float,
    short_um: float,
    size_sd: float,
    absorbance: float,
    absorbance_sd: float,
    chromatin: Chromatin,
    *,
    pointed: float = 0.0,
    ragged: float = 0.03,
    coarse: float = 1.0,
    inner: np.random.Generator | None = None,
) -> FloatArray:
    """Draw `count` sprites (count, side, side, 2) with half axes `long_um`, `short_um`.

    Args:
        rng: source of randomness.
        count: number of sprites.
        long_um: mean half axis along x.
        short_um: mean half axis along y.
        size_sd: relative spread of both.
        absorbance: concentration of a plain nucleus that would let as much light through; see the top of this file.
        absorbance_sd: its relative spread.
        chromatin: the pattern inside.
        pointed: 0 for ellipses, up to 1 for spindles.
        ragged: relative roughness of the outline.
        coarse: share of the coarse part of the texture (`COARSE_UM`) that is kept; at 0 the absorbance around every
            point of the nucleus, and not only its mean, is that of a plain nucleus.
        inner: source of randomness for the texture; `rng` if not given.
    """
    half = (SPRITE_SIDE - 1) / 2
    axis = (np.arange(SPRITE_SIDE, dtype=np.float32) - half) * SPRITE_STEP_UM
    x, y = axis[None, None, :], axis[None, :, None]
    size = np.exp(rng.normal(0, size_sd, (count, 1, 1))).astype(np.float32)
    aspect = np.exp(rng.normal(0, 0.09, (count, 1, 1))).astype(np.float32)
    a, b = long_um * size * aspect, short_um * size / aspect
    theta = np.arctan2(y / b, x / a)
    outline = np.ones((count, SPRITE_SIDE, SPRITE_SIDE), np.float32)
    for harmonic in (2, 3, 4, 5):
        phase = rng.uniform(0, 2 * math.pi, (count, 1, 1)).astype(np.float32)
        outline += rng.normal(0, ragged / (harmonic - 1) ** 0.5, (count, 1, 1)).astype(np.float32) * np.cos(
            harmonic * theta + phase
        )
    outline -= pointed * np.abs(np.sin(2 * theta)) * 0.35
    radius = np.sqrt((x / a) ** 2 + (y / b) ** 2) / np.clip(outline, 0.35, 1.6)
    depth_um = (1 - radius) * b  # distance from the membrane, about
    coverage = np.clip(depth_um / 0.5 + 0.5, 0, 1)

    wanted = absorbance * np.exp(rng.normal(0, absorbance_sd, count)).astype(np.float32)
    rng = rng if inner is None else inner
    rim = np.exp(-(((depth_um - 0.35) / 0.45) ** 2))
    texture = chromatin.grain * _noise(rng, count, chromatin.grain_um, chromatin.stripe)
    texture += chromatin.clump * np.tanh(1.6 * _noise(rng, count, chromatin.clump_um, 1.0))
    texture += chromatin.membrane * rim
    texture += _nucleoli(rng, count, chromatin, x, y, a, b)
    if coarse < 1:
        texture -= (1 - coarse) * _low_pass(texture, coverage)
    density = np.clip(1 + 0.3 * rim + texture, 0.1, None)

    sprites = np.stack([coverage, coverage * density], axis=-1)
    as_pasted = np.empty_like(sprites)
    for i in range(count):
        sprites[i] = cv2.GaussianBlur(sprites[i], (0, 0), _PREFILTER_UM / SPRITE_STEP_UM)
        # turning a sprite and sampling it between its points smooths it a little more
        as_pasted[i] = cv2.GaussianBlur(sprites[i], (0, 0), 0.10 / SPRITE_STEP_UM)
    sprites[..., 1] *= _equalise(as_pasted[..., 1], coverage, wanted)[:, None, None]
    return sprites


def _equalise(density: FloatArray, coverage: FloatArray, wanted: FloatArray) -> FloatArray:
    """Factors (n,) on density (n, h, w) that let as much light through as a plain nucleus of density `wanted` does."""
    k = np.float32(math.log(10) * _DETECTOR)
    weight = coverage / coverage.sum((1, 2), keepdims=True)
    target = np.exp(-k * wanted)
    factor = wanted / (density * weight).sum((1, 2))
    for _ in range(8):
        light = weight * np.exp(-k * factor[:, None, None] * density)
        error = light.sum((1, 2)) - target
        slope = -k * (light * density).sum((1, 2))
        factor = factor - error / slope
    return factor.astype(np.float32)


def _low_pass(texture: FloatArray, coverage: FloatArray) -> FloatArray:
    """Coarse part of textures (n, h, w), averaged inside the nucleus only."""
    low = np.empty_like(texture)
    sigma = COARSE_UM / SPRITE_STEP_UM
    for i in range(len(texture)):
        weight = cv2.GaussianBlur(coverage[i], (0, 0), sigma)
        low[i] = cv2.GaussianBlur(coverage[i] * texture[i], (0, 0), sigma) / np.maximum(weight, 1e-3)
    return low


def _noise(rng: np.random.Generator, count: int, scale_um: float, stripe: float) -> FloatArray:
    noise = rng.standard_normal((count, SPRITE_SIDE, SPRITE_SIDE), dtype=np.float32)
    sigma = scale_um / SPRITE_STEP_UM
    for i in range(count):
        noise[i] = cv2.GaussianBlur(noise[i], (0, 0), sigmaX=sigma * stripe, sigmaY=sigma)
    return noise / noise.std((1, 2), keepdims=True)


def _nucleoli(
    rng: np.random.Generator,
    count: int,
    chromatin: Chromatin,
    x: FloatArray,
    y: FloatArray,
    a: FloatArray,
    b: FloatArray,
) -> FloatArray:
    """Round dark bodies (count, h, w); a mean of 1.5 gives one or two, and so on."""
    total = np.zeros((count, SPRITE_SIDE, SPRITE_SIDE), np.float32)
    low = math.floor(chromatin.nucleoli)
    number = low + (rng.uniform(size=count) < chromatin.nucleoli - low)
    for spot in range(int(number.max(initial=0))):
        angle = rng.uniform(0, 2 * math.pi, (count, 1, 1)).astype(np.float32)
        reach = 0.55 * np.sqrt(rng.uniform(0, 1, (count, 1, 1))).astype(np.float32)
        cx, cy = a * reach * np.cos(angle), b * reach * np.sin(angle)
        radius = chromatin.nucleolus_um * np.exp(rng.normal(0, 0.15, (count, 1, 1))).astype(np.float32)
        body = np.exp(-((((x - cx) ** 2 + (y - cy) ** 2) / radius**2) ** 1.5))
        total += (spot < number)[:, None, None] * np.float32(chromatin.nucleolus) * body
    return total


def paste(
    haematoxylin: FloatArray,
    eosin: FloatArray,
    origin_px: tuple[int, int],
    mpp: float,
    atlases: dict[tuple[int, int], Atlas],
    kind: npt.NDArray[np.integer],
    pattern: npt.NDArray[np.integer],
    sprite: npt.NDArray[np.integer],
    x_um: npt.NDArray[np.floating],
    y_um: npt.NDArray[np.floating],
    angle: npt.NDArray[np.floating],
    size: npt.NDArray[np.floating],
    darkness: npt.NDArray[np.floating],
) -> None:
    """Paste nuclei, in order, into concentration windows (h, w) whose top-left pixel is `origin_px`. In place.

    `sprite` is taken modulo the atlas's length; `angle` in radians turns the long axis from x towards y; `size` and
    `darkness` are factors. Nuclei that reach over the window are cut.
    """
    height, width = haematoxylin.shape
    half = (SPRITE_SIDE - 1) / 2
    for n in range(len(x_um)):
        zoom = size[n] * SPRITE_STEP_UM / mpp
        reach = math.ceil(half * zoom * 0.85) + 1
        cx, cy = x_um[n] / mpp - 0.5 - origin_px[0], y_um[n] / mpp - 0.5 - origin_px[1]
        x0, y0 = round(cx) - reach, round(cy) - reach
        side = 2 * reach + 1
        left, top = max(0, -x0), max(0, -y0)
        right, bottom = min(side, width - x0), min(side, height - y0)
        if left >= right or top >= bottom:
            continue
        atlas = atlases[int(kind[n]), int(pattern[n])].sprites
        cos, sin = math.cos(angle[n]) / zoom, math.sin(angle[n]) / zoom
        ox, oy = cx - x0, cy - y0
        matrix = np.array([[cos, sin, half - cos * ox - sin * oy], [-sin, cos, half + sin * ox - cos * oy]])
        patch = cv2.warpAffine(
            atlas[int(sprite[n]) % len(atlas)], matrix, (side, side), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        )[top:bottom, left:right]
        window = (slice(y0 + top, y0 + bottom), slice(x0 + left, x0 + right))
        keep = 1 - patch[..., 0]
        stain = patch[..., 1] * np.float32(darkness[n])
        if kind[n] == RED_CELL or kind[n] == VACUOLE:
            haematoxylin[window] *= keep
            eosin[window] *= keep
            (eosin if kind[n] == RED_CELL else haematoxylin)[window] += stain
        else:
            haematoxylin[window] *= keep
            haematoxylin[window] += stain
            eosin[window] *= 0.6 + 0.4 * keep
