"""Attention painted onto a slide, exactly where the regions lie.

A box (x0, y0, x1, y1) in level-0 pixels covers overview pixels round(x0 / dx) .. round(x1 / dx), where (dx, dy) is how
many level-0 pixels one overview pixel spans. Every boundary is rounded by itself from level 0, so that neighbours share
it and no error adds up across the slide. x is a column, y a row.

Attention is coloured by its percentile rank within the slide: raw weights of a softmax over thousands of regions are
all close to 0, and colouring them as they are shows a cold map whatever the model looked at. Regions that were not
looked at are not painted, so that "low" and "not looked at" cannot be confused. Under the paint the slide is shown in
grey, because the pinks of a stain are colours of the scale, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from scipy import stats

from lrmil.errors import ConfigError

UInt8Image = npt.NDArray[np.uint8]
Scaling = Literal["rank", "range"]
Polygon = npt.NDArray[np.float64]

COLORMAP = "viridis"
OPACITY = 0.6
SCALE_TITLE: dict[str, str] = {
    "rank": "attention, percentile within the slide",
    "range": "attention, from its lowest to its highest value",
}
_GREY = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class AttentionMap:
    """What one model looked at on one slide."""

    title: str
    boxes_l0: npt.NDArray[np.int64]
    """(N, 4) x0, y0, x1, y1 of the regions in level-0 pixels"""
    attention: npt.NDArray[np.floating[Any]]
    """(N,) weights or logits; only their order matters with `scaling="rank"`"""


def scale_attention(attention: npt.ArrayLike, scaling: Scaling = "rank") -> npt.NDArray[np.float64]:
    """Map attention (N,) to 0..1 for colouring; values that are not finite stay nan.

    "rank": (midrank - 1/2) / N, so that equal values get equal colours and all-equal attention is mid-scale.
    "range": linear from the lowest to the highest value.
    """
    values = np.asarray(attention, dtype=np.float64)
    out = np.full(values.shape, np.nan)
    known = np.isfinite(values)
    if not known.any():
        return out
    inside = values[known]
    if scaling == "rank":
        out[known] = (stats.rankdata(inside) - 0.5) / len(inside)
    else:
        spread = inside.max() - inside.min()
        out[known] = (inside - inside.min()) / spread if spread > 0 else 0.5
    return out


def paint_boxes(
    boxes_l0: npt.ArrayLike,
    values: npt.ArrayLike,
    downsample_l0: tuple[float, float],
    shape_px: tuple[int, int],
    origin_l0: tuple[int, int] = (0, 0),
) -> npt.NDArray[np.float64]:
    """Paint one value for each box onto an empty overview: (h, w), nan where no box lies.

    Where boxes overlap, their mean. A box smaller than a pixel takes one. Boxes may reach past the image.

    Args:
        boxes_l0: (N, 4) x0, y0, x1, y1.
        values: (N,); boxes whose value is not finite are left out.
        downsample_l0: level-0 pixels per overview pixel, (x, y).
        shape_px: height and width of the overview.
        origin_l0: level-0 position (x, y) of the overview's upper left corner.
    """
    boxes = np.asarray(boxes_l0, dtype=np.float64).reshape(-1, 4)
    given = np.asarray(values, dtype=np.float64)
    if given.shape != (len(boxes),):
        raise ConfigError(f"{len(boxes)} boxes come with values of shape {given.shape}.", fix="Give one for each box.")
    height, width = shape_px
    per_px = np.array([*downsample_l0, *downsample_l0], dtype=np.float64)
    edges = np.floor((boxes - np.tile(np.asarray(origin_l0, np.float64), 2)) / per_px + 0.5).astype(np.int64)
    edges[:, 2:] = np.maximum(edges[:, 2:], edges[:, :2] + 1)
    edges = np.clip(edges, 0, [width, height, width, height])
    total, count = np.zeros(shape_px), np.zeros(shape_px)
    for (x0, y0, x1, y1), value in zip(edges, given, strict=True):
        if np.isfinite(value):
            total[y0:y1, x0:x1] += value
            count[y0:y1, x0:x1] += 1
    return np.divide(total, count, out=np.full(shape_px, np.nan), where=count > 0)


def attention_overlay(
    rgb: UInt8Image,
    boxes_l0: npt.ArrayLike,
    attention: npt.ArrayLike,
    downsample_l0: tuple[float, float],
    *,
    origin_l0: tuple[int, int] = (0, 0),
    scaling: Scaling = "rank",
    colormap: str = COLORMAP,
    opacity: float = OPACITY,
    grey_below: bool = True,
) -> UInt8Image:
    """Paint attention over a slide overview; returns an image of the same size, (h, w, 3) uint8.

    Args:
        rgb: (h, w, 3) uint8 overview of the slide.
        boxes_l0: (N, 4) x0, y0, x1, y1 of the regions.
        attention: (N,) one value for each region.
        downsample_l0: level-0 pixels per overview pixel, (x, y).
        origin_l0: level-0 position of the overview's upper left corner.
        scaling: see `scale_attention`.
        colormap: name of a matplotlib colour map; "viridis" and "magma" keep their order for colour-blind readers.
        opacity: of the paint, 0..1.
        grey_below: show the slide in grey under the paint.
    """
    painted = paint_boxes(boxes_l0, scale_attention(attention, scaling), downsample_l0, rgb.shape[:2], origin_l0)
    covered = np.isfinite(painted)
    below = rgb[covered].astype(np.float64)
    if grey_below:
        below = np.repeat((below @ _GREY)[:, None], 3, axis=1)
    paint = 255.0 * colormaps[colormap](painted[covered])[:, :3]
    out = rgb.copy()
    out[covered] = np.rint(opacity * paint + (1 - opacity) * below).astype(np.uint8)
    return out


def mask_outlines(
    mask: npt.ArrayLike, downsample_l0: tuple[float, float], origin_l0: tuple[int, int] = (0, 0)
) -> list[Polygon]:
    """Outline the areas (and holes) of a mask: polygons (V, 2) of level-0 points (x, y), along the pixels' edges.

    Args:
        mask: (h, w) true inside.
        downsample_l0: level-0 pixels per mask pixel, (x, y).
        origin_l0: level-0 position of the mask's upper left corner.
    """
    # Pixel centres are at whole numbers for cv2; at double size and shifted by 1/2, contours follow the pixels' edges.
    doubled = np.kron(np.asarray(mask).astype(bool).astype(np.uint8), np.ones((2, 2), np.uint8)).astype(np.uint8)
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    per_px, origin = np.asarray(downsample_l0, np.float64), np.asarray(origin_l0, np.float64)
    return [np.round((c[:, 0, :] + 0.5) / 2) * per_px + origin for c in contours if len(c) > 2]


def box_outlines(boxes_l0: npt.ArrayLike) -> list[Polygon]:
    """Return the four corners of each box as a polygon (4, 2) of level-0 points (x, y)."""
    boxes = np.asarray(boxes_l0, dtype=np.float64).reshape(-1, 4)
    return [np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) for x0, y0, x1, y1 in boxes]


def nice_length_um(available_um: float) -> float:
    """Return the largest of 1, 2, 5 x 10**n um that fits into `available_um`: the length of a scale bar."""
    power = 10.0 ** np.floor(np.log10(available_um))
    return float(max(f * power for f in (1.0, 2.0, 5.0) if f * power <= available_um * (1 + 1e-9)))


def length_label(um: float) -> str:
    """Write a length: 200 µm, 1 mm, 2.5 mm."""
    return f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"


def check_maps(maps: Sequence[AttentionMap]) -> None:
    """Raise `ConfigError` if a map has not one value for each box, or there is no map."""
    if not maps:
        raise ConfigError("there is no attention map to show.", fix="Give at least one.")
    for one in maps:
        if len(one.boxes_l0) != len(one.attention):
            raise ConfigError(
                f"{one.title}: {len(one.boxes_l0)} boxes and {len(one.attention)} attention values.",
                fix="Give one value for each box.",
            )
