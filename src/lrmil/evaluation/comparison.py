"""Many methods on one task of one cohort: everything that a comparison reports, and the files that hold it.

Three kinds of methods: the reference, which all others are compared with; the baselines, whose tests share one Holm
correction per metric and cohort; and lines that only give a scale (a majority class, an ablation of the reference),
whose differences are shown without correction, since no claim rests on them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from lrmil.errors import ConfigError
from lrmil.evaluation.intervals import RESAMPLES, check_paired
from lrmil.evaluation.metrics import SHOWN, fold_scores, reliability_bins
from lrmil.evaluation.paired import PERMUTATIONS, compare_methods, holm
from lrmil.evaluation.predictions import Predictions
from lrmil.evaluation.scored import Scored
from lrmil.evaluation.survival import Thresholds, log_rank, risk_groups
from lrmil.evaluation.table_formats import to_latex, to_markdown
from lrmil.evaluation.tables import (
    CellScores,
    Cost,
    TextTable,
    differences_table,
    p_value_text,
    paper_frame,
    paper_table,
    result_row,
    results_frame,
    text_table,
    three_digits,
    times_frame,
    write_results,
)
from lrmil.evaluation.values import Values
from lrmil.files import write_text

BASELINE_GROUPS = ("Full HR", "SC")
"""Groups whose methods are baselines of the paper"""
OTHER = "Other"
"""Group of methods for which none is given"""

_CALIBRATION = ("brier", "ece")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results of many methods on one task of one cohort. Made by `compare_report`."""

    dataset: str
    task: str
    reference: str
    """Method that the others are compared with"""
    baselines: tuple[str, ...]
    """Methods whose tests share Holm's correction"""
    results: pd.DataFrame
    """A row for each method, slide level, see `tables`"""
    patients: pd.DataFrame
    """The same at patient level; empty where every patient has one slide, or none has one label for all"""
    differences: pd.DataFrame
    """Reference less other, a row for each metric and other method, see `paired.compare_methods`; p_holm is nan where
    the other is no baseline"""
    folds: pd.DataFrame
    """Tidy: method, group, then `metrics.fold_scores`"""
    calibration: pd.DataFrame
    """Like `results`, with the metrics that say how far stated probabilities can be believed; empty without classes"""
    reliability: pd.DataFrame
    """Tidy: method, then `metrics.reliability_bins`; empty without classes"""
    risk: pd.DataFrame
    """Survival: a row for each method whose thresholds were given: patients and events at high and low risk, log-rank
    statistic and p; empty otherwise"""
    times: pd.DataFrame
    """See `tables.times_frame`; empty if no cost is known"""
    predictions: Mapping[str, Scored] = field(repr=False)
    groups: Mapping[str, str] = field(repr=False)
    thresholds: Mapping[str, Thresholds] = field(repr=False)
    """For each method, the median risk in the training split of each fold; empty if not survival"""
    seed: int

    @property
    def title(self) -> str:
        """What was compared, for headings."""
        return f"{self.dataset}: {self.task}"

    def results_table(self) -> TextTable:
        """Metrics with sd and interval, patches and seconds per slide."""
        return text_table(self.results, title=self.title)

    def paper_table(self) -> TextTable:
        """As the paper prints: accuracy, AUC, seconds of the whole cohort."""
        return paper_table(self.results, self.title)

    def patients_table(self) -> TextTable | None:
        """Metrics of the mean probability over each patient's slides, or None where that says nothing new."""
        if self.patients.empty:
            return None
        return text_table(self.patients, title=f"{self.title}, patient level", show_cost=False)

    def differences_table(self) -> TextTable:
        """Paired differences with intervals and tests."""
        return differences_table(self.differences, f"{self.title}, {self.reference} less each other method")

    def calibration_table(self) -> TextTable | None:
        """How far stated probabilities can be believed."""
        if self.calibration.empty:
            return None
        return text_table(self.calibration, title=f"{self.title}, calibration", show_cost=False)

    def times_table(self) -> TextTable | None:
        """Seconds of each part, in the order of the results; None if no cost is known."""
        if self.times.empty:
            return None
        names = [c for c in self.times.columns if c not in ("method", "group")]
        kept = [c for c in names if self.times[c].notna().any()]
        order = {method: i for i, method in enumerate(self.results["method"])}
        ordered = sorted(self.times.to_dict("records"), key=lambda row: order[row["method"]])
        rows = [
            [row["method"], *(three_digits(row[c]) if np.isfinite(row[c]) else "–" for c in kept)] for row in ordered
        ]
        return TextTable.of(f"{self.title}, time", ["Method", *(_heading(c) for c in kept)], rows)

    def risk_table(self) -> TextTable | None:
        """Survival of the patients at high and low risk; None if there are no thresholds."""
        if self.risk.empty:
            return None
        header = ["Method", "High risk: events / patients", "Low risk: events / patients", "Log-rank χ²", "p"]
        rows = [
            [
                row["method"],
                f"{row['high_events']} / {row['high_patients']}",
                f"{row['low_events']} / {row['low_patients']}",
                f"{row['statistic']:.2f}" if np.isfinite(row["statistic"]) else "–",
                p_value_text(row["p_value"]),
            ]
            for row in self.risk.to_dict("records")
        ]
        table = TextTable.of(f"{self.title}, survival of risk groups", header, rows)
        notes = [f"{row['method']}: {row['reason']}." for row in self.risk.to_dict("records") if row["reason"]]
        lead = (
            "Groups are divided at the median risk of each fold's training patients. Log-rank over all test patients."
        )
        return replace(table, notes=(lead, *notes))

    def tables(self) -> dict[str, TextTable]:
        """Every table that has something to say, by the name of its files."""
        found = {
            "results": self.results_table(),
            "paper": self.paper_table(),
            "patients": self.patients_table(),
            "differences": self.differences_table(),
            "calibration": self.calibration_table(),
            "times": self.times_table(),
            "risk": self.risk_table(),
        }
        return {name: table for name, table in found.items() if table is not None}


