"""The cohort of a config, and whether it brings slides or features alone."""

from __future__ import annotations

from lrmil.cohorts.table import Cohort, load_cohort
from lrmil.pipeline.config import RunSettings


def settings_cohort(settings: RunSettings) -> Cohort:
    """Read and check the table that a config names.

    Raises:
        CohortError: see `load_cohort`.
    """
    c = settings.cohort
    brings_folds = settings.folds.clam_splits is not None
    return load_cohort(
        c.table,
        task=c.task,
        kind=c.kind,
        classes=c.classes,
        time=c.time,
        event=c.event,
        slides_dir=c.slides_dir,
        features_dir=c.features_dir,
        label_level=c.label_level,
        num_folds=None if brings_folds else settings.folds.num_folds,
    )


def brings_features_alone(cohort: Cohort) -> bool:
    """Say whether the labelled slides of a cohort have feature files, and none of them a slide file."""
    table = cohort.labelled()
    has_slides = "path" in table and bool(table["path"].notna().any())
    return not has_slides and "features" in table
