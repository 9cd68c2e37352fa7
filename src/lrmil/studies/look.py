"""Fields of several studies side by side, for people who know tissue: as 20x shows them, and below as 5x does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lrmil.errors import ConfigError
from lrmil.evaluation.plots import new_figure, save_figure, set_title
from lrmil.studies.fields import Field, load_fields
from lrmil.studies.settings import ProbeSettings
from lrmil.studies.views import View, look

_SHOWN_IN = 1.35


def look_figure(studies: Sequence[tuple[str, Sequence[Field]]], side_px: int, ratio: int) -> Figure:
    """Draw the upper left square of every field, a pair of rows for each study.

    Args:
        studies: name, and as many fields of each.
        side_px: side of the squares, in pixels of 20x.
        ratio: 20x pixels to one of 5x.
    """
    columns = max(len(fields) for _, fields in studies)
    figure = new_figure(_SHOWN_IN * columns + 1.2, _SHOWN_IN * 2 * len(studies) + 0.6)
    axes = figure.subplots(2 * len(studies), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for number, (title, fields) in enumerate(studies):
        for column, field in enumerate(fields):
            low = look(field, [View(0, 0)], side_px // ratio, ratio, (), 1).images[0]
            axes[2 * number, column].imshow(field.pixels[:side_px, :side_px])
            axes[2 * number + 1, column].imshow(low, interpolation="nearest")
        for row, scale in ((2 * number, "20x"), (2 * number + 1, "5x")):
            axes[row, 0].text(
                -0.08, 0.5, f"{title}, {scale}", transform=axes[row, 0].transAxes, rotation=90, ha="right", va="center",
                fontsize=7,
            )  # fmt: skip
    set_title(figure, f"Fields drawn at random, {side_px} px at 20x")
    return figure


def write_look(studies: Sequence[tuple[str, ProbeSettings]], count: int, out: Path, *, seed: int = 0) -> Path:
    """Draw `count` fields of each study, chosen at random, all of the size of the smallest region.

    Raises:
        ConfigError: the studies differ in how many 20x pixels there are to one of 5x.
    """
    ratios = {settings.ratio for _, settings in studies}
    if len(ratios) > 1:
        raise ConfigError("these studies have different ratios.", fix="Show those of one ratio.")
    ratio = ratios.pop()
    side_px = min(settings.patch_px * settings.ratio for _, settings in studies)
    shown = []
    for title, settings in studies:
        assert settings.out is not None
        fields = load_fields(settings.fields, Path(settings.out), settings.patch_px * settings.ratio)
        picked = np.random.default_rng(seed).choice(len(fields), min(count, len(fields)), replace=False)
        shown.append((title, [fields[i] for i in sorted(picked)]))
    path = out.with_suffix(".png")
    save_figure(path, look_figure(shown, side_px, ratio))
    return path
