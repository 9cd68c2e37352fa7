"""Screening of recipes: one setting changed at a time, judged on validation slides of a cohort that nothing else uses.

A recipe is chosen here and reported elsewhere: no slide of the screening cohort is in a reported one, and within it
only the validation slides of each fold are asked. The number of an epoch was chosen on the same slides, for every
recipe alike, so that all figures here are too high, and only their differences mean something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import Field

from lrmil.errors import ConfigError
from lrmil.evaluation import Scored, bootstrap, interval_columns, paired_bootstrap
from lrmil.evaluation.metrics import MAIN, metric
from lrmil.evaluation.plots import save_figure
from lrmil.files import write_json, write_text
from lrmil.pipeline.ablate import require_trainable
from lrmil.pipeline.context import Split
from lrmil.pipeline.evaluate import TestPredictions
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.study import Study
from lrmil.pipeline.variants import OWN, Variant, recipe_variant
from lrmil.studies.configs import load_config
from lrmil.studies.forest import forest
from lrmil.studies.markdown import bracketed
from lrmil.studies.on_slides import OnSlides, prepared_run
from lrmil.studies.tables import write_table


class ScreenSettings(OnSlides):
    """A screen of recipes; its cohort is used for nothing else."""

    title: str = Field("Screen", description="heading")
    num_folds: int = Field(3, ge=1, description="how many of the run's folds are trained, from the first")
    factors: dict[str, dict[str, dict[str, Any]]] = Field(
        min_length=1,
        description="for each factor its values by heading, and what each changes in stage1, teacher and student of "
        "the run's config, or in encoder.student_embedding",
    )
    resamples: int = Field(2000, ge=100, description="of patients, for intervals")


def load_screen(path: Path, overrides: Sequence[str] | None = None) -> ScreenSettings:
    """Read the config; see `load_config`."""
    return load_config(ScreenSettings, path, overrides)


def run_screen(settings: ScreenSettings, reporter: Reporter, *, publish: Path | None = None) -> list[Path]:
    """Make the cohort, encode, then train every recipe on every fold; resumes. Return what was published.

    Args:
        settings: of the screen.
        reporter: told of progress.
        publish: folder of table and figure; None: report/ of the study's own folder.

    Raises:
        ConfigError: a recipe is impossible.
    """
    run = prepared_run(settings, reporter)
    recipes = [("", Variant("own", OWN))]
    for factor, values in settings.factors.items():
        recipes += [(factor, recipe_variant(title, told)) for title, told in values.items()]
    changed = [recipe.applied(run) for _, recipe in recipes]
    study = Study.begin(run, reporter)
    _require_folds(study, settings.num_folds)
    require_trainable(study, [recipe for _, recipe in recipes])
    study.keep_layers_of(changed)
    study.prepare()
    del study.folds[settings.num_folds :]
    rows: list[dict[str, Any]] = []
    reference: Scored | None = None
    for (factor, recipe), own in zip(recipes, changed, strict=True):
        said = _validated(study if own == run else study.variant(recipe.name, own))
        rows.append({"factor": factor, "recipe": recipe.title} | _scores(said, reference, study, settings.resamples))
        reference = said if reference is None else reference
        reporter.line(f"  {factor or 'recipe'}, {recipe.title}: {bracketed(rows[-1], 'value', '.3f')}")
    return _write(pd.DataFrame(rows), settings, settings.folder / "report" if publish is None else publish)


def to_markdown(frame: pd.DataFrame) -> str:
    """Write the frame as a table, a line a recipe."""
    title = metric(frame["metric"].iloc[0]).title
    lines = [f"| factor | value | {title}, validation | more than the recipe as it is, paired |", "|---|---|---:|---:|"]
    for row in frame.to_dict("records"):
        more = bracketed(row, "gain", "+.3f") if np.isfinite(row["gain"]) else ""
        lines.append(f"| {row['factor']} | {row['recipe']} | {bracketed(row, 'value', '.3f')} | {more} |")
    return "\n".join(lines) + "\n"


def figure(frame: pd.DataFrame, title: str) -> Figure:
    """Draw what every change brings, as a row, with its interval."""
    changes = frame[frame["factor"] != ""]
    names = [f"{row['factor']}: {row['recipe']}" for row in changes.to_dict("records")]
    name = metric(frame["metric"].iloc[0]).title
    axis = f"{name} more than the recipe as it is, validation slides, paired, 95 % interval"
    return forest(changes, "gain", names, axis, title)


def _require_folds(study: Study, num_folds: int) -> None:
    own = study.run.settings.folds.num_folds
    if num_folds > own:
        raise ConfigError(
            f"num_folds is {num_folds}, but the run has {own} folds.", fix="Set run.folds.num_folds, or train fewer."
        )


def _validated(own: Study) -> Scored:
    """Train a recipe on every fold, and return what it says of the fold's validation slides."""
    answers = TestPredictions(own.run)
    for split in own.folds:
        own.distil(split)
        answers.add(OWN, _asked_of_validation(split), own.student(split))
    return answers.of(OWN)


def _asked_of_validation(split: Split) -> Split:
    """Test slides take no part, so that nothing can be chosen by them."""
    return replace(split, test=split.val)


def _scores(said: Scored, reference: Scored | None, study: Study, resamples: int) -> dict[str, Any]:
    """Return a recipe's score, and its gain over the reference, with intervals."""
    name, seed = MAIN[study.run.kind], study.run.settings.seed
    found = bootstrap(said, name, seed=seed, resamples=resamples)
    gain = None if reference is None else paired_bootstrap(said, reference, name, seed=seed, resamples=resamples)
    about: dict[str, Any] = {"metric": name, "slides": len(said.slide_ids)}
    return about | interval_columns("value", found) | interval_columns("gain", gain)


def _write(frame: pd.DataFrame, settings: ScreenSettings, folder: Path) -> list[Path]:
    paths = [folder / f"{settings.folder.name}{end}" for end in (".csv", ".md", ".png", "_settings.json")]
    write_table(paths[0], frame)
    write_text(paths[1], to_markdown(frame))
    save_figure(paths[2], figure(frame, settings.title))
    write_json(paths[3], settings.model_dump(mode="json", exclude={"out"}))
    return paths