def compare_report(
    predictions: Mapping[str, Scored],
    *,
    reference: str,
    dataset: str,
    task: str,
    groups: Mapping[str, str],
    costs: Mapping[str, Cost],
    seed: int,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    baselines: Collection[str] | None = None,
    thresholds: Mapping[str, Thresholds] | None = None,
    censoring: Mapping[str, CellScores] | None = None,
) -> Comparison:
    """Score every method, and every method against the reference, on the same slides and folds.

    Args:
        predictions: of each method, all folds and seeds: all `Predictions`, or all `Values` of one kind.
        reference: the method that the others are compared with, usually LRMIL.
        dataset: name of the cohort.
        task: what is predicted.
        groups: block of the table of each method, see `tables.GROUP_ORDER`; "Other" where none is given.
        costs: measured at inference; unknown where none is given.
        seed: of bootstrap and permutations.
        resamples: of the bootstrap.
        permutations: of the test.
        baselines: methods whose tests share Holm's correction; None: those of `BASELINE_GROUPS`, and if there are none,
            every other method.
        thresholds: survival only: for each method whose risk groups shall be shown, the median risk in the training
            split of each fold.
        censoring: survival only: see `tables.result_row`, for each method.

    Raises:
        ConfigError: the reference or a baseline is not among the methods, or methods differ in slides, folds, patients,
            truth or number of seeds.
    """
    if reference not in predictions:
        raise ConfigError(
            f"the reference {reference!r} is not among the methods ({', '.join(predictions)}).",
            fix="Name one that was run.",
        )
    ours = predictions[reference]
    others = {method: found for method, found in predictions.items() if method != reference}
    for method, found in others.items():
        try:
            check_paired(ours, found)
        except ConfigError as error:
            raise ConfigError(f"{reference} and {method}: {error.message}", fix=error.fix) from error
    group_of = {method: groups.get(method, OTHER) for method in predictions}
    family = _family(others, group_of, baselines)

    def rows(metrics: Sequence[str], level: str = "slide") -> pd.DataFrame:
        return results_frame(
            [
                result_row(
                    found,
                    dataset=dataset,
                    task=task,
                    method=method,
                    group=group_of[method],
                    seed=seed,
                    metrics=metrics,
                    cost=costs.get(method),
                    level=level,
                    resamples=resamples,
                    censoring=(censoring or {}).get(method) if level == "slide" else None,
                )
                for method, found in predictions.items()
            ]
        )

    shown = SHOWN[ours.kind]
    results = rows(shown)
    by_patient = not ours.one_slide_per_patient() and len(ours.mixed_patients()) < len(np.unique(ours.patient_ids))
    tested = [
        compare_methods(ours, others, name, seed=seed, resamples=resamples, permutations=permutations) for name in shown
    ]
    order = {method: i for i, method in enumerate(results["method"])}
    differences = pd.concat([_holm_over(frame, family) for frame in tested], ignore_index=True)
    differences = differences.sort_values("method", key=lambda m: m.map(order), kind="stable", ignore_index=True)
    differences = differences.sort_values(
        "metric", key=lambda m: m.map({n: i for i, n in enumerate(shown)}), kind="stable", ignore_index=True
    )
    folds = [fold_scores(predictions[m]).assign(method=m, group=group_of[m]) for m in order]
    ordered = {m: predictions[m] for m in order}
    bins = [reliability_bins(p).assign(method=m) for m, p in ordered.items() if isinstance(p, Predictions)]
    return Comparison(
        dataset=dataset,
        task=task,
        reference=reference,
        baselines=tuple(m for m in order if m in family),
        results=results,
        patients=rows(shown, "patient") if by_patient else results.iloc[:0],
        differences=differences,
        folds=_first(pd.concat(folds, ignore_index=True), ["method", "group"]),
        calibration=rows(_CALIBRATION) if bins else results.iloc[:0],
        reliability=_first(pd.concat(bins, ignore_index=True), ["method"]) if bins else pd.DataFrame(),
        risk=_risk(ordered, thresholds or {}),
        times=times_frame({m: costs[m] for m in order if m in costs}, group_of, int(results["slides"].max())),
        predictions=ordered,
        groups=group_of,
        thresholds=dict(thresholds or {}),
        seed=seed,
    )


