"""Simulated H&E-like slides whose truth is known for every nucleus and region."""

from lrmil.cohorts.simulated.cohort import simulate_cohort
from lrmil.cohorts.simulated.settings import SimulatedSettings, preset
from lrmil.cohorts.simulated.slide import Truth, render_tile

__all__ = [
    "SimulatedSettings",
    "Truth",
    "preset",
    "render_tile",
    "simulate_cohort",
]
