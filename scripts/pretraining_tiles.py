"""The tiles on which `lrmil-small` is pretrained: 64-px cuts of real and of simulated tissue, at several scales."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image

from lrmil.cohorts.simulated import render_tile
from lrmil.cohorts.simulated.settings import SimulatedSettings

Tiles = npt.NDArray[np.uint8]

INPUT_PX = 64
SIMULATOR_SEED = 990_000
"""Tiles of the simulator use the seeds 990,000 to 990,999, for its settings and for its generators."""
SCALES = {0.25: 0.10, 0.35: 0.08, 0.5: 0.44, 0.7: 0.08, 1.0: 0.12, 2.0: 0.18}
"""um per pixel: share of the tiles"""
REAL = {
    "slides/CMU-1-Small-Region.svs": 0.5,
    "slides/CropBreastSlide.tiff": 0.25,
    "slides/tcga-cr-7395-01a-01-ts1.svs": 1.0,
    "tissue_cases/histolab_pil-images-rgba_tcga-lung.png": 0.25,
    "tissue_cases/histolab_tiles_high-nuclei-score-level0.png": 0.25,
    "tissue_cases/histolab_tiles_medium-nuclei-score-level0.png": 0.25,
    "tissue_cases/histolab_tiles_medium-nuclei-score-level1-2.png": 1.0,
    "tissue_cases/histolab_tiles_tissue-level0-4302-10273-4814-10785.png": 0.5,
    "tissue_cases/histolab_tiles_tissue-level0-7352-11762-7864-12274.png": 0.5,
    "features/TCGA-AD-6964-01Z-00-DX1/Tile_(16896,20480).jpg": 0.5,
    "features/TCGA-AD-6964-01Z-00-DX1/Tile_(22016,11776).jpg": 0.5,
    "features/TCGA-AD-6964-01Z-00-DX1/Tile_(23040,25088).jpg": 0.5,
}
"""Real images and their um per pixel, judged by the size of nuclei where the file does not say it."""
HEMATOXYLIN_EOSIN = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
"""Unit optical densities of haematoxylin, eosin and a rest (Ruifrok and Johnston, 2001)."""


def load_real(path: Path) -> Tiles:
    """Whole image, (h, w, 3) uint8, at its finest level."""
    if path.suffix in (".svs", ".tiff"):
        with openslide.OpenSlide(path) as slide:
            image = slide.read_region((0, 0), 0, slide.dimensions)
            return np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    return np.array(Image.open(path).convert("RGB"))


def cut(rng: np.random.Generator, image: Tiles, mpp: float, wanted_mpp: float) -> Tiles | None:
    """Cut one tile at a random place, or None where the image is too small or there is little tissue."""
    side = round(INPUT_PX * wanted_mpp / mpp)
    height, width = image.shape[:2]
    if side > min(height, width):
        return None
    y, x = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    crop = image[y : y + side, x : x + side]
    if (crop.max(2).astype(np.int16) - crop.min(2) > 20).mean() < rng.uniform(0.1, 0.6):
        return None
    return cv2.resize(crop, (INPUT_PX, INPUT_PX), interpolation=cv2.INTER_AREA if side > INPUT_PX else cv2.INTER_CUBIC)


def jitter_stain(rng: np.random.Generator, tile: Tiles) -> Tiles:
    """Scale haematoxylin, eosin and the rest by random factors, and the light a little."""
    basis = HEMATOXYLIN_EOSIN / np.linalg.norm(HEMATOXYLIN_EOSIN, axis=1, keepdims=True)
    density = -np.log10((tile.astype(np.float32) + 1) / 256)
    density = density @ np.linalg.inv(basis) * np.exp(rng.normal(0, 0.22, 3)).astype(np.float32) @ basis
    return np.clip(256 * 10**-density * rng.normal(1, 0.02) - 1, 0, 255).round().astype(np.uint8)


def real_tiles(data: Path, count: int) -> Tiles:
    """(count, 64, 64, 3) from the real images, each weighted by the root of its area in um."""
    rng = np.random.default_rng([SIMULATOR_SEED, 1])
    images = [(load_real(data / name), mpp) for name, mpp in REAL.items()]
    weights = np.array([math.sqrt(image.shape[0] * image.shape[1]) * mpp for image, mpp in images])
    tiles: list[Tiles] = []
    while len(tiles) < count:
        wanted = rng.choice(list(SCALES), p=list(SCALES.values())) * math.exp(rng.normal(0, 0.06))
        # enlarging beyond 1.5 times shows nothing new
        usable = np.array([wanted >= mpp / 1.5 for _, mpp in images])
        image, mpp = images[rng.choice(len(images), p=weights * usable / (weights * usable).sum())]
        tile = cut(rng, image, mpp, wanted)
        if tile is not None:
            tiles.append(jitter_stain(rng, tile))
    return np.stack(tiles)


def simulated_tiles(count: int, per_field: int = 48) -> Tiles:
    """(count, 64, 64, 3) from fields of simulated tissue; stain, site, glands and positive areas are random."""
    tiles: list[Tiles] = []
    fields = math.ceil(count / per_field)
    for number in range(fields):
        rng = np.random.default_rng([SIMULATOR_SEED, 2, number])
        settings = SimulatedSettings(seed=SIMULATOR_SEED + number * 8 // fields)
        finest = 0.25 if number % 4 == 0 else 0.5
        field, _ = render_tile(rng, settings, 1024, mpp=finest, positive=(None, True, False)[number % 3])
        tries = 0
        start = len(tiles)
        while len(tiles) < min(start + per_field, count) and tries < 20 * per_field:
            tries += 1
            wanted = rng.choice(list(SCALES), p=list(SCALES.values())) * math.exp(rng.normal(0, 0.06))
            tile = cut(rng, field, finest, wanted) if wanted >= finest / 1.5 else None
            if tile is not None:
                tiles.append(jitter_stain(rng, tile))
    return np.stack(tiles)
