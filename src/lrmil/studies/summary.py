"""R2, gains and recovery with intervals over groups, from the cells of a study of region probes.

R2 is 1 - mean squared error / variance of the truth, averaged over seeds. Each region is answered by the model of the
fold that tests its group. The variance is that of all regions of the study: one dozen test images may hardly vary, and
R2 by fold then says more about which images met there than about the embedding (it is in the table of cells).

Intervals resample groups (images, patients). The variance and the number of regions are held fixed, so that R2 is a sum
over groups, and differences are paired; seeds, each of which deals the groups to other folds, are averaged first. The
intervals are about other test images for these trained encoders; that seeds train on other images is averaged, not
resampled.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.evaluation.intervals import Interval, interval_columns, resample_patients
from lrmil.evaluation.recovery import share_of_gap
from lrmil.evaluation.values import Values

FloatArray = npt.NDArray[np.float64]
Arm = tuple[str, str]
"""(arm, embedding)"""


@dataclass(frozen=True)
class Drawn:
    """A value, and what it is in each resample of groups (B,)."""

    value: float
    resamples: FloatArray
    groups: int
    """how many are resampled"""

    def __sub__(self, other: Drawn) -> Drawn:
        """Return the paired difference: both under the same resamples."""
        return Drawn(self.value - other.value, self.resamples - other.resamples, self.groups)

    def interval(self) -> Interval:
        """Return the value with the 2.5 and 97.5 % points of its resamples."""
        low, high = np.quantile(self.resamples, [0.025, 0.975])
        return Interval(self.value, float(low), float(high), 0.95, len(self.resamples), self.groups)


@dataclass(frozen=True)
class GroupLosses:
    """Squared errors of one arm for one target, in units of the variance of the truth."""

    error: pd.DataFrame
    """columns sum and count; indexed by (seed, fold, group)"""

    @property
    def cells(self) -> set[tuple[int, int]]:
        """(seed, fold) that are finished."""
        return {(int(seed), int(fold)) for seed, fold, _ in self.error.index}

    @property
    def seeds(self) -> int:
        """How many seeds have a finished fold."""
        return len({seed for seed, _ in self.cells})

    def share(self, cells: Collection[tuple[int, int]]) -> pd.Series:
        """By group, what it adds to 1 - R2 over these cells."""
        own = self.error[[(seed, fold) in cells for seed, fold, _ in self.error.index]]
        regions = own["count"].groupby(level="seed").transform("sum")
        seeds = own.index.get_level_values("seed").nunique()
        return (own["sum"] / regions / seeds).groupby(level="group").sum()


def group_losses(rows: pd.DataFrame, variance: float) -> GroupLosses | None:
    """Sum up the errors of one arm for one target.

    Args:
        rows: fold, seed, group, truth (nan where unknown), predicted.
        variance: of the truth, over all regions of the study.
    """
    known = rows[np.isfinite(rows["truth"])]
    if known.empty or variance <= 0:
        return None
    error = known.assign(error=(known["truth"] - known["predicted"]) ** 2 / variance)
    return GroupLosses(error.groupby(["seed", "fold", "group"])["error"].agg(["sum", "count"]))


class Bootstrap:
    """The same resamples of groups for every arm that has the same groups."""

    def __init__(self, resamples: int, seed: int = 0) -> None:
        self._resamples, self._seed = resamples, seed

    def r2(self, losses: GroupLosses, cells: Collection[tuple[int, int]]) -> Drawn:
        """Return R2 over some cells."""
        share = losses.share(cells).sort_index()
        ids = share.index.astype(str).tolist()
        keys = Values.of(slide_ids=ids, patient_ids=ids, targets=np.zeros(len(ids)), predicted=np.zeros(len(ids)))
        drawn = resample_patients(keys, self._resamples, self._seed)
        weights = drawn.for_rows(keys.patient_ids, slice(None))
        return Drawn(float(1 - share.sum()), 1 - weights @ share.to_numpy(), len(ids))


def recovery(student: Drawn, low: Drawn, high: Drawn) -> Interval | None:
    """Return (student - LR) / (HR - LR), not clipped; see `share_of_gap`.

    None unless the interval of HR - LR lies above 0: without a gap there is nothing to recover.
    """
    student_, high_, low_ = ((own.value, own.resamples) for own in (student, high, low))
    return share_of_gap((high - low).interval(), student_, high_, low_)


def results_table(
    answers: pd.DataFrame, targets: Sequence[str], resamples: int, primary: str | None = None
) -> pd.DataFrame:
    """One row for each target, arm and embedding.

    Columns: target, arm, embedding, cells, seeds, r2 (low, high); gain over lr with the same embedding (low,
    high); gap, hr - lr with the same embedding (low, high); recovery (low, high), empty without a gap; below_primary:
    the arm `primary` minus this one (low, high), for negative controls and variants.

    Args:
        answers: arm, embedding, target, fold, seed, group, view, truth, predicted.
        targets: in the order wanted.
        resamples: of groups.
        primary: the unbroken run with which other recipes are compared.
    """
    bootstrap = Bootstrap(resamples)
    rows = []
    for target in targets:
        own = answers[answers["target"] == target]
        truth = own.drop_duplicates("view")["truth"]
        variance = float(np.nanvar(truth))
        losses: dict[Arm, GroupLosses] = {}
        for (arm, embedding), part in own.groupby(["arm", "embedding"], sort=False):
            found = group_losses(part, variance)
            if found is not None:
                losses[str(arm), str(embedding)] = found
        rows += [_row(target, arm, losses, bootstrap, primary) for arm in losses]
    return pd.DataFrame(rows)


def _row(
    target: str, arm: Arm, losses: Mapping[Arm, GroupLosses], bootstrap: Bootstrap, primary: str | None
) -> dict[str, Any]:
    own = losses[arm]
    name, embedding = arm
    row: dict[str, Any] = {"target": target, "arm": name, "embedding": embedding}
    row |= {"cells": len(own.cells), "seeds": own.seeds} | interval_columns(
        "r2", bootstrap.r2(own, own.cells).interval()
    )

    def paired(other: Arm) -> tuple[Drawn, Drawn, set[tuple[int, int]]] | None:
        if other not in losses or other == arm:
            return None
        cells = own.cells & losses[other].cells
        return (bootstrap.r2(own, cells), bootstrap.r2(losses[other], cells), cells) if cells else None

    # Arms without an embedding of their own (ceiling, colours) are held against the best-known one, the class token.
    kind = embedding if ("lr", embedding) in losses else "cls"
    against = paired(("lr", kind))
    if against is not None:
        mine, low, cells = against
        row |= interval_columns("gain", (mine - low).interval())
        if ("hr", kind) in losses and name != "hr":
            high = bootstrap.r2(losses["hr", kind], cells)
            row |= interval_columns("gap", (high - low).interval())
            row |= interval_columns("recovery", recovery(mine, low, high))
    unbroken = paired((primary, embedding)) if primary is not None and name not in ("hr", "lr", "random") else None
    if unbroken is not None:
        mine, best, _ = unbroken
        row |= interval_columns("below_primary", (best - mine).interval())
    return row


def retrieval_table(retrieval: pd.DataFrame, resamples: int, last_layer: int) -> pd.DataFrame:
    """Mean slot retrieval after the last block (or the last that was distilled), by arm, with intervals over groups.

    Args:
        retrieval: arm, layer, fold, seed, group, view, share.
        resamples: of groups.
        last_layer: number of the last block.
    """
    rows = []
    for arm, part in retrieval.groupby("arm", sort=False):
        for layer in sorted(set(part["layer"].tolist())):
            own = part[part["layer"] == layer]
            losses = GroupLosses(own.groupby(["seed", "fold", "group"])["share"].agg(["sum", "count"]))
            missed = Bootstrap(resamples).r2(losses, losses.cells)
            found = Drawn(1 - missed.value, 1 - missed.resamples, missed.groups).interval()
            row = {"arm": arm, "layer": int(layer), "last": int(layer) == last_layer, "cells": len(losses.cells)}
            rows.append(row | {"seeds": losses.seeds} | interval_columns("retrieval", found))
    return pd.DataFrame(rows)
