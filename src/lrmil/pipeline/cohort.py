"""The cohort of a config, and whether it brings slides or features alone."""

from __future__ import annotations

import pandas as pd

from lrmil.cohorts.table import Cohort, load_cohort
from lrmil.cohorts.targets import TaskSpec
from lrmil.pipeline.config import RunSettings


def settings_cohort(settings: RunSettings) -> Cohort:
    """Read and check the table that a config names.

    Raises:
        CohortError: see `load_cohort`.
    """
    c = settings.cohort
    brings_folds = settings.folds.clam_splits is not None
    kinds = {c.task: c.kind} | {name: kind for name, kind in c.tasks.items() if name != c.task}
    return load_cohort(
        c.table,
        # The task at hand comes first: it is the one that a cohort is asked about by default.
        task=[
            TaskSpec(name, kind, c.classes if name == c.task else None, c.time, c.event) for name, kind in kinds.items()
        ],
        slides_dir=c.slides_dir,
        features_dir=c.features_dir,
        label_level=c.label_level,
        num_folds=None if brings_folds else settings.folds.num_folds,
    )


def labelled_for_any(cohort: Cohort) -> pd.DataFrame:
    """Return the rows that any task of the cohort labels, in the order of the table."""
    known: set[object] = set()
    for task in cohort.tasks:
        known.update(cohort.labelled(task.name).index)
    return cohort.table[cohort.table.index.isin(list(known))]


def brings_features_alone(cohort: Cohort) -> bool:
    """Say whether the labelled slides of a cohort have feature files, and none of them a slide file."""
    table = cohort.labelled()
    has_slides = "path" in table and bool(table["path"].notna().any())
    return not has_slides and "features" in table
