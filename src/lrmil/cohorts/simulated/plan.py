"""Who is in the cohort: patients, their slides, sites, labels and shares of positive tissue. Drawn before any pixel."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lrmil.cohorts.simulated.settings import SimulatedSettings

_PLAN_STREAM = 11


@dataclass(frozen=True)
class SlidePlan:
    """What one slide is to be."""

    index: int
    """seeds the slide"""
    slide_id: str
    patient_id: str
    patient: int
    """seeds what the slides of a patient share"""
    site: int
    label: int
    positive_share: float
    """wanted share of the tissue"""
    time: float | None = None
    """months, where survival is the target"""
    event: int | None = None

    @property
    def site_name(self) -> str:
        """A, B, ... Z, AA, ..."""
        letter = chr(ord("A") + self.site % 26)
        return letter * (1 + self.site // 26)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for fingerprints and files."""
        return asdict(self)


def label_name(settings: SimulatedSettings, label: int) -> str:
    """The label as it stands in cohort.csv."""
    if settings.target == "survival":
        return ("low", "high")[label]
    return ("negative", "positive")[label] if settings.classes == 2 else f"class_{label}"


def plan_cohort(settings: SimulatedSettings) -> list[SlidePlan]:
    """Draw the plan: labels balanced over patients and crossed with sites, second slides balanced over labels.

    Numbers of slides and patients are shuffled, so that neither their order nor their names tell the label.
    """
    rng = np.random.default_rng([settings.seed, _PLAN_STREAM])
    patients = np.arange(settings.patients)
    label = patients % settings.classes
    site = (patients // settings.classes) % settings.sites
    share = _shares(rng, settings, label)
    time, event = _survival(rng, settings, share)
    if settings.target != "class":
        label = (share > settings.tissue.witness_rate).astype(np.int64)

    owner = np.arange(settings.slides) % settings.patients
    patient_number = rng.permutation(settings.patients)
    slide_number = rng.permutation(settings.slides)
    wobble = np.exp(rng.normal(0, 0.5 * settings.tissue.witness_spread, settings.slides))
    plans = []
    for row, who in enumerate(owner):
        plans.append(
            SlidePlan(
                index=int(slide_number[row]),
                slide_id=f"S{slide_number[row] + 1:03d}",
                patient_id=f"P{patient_number[who] + 1:03d}",
                patient=int(who),
                site=int(site[who]),
                label=int(label[who]),
                positive_share=float(min(share[who] * wobble[row], 0.85)),
                time=None if time is None else max(0.01, round(float(time[who]), 2)),
                event=None if event is None else int(event[who]),
            )
        )
    return sorted(plans, key=lambda plan: plan.index)


def _shares(rng: np.random.Generator, settings: SimulatedSettings, label: np.ndarray[Any, Any]) -> Any:
    """Wanted share of positive tissue of each patient."""
    rate, spread = settings.tissue.witness_rate, settings.tissue.witness_spread
    if settings.target == "class":
        return np.where(label > 0, rate * np.exp(rng.normal(0, spread, len(label)) - spread**2 / 2), 0.0)
    return rng.uniform(0, 2 * rate, len(label))


def _survival(rng: np.random.Generator, settings: SimulatedSettings, share: Any) -> tuple[Any, Any]:
    """Observed months and whether death was observed, or (None, None) where survival is not the target."""
    if settings.target != "survival":
        return None, None
    survival = settings.survival
    relative = share / settings.tissue.witness_rate - 1
    hazard = math.log(2) / survival.median_months * np.exp(survival.log_hazard * relative)
    death = rng.exponential(1 / hazard)
    follow_up = rng.uniform(*survival.follow_up_months, len(share))
    return np.minimum(death, follow_up), (death <= follow_up).astype(np.int64)
