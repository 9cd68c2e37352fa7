"""Test predictions of every method, scored on the same folds with the same intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.evaluation import (
    Cost,
    Interval,
    Predictions,
    TextTable,
    paired_bootstrap,
    result_row,
    results_frame,
    text_table,
    write_results,
)
from lrmil.evaluation.table_formats import to_markdown, to_rich
from lrmil.files import write_text
from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.heads import Outputs

TEACHER, LRMIL, LR_ONLY = "HR teacher", "LRMIL", "LR without distillation"
RANDOM, COLOUR, MAJORITY = "Random encoder", "Colour histogram", "Majority class"
GROUPS = {
    TEACHER: "Full HR",
    LRMIL: "Ours",
    LR_ONLY: "LR only",
    RANDOM: "LR only",
    COLOUR: "Reference",
    MAJORITY: "Reference",
}


class TestPredictions:
    """Collects, fold by fold, what each method says about the fold's test slides."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    def __init__(self, run: Run) -> None:
        self._run = run
        self._rows: dict[str, list[tuple[str, int, npt.NDArray[np.floating]]]] = {}

    def add(self, method: str, split: Split, outputs: Outputs) -> None:
        """Add a head's probabilities for the test slides of a fold, which must be in `outputs`, all of them."""
        self.add_rows(method, split, {s: outputs[s].probabilities for s in split.test})

    def add_rows(self, method: str, split: Split, probabilities: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """Add probabilities (C,) for the test slides of a fold."""
        rows = self._rows.setdefault(method, [])
        rows += [(slide, int(split.name), p) for slide, p in probabilities.items()]

    def add_majority(self, split: Split) -> None:
        """Add the constant answer: the shares of the classes in the fold's training split."""
        cohort = self._run.cohort
        labels = [cohort.label_of(s) for s in split.train]
        counts = np.bincount(labels, minlength=len(cohort.classes))
        self.add_rows(MAJORITY, split, {s: counts / counts.sum() for s in split.test})

    def of(self, method: str) -> Predictions:
        """Return all test predictions of a method."""
        cohort = self._run.cohort
        slides, folds, probabilities = zip(*self._rows[method], strict=True)
        return Predictions.of(
            slide_ids=slides,
            patient_ids=[cohort.patient_of(s) for s in slides],
            labels=[cohort.label_of(s) for s in slides],
            probabilities=np.stack(probabilities).astype(np.float64),
            class_names=cohort.classes,
            folds=folds,
            seeds=[self._run.settings.seed] * len(slides),
        )

    def all(self) -> dict[str, Predictions]:
        """Return the predictions of every method."""
        return {method: self.of(method) for method in self._rows}


@dataclass(frozen=True)
class Scores:
    """The results of a run."""

    results: pd.DataFrame
    """one row a method, see `evaluation.tables`"""
    table: TextTable
    gain: Interval | None
    """LRMIL less LR without distillation, AUC"""
    gap: Interval | None
    """LRMIL less the HR teacher, AUC"""
    predictions: dict[str, Predictions]

    def table_lines(self) -> list[str]:
        """Return the table for a terminal."""
        return terminal_lines(self.table)


def score_methods(run: Run, predictions: Mapping[str, Predictions], costs: Mapping[str, Cost], dataset: str) -> Scores:
    """Score every method; write tables/: results.csv, results.md, and the predictions of each method.

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
            metrics=("acc", "balanced_acc", "auc"),
            cost=costs.get(method),
        )
        for method, found in predictions.items()
    ]
    results = results_frame(rows)
    table = text_table(results, title=f"{dataset}: {run.settings.cohort.task}")
    folder: Path = run.folder.tables
    write_results(folder / "results.csv", results)
    write_text(folder / "results.md", to_markdown(table))
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
        gain=_difference(run, predictions, LR_ONLY),
        gap=_difference(run, predictions, TEACHER),
        predictions=dict(predictions),
    )


def _difference(run: Run, predictions: Mapping[str, Predictions], other: str) -> Interval | None:
    if other not in predictions or LRMIL not in predictions:
        return None
    e = run.settings.evaluation
    return paired_bootstrap(predictions[LRMIL], predictions[other], "auc", seed=e.seed, resamples=e.bootstrap)


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
