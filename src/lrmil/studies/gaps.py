"""Where is 20x better than 5x? Tasks and cohorts of slides assembled from real tissue, before anything is distilled.

A student can only recover what its teacher has more than 5x. So each task is asked of the same head at 20x and at 5x,
on the same slides, folds and seeds, and nothing else: no stage 1, no student. What comes out says on which of them a
study of distillation can mean anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
from matplotlib.figure import Figure
from pydantic import Field, model_validator

from lrmil.cohorts.assembled import AssembledSettings
from lrmil.errors import ConfigError
from lrmil.evaluation.metrics import metric
from lrmil.evaluation.plots import save_figure
from lrmil.files import write_json, write_text
from lrmil.pipeline.compare import compare
from lrmil.pipeline.evaluate import LR_ONLY
from lrmil.pipeline.methods import methods_named
from lrmil.pipeline.overrides import validated
from lrmil.pipeline.reporting import Reporter
from lrmil.settings import Settings
from lrmil.studies.configs import load_config
from lrmil.studies.forest import forest
from lrmil.studies.markdown import bracketed
from lrmil.studies.on_slides import OnSlides, prepared_run
from lrmil.studies.tables import write_table
from lrmil.tasks import TaskKind

_HR = "abmil"
_MEASURE: dict[TaskKind, str] = {"classification": "auc", "regression": "pearson"}
"""What tasks of different units can be compared by"""
_ASTRAY = "†"
"""marks an interval without its value: with two or three groups to test in a fold, resampling biases a correlation"""
_FIELDS = {"slides": "slides", "patients": "groups", "seeds": "seeds"}


class GapSettings(Settings):
    """Which cohorts, and what is asked of each."""

    title: str = Field("20x against 5x", description="heading")
    out: str | None = Field(None, description="output folder; null: out/<name of the config> beside the config")
    crchisto: str = Field(description="folder of CRCHistoPhenotypes")
    cohorts: dict[str, dict[str, Any]] = Field(min_length=1, description="settings of `lrmil assemble`, by heading")
    tasks: dict[str, Literal["classification", "regression"]] = Field(
        min_length=1, description="columns of the cohort table, and what is asked"
    )
    run: dict[str, Any] = Field(default_factory=dict, description="a run's config, without cohort and out")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="of the heads")

    @model_validator(mode="after")
    def _own_folders(self) -> Self:
        if len({_slug(title) for title in self.cohorts}) < len(self.cohorts):
            raise ValueError("two cohorts have headings that differ in punctuation alone")
        return self


def load_gaps(path: Path, overrides: Sequence[str] | None = None) -> GapSettings:
    """Read the config; see `load_config`."""
    return load_config(GapSettings, path, overrides)


def run_gaps(settings: GapSettings, reporter: Reporter, *, publish: Path | None = None) -> list[Path]:
    """Assemble every cohort and compare 20x with 5x on every task; resumes. Return what was published.

    Args:
        settings: of the study.
        reporter: told of progress.
        publish: folder of table and figure; None: report/ of the study's own folder.

    Raises:
        ConfigError, CohortError: a cohort or the run's config is impossible.
    """
    assert settings.out is not None  # `load_config` names one
    out = Path(settings.out)
    cohorts = {t: validated(AssembledSettings, told, f"cohorts, {t}") for t, told in settings.cohorts.items()}
    rows = []
    for title, assembled in cohorts.items():
        reporter.line(f"{title}:")
        for task, kind in settings.tasks.items():
            told = {
                "cohort": {"tasks": settings.tasks, "task": task},
                "compare": settings.run.get("compare", {})
                | {"methods": [_HR, "lr_only"], "reference": _HR, "seeds": list(settings.seeds)},
            }
            own = OnSlides(
                out=str(out / _slug(title)),
                assembled=assembled,
                crchisto=settings.crchisto,
                run=settings.run | told,
            )
            where = compare(prepared_run(own, reporter), reporter).folder.comparison
            rows.append({"cohort": title, "task": task} | _gap(where, kind))
            reporter.line(f"  {task}: 20x - 5x {_told(rows[-1], 'gap', '+.2f')}")
    return _write(pd.DataFrame(rows), settings, out.name, out / "report" if publish is None else publish)


def to_markdown(frame: pd.DataFrame) -> str:
    """Write the frame as a table, a line a cohort and task; intervals that leave out their own value are marked."""
    lines = [
        "| cohort | slides | task | measured by | 20x | 5x | 20x - 5x, paired |",
        "|---|---:|---|---|---:|---:|---:|",
    ]
    for row in frame.to_dict("records"):
        gap = _told(row, "gap", "+.2f")
        cells = [
            row["cohort"],
            str(row["slides"]),
            row["task"],
            metric(row["metric"]).title,
            _told(row, "hr", ".2f") + _mark(row, "hr"),
            _told(row, "lr", ".2f") + _mark(row, "lr"),
            (f"**{gap}**" if row["gap_low"] > 0 else gap) + _mark(row, "gap"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if any(_ASTRAY in line for line in lines):
        lines += ["", f"{_ASTRAY} The resamples are biased so much that their interval leaves out the value itself."]
    return "\n".join(lines) + "\n"


def _told(row: Mapping[Any, Any], name: str, form: str) -> str:
    if not _has_interval(row, name):
        return f"{row[name]:{form}}, no interval" if math.isfinite(row[name]) else "undefined"
    return bracketed(row, name, form)


def _mark(row: Mapping[Any, Any], name: str) -> str:
    astray = _has_interval(row, name) and not row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    return f" {_ASTRAY}" if astray else ""


def _has_interval(row: Mapping[Any, Any], name: str) -> bool:
    """False where a metric is undefined, or where there is nothing to resample."""
    return all(math.isfinite(row[f"{name}{end}"]) for end in ("", "_low", "_high"))


def figure(frame: pd.DataFrame, title: str) -> Figure:
    """Draw 20x - 5x of every cohort and task as a row, with its interval."""
    names = [f"{r['cohort']}: {r['task']} ({metric(r['metric']).title})" for r in frame.to_dict("records")]
    return forest(frame, "gap", names, "20x - 5x, of AUC or correlation, paired, 95 % interval over groups", title)


def _gap(comparison: Path, kind: TaskKind) -> dict[str, Any]:
    """Read what both methods scored, and their paired difference, from a comparison's tables."""
    name = _MEASURE[kind]
    (hr,) = methods_named([_HR], kind)
    results = {row["method"]: row for row in pd.read_csv(comparison / "results.csv").to_dict("records")}
    told = pd.read_csv(comparison / "differences.csv")
    less = told[(told["method"] == LR_ONLY) & (told["metric"] == name)].to_dict("records")
    if len(less) != 1:
        raise ConfigError(f"{comparison}: no difference of {name} between 20x and 5x.", fix="Compare them again.")
    row: dict[str, Any] = {"metric": name} | {own: int(results[hr.title][n]) for n, own in _FIELDS.items()}
    for short, method in (("hr", hr.title), ("lr", LR_ONLY)):
        row |= {f"{short}{end}": float(results[method][f"{name}{end}"]) for end in ("", "_low", "_high")}
    return row | {"gap": less[0]["difference"], "gap_low": less[0]["low"], "gap_high": less[0]["high"]}


def _write(frame: pd.DataFrame, settings: GapSettings, name: str, folder: Path) -> list[Path]:
    paths = [folder / f"{name}{end}" for end in (".csv", ".md", ".png", "_settings.json")]
    write_table(paths[0], frame)
    write_text(paths[1], to_markdown(frame))
    save_figure(paths[2], figure(frame, settings.title))
    write_json(paths[3], settings.model_dump(mode="json", exclude={"out", "crchisto"}))
    return paths


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
