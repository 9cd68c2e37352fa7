"""The same cohort split in other ways: with few patients to learn from, or with sites that nobody has learned from.

Each split trains all of it anew, stage 1 included: 20x teacher, 5x without distillation, LRMIL. Tiles and 20x features
are those of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lrmil.errors import ConfigError
from lrmil.evaluation import Scored, bootstrap, interval_columns, paired_bootstrap, recovered_share
from lrmil.evaluation.metrics import MAIN, metric
from lrmil.evaluation.plots import BLACK, BLUE, ORANGE, VERMILION, new_figure, set_title, style_axes
from lrmil.pipeline.config import FoldSettings, RunSettings
from lrmil.pipeline.evaluate import LR_ONLY, LRMIL, TEACHER
from lrmil.pipeline.overrides import validated
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.run import cross_validate
from lrmil.pipeline.study import Study
from lrmil.settings import fingerprint
from lrmil.studies.markdown import bracketed

METHODS = (TEACHER, LR_ONLY, LRMIL)
_STYLE = {TEACHER: (BLACK, "o"), LR_ONLY: (ORANGE, "s"), LRMIL: (VERMILION, "*")}


def fold_study(run: RunSettings, folds: Mapping[str, Mapping[str, Any]], reporter: Reporter) -> pd.DataFrame:
    """Train and test on every way of splitting; resumes.

    Args:
        run: what is trained, and the cohort.
        folds: heading of each way: what it changes in the `folds` of the run; nothing is the run's own.
        reporter: told of progress.

    Returns:
        One row a way and method: split, train_patients (mean over folds), method, metric, value, value_low, value_high,
        and for 5x without distillation and the teacher gain, gain_low, gain_high: LRMIL less that method, paired;
        for LRMIL recovered, recovered_low, recovered_high: its share of 20x - 5x, see `recovered_share`.
    """
    if "lr_only" not in run.evaluation.baselines:
        raise ConfigError("evaluation.baselines: lr_only is missing, with which LRMIL is compared.", fix="Add it.")
    changed = {title: _split_as(run, own, title) for title, own in folds.items()}
    study = Study.begin(run, reporter)
    study.prepare()
    rows = []
    for title, settings in changed.items():
        reporter.line(f"{title}:")
        own = study if settings.folds == run.folds else study.variant(_name(settings), settings)
        found = cross_validate(own)[0]
        patients = np.mean([len({own.run.cohort.patient_of(s) for s in split.train}) for split in own.folds])
        head = {"split": title, "train_patients": round(float(patients), 1)}
        rows += [head | row for row in _scored(own, found.all())]
    return pd.DataFrame(rows)


def to_markdown(frame: pd.DataFrame) -> str:
    """Write the frame as a table, a line a split."""
    name = frame["metric"].iloc[0]
    title, (scale, form) = metric(name).title, _scale(name)
    heads = ["", "training patients", *(f"{title}, {m}" for m in METHODS), "LRMIL - 5x, paired", "LRMIL - 20x, paired"]
    heads.append("recovered of 20x - 5x")
    lines = [
        f"| {' | '.join(heads)} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for split, own in frame.groupby("split", sort=False):
        told = {row["method"]: row for row in own.to_dict("records")}
        cells = [bracketed(told[m], "value", form, scale=scale) for m in METHODS]
        cells += [bracketed(told[m], "gain", f"+{form}", scale=scale) for m in (LR_ONLY, TEACHER)]
        cells.append(_recovered(told[LRMIL]))
        lines.append(f"| {split} | {told[LRMIL]['train_patients']:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(frame: pd.DataFrame, title: str) -> Figure:
    """Draw every split as a row: the three methods with their intervals; beside them what LRMIL gains over 5x."""
    splits = list(dict.fromkeys(frame["split"]))
    name = frame["metric"].iloc[0]
    scale, _ = _scale(name)
    drawn = new_figure(8.0, 1.5 + 0.55 * len(splits))
    left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, split in enumerate(splits):
        told = {row["method"]: row for row in frame[frame["split"] == split].to_dict("records")}
        for shift, method in zip((0.2, 0.0, -0.2), METHODS, strict=True):
            colour, marker = _STYLE[method]
            _bar(left, told[method], "value", len(splits) - 1 - place + shift, colour, marker, scale)
        _bar(right, told[LR_ONLY], "gain", len(splits) - 1 - place, BLUE, "o", scale)
    style_axes(left, f"{metric(name).title}, 95 % interval over patients", "")
    style_axes(right, "LRMIL - 5x without distillation, paired", "")
    right.axvline(0, color=BLACK, linewidth=0.8)
    left.set_yticks(range(len(splits)), [str(split) for split in reversed(splits)], fontsize=8)
    left.set_ylim(-0.6, len(splits) - 0.4)
    for method in METHODS:
        colour, marker = _STYLE[method]
        left.plot([], [], marker, color=colour, label=method)
    drawn.legend(loc="outside lower center", ncols=len(METHODS), fontsize=8, frameon=False)
    set_title(drawn, title)
    return drawn


def _recovered(row: Mapping[Any, Any]) -> str:
    if not np.isfinite(row.get("recovered", np.nan)):
        return "no gap"
    return bracketed(row, "recovered", ".0f", scale=100, unit=" %")


def _scored(study: Study, said: Mapping[str, Scored]) -> list[dict[str, Any]]:
    s, name = study.run.settings.evaluation, MAIN[study.run.kind]
    recovered = recovered_share(
        said[LRMIL], said[TEACHER], said[LR_ONLY], name, seed=s.seed, resamples=s.bootstrap
    ).share
    rows = []
    for method in METHODS:
        row: dict[str, Any] = {"method": method, "metric": name}
        row |= interval_columns("value", bootstrap(said[method], name, seed=s.seed, resamples=s.bootstrap))
        if method == LRMIL and recovered is not None:
            row |= interval_columns("recovered", recovered)
        if method != LRMIL:
            gain = paired_bootstrap(said[LRMIL], said[method], name, seed=s.seed, resamples=s.bootstrap)
            row |= interval_columns("gain", gain)
        rows.append(row)
    return rows


def _split_as(run: RunSettings, changes: Mapping[str, Any], source: str) -> RunSettings:
    tree = run.folds.model_dump() | dict(changes)
    return run.model_copy(update={"folds": validated(FoldSettings, tree, f"folds, {source}")})


def _name(settings: RunSettings) -> str:
    """Name the folder of what is trained on these folds."""
    return f"folds_{fingerprint(settings.folds)}"


def _scale(name: str) -> tuple[float, str]:
    """Classes are scored in percent."""
    return (100, ".0f") if name == "auc" else (1, ".2f")


def _bar(ax: Any, row: Mapping[Any, Any], name: str, y: float, colour: str, marker: str, scale: float) -> None:
    value, low, high = (scale * float(row[key]) for key in (name, f"{name}_low", f"{name}_high"))
    ax.plot([low, high], [y, y], color=colour, lw=1.6, alpha=0.6, solid_capstyle="butt")
    ax.plot([value], [y], marker, color=colour, ms=9 if marker == "*" else 5, zorder=3)
