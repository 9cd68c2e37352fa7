"""Who trains, who validates, who tests; and the proof that nobody does two of these."""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

from lrmil.errors import CohortError
from lrmil.pipeline.cohort import labelled_for_any
from lrmil.pipeline.context import Run, Split
from lrmil.training.clam_splits import read_clam_splits
from lrmil.training.folds import (
    FINAL,
    Splits,
    final_split,
    fold_columns,
    folds_for,
    make_group_folds,
    thinned,
)
from lrmil.training.leakage import leakage_proof


def make_splits(run: Run, usable: Collection[str]) -> tuple[list[Split], str]:
    """Deal the usable slides to folds, write splits.csv, and return the folds with the proof, which is also printed.

    The split is by patient, or by groups of them, and made from the whole cohort, so that a slide which fails does not
    move the others.
    """
    table = _stratified(run)
    splits = _dealt(run, table)
    splits.write(run.folder.splits)
    kept, group = table[table["slide_id"].isin(list(usable))], run.settings.folds.group
    proof = leakage_proof(
        splits,
        list(kept["patient_id"]),
        list(kept["slide_id"]),
        list(kept[_STRATUM]),
        tested_once=run.settings.folds.clam_splits is None and "fold" not in table and not fold_columns(table),
        groups=None if group is None else (group, list(kept[group])),
    )
    run.reporter.line(proof)
    folds = _folds(run, splits, usable)
    for fold in folds:
        _require_parts(run, fold)
    if not any(fold.test for fold in folds):
        raise CohortError(
            f"{run.cohort.source}: no fold has a slide to test.", fix="Mark some patients of each fold column as test."
        )
    return folds, proof


def known_splits(run: Run, usable: Collection[str]) -> list[Split]:
    """Return the folds that `make_splits` would make, and leave what is on disk alone."""
    return _folds(run, _dealt(run, _stratified(run)), usable)


def _dealt(run: Run, table: pd.DataFrame) -> Splits:
    settings = run.settings.folds
    if settings.clam_splits is not None:
        patient_of = dict(zip(table["slide_id"], table["patient_id"], strict=True))
        splits = read_clam_splits(settings.clam_splits, patient_of)
    elif settings.group is not None:
        splits = _dealt_by_group(run, table, settings.group)
    else:
        splits = folds_for(table, _STRATUM, num_folds=settings.num_folds, seed=settings.seed)
    return _thinned(run, table, splits)


def _dealt_by_group(run: Run, table: pd.DataFrame, group: str) -> Splits:
    settings = run.settings.folds
    if group not in table:
        raise CohortError(
            f"{run.cohort.source}: there is no column {group}, by which folds.group deals patients.",
            fix=f"Columns are {', '.join(str(c) for c in table if c != _STRATUM)}.",
        )
    if "fold" in table or fold_columns(table):
        raise CohortError(
            f"{run.cohort.source} brings folds of its own, and folds.group asks for others.",
            fix="Leave folds.group out, or take the fold columns out of the table.",
        )
    patients, labels = list(table["patient_id"]), list(table[_STRATUM])
    sizes = {"num_folds": settings.num_folds, "seed": settings.seed}
    return make_group_folds(patients, list(table[group]), labels, column=group, **sizes)


def _thinned(run: Run, table: pd.DataFrame, splits: Splits) -> Splits:
    """Leave training patients out, where the config says how many stay."""
    settings = run.settings.folds
    if settings.train_patients is None:
        return splits
    patients, labels = list(table["patient_id"]), list(table[_STRATUM])
    return thinned(splits, patients, labels, train_patients=settings.train_patients, seed=settings.seed)


def _folds(run: Run, splits: Splits, usable: Collection[str]) -> list[Split]:
    return [
        _split(run, splits, name, str(number), f"fold {number + 1} of {splits.num_folds}", usable)
        for number, name in enumerate(splits.names)
    ]


def deployment_split(run: Run, usable: Collection[str]) -> Split:
    """Return the split of the deployed model: everything trains, except one patient in `num_folds`, who validate."""
    table = _stratified(run)
    s = run.settings
    splits = final_split(
        list(table["patient_id"]), list(table[_STRATUM]), num_folds=s.folds.num_folds, seed=s.folds.seed
    )
    split = _split(run, _thinned(run, table, splits), FINAL, FINAL, "final model", usable)
    _require_parts(run, split)
    return split


_STRATUM = "stratum of the task"


def _stratified(run: Run) -> pd.DataFrame:
    """Return the labelled rows with what folds are stratified by: classes, or groups of numbers or of survival.

    Tasks that share folds are stratified together, in the order of the config, whichever of them is run.
    """
    table, num_folds = labelled_for_any(run.cohort), run.settings.folds.num_folds
    if run.settings.cohort.tasks:
        strata = run.cohort.joint_strata(list(run.settings.cohort.tasks), num_folds=num_folds)
    else:
        strata = run.cohort.strata(run.settings.cohort.task, num_folds=num_folds)
    return table.assign(**{_STRATUM: strata[table.index]})


def _split(run: Run, splits: Splits, column: str, name: str, title: str, usable: Collection[str]) -> Split:
    table = labelled_for_any(run.cohort)
    labelled = set(run.cohort.labelled()["slide_id"])
    parts = splits.part_of(column, list(table["patient_id"]))
    pictured: dict[str, list[str]] = {"train": [], "val": [], "test": [], "": []}
    for slide_id, part in zip(table["slide_id"], parts, strict=True):
        if slide_id in usable:
            pictured[str(part)].append(str(slide_id))
    train, val, test = (tuple(s for s in pictured[part] if s in labelled) for part in ("train", "val", "test"))
    more = {part: tuple(pictured[part]) for part in ("train", "val")}
    return Split(name, title, train, val, test, more if more != {"train": train, "val": val} else {})


def _require_parts(run: Run, split: Split) -> None:
    """A fold without training or validation slides should be found out before anything is trained."""
    for part, name in (("train", "training"), ("val", "validation")):
        if not split.of(part):
            failed = f" ({len(run.failures)} slides failed, see {run.folder.failures})" if run.failures else ""
            raise CohortError(
                f"{run.cohort.source}: {split.title} has no {name} slide{failed}.",
                fix="Use fewer folds, add patients, or complete the cohort's own folds.",
            )
