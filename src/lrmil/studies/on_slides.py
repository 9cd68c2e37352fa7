"""What studies of simulated slides have in common: a cohort, and a run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from lrmil.cohorts.simulated import SimulatedSettings, simulate_cohort
from lrmil.pipeline.config import RunSettings, parse_config
from lrmil.pipeline.reporting import Reporter
from lrmil.settings import Settings


class OnSlides(Settings):
    """The cohort of a study, what is run on it, and where."""

    out: str | None = Field(None, description="output folder; null: out/<name of the config> beside the config")
    simulated: SimulatedSettings = Field(description="the cohort")
    run: dict[str, Any] = Field(default_factory=dict, description="a run's config, without cohort and out")

    @property
    def folder(self) -> Path:
        """The study's output folder."""
        assert self.out is not None  # `load_config` names one
        return Path(self.out)


def simulated_run(settings: OnSlides, reporter: Reporter) -> RunSettings:
    """Simulate the cohort into cohort/ of the study's folder, where that is not done; return the run on it, in run/.

    Raises:
        ConfigError: the run's config is impossible.
    """
    with reporter.task("Simulating slides", settings.simulated.slides) as progress:
        table = simulate_cohort(settings.folder / "cohort", settings.simulated, on_progress=progress.reach)
    tree = settings.run | {"cohort": {"table": str(table)}, "out": str(settings.folder / "run")}
    return parse_config(tree, "run")
