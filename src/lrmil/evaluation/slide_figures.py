"""Figures of slides: an attention map with its colour bar, and several models side by side with the true areas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as OutlinePath
from matplotlib.patheffects import Normal, Stroke

from lrmil.evaluation.overlay import (
    COLORMAP,
    OPACITY,
    SCALE_TITLE,
    AttentionMap,
    Polygon,
    Scaling,
    UInt8Image,
    attention_overlay,
    check_maps,
    length_label,
    nice_length_um,
)

_PANEL_IN = 3.1


def attention_figure(
    rgb: UInt8Image,
    attention_map: AttentionMap,
    downsample_l0: tuple[float, float],
    *,
    mpp_l0: float | None = None,
    origin_l0: tuple[int, int] = (0, 0),
    true_areas: Sequence[Polygon] = (),
    scaling: Scaling = "rank",
    colormap: str = COLORMAP,
    caption: str = "",
) -> Figure:
    """One attention map with its colour bar and scale bar, for a file: see `side_by_side`."""
    return _panels(
        rgb,
        [attention_map],
        downsample_l0,
        show_slide=False,
        mpp_l0=mpp_l0,
        origin_l0=origin_l0,
        true_areas=true_areas,
        scaling=scaling,
        colormap=colormap,
        title=caption,
    )


def side_by_side(
    rgb: UInt8Image,
    maps: Sequence[AttentionMap],
    downsample_l0: tuple[float, float],
    *,
    mpp_l0: float | None = None,
    origin_l0: tuple[int, int] = (0, 0),
    true_areas: Sequence[Polygon] = (),
    scaling: Scaling = "rank",
    colormap: str = COLORMAP,
    title: str = "",
) -> Figure:
    """The slide and, beside it, what each model looked at; true areas are outlined in every panel.

    Args:
        rgb: (h, w, 3) uint8 overview of the slide.
        maps: one for each model, for example HR teacher, LR without distillation, LRMIL.
        downsample_l0: level-0 pixels per overview pixel, (x, y).
        mpp_l0: um per level-0 pixel; draws a scale bar.
        origin_l0: level-0 position of the overview's upper left corner.
        true_areas: outlines (V, 2) in level-0 points, see `mask_outlines` and `box_outlines`.
        scaling: how attention becomes colour, said beside the colour bar; each map is scaled by itself.
        colormap: name of a matplotlib colour map.
        title: printed above.
    """
    return _panels(
        rgb,
        maps,
        downsample_l0,
        show_slide=True,
        mpp_l0=mpp_l0,
        origin_l0=origin_l0,
        true_areas=true_areas,
        scaling=scaling,
        colormap=colormap,
        title=title,
    )


def _panels(
    rgb: UInt8Image,
    maps: Sequence[AttentionMap],
    downsample_l0: tuple[float, float],
    *,
    show_slide: bool,
    mpp_l0: float | None,
    origin_l0: tuple[int, int],
    true_areas: Sequence[Polygon],
    scaling: Scaling,
    colormap: str,
    title: str,
) -> Figure:
    check_maps(maps)
    height, width = rgb.shape[:2]
    outlines = [(p - np.asarray(origin_l0)) / np.asarray(downsample_l0) for p in true_areas]
    pictures = [("slide" + (", true areas outlined" if outlines else ""), rgb)] if show_slide else []
    for one in maps:
        painted = attention_overlay(
            rgb,
            one.boxes_l0,
            one.attention,
            downsample_l0,
            origin_l0=origin_l0,
            scaling=scaling,
            colormap=colormap,
        )
        pictures.append((one.title, painted))

    # Wide slides are stacked in fewer columns, so that a panel is never a thin strip.
    columns = len(pictures) if width / height < 1.6 else min(len(pictures), 2)
    rows = -(-len(pictures) // columns)
    panel_width = _PANEL_IN * min(max(width / height, 0.6), 1.6) if len(pictures) > 1 else 5.5
    panel_height = panel_width * height / width
    figure = Figure(figsize=(columns * panel_width + 1.1, rows * (panel_height + 0.35) + 0.45), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(pictures) :]:
        ax.axis("off")
    for ax, (name, picture) in zip(axes.flat, pictures, strict=False):
        _show(ax, picture, name)
        _outline(ax, outlines, inside_paint=picture is not rgb)
    if mpp_l0 is not None:
        _scale_bar(axes.flat[0], width, mpp_l0 * downsample_l0[0])
    _colour_bar(figure, axes, scaling, colormap)
    if title:
        figure.suptitle(title, fontsize=10, fontweight="bold", color="#222222", x=0.01, ha="left")
    return figure


def _show(ax: Axes, picture: npt.NDArray[np.uint8], name: str) -> None:
    height, width = picture.shape[:2]
    # Extent in pixels from edge to edge: the point (x, y) of an outline is then a corner of pixels, not a centre.
    ax.imshow(picture, extent=(0, width, height, 0), interpolation="antialiased")
    ax.set_title(name, fontsize=9, color="#222222", pad=4)
    ax.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    ax.spines[:].set_color("#cccccc")


def _outline(ax: Axes, outlines: Sequence[Polygon], *, inside_paint: bool) -> None:
    """Black core in a white rim: seen on tissue, on glass and on every colour of the map."""
    for points in outlines:
        closed = OutlinePath(np.vstack([points, points[:1]]), closed=True)
        width = 1.0 if inside_paint else 1.2
        rim = [Stroke(linewidth=width + 1.6, foreground="white"), Normal()]
        ax.add_patch(PathPatch(closed, fill=False, edgecolor="black", lw=width, path_effects=rim, joinstyle="round"))


def _scale_bar(ax: Axes, width_px: int, um_per_px: float) -> None:
    length_um = nice_length_um(0.3 * width_px * um_per_px)
    share = length_um / um_per_px / width_px
    rim = [Stroke(linewidth=5.0, foreground="white"), Normal()]
    ax.plot([0.04, 0.04 + share], [0.04, 0.04], transform=ax.transAxes, color="black", lw=2.4, path_effects=rim)
    text = ax.text(0.04, 0.06, length_label(length_um), transform=ax.transAxes, fontsize=8, va="bottom")
    text.set_path_effects([Stroke(linewidth=2.2, foreground="white"), Normal()])


def _colour_bar(figure: Figure, axes: npt.NDArray[np.object_], scaling: Scaling, colormap: str) -> None:
    """The colours as painted, that is over white at the opacity of the paint."""
    scale = ScalarMappable(Normalize(0, 100 if scaling == "rank" else 1), colormaps[colormap])
    bar = figure.colorbar(scale, ax=axes, shrink=0.8, aspect=28, pad=0.015, alpha=OPACITY)
    bar.set_label(f"{SCALE_TITLE[scaling]}\n(unpainted: not looked at)", fontsize=8)
    bar.ax.tick_params(labelsize=7, length=2)
    if scaling == "range":
        bar.set_ticks([0, 1], labels=["lowest", "highest"])
    bar.outline.set_visible(False)
