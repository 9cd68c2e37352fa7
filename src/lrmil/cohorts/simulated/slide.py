"""One slide or one tile: scene, pixels and truth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.cohorts.simulated.architecture import Wish, lay_out
from lrmil.cohorts.simulated.artefacts import draw_artefacts
from lrmil.cohorts.simulated.fields import STEP_UM, fractal_noise
from lrmil.cohorts.simulated.nuclei import KINDS
from lrmil.cohorts.simulated.painter import Scene, paint
from lrmil.cohorts.simulated.population import Population, populate
from lrmil.cohorts.simulated.settings import SimulatedSettings
from lrmil.cohorts.simulated.stain import StainProfile, make_profile, make_site

_BASE_MPP = 0.5


@dataclass(frozen=True)
class Truth:
    """What is known of every pixel and nucleus of an image. Pixels are those of the image it comes with."""

    mpp: float
    label: int
    x_px: npt.NDArray[np.float32]
    """(N,) centres of nuclei"""
    y_px: npt.NDArray[np.float32]
    kind: npt.NDArray[np.uint8]
    """(N,) index into `nuclei.KINDS`"""
    pattern: npt.NDArray[np.uint8]
    """(N,) chromatin: 0 the fine pattern, else the label whose pattern it shows"""
    in_positive_area: npt.NDArray[np.bool_]
    """(N,)"""
    positive: npt.NDArray[np.bool_]
    """(h, w) coarse mask of positive areas, `mask_step_px` image pixels per sample"""
    tissue: npt.NDArray[np.bool_]
    """(h, w) coarse mask of tissue"""
    mask_step_px: float

    @property
    def positive_share(self) -> float:
        """Share of the tissue that is positive."""
        return float((self.positive & self.tissue).sum() / max(self.tissue.sum(), 1))


def build_scene(
    rng: np.random.Generator,
    settings: SimulatedSettings,
    width_um: float,
    height_um: float,
    wish: Wish,
    label: int,
    stain: StainProfile,
) -> Scene:
    """Draw a scene. All its randomness comes from `rng`, the settings and the cohort's seed."""
    layout = lay_out(rng, settings.tissue, width_um, height_um, wish)
    shape = layout.tissue_um.shape
    artefacts = draw_artefacts(rng, shape, settings.scanner.artefacts)
    population = populate(rng, layout, settings.nuclei, settings.classes, label, artefacts.dust_um)
    strength = np.exp(settings.stain.field_strength_sd * fractal_noise(rng, shape, 600, 2))
    if artefacts.fold is not None:
        strength = strength * artefacts.fold
    strength = strength.astype(np.float32)
    return Scene(layout, population, stain, strength, artefacts, int(rng.integers(1 << 31)), settings)


def scene_truth(scene: Scene, label: int, mpp: float) -> Truth:
    """Return the truth of a scene in pixels of `mpp` um."""
    people: Population = scene.population.take(scene.population.kind < len(KINDS))
    tissue = scene.layout.tissue_um > 0
    return Truth(
        mpp=mpp,
        label=label,
        x_px=(people.x_um / mpp).astype(np.float32),
        y_px=(people.y_um / mpp).astype(np.float32),
        kind=people.kind,
        pattern=people.pattern,
        in_positive_area=people.in_area,
        positive=scene.layout.positive & tissue,
        tissue=tissue,
        mask_step_px=STEP_UM / mpp,
    )


def render_tile(
    rng: np.random.Generator,
    settings: SimulatedSettings,
    size_px: int,
    mpp: float = 0.5,
    positive: bool | None = None,
    label: int = 1,
) -> tuple[npt.NDArray[np.uint8], Truth]:
    """Draw one tile as if cut from the inside of some slide of some site; for training encoders and for tests.

    Each call draws its own site, stain and blur. Nuclear sprites are drawn once per `settings.seed` (and take a second
    or two the first time), so take a seed of your own, and other ones for the cohorts that you evaluate on. A few large
    tiles cut up are much cheaper than many small ones.

    Args:
        rng: all other randomness.
        settings: the cohort the tile could be part of.
        size_px: side of the tile.
        mpp: um per pixel; above 0.5 the tile is painted at 0.5 or finer and averaged by area, as in a pyramid.
        positive: True: every gland is positive; False: none is; None: some may be.
        label: whose pattern positive glands show, 1 to classes - 1.

    Returns:
        rgb (size_px, size_px, 3) uint8, and the truth in pixels of the tile.
    """
    stain = make_profile(rng, make_site(rng, settings.stain), settings.stain, settings.scanner)
    share = {True: 10.0, False: 0.0, None: float(rng.choice([0.0, 0.3, 0.6]))}[positive]
    side_um = size_px * mpp
    spacing = math.exp(rng.normal(0, settings.tissue.gland_spacing_sd))
    wish = Wish(share, foci=1, outline="whole" if rng.uniform() < 0.85 else "edge", spacing_factor=spacing)
    scene = build_scene(rng, settings, side_um, side_um, wish, label, stain)
    factor = max(1, math.ceil(mpp / _BASE_MPP - 1e-9))
    image = paint(scene, size_px * factor, size_px * factor, mpp / factor)
    if factor > 1:
        image = np.asarray(cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_AREA), np.uint8)
    return image, scene_truth(scene, label if scene.layout.positive.any() else 0, mpp)
