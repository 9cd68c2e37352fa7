"""Test predictions of every method, scored on the same folds with the same intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.evaluation import (
    Cost,
    Interval,
    Predictions,
    Scored,
    TextTable,
    Values,
    constant_answer,
    interval_columns,
    paired_bootstrap,
    result_row,
    results_frame,
    text_table,
    write_results,
)
from lrmil.evaluation.metrics import MAIN, SHOWN
from lrmil.evaluation.survival import Thresholds
from lrmil.evaluation.survival_metrics import censoring_scores
from lrmil.evaluation.table_formats import to_markdown, to_rich
from lrmil.evaluation.tables import CellScores
from lrmil.files import write_text
from lrmil.pipeline.baselines import CONSTANT_RISK, MAJORITY, TRAINING_MEAN, constant_title
from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.heads import Outputs
from lrmil.tasks import TaskKind
from lrmil.training.predict import BagPrediction

TEACHER, LRMIL, LR_ONLY = "HR teacher", "LRMIL", "LR without distillation"
RANDOM, COLOUR = "Random encoder", "Colour histogram"
GROUPS = {
    TEACHER: "Full HR",
    LRMIL: "Ours",
    LR_ONLY: "LR only",
    RANDOM: "LR only",
    COLOUR: "Reference",
    MAJORITY: "Reference",
    TRAINING_MEAN: "Reference",
    CONSTANT_RISK: "Reference",
}


class TestPredictions:
    """Collects, fold by fold, what each method says about the fold's test slides."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    def __init__(self, run: Run) -> None:
        self._run = run
        self._rows: dict[str, list[tuple[str, int, npt.NDArray[np.floating]]]] = {}
        self.thresholds: dict[str, dict[tuple[int, int], float]] = {}
        """Survival: for each method that has a head the median risk of each (fold, seed)'s training patients"""
        self.censoring: dict[str, dict[tuple[int, int], dict[str, float]]] = {}
        """Survival: for each of these methods the scores of each (fold, seed) that weigh by censoring"""

    def asked(self, split: Split) -> tuple[str, ...]:
        """Return the slides of a fold that `add` wants answers for: those of its test; for survival, where risk groups
        are divided at the median of the training patients, those, too.
        """
        return (*split.train, *split.test) if self._run.kind == "survival" else split.test

    def add(self, method: str, split: Split, outputs: Outputs) -> None:
        """Add a head's answers for the test slides of a fold; all slides of `asked` must be in `outputs`."""
        self.add_rows(method, split, {s: _answer(outputs[s]) for s in split.test})
        if self._run.kind == "survival":
            risks = {s: outputs[s].value for s in split.train}
            cell = int(split.name), self._run.settings.seed
            self.thresholds.setdefault(method, {})[cell] = median_of_patients(self._run, risks)
            self.censoring.setdefault(method, {})[cell] = self._censoring_scores(split, outputs)

    def _censoring_scores(self, split: Split, outputs: Outputs) -> dict[str, float]:
        train, test = (np.stack([self._run.cohort.target_of(s) for s in part]) for part in (split.train, split.test))
        risk = np.array([outputs[s].value for s in split.test], dtype=np.float64)
        curves = [curve for s in split.test if (curve := outputs[s].survival) is not None]
        if not curves:
            return censoring_scores(test, risk, train)
        return censoring_scores(test, risk, train, np.stack(curves), self._run.objective.fit(train).readout.times)

    def add_rows(self, method: str, split: Split, answers: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """Add answers for the test slides of a fold: probabilities (C,), or a number or risk ()."""
        rows = self._rows.setdefault(method, [])
        rows += [(slide, int(split.name), answer) for slide, answer in answers.items()]

    def add_constant(self, split: Split) -> None:
        """Add the answer that looks at no slide, see `constant_answer`."""
        cohort = self._run.cohort
        truth: Callable[[str], Any] = cohort.label_of if self._run.kind == "classification" else cohort.target_of
        answer = constant_answer(self._run.kind, [truth(s) for s in split.train], len(cohort.classes))
        self.add_rows(constant_title(self._run.kind), split, dict.fromkeys(split.test, answer))

    def of(self, method: str) -> Scored:
        """Return all test predictions of a method."""
        cohort = self._run.cohort
        slides, folds, answers = zip(*self._rows[method], strict=True)
        whose: dict[str, Any] = {
            "slide_ids": slides,
            "patient_ids": [cohort.patient_of(s) for s in slides],
            "folds": folds,
            "seeds": [self._run.settings.seed] * len(slides),
        }
        said = np.stack(answers).astype(np.float64)
        if self._run.kind != "classification":
            return Values.of(targets=np.stack([cohort.target_of(s) for s in slides]), predicted=said, **whose)
        labels = [cohort.label_of(s) for s in slides]
        return Predictions.of(labels=labels, probabilities=said, class_names=cohort.classes, **whose)

    def all(self) -> dict[str, Scored]:
        """Return the predictions of every method."""
        return {method: self.of(method) for method in self._rows}


def median_of_patients(run: Run, risks: Mapping[str, float | None]) -> float:
    """Return the median over patients of the mean risk of their slides."""
    of_patient: dict[str, list[float]] = {}
    for slide, risk in risks.items():
        assert risk is not None, f"{slide} has no risk"
        of_patient.setdefault(run.cohort.patient_of(slide), []).append(risk)
    return float(np.median([np.mean(own) for own in of_patient.values()]))


def _answer(output: BagPrediction) -> npt.NDArray[np.floating]:
    return output.probabilities if output.value is None else np.asarray(output.value, np.float64)


@dataclass(frozen=True)
class Scores:
    """The results of a run."""

    results: pd.DataFrame
    """one row a method, see `evaluation.tables`"""
    table: TextTable
    differences: Mapping[str, Interval]
    """LRMIL less each other method on the same patients, in the main metric of the task"""
    predictions: dict[str, Scored]
    thresholds: Mapping[str, Thresholds]
    """Survival: where risk groups of a method are divided in each fold; empty otherwise"""

    @property
    def kind(self) -> TaskKind:
        """Of the task."""
        return next(iter(self.predictions.values())).kind

    def table_lines(self) -> list[str]:
        """Return the table for a terminal."""
        return terminal_lines(self.table)


def score_methods(
    run: Run,
    predictions: Mapping[str, Scored],
    costs: Mapping[str, Cost],
    dataset: str,
    thresholds: Mapping[str, Thresholds] | None = None,
    censoring: Mapping[str, CellScores] | None = None,
) -> Scores:
    """Score every method; write tables/: results.csv and .md, differences.csv, and the predictions of each method.

    Predictions of methods that are no longer asked for are removed: tables/ holds what one config gave.
    """
    e = run.settings.evaluation
    rows = [
        result_row(
            found,
            dataset=dataset,
            task=run.settings.cohort.task,
            method=method,
            group=GROUPS.get(method, "Other"),
            seed=e.seed,
            resamples=e.bootstrap,
            metrics=SHOWN[run.kind],
            cost=costs.get(method),
            censoring=(censoring or {}).get(method),
        )
        for method, found in predictions.items()
    ]
    results = results_frame(rows)
    table = text_table(results, title=f"{dataset}: {run.settings.cohort.task}")
    folder: Path = run.folder.tables
    write_results(folder / "results.csv", results)
    write_text(folder / "results.md", to_markdown(table))
    differences = {other: _difference(run, predictions, other) for other in predictions if other != LRMIL}
    lines = [
        {"method": LRMIL, "less": other, "metric": MAIN[run.kind]} | interval_columns("difference", found)
        for other, found in differences.items()
    ]
    write_results(folder / "differences.csv", pd.DataFrame(lines))
    written = {
        folder / "predictions" / f"{method.lower().replace(' ', '_')}.csv": m for method, m in predictions.items()
    }
    for path, found in written.items():
        found.write_csv(path)
    for path in (folder / "predictions").glob("*.csv"):
        if path not in written:
            path.unlink()
    return Scores(
        results,
        table,
        differences=differences,
        predictions=dict(predictions),
        thresholds=dict(thresholds or {}),
    )


def _difference(run: Run, predictions: Mapping[str, Scored], other: str) -> Interval:
    e = run.settings.evaluation
    return paired_bootstrap(predictions[LRMIL], predictions[other], MAIN[run.kind], seed=e.seed, resamples=e.bootstrap)


def terminal_lines(table: TextTable) -> list[str]:
    """Return a table as lines for a terminal."""
    from rich.console import Console

    text = StringIO()
    Console(file=text, width=150, highlight=False).print(to_rich(table))
    return text.getvalue().rstrip("\n").split("\n")


def per_fold_slides(folds: Sequence[Split]) -> TextTable:
    """Return how many slides each part of each fold has."""
    rows = [[f.title, len(f.train), len(f.val), len(f.test)] for f in folds]
    return TextTable.of("Slides in each fold", ["Fold", "Training", "Validation", "Test"], rows)
