"""From stain concentrations to colour: Beer-Lambert mixing, with variation by site, patient and slide.

A pixel with haematoxylin h and eosin e transmits glass * 10^-(h * H + e * E), H and E being unit vectors of optical
density in red, green, blue. The default vectors are what Macenko's method (ISBI 2009) finds on ordinary H&E slides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lrmil.cohorts.simulated.settings import ScannerSettings, StainSettings

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StainProfile:
    """How one slide was stained and scanned."""

    vectors: FloatArray
    """(2, 3) unit optical densities: haematoxylin, eosin"""
    strength: tuple[float, float]
    """factors on the two concentrations"""
    glass: FloatArray
    """(3,) colour of empty glass"""
    blur_um: float


@dataclass(frozen=True)
class SiteProfile:
    """What all slides of one site share."""

    vectors: FloatArray
    strength: tuple[float, float]
    glass: FloatArray
    blur_factor: float


def make_site(rng: np.random.Generator, stain: StainSettings) -> SiteProfile:
    """Draw a site's stain vectors, strengths and glass colour."""
    base = np.array([stain.haematoxylin, stain.eosin], np.float64)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    vectors = np.clip(base + rng.normal(0, stain.site_hue_sd, (2, 3)) * (1, 0.5, 1), 0.03, None)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    strength = np.exp(rng.normal(0, stain.site_strength_sd, 2))
    glass = np.clip(np.array(stain.glass) + rng.normal(0, 2.0) + rng.normal(0, 1.5, 3), 200, 255)
    return SiteProfile(
        vectors.astype(np.float32),
        (float(strength[0]), float(strength[1])),
        glass.astype(np.float32),
        float(math.exp(rng.normal(0, 0.15))),
    )


def make_profile(
    rng: np.random.Generator,
    site: SiteProfile,
    stain: StainSettings,
    scanner: ScannerSettings,
    patient_strength: tuple[float, float] = (1.0, 1.0),
) -> StainProfile:
    """Draw one slide's stain and blur around those of its site and patient."""
    slide = np.exp(rng.normal(0, stain.slide_strength_sd, 2))
    blur = scanner.blur_um * site.blur_factor * math.exp(rng.normal(0, scanner.blur_spread))
    strength = np.clip(np.array(site.strength) * patient_strength * slide, 0.4, 2.2)
    return StainProfile(site.vectors, (float(strength[0]), float(strength[1])), site.glass, blur)


def patient_strength(rng: np.random.Generator, stain: StainSettings) -> tuple[float, float]:
    """Draw the factors on stain strength that all slides of one patient share."""
    factors = np.exp(rng.normal(0, stain.patient_strength_sd, 2))
    return float(factors[0]), float(factors[1])


def transmit(haematoxylin: FloatArray, eosin: FloatArray, profile: StainProfile) -> FloatArray:
    """Colour (h, w, 3) float32, 0 to 255, of concentrations (h, w)."""
    scale = np.float32(-math.log(10))
    h = haematoxylin * (scale * np.float32(profile.strength[0]))
    e = eosin * (scale * np.float32(profile.strength[1]))
    rgb = np.empty((*h.shape, 3), np.float32)
    for channel in range(3):
        exponent = h * profile.vectors[0, channel]
        exponent += e * profile.vectors[1, channel]
        rgb[..., channel] = np.exp(exponent, out=exponent) * profile.glass[channel]
    return rgb