def write_joint_tables(folder: str | os.PathLike[str], comparisons: Sequence[Comparison]) -> tuple[Path, ...]:
    """Write results.csv and paper.csv, .md, .tex: several cohorts and tasks side by side, as in the paper."""
    results = results_frame([row for c in comparisons for row in c.results.to_dict("records")])
    root = Path(folder)
    table = paper_table(results)
    write_results(root / "results.csv", results)
    write_results(root / "paper.csv", paper_frame(results))
    write_text(root / "paper.md", to_markdown(table))
    write_text(root / "paper.tex", to_latex(table, label="tab:comparison"))
    return tuple(root / name for name in ("results.csv", "paper.csv", "paper.md", "paper.tex"))


def file_name(method: str) -> str:
    """Name of a method as it can stand in a file name: lower case letters, digits, underscores and hyphens."""
    return re.sub(r"[^a-z0-9-]+", "_", method.lower()).strip("_") or "method"


def _family(
    others: Mapping[str, Scored], group_of: Mapping[str, str], baselines: Collection[str] | None
) -> frozenset[str]:
    if baselines is None:
        return frozenset(m for m in others if group_of[m] in BASELINE_GROUPS) or frozenset(others)
    strangers = sorted(set(baselines) - set(others))
    if strangers:
        raise ConfigError(f"no predictions of the baselines {', '.join(strangers)}.", fix="Run them, or name others.")
    return frozenset(baselines)


def _risk(predictions: Mapping[str, Scored], thresholds: Mapping[str, Thresholds]) -> pd.DataFrame:
    rows = []
    for method, limits in thresholds.items():
        values = predictions.get(method)
        if not isinstance(values, Values):
            raise ConfigError(
                f"thresholds of risk for {method}, which has no predictions of survival.",
                fix="Give thresholds for methods of survival only.",
            )
        patients, high = risk_groups(values, limits)
        test = log_rank(patients.time, patients.event, high)
        row: dict[str, object] = {"method": method}
        for name, inside in (("high", high), ("low", ~high)):
            row |= {f"{name}_patients": int(inside.sum()), f"{name}_events": int(patients.event[inside].sum())}
        rows.append(row | {"statistic": test.statistic, "p_value": test.p_value, "reason": test.reason})
    return pd.DataFrame(rows)


def _holm_over(differences: pd.DataFrame, family: Collection[str]) -> pd.DataFrame:
    inside = differences["method"].isin(list(family))
    p_values = differences["p_permutation"].where(inside)
    return differences.assign(p_holm=holm(p_values.to_numpy(dtype=np.float64)))


def _first(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    return frame[[*columns, *(c for c in frame if c not in columns)]]


def _heading(column: str) -> str:
    known = {
        "seconds_per_slide": "Seconds / slide",
        "time_s": "Cohort (s)",
        "patches_read_per_slide": "Patches read / slide",
        "patches_per_slide": "Patches encoded / slide",
        "bytes_per_slide": "Bytes / slide",
    }
    return known.get(column) or f"{column.removesuffix('_s')} (s)"
