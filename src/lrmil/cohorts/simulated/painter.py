"""From a scene to pixels: stain concentrations of every tissue, nuclei, Beer-Lambert, blur, noise. Window by window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.cohorts.simulated.architecture import Layout
from lrmil.cohorts.simulated.fields import Field2D, fractal_noise, periodic_noise, smoothstep, to_pixels
from lrmil.cohorts.simulated.nuclei import SPRITE_SIDE, SPRITE_STEP_UM, build_atlases, paste
from lrmil.cohorts.simulated.population import Population
from lrmil.cohorts.simulated.settings import SimulatedSettings
from lrmil.cohorts.simulated.stain import StainProfile, transmit

WINDOW_PX = 1024
_TEXTURE_SIDE = 1024
_TEXTURE_UM = 0.5


@dataclass(frozen=True)
class Scene:
    """All there is to paint."""

    layout: Layout
    population: Population
    stain: StainProfile
    strength: Field2D
    """(h, w) coarse field of factors on stain strength"""
    noise_seed: int
    settings: SimulatedSettings


@dataclass(frozen=True)
class _Textures:
    bundle: Field2D
    fibril: Field2D
    cleft: Field2D
    grain: Field2D


@lru_cache(maxsize=2)
def _textures(seed: int) -> _Textures:
    """Periodic noise in fibre coordinates (x along, y across) and in plain ones (grain)."""
    rng = np.random.default_rng([seed, 81])
    side = _TEXTURE_SIDE
    bundle = 0.75 * periodic_noise(rng, side, 60, 7) + 0.65 * periodic_noise(rng, side, 35, 3)
    fibril = 0.8 * periodic_noise(rng, side, 18, 1.1) + 0.6 * periodic_noise(rng, side, 5, 0.8)
    ridge = np.abs(periodic_noise(rng, side, 48, 5) + 0.25 * periodic_noise(rng, side, 12, 2))
    grain = 0.7 * periodic_noise(rng, side, 1.6, 1.6) + 0.7 * periodic_noise(rng, side, 5, 5)
    return _Textures(bundle, fibril, ridge, grain)


def paint(scene: Scene, width_px: int, height_px: int, mpp: float) -> npt.NDArray[np.uint8]:
    """Paint the whole scene, (height_px, width_px, 3) uint8, at `mpp` um per pixel."""
    image = np.empty((height_px, width_px, 3), np.uint8)
    for y in range(0, height_px, WINDOW_PX):
        for x in range(0, width_px, WINDOW_PX):
            w, h = min(WINDOW_PX, width_px - x), min(WINDOW_PX, height_px - y)
            image[y : y + h, x : x + w] = paint_window(scene, x, y, w, h, mpp)
    return image


def paint_window(
    scene: Scene, x_px: int, y_px: int, width_px: int, height_px: int, mpp: float
) -> npt.NDArray[np.uint8]:
    """Paint one window (height_px, width_px, 3) uint8. Windows join seamlessly, but for the sensor noise."""
    sigma = scene.stain.blur_um / mpp
    halo = math.ceil(3 * sigma) + 1
    origin = (x_px - halo, y_px - halo)
    size = (width_px + 2 * halo, height_px + 2 * halo)
    haematoxylin, eosin = _ground(scene, origin, size, mpp)
    _paste_nuclei(scene, haematoxylin, eosin, origin, mpp)
    strength = to_pixels(scene.strength, origin, size, mpp)
    haematoxylin *= strength
    eosin *= strength
    rgb = transmit(haematoxylin, eosin, scene.stain)
    if sigma > 0.05:
        rgb = cv2.GaussianBlur(rgb, (0, 0), sigma)
    rgb = np.ascontiguousarray(rgb[halo : halo + height_px, halo : halo + width_px])
    noise = scene.settings.scanner.noise
    if noise > 0:
        rng = np.random.default_rng([scene.noise_seed, x_px, y_px])
        rgb += rng.standard_normal(rgb.shape, dtype=np.float32) * np.float32(noise)
    np.clip(rgb, 0, 255, out=rgb)
    return np.rint(rgb, out=rgb).astype(np.uint8)


def _ground(scene: Scene, origin: tuple[int, int], size: tuple[int, int], mpp: float) -> tuple[Field2D, Field2D]:
    """Concentrations of everything but nuclei: stroma, fat, cytoplasm, lumina, bare glass."""
    layout = scene.layout
    tex = _textures(scene.settings.seed)
    field = {
        name: to_pixels(getattr(layout, name), origin, size, mpp)
        for name in ("tissue_um", "gland_um", "lumen_um", "fat_um", "looseness", "fibre_along_um", "fibre_across_um")
    }
    u = field["fibre_along_um"] / np.float32(_TEXTURE_UM)
    v = field["fibre_across_um"] / np.float32(_TEXTURE_UM)
    bundle = _wrap(tex.bundle, u * 0.8, v * 0.8)
    fibril = _wrap(tex.fibril, u, v)
    cleft = _wrap(tex.cleft, u * 0.9, v * 0.9)
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float32)
    x = (x + origin[0]) * np.float32(mpp / _TEXTURE_UM)
    y = (y + origin[1]) * np.float32(mpp / _TEXTURE_UM)
    grain = _wrap(tex.grain, x, y)

    loose = field["looseness"]
    body = np.clip(1 + 0.20 * bundle + 0.17 * fibril, 0.25, 2)
    width = np.clip(0.02 + 0.55 * (loose - 0.35), 0.0, 0.6)
    open_ = 1 - smoothstep_field(cleft, width, width + 0.16)
    eosin = (0.46 - 0.26 * loose) * body * (1 - 0.88 * open_)
    haematoxylin = (0.035 + 0.035 * loose + 0.012 * fibril) * (1 - 0.8 * open_)

    fat = field["fat_um"]
    inside_fat = smoothstep(fat, -0.4, 0.8)
    eosin *= 1 - 0.985 * inside_fat
    haematoxylin *= 1 - 0.97 * inside_fat

    gland, lumen = field["gland_um"], field["lumen_um"]
    in_gland = smoothstep(gland, -0.5, 0.7)
    membrane = np.exp(-(((gland + 1.0) / 1.1) ** 2))
    apical = np.clip(gland / 22, 0, 1)
    cyto_e = (0.20 + 0.07 * apical) * (1 + 0.16 * grain)
    cyto_h = (0.145 - 0.055 * apical) * (1 + 0.22 * grain)
    eosin += in_gland * (cyto_e - eosin) + 0.10 * membrane
    haematoxylin += in_gland * (cyto_h - haematoxylin)
    in_lumen = smoothstep(lumen, -0.6, 0.6)
    brush = np.exp(-(((lumen + 0.8) / 1.0) ** 2)) * in_gland
    eosin += 0.10 * brush
    eosin += in_lumen * (0.02 - eosin)
    haematoxylin += in_lumen * (0.008 - haematoxylin)

    tissue = smoothstep(field["tissue_um"], -1.0, 1.6)
    edge = 1 + 0.35 * np.exp(-((field["tissue_um"] - 3) ** 2) / 18)
    return np.clip(haematoxylin * tissue, 0, None), np.clip(eosin * tissue * edge, 0, None)


def smoothstep_field(values: Field2D, low: Field2D, high: Field2D) -> Field2D:
    """`smoothstep` whose ends vary over the field."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _wrap(texture: Field2D, u: Field2D, v: Field2D) -> Field2D:
    return cv2.remap(
        texture, np.mod(u, _TEXTURE_SIDE), np.mod(v, _TEXTURE_SIDE), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
    )


def _paste_nuclei(scene: Scene, haematoxylin: Field2D, eosin: Field2D, origin: tuple[int, int], mpp: float) -> None:
    reach = SPRITE_SIDE * SPRITE_STEP_UM
    height, width = haematoxylin.shape
    people = scene.population
    x0, y0 = origin[0] * mpp, origin[1] * mpp
    near = (people.x_um > x0 - reach) & (people.x_um < x0 + width * mpp + reach)
    near &= (people.y_um > y0 - reach) & (people.y_um < y0 + height * mpp + reach)
    some = people.take(near)
    settings = scene.settings
    atlases = build_atlases(settings.nuclei, settings.classes, settings.seed)
    paste(
        haematoxylin, eosin, origin, mpp, atlases, some.kind, some.pattern, some.sprite,
        some.x_um, some.y_um, some.angle, some.size, some.darkness,
    )  # fmt: skip


def strength_field(rng: np.random.Generator, shape: tuple[int, int], sd: float) -> Field2D:
    """Slow variation of stain strength over a slide."""
    return np.exp(np.float32(sd) * fractal_noise(rng, shape, 600, 2)).astype(np.float32)
