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

from lrmil.cohorts.simulated import SimulatedSettings, simulate_cohort
from lrmil.distill import resolve_layers
from lrmil.evaluation import Scored, bootstrap, paired_bootstrap
from lrmil.evaluation.metrics import MAIN, metric
from lrmil.evaluation.plots import BLACK, BLUE, new_figure, save_figure, set_title, style_axes
from lrmil.files import atomic_path, write_json, write_text
from lrmil.pipeline.config import RunSettings, parse_config
from lrmil.pipeline.context import Split
from lrmil.pipeline.evaluate import TestPredictions
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.study import Study
from lrmil.pipeline.variants import Variant
from lrmil.settings import Settings, fingerprint
from lrmil.studies.configs import load_config
from lrmil.studies.markdown import bracketed

OWN = "as it is"


class ScreenSettings(Settings):
    """A screen of recipes."""

    title: str = Field("Screen", description="heading")
    out: str | None = Field(None, description="output folder; null: out/<name of the config> beside the config")
    simulated: SimulatedSettings = Field(description="the cohort, used for nothing else")
    run: dict[str, Any] = Field(default_factory=dict, description="a run's config, without cohort and out")
    num_folds: int = Field(3, ge=1, description="how many of the run's folds are trained, from the first")
    factors: dict[str, dict[str, dict[str, Any]]] = Field(
        min_length=1, description="for each factor its values by heading, and what each changes in the run's config"
    )
    resamples: int = Field(2000, ge=100, description="of patients, for intervals")


def load_screen(path: Path, overrides: Sequence[str] | None = None) -> ScreenSettings:
    """Read the config; see `load_config`."""
    return load_config(ScreenSettings, path, overrides)


def run_screen(settings: ScreenSettings, reporter: Reporter, *, publish: Path | None = None) -> list[Path]:
    """Simulate, encode, then train every recipe on every fold; resumes. Return what was published.

    Args:
        settings: of the screen.
        reporter: told of progress.
        publish: folder of table and figure; None: report/ of the study's own folder.

    Raises:
        ConfigError: a recipe is impossible.
    """
    assert settings.out is not None
    out = Path(settings.out)
    with reporter.task("Simulating slides", settings.simulated.slides) as progress:
        table = simulate_cohort(out / "cohort", settings.simulated, on_progress=progress.reach)
    run = parse_config(settings.run | {"cohort": {"table": str(table)}, "out": str(out / "run")}, "run")
    recipes = [("", Variant("own", OWN))]
    for factor, values in settings.factors.items():
        recipes += [
            (factor, Variant(f"screen_{fingerprint(changes)}", heading, changes)) for heading, changes in values.items()
        ]
    # Before hours of training: every recipe is possible.
    changed = [recipe.applied(run) for _, recipe in recipes]
    study = Study.begin(run, reporter)
    study.layers = _layers(changed, study.encoder.depth)
    study.prepare()
    del study.folds[settings.num_folds :]
    rows = []
    said: dict[str, Scored] = {}
    for (factor, recipe), own_settings in zip(recipes, changed, strict=True):
        own = study if own_settings == run else study.variant(recipe.name, own_settings)
        said[recipe.name] = _validated(own, shared=own is not study and own.run.stage1_folder is not None)
        rows.append(_row(factor, recipe, said[recipe.name], said["own"], settings, study))
        reporter.line(f"  {factor or 'recipe'}, {recipe.title}: {bracketed(rows[-1], 'value', '.3f')}")
    frame = pd.DataFrame(rows)
    folder = out / "report" if publish is None else publish
    paths = [folder / f"{out.name}{end}" for end in (".csv", ".md", ".png", "_settings.json")]
    with atomic_path(paths[0]) as scratch:
        frame.to_csv(scratch, index=False, float_format="%.6g")
    write_text(paths[1], to_markdown(frame))
    save_figure(paths[2], figure(frame, settings.title))
    write_json(paths[3], settings.model_dump(mode="json", exclude={"out"}))
    return paths


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
    changes = frame[frame["factor"] != ""].to_dict("records")
    drawn = new_figure(7.0, 1.2 + 0.3 * len(changes))
    ax = drawn.subplots()
    for place, row in enumerate(reversed(changes)):
        ax.plot([row["gain_low"], row["gain_high"]], [place, place], color=BLUE, lw=1.6, alpha=0.6)
        ax.plot([row["gain"]], [place], "o", color=BLUE, ms=5)
    name = metric(frame["metric"].iloc[0]).title
    style_axes(ax, f"{name} more than the recipe as it is, validation slides, paired, 95 % interval", "")
    ax.axvline(0, color=BLACK, linewidth=0.8)
    ax.set_yticks(range(len(changes)), [f"{r['factor']}: {r['recipe']}" for r in reversed(changes)], fontsize=8)
    set_title(drawn, title)
    return drawn


def _validated(own: Study, *, shared: bool) -> Scored:
    """Train a recipe on every fold, and return what it says of the fold's validation slides."""
    answers = TestPredictions(own.run)
    for split in own.folds:
        if not shared:
            own.distil(split)
        answers.add(OWN, _asked_of_validation(split), own.student(split))
    return answers.of(OWN)


def _asked_of_validation(split: Split) -> Split:
    """Test slides take no part, so that nothing can be chosen by them."""
    return replace(split, test=split.val)


def _row(
    factor: str, recipe: Variant, said: Scored, own: Scored, settings: ScreenSettings, study: Study
) -> dict[str, Any]:
    name = MAIN[study.run.kind]
    how: dict[str, Any] = {"seed": study.run.settings.seed, "resamples": settings.resamples}
    found = bootstrap(said, name, **how)
    row: dict[str, Any] = {"factor": factor, "recipe": recipe.title, "metric": name, "slides": len(said.slide_ids)}
    row |= {"value": found.value, "value_low": found.low, "value_high": found.high}
    if said is own:
        return row | dict.fromkeys(("gain", "gain_low", "gain_high"), np.nan)
    gain = paired_bootstrap(said, own, name, **how)
    return row | {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}


def _layers(changed: Sequence[RunSettings], depth: int) -> tuple[int, ...]:
    """Return every block that some recipe distils."""
    return tuple(sorted({layer for s in changed for layer in resolve_layers(s.stage1.loss.layers, depth)}))
