"""What a simulated cohort looks like: every knob, its unit and its meaning. `preset` gives the three ready sizes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lrmil.errors import ConfigError
from lrmil.settings import Settings

MAX_CLASSES = 7


class StainSettings(Settings):
    """Colour: how haematoxylin and eosin absorb, and how much that varies from site to site and slide to slide."""

    haematoxylin: tuple[float, float, float] = Field(
        (0.59, 0.75, 0.29), description="optical density of haematoxylin in red, green, blue (direction only)"
    )
    eosin: tuple[float, float, float] = Field(
        (0.21, 0.88, 0.42), description="optical density of eosin in red, green, blue (direction only)"
    )
    glass: tuple[float, float, float] = Field((243.0, 242.0, 244.0), description="colour of empty glass, 0 to 255")
    site_hue_sd: float = Field(0.035, ge=0, le=0.3, description="spread of the two directions between sites")
    site_strength_sd: float = Field(0.14, ge=0, le=0.6, description="spread of log stain strength between sites")
    patient_strength_sd: float = Field(0.08, ge=0, le=0.6, description="spread of log stain strength between patients")
    slide_strength_sd: float = Field(0.05, ge=0, le=0.6, description="spread of log stain strength between slides")
    field_strength_sd: float = Field(
        0.06, ge=0, le=0.5, description="spread of log stain strength inside a slide, over hundreds of um"
    )


class ScannerSettings(Settings):
    """What the scanner does to the image, and what lies on the glass."""

    blur_um: float = Field(0.28, ge=0, le=5, description="typical standard deviation of the optical blur, um")
    blur_spread: float = Field(0.25, ge=0, le=1, description="relative spread of the blur between slides")
    noise: float = Field(1.6, ge=0, le=30, description="standard deviation of sensor noise, grey levels of 255")
    artefacts: float = Field(
        0.3,
        ge=0,
        le=10,
        description="mean number of artefacts per mm2 of slide: folds, pen strokes, fields out of focus; five times "
        "as many specks of dust",
    )


class NucleusSettings(Settings):
    """Nuclei and the fine evidence: positive and negative epithelial nuclei differ in their chromatin pattern."""

    atypical_share: float = Field(
        0.85, ge=0, le=1, description="share of epithelial nuclei with the positive pattern inside positive areas"
    )
    background_atypical_share: float = Field(
        0.04, ge=0, le=1, description="the same share everywhere else: reactive nuclei, in every class"
    )
    pattern_strength: float = Field(
        1.0,
        ge=0,
        le=2,
        description="how far chromatin of positive nuclei is from that of negative ones at 20x; 0: equal",
    )
    visibility: float = Field(
        0.15,
        ge=0,
        le=1,
        description="how much of the difference survives at 5x: the share of the pattern's coarse part that is kept; "
        "at 1, positive nuclei are also 22 % wider and absorb 25 % more; at 0, size, density and colour are equal and "
        "only texture finer than 5x resolves differs",
    )
    mitoses: float = Field(
        0.01, ge=0, le=0.2, description="share of mitotic figures among epithelial nuclei of positive areas"
    )
    size_sd: float = Field(0.07, ge=0, le=0.3, description="relative spread of mean nuclear size between glands")
    absorbance_sd: float = Field(0.10, ge=0, le=0.5, description="relative spread of mean absorbance between glands")
    shapes: int = Field(220, ge=8, le=5000, description="different nuclei drawn of each kind and pattern")


class TissueSettings(Settings):
    """What tissue is made of, and the evidence that 5x shows."""

    tissue_share: float = Field(0.55, gt=0.05, le=0.95, description="share of the slide that tissue covers, about")
    pieces: tuple[int, int] = Field((1, 2), description="fewest and most pieces of tissue on a slide")
    gland_share: float = Field(0.62, ge=0, le=1, description="share of the tissue that is gland-bearing")
    fat_share: float = Field(0.10, ge=0, le=1, description="share of the tissue that is fat")
    inflamed_share: float = Field(0.09, ge=0, le=1, description="share of the tissue that is full of lymphocytes")
    gland_spacing_um: float = Field(74.0, ge=30, le=300, description="mean distance between gland centres, um")
    gland_spacing_sd: float = Field(0.10, ge=0, le=0.4, description="relative spread of that distance between slides")
    architecture: float = Field(
        0.25,
        ge=0,
        le=1,
        description="evidence that 5x shows: how much more crowded, irregular and narrow-lumened glands of positive "
        "areas are than others, beside the variation that all glands have; 0: not at all",
    )
    witness_rate: float = Field(
        0.25, gt=0, le=0.8, description="share of the tissue of a positive slide that is positive"
    )
    witness_spread: float = Field(0.3, ge=0, le=1, description="relative spread of that share between slides")
    foci: tuple[int, int] = Field((1, 3), description="fewest and most positive areas on a positive slide")

    @model_validator(mode="after")
    def _check(self) -> TissueSettings:
        if self.gland_share + self.fat_share + self.inflamed_share > 1:
            raise ValueError("gland_share, fat_share and inflamed_share together exceed 1")
        for name in ("pieces", "foci"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be two whole numbers, 1 <= fewest <= most")
        return self


class SurvivalSettings(Settings):
    """Exponential survival times: hazard = log(2) / median * exp(log_hazard * (share / witness_rate - 1))."""

    median_months: float = Field(30.0, gt=0, description="median survival at a positive share of witness_rate")
    log_hazard: float = Field(1.2, description="change of the log hazard as the positive share rises by witness_rate")
    follow_up_months: tuple[float, float] = Field(
        (12.0, 72.0), description="shortest and longest follow-up; who lives longer is censored there"
    )

    @model_validator(mode="after")
    def _check(self) -> SurvivalSettings:
        if not 0 < self.follow_up_months[0] <= self.follow_up_months[1]:
            raise ValueError("follow_up_months must be two positive numbers, shortest <= longest")
        return self


class SimulatedSettings(Settings):
    """A simulated cohort. The same settings always give the same pixels."""

    seed: int = Field(1, ge=0, description="all randomness comes from it; slides do not depend on each other's order")
    slides: int = Field(48, ge=1, description="number of slides")
    patients: int = Field(
        36, ge=1, description="number of patients; slides beyond it are second slides of some of them"
    )
    classes: int = Field(
        2, ge=2, le=MAX_CLASSES, description="number of labels; label 0 has no positive area, others a pattern each"
    )
    sites: int = Field(3, ge=1, le=50, description="number of sites, each with its own stain and scanner")
    slide_px: int = Field(2048, ge=512, le=20_000, description="side of a slide at level 0, in pixels")
    mpp: float = Field(0.5, ge=0.2, le=1.0, description="um per level-0 pixel: 0.5 is called 20x, 0.25 is called 40x")
    target: Literal["class", "share", "survival"] = Field(
        "class",
        description="what is to be predicted: a label; the share of the tissue that is positive; or survival times "
        "whose hazard that share drives (columns time, event). In the last two every slide may have positive tissue",
    )
    survival: SurvivalSettings = Field(SurvivalSettings(), description="survival times, where they are the target")
    tissue: TissueSettings = Field(TissueSettings(), description="tissue and architecture")
    nuclei: NucleusSettings = Field(NucleusSettings(), description="nuclei and the fine evidence")
    stain: StainSettings = Field(StainSettings(), description="stain colours")
    scanner: ScannerSettings = Field(ScannerSettings(), description="blur, noise and artefacts")
    jpeg_quality: int = Field(88, ge=50, le=100, description="JPEG quality of the slides")

    @model_validator(mode="after")
    def _check(self) -> SimulatedSettings:
        if self.patients > self.slides:
            raise ValueError(f"patients={self.patients} is more than slides={self.slides}")
        if self.target != "class" and self.classes != 2:
            raise ValueError(f"target {self.target!r} has one kind of positive tissue: leave classes at 2")
        if self.patients < self.classes:
            raise ValueError(f"patients={self.patients} is fewer than classes={self.classes}")
        return self


_PRESETS: dict[str, dict[str, Any]] = {
    "test": {"slides": 6, "patients": 4, "sites": 2, "slide_px": 1024},
    "demo": {
        "seed": 2,
        "slides": 48,
        "patients": 36,
        "sites": 3,
        "slide_px": 1536,
        "nuclei": {"visibility": 0.5},
    },
    "study": {
        "slides": 160,
        "patients": 120,
        "sites": 4,
        "slide_px": 4096,
        "tissue": {"pieces": (1, 3), "foci": (1, 4)},
    },
}


def preset(name: str, **changes: Any) -> SimulatedSettings:
    """Return the settings of size "test", "demo" or "study", with top-level fields changed by name."""
    if name not in _PRESETS:
        raise ConfigError(f"no simulated cohort of size {name!r}.", fix=f"Choose one of {', '.join(_PRESETS)}.")
    return SimulatedSettings.model_validate(_PRESETS[name] | changes)
