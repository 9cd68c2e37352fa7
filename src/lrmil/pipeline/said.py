"""What many methods say about the test slides under several seeds, gathered into one comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lrmil.evaluation import Cost, Scored, concatenate, recovered_share
from lrmil.evaluation.comparison import Comparison, compare_report
from lrmil.evaluation.metrics import MAIN
from lrmil.pipeline.config import RunSettings
from lrmil.pipeline.context import Run
from lrmil.pipeline.evaluate import LR_ONLY, TestPredictions


@dataclass
class Said:
    """What methods say about the test slides, and what that costs."""

    predictions: dict[str, list[Scored]] = field(default_factory=dict)
    """Of each method, one entry a seed"""
    thresholds: dict[str, dict[tuple[int, int], float]] = field(default_factory=dict)
    """Survival: see `TestPredictions`"""
    censoring: dict[str, dict[tuple[int, int], dict[str, float]]] = field(default_factory=dict)
    """Survival: see `TestPredictions`"""
    costs: dict[str, Cost] = field(default_factory=dict)
    """Of those whose answers were timed"""

    def add(self, answers: TestPredictions) -> None:
        """Add what was said under one seed."""
        for method, predictions in answers.all().items():
            self.predictions.setdefault(method, []).append(predictions)
        for method, limits in answers.thresholds.items():
            self.thresholds.setdefault(method, {}).update(limits)
        for method, cells in answers.censoring.items():
            self.censoring.setdefault(method, {}).update(cells)

    def comparison(
        self, run: Run, *, reference: str, groups: Mapping[str, str], titles: Sequence[str] | None = None
    ) -> Comparison:
        """Score everything on the slides of `run`, and compare it with `reference`.

        Args:
            run: the cohort, and how it is evaluated.
            reference: title of the method that the others are compared with.
            groups: heading of each method in tables.
            titles: methods in the order of the tables; None: as they were added.
        """
        own = run.settings.evaluation
        return compare_report(
            {title: concatenate(self.predictions[title]) for title in titles or self.predictions},
            reference=reference,
            dataset=run.cohort.name,
            task=run.settings.cohort.task,
            groups=groups,
            costs=self.costs,
            seed=own.seed,
            resamples=own.bootstrap,
            thresholds=self.thresholds,
            censoring=self.censoring,
        )


def recovery_table(
    comparison: Comparison, settings: RunSettings, asked: Iterable[tuple[str, str, str]]
) -> pd.DataFrame:
    """Return what methods recover of the distance between 20x methods and 5x without distillation.

    Args:
        comparison: the scored predictions; without those of 5x without distillation there is no line.
        settings: how they are evaluated.
        asked: for each line its name, the 5x method, and the 20x method; left out where one of the two is not compared.

    Returns:
        Columns method (the line's name), metric, patients, gap, gap_low, gap_high, and recovered, recovered_low,
        recovered_high, empty where the interval of the gap holds 0.
    """
    said, metric, own = comparison.predictions, MAIN[settings.cohort.kind], settings.evaluation
    rows: list[dict[str, Any]] = []
    for name, low, high in asked:
        if {low, high, LR_ONLY} <= said.keys():
            found = recovered_share(
                said[low], said[high], said[LR_ONLY], metric, seed=own.seed, resamples=own.bootstrap
            )
            rows.append({"method": name, "metric": metric, "patients": found.gap.patients} | found.columns())
    numbers = [f"{kind}{end}" for kind in ("gap", "recovered") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["method", "metric", "patients", *numbers])
