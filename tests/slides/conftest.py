"""Images with known content, and a stand-in for OpenSlide's handle where no file with such properties exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openslide
import pytest
from PIL import Image

from lrmil.slides import Slide
from lrmil.slides.openslide_reader import OpenSlideSlide


@pytest.fixture(scope="session")
def picture() -> Callable[..., npt.NDArray[np.uint8]]:
    """`picture(width, height)`: colour ramps that differ along x and y, with noise; no two places alike."""

    def make(width: int, height: int, seed: int = 0) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        x, y = np.arange(width)[None, :], np.arange(height)[:, None]
        base = np.stack([x * 180 / width + 0 * y, y * 180 / height + 0 * x, (x + 2 * y) % 97 + 40.0], axis=-1)
        return np.clip(base + rng.normal(20, 12, (height, width, 1)), 0, 255).astype(np.uint8)

    return make


@dataclass
class FakeHandle:
    """Answers as an OpenSlide handle does: whole level pixels in RGBA, errors that stay once they came."""

    pixels: list[npt.NDArray[np.uint8]]
    properties: dict[str, str] = field(default_factory=dict)
    bad_l0: tuple[int, int, int, int] | None = None
    requests: list[tuple[tuple[int, int], int, tuple[int, int]]] = field(default_factory=list)
    before_read: Callable[[tuple[int, int]], None] | None = None
    latched: bool = False
    closed: bool = False

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        return tuple((p.shape[1], p.shape[0]) for p in self.pixels)

    @property
    def dimensions(self) -> tuple[int, int]:
        return self.level_dimensions[0]

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        (w0, h0), sizes = self.dimensions, self.level_dimensions
        return tuple((w0 / w + h0 / h) / 2 for w, h in sizes)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        assert not self.closed, "read after close"
        assert all(isinstance(v, int) for v in (*location, level, *size)), "OpenSlide takes whole numbers"
        self.requests.append((location, level, size))
        if self.before_read is not None:
            self.before_read(location)
        own = self.level_downsamples[level]
        if self.bad_l0 is not None:
            x0, y0, x1, y1 = self.bad_l0
            right, bottom = location[0] + size[0] * own, location[1] + size[1] * own
            self.latched |= location[0] < x1 and right > x0 and location[1] < y1 and bottom > y0
        if self.latched:
            raise openslide.OpenSlideError("bogus tile")
        x, y = round(location[0] / own), round(location[1] / own)
        cut = self.pixels[level][y : y + size[1], x : x + size[0]]
        assert cut.shape[:2] == (size[1], size[0]), "asked for pixels outside the level"
        return Image.fromarray(cut, "RGBA")

    def close(self) -> None:
        self.closed = True


class FakeSlides:
    """Makes slides over `FakeHandle`s and keeps every handle that was opened."""

    def __init__(self) -> None:
        self.handles: list[FakeHandle] = []

    def __call__(
        self,
        *levels: npt.NDArray[np.uint8],
        mpp: float | None = 0.25,
        properties: dict[str, str] | None = None,
        **options: Any,
    ) -> Slide:
        rgba = [
            level if level.shape[2] == 4 else np.dstack([level, np.full(level.shape[:2], 255, np.uint8)])
            for level in levels
        ]

        def open_handle(_path: str) -> FakeHandle:
            self.handles.append(FakeHandle(rgba, dict(properties or {}), **options))
            return self.handles[-1]

        return OpenSlideSlide(Path("fake.svs"), mpp, open_handle=open_handle)


@pytest.fixture
def fake_slides() -> FakeSlides:
    return FakeSlides()


def _block_mean(image: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.float64]:
    height, width = image.shape[0] // factor, image.shape[1] // factor
    cut = image[: height * factor, : width * factor].astype(np.float64)
    return cut.reshape(height, factor, width, factor, -1).mean(axis=(1, 3))


@pytest.fixture(scope="session")
def block_mean() -> Callable[[npt.NDArray[np.uint8], int], npt.NDArray[np.float64]]:
    """`block_mean(image, factor)`: unrounded averages of whole factor x factor blocks, the remainder cut off."""
    return _block_mean
