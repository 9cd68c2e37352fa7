"""Views: the squares of a field that are looked at as regions, with their children and their truth.

Training views lie anywhere in the field, turned or mirrored in one of the 8 ways of a square; children are cut from the
turned pixels, so that slots are those that the encoder sees. Probe views are the four corners, upright, the same for
every method, fold and seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lrmil.slides.resample import area_resample
from lrmil.studies.fields import Field, FloatArray
from lrmil.training.seeds import derive_seed

ImageArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class View:
    """One region, as a window of a field."""

    x_px: int
    y_px: int
    symmetry: int = 0
    """0..7: turn counter-clockwise symmetry % 4 times by 90 degrees, then mirror left to right if 4 or more"""


@dataclass(frozen=True)
class FieldViews:
    """Some views of one field, in numbers."""

    images: ImageArray
    """(n, P, P, 3) the regions at low resolution"""
    children: ImageArray
    """(n, K, P, P, 3) their children, by slot"""
    truth: FloatArray
    """(n, T)"""


def training_views(field: Field, count: int, side_px: int, seed: int) -> list[View]:
    """Draw views; they depend on field and seed alone, and the first ones not on how many are drawn."""
    rng = np.random.default_rng(derive_seed(seed, "views", field.name))
    height, width = field.pixels.shape[:2]
    return [
        View(int(rng.integers(width - side_px + 1)), int(rng.integers(height - side_px + 1)), int(rng.integers(8)))
        for _ in range(count)
    ]


def probe_views(field: Field, side_px: int) -> list[View]:
    """The four corners."""
    height, width = field.pixels.shape[:2]
    right, low = width - side_px, height - side_px
    return [View(x, y) for y in dict.fromkeys((0, low)) for x in dict.fromkeys((0, right))]


def look(
    field: Field, views: Sequence[View], patch_px: int, ratio: int, targets: tuple[str, ...], min_nuclei: int
) -> FieldViews:
    """Cut views out of a field. Low resolution is the mean over ratio x ratio pixels."""
    side_px = patch_px * ratio
    images, children, truth = [], [], []
    for view in views:
        window = window_of(field, view, side_px)
        images.append(area_resample(window, (0.0, 0.0, float(side_px), float(side_px)), (patch_px, patch_px)))
        children.append(cut_children(window, ratio))
        truth.append(field.truth(view.x_px, view.y_px, side_px, targets, min_nuclei))
    return FieldViews(np.stack(images), np.stack(children), np.stack(truth))


def window_of(field: Field, view: View, side_px: int) -> ImageArray:
    """Return the pixels of a view at the children's resolution, (side_px, side_px, 3)."""
    cut = field.pixels[view.y_px : view.y_px + side_px, view.x_px : view.x_px + side_px]
    turned = np.rot90(cut, view.symmetry % 4)
    return np.ascontiguousarray(turned[:, ::-1] if view.symmetry >= 4 else turned)


def cut_children(window: ImageArray, ratio: int) -> ImageArray:
    """(S, S, 3) -> (ratio**2, S / ratio, S / ratio, 3), slot = ratio * row + column."""
    side = len(window) // ratio
    grid = window.reshape(ratio, side, ratio, side, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid.reshape(ratio * ratio, side, side, 3))
