"""Pictures with known tissue."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from lrmil.slides import Overview

Rgb = tuple[int, int, int]
GLASS: Rgb = (243, 241, 243)


@pytest.fixture(scope="session")
def see() -> Callable[..., Overview]:
    """`see(rgb, mpp)`: an overview of a slide that is scanned all over, unless `scanned` (h, w) says otherwise."""

    def make(
        rgb: npt.NDArray[np.uint8],
        mpp: float = 8.0,
        *,
        scanned: npt.NDArray[np.bool_] | None = None,
        downsample_l0: tuple[float, float] = (32.0, 32.0),
    ) -> Overview:
        if scanned is None:
            scanned = np.ones(rgb.shape[:2], np.bool_)
        return Overview(rgb, scanned, mpp, downsample_l0, unreadable=0, unreadable_px=0)

    return make


@pytest.fixture(scope="session")
def paint() -> Callable[..., npt.NDArray[np.uint8]]:
    """`paint(width, height, {(x0, y0, x1, y1): colour})`: rectangles on glass, with the noise of a camera."""

    def make(
        width: int, height: int, boxes: dict[tuple[int, int, int, int], Rgb], glass: Rgb = GLASS, noise: float = 1.5
    ) -> npt.NDArray[np.uint8]:
        image = np.empty((height, width, 3))
        image[:] = glass
        for (x0, y0, x1, y1), colour in boxes.items():
            image[y0:y1, x0:x1] = colour
        image += np.random.default_rng(0).normal(0, noise, image.shape)
        return np.clip(image.round(), 0, 255).astype(np.uint8)

    return make
