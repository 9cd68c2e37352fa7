"""From a scene to pixels: stain concentrations of every tissue, nuclei, Beer-Lambert, blur, noise. Window by window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.cohorts.simulated.architecture import Layout
from lrmil.cohorts.simulated.artefacts import Artefacts
from lrmil.cohorts.simulated.fields import Field2D, periodic_noise, smoothstep, to_pixels
from lrmil.cohorts.simulated.nuclei import SPRITE_SIDE, SPRITE_STEP_UM, build_atlases, paste
from lrmil.cohorts.simulated.population import Population
from lrmil.cohorts.simulated.settings import SimulatedSettings
from lrmil.cohorts.simulated.stain import StainProfile, transmit

WINDOW_PX = 512
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
    artefacts: Artefacts | None
    noise_seed: int
    settings: SimulatedSettings


@dataclass(frozen=True)
class _Textures:
    bundle: Field2D
    fibril: Field2D
    gap: Field2D
    grain: Field2D


@lru_cache(maxsize=2)
def _textures(seed: int) -> _Textures:
    """Periodic noise in fibre coordinates (x along, y across) and in plain ones (grain)."""
    rng = np.random.default_rng([seed, 81])
    side = _TEXTURE_SIDE
    crimp = 3.0 * periodic_noise(rng, side, 9, 7) + 1.2 * periodic_noise(rng, side, 4, 4)
    bundle = 0.8 * periodic_noise(rng, side, 26, 6) + 0.6 * periodic_noise(rng, side, 14, 2.5)
    fibril = 0.75 * periodic_noise(rng, side, 9, 1.0) + 0.65 * periodic_noise(rng, side, 3, 0.8)
    gap = 0.9 * periodic_noise(rng, side, 20, 2.6) + 0.45 * periodic_noise(rng, side, 9, 1.6)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    bundle, fibril, gap = (_wrap(t, x, y + crimp) for t in (bundle, fibril, gap))
    grain = 0.7 * periodic_noise(rng, side, 1.2, 1.2) + 0.7 * periodic_noise(rng, side, 5, 5)
    return _Textures(bundle, fibril, gap, grain)


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
    tissue = to_pixels(scene.layout.tissue_um, origin, size, mpp)
    if tissue.max() < -4 and not _any_nucleus(scene, origin, size, mpp):
        rgb = np.broadcast_to(scene.stain.glass, (size[1], size[0], 3)).copy()
    else:
        haematoxylin, eosin = _ground(scene, tissue, origin, size, mpp)
        _paste_nuclei(scene, haematoxylin, eosin, origin, mpp)
        strength = to_pixels(scene.strength, origin, size, mpp, smooth=False)
        haematoxylin *= strength
        eosin *= strength
        rgb = transmit(haematoxylin, eosin, scene.stain)
        if sigma > 0.05:
            rgb = np.asarray(cv2.GaussianBlur(rgb, (0, 0), sigma), np.float32)
    _spoil(scene, rgb, origin, size, mpp)
    rgb = np.ascontiguousarray(rgb[halo : halo + height_px, halo : halo + width_px])
    noise = scene.settings.scanner.noise
    if noise > 0:
        rng = np.random.default_rng([scene.noise_seed, x_px, y_px])
        rgb += rng.standard_normal(rgb.shape, dtype=np.float32) * np.float32(noise)
    np.clip(rgb, 0, 255, out=rgb)
    return np.rint(rgb, out=rgb).astype(np.uint8)


def _spoil(scene: Scene, rgb: Field2D, origin: tuple[int, int], size: tuple[int, int], mpp: float) -> None:
    """Add ink and lack of focus, in place."""
    artefacts = scene.artefacts
    if artefacts is None:
        return
    if artefacts.defocus is not None:
        share = to_pixels(artefacts.defocus, origin, size, mpp, smooth=False)[..., None]
        if share.max() > 0.01:
            rgb += share * (cv2.GaussianBlur(rgb, (0, 0), 2.2 / mpp) - rgb)
    if artefacts.ink is not None:
        share = to_pixels(artefacts.ink, origin, size, mpp, smooth=False)[..., None]
        if share.max() > 0.01:
            rgb *= 1 - share * (1 - np.array(artefacts.ink_transmission, np.float32))


def _near(scene: Scene, origin: tuple[int, int], size: tuple[int, int], mpp: float) -> npt.NDArray[np.bool_]:
    """Rows of the population whose sprites may touch a window."""
    reach = SPRITE_SIDE * SPRITE_STEP_UM * 0.75
    people = scene.population
    x0, y0 = origin[0] * mpp, origin[1] * mpp
    near = (people.x_um > x0 - reach) & (people.x_um < x0 + size[0] * mpp + reach)
    return near & (people.y_um > y0 - reach) & (people.y_um < y0 + size[1] * mpp + reach)


def _any_nucleus(scene: Scene, origin: tuple[int, int], size: tuple[int, int], mpp: float) -> bool:
    return bool(_near(scene, origin, size, mpp).any())


def _ground(
    scene: Scene, tissue_um: Field2D, origin: tuple[int, int], size: tuple[int, int], mpp: float
) -> tuple[Field2D, Field2D]:
    """Concentrations of everything but nuclei: stroma, fat, cytoplasm, lumina, bare glass."""
    layout = scene.layout
    tex = _textures(scene.settings.seed)
    sharp = ("gland_um", "lumen_um", "fat_um")
    field = {
        name: to_pixels(getattr(layout, name), origin, size, mpp, smooth=name in sharp)
        for name in (*sharp, "looseness", "lumen_content", "fibre_along_um", "fibre_across_um")
    }
    u = field["fibre_along_um"] / np.float32(_TEXTURE_UM)
    v = field["fibre_across_um"] / np.float32(_TEXTURE_UM)
    bundle = _wrap(tex.bundle, u, v)
    fibril = _wrap(tex.fibril, u * 1.03, v * 1.03)
    gap = _wrap(tex.gap, u * 0.96, v * 0.96)
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float32)
    x = (x + origin[0]) * np.float32(mpp / _TEXTURE_UM)
    y = (y + origin[1]) * np.float32(mpp / _TEXTURE_UM)
    grain = _wrap(tex.grain, x, y)

    loose = field["looseness"]
    body = np.clip(1 + 0.22 * bundle + 0.20 * fibril + 0.06 * grain, 0.25, 2)
    threshold = 2.3 - 2.1 * loose  # from hardly any gaps between the fibres to gaps over a third of the area
    open_ = smoothstep(gap - threshold, 0.0, 0.55)
    eosin = (0.33 - 0.15 * loose) * body * (1 - 0.90 * open_)
    haematoxylin = (0.03 + 0.03 * loose + 0.010 * fibril) * (1 - 0.85 * open_)

    fat = field["fat_um"]
    inside_fat = smoothstep(fat, -0.4, 0.8)
    eosin *= 1 - 0.985 * inside_fat
    haematoxylin *= 1 - 0.97 * inside_fat

    gland, lumen = field["gland_um"], field["lumen_um"]
    in_gland = smoothstep(gland, -0.5, 0.7)
    membrane = np.exp(-(((gland + 1.0) / 1.1) ** 2))
    apical = np.clip(gland / 22, 0, 1)
    cyto_e = (0.17 + 0.07 * apical) * (1 + 0.17 * grain)
    cyto_h = (0.135 - 0.05 * apical) * (1 + 0.22 * grain)
    eosin += in_gland * (cyto_e - eosin) + 0.10 * membrane
    haematoxylin += in_gland * (cyto_h - haematoxylin)
    in_lumen = smoothstep(lumen, -0.6, 0.6)
    brush = np.exp(-(((lumen + 0.8) / 1.0) ** 2)) * in_gland
    eosin += 0.10 * brush
    content = field["lumen_content"]
    eosin += in_lumen * (0.015 + content * (0.16 + 0.05 * grain) - eosin)
    haematoxylin += in_lumen * (0.006 + 0.03 * content - haematoxylin)

    tissue = smoothstep(tissue_um, -1.0, 1.6)
    edge = 1 + 0.35 * np.exp(-((tissue_um - 3) ** 2) / 18)
    return np.clip(haematoxylin * tissue, 0, None), np.clip(eosin * tissue * edge, 0, None)


def _wrap(texture: Field2D, u: Field2D, v: Field2D) -> Field2D:
    """A periodic texture at (u, v), in its samples."""
    u = u - np.floor(u * (1 / _TEXTURE_SIDE)) * _TEXTURE_SIDE
    v = v - np.floor(v * (1 / _TEXTURE_SIDE)) * _TEXTURE_SIDE
    return np.asarray(cv2.remap(texture, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP), np.float32)


def _paste_nuclei(scene: Scene, haematoxylin: Field2D, eosin: Field2D, origin: tuple[int, int], mpp: float) -> None:
    height, width = haematoxylin.shape
    some = scene.population.take(_near(scene, origin, (width, height), mpp))
    settings = scene.settings
    atlases = build_atlases(settings.nuclei, settings.classes, settings.seed)
    paste(
        haematoxylin, eosin, origin, mpp, atlases, some.kind, some.pattern, some.sprite,
        some.x_um, some.y_um, some.angle, some.size, some.darkness,
    )  # fmt: skip
