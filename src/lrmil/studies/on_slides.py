"""What studies of slides have in common: a cohort that the study makes, and a run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from lrmil.cohorts.assembled import AssembledSettings, assemble_cohort
from lrmil.cohorts.simulated import SimulatedSettings, simulate_cohort
from lrmil.pipeline.config import RunSettings, parse_config
from lrmil.pipeline.reporting import Reporter
from lrmil.settings import Settings


class OnSlides(Settings):
    """The cohort of a study, what is run on it, and where."""

    out: str | None = Field(None, description="output folder; null: out/<name of the config> beside the config")
    simulated: SimulatedSettings | None = Field(None, description="a simulated cohort")
    assembled: AssembledSettings | None = Field(None, description="a cohort assembled from CRCHistoPhenotypes")
    crchisto: str | None = Field(None, description="for assembled: folder of CRCHistoPhenotypes")
    run: dict[str, Any] = Field(
        default_factory=dict, description="a run's config, without out, and of cohort without the table"
    )

    @model_validator(mode="after")
    def _one_cohort(self) -> Self:
        if (self.simulated is None) == (self.assembled is None):
            raise ValueError("give either simulated or assembled")
        if self.assembled is not None and self.crchisto is None:
            raise ValueError("assembled needs crchisto, the folder of CRCHistoPhenotypes")
        return self

    @property
    def folder(self) -> Path:
        """The study's output folder."""
        assert self.out is not None  # `load_config` names one
        return Path(self.out)

    @property
    def made_of(self) -> SimulatedSettings | AssembledSettings:
        """What the cohort is made by."""
        made = self.simulated or self.assembled
        assert made is not None
        return made


def prepared_run(settings: OnSlides, reporter: Reporter) -> RunSettings:
    """Make the cohort in cohort/ of the study's folder, where that is not done; return the run on it, in run/.

    Raises:
        ConfigError: the run's config is impossible.
        CohortError: the cohort cannot be assembled.
    """
    cohort = settings.folder / "cohort"
    if settings.simulated is not None:
        with reporter.task("Simulating slides", settings.simulated.slides) as progress:
            table = simulate_cohort(cohort, settings.simulated, on_progress=progress.reach)
    else:
        own, source = settings.assembled, settings.crchisto
        assert own is not None
        assert source is not None
        with reporter.task("Assembling slides", own.groups * own.slides_per_group) as progress:
            table = assemble_cohort(source, cohort, own, on_progress=progress.reach)
    told = {**settings.run.get("cohort", {}), "table": str(table)}
    return parse_config(settings.run | {"cohort": told, "out": str(settings.folder / "run")}, "run")
