"""Simulated H&E-like slides whose truth is known for every nucleus and region."""

from lrmil.cohorts.simulated.cohort import simulate_cohort
from lrmil.cohorts.simulated.settings import SimulatedSettings, preset
from lrmil.cohorts.simulated.slide import Truth, render_tile
from lrmil.cohorts.simulated.truth_files import area_mask, read_areas, read_nuclei

__all__ = [
    "SimulatedSettings",
    "Truth",
    "area_mask",
    "preset",
    "read_areas",
    "read_nuclei",
    "render_tile",
    "simulate_cohort",
]
