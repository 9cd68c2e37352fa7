"""What may be asked of the tissue mask."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lrmil.settings import Settings

PenColour = Literal["blue_green", "red", "black"]


class TissueSettings(Settings):
    """Scale, thresholds and sizes of the tissue mask. Lengths are um and areas um2, so that they hold at any mpp."""

    mpp: float = Field(8.0, gt=0, le=64, description="scale at which the slide is looked at, um per pixel")
    smooth_um: float = Field(6.0, ge=0, description="Gaussian sigma that calms noise and compression artefacts")
    min_stain: float = Field(
        0.04,
        gt=0,
        description="least stain (optical density) of tissue, whatever Otsu says: keeps an empty slide empty",
    )
    max_stain: float = Field(
        0.06,
        gt=0,
        description="stain that is always tissue, whatever Otsu says: keeps a slide without background full",
    )
    min_tissue_um2: float = Field(16_000.0, ge=0, description="smaller pieces are specks, and dropped")
    max_hole_um2: float = Field(5_000.0, ge=0, description="smaller holes are filled; larger ones (lumen) stay open")
    pens: tuple[PenColour, ...] = Field(
        ("blue_green", "red", "black"),
        description="pen colours to cut out; leave out those that a special stain shares (trichrome: blue_green)",
    )
    min_pen_um: float = Field(80.0, ge=0, description="least width of the solid part of a pen stroke")
    pen_reach_um: float = Field(300.0, ge=0, description="how far the blurred edge of a stroke may reach")
    pen_margin_um: float = Field(24.0, ge=0, description="rim around pen marks that is cut out as well")

    @model_validator(mode="after")
    def _check(self) -> TissueSettings:
        if self.max_stain < self.min_stain:
            raise ValueError(f"max_stain={self.max_stain:g} is below min_stain={self.min_stain:g}")
        return self
