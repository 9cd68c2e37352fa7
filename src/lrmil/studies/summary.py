"""R2, gains and recovery with intervals over groups, from the cells of a study of region probes.

R2 is taken within each test fold, averaged over seeds, then over folds. Intervals resample groups (images, patients)
within their test folds, as `evaluation.intervals` does; the variance by which errors are divided stays that of the
fold's own test regions, because resampling a dozen groups biases it. R2 is then a sum over groups, differences are
paired, and seeds are averaged first. The intervals are about other test images for these trained encoders, not about
other training images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.evaluation.intervals import resample_patients
from lrmil.evaluation.values import Values

FloatArray = npt.NDArray[np.float64]
Arm = tuple[str, str]
"""(arm, embedding)"""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """True if the whole interval lies on one side of 0."""
        return bool(self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class GroupLosses:
    """1 - R2 of one arm for one target, as a sum over test groups."""

    folds: tuple[int, ...]
    """that are finished"""
    seeds: int
    share: pd.Series
    """indexed by (fold, group): squared error over the fold's own sum of squares, seeds averaged; folds not averaged"""

    def by_fold(self) -> pd.Series:
        """R2 of each fold."""
        return 1.0 - self.share.groupby(level="fold").sum()


def group_losses(rows: pd.DataFrame) -> GroupLosses | None:
    """Make losses of the answers of one arm for one target.

    Args:
        rows: fold, seed, group, view, truth (nan where unknown), predicted.
    """
    known = rows[np.isfinite(rows["truth"])]
    shares = []
    for (fold, _), cell in known.groupby(["fold", "seed"]):
        spread = float(((cell["truth"] - cell["truth"].mean()) ** 2).sum())
        if spread <= 0:
            continue
        error = (cell["truth"] - cell["predicted"]) ** 2 / spread
        shares.append(error.groupby(cell["group"]).sum().rename_axis("group").to_frame("share").assign(fold=fold))
    if not shares:
        return None
    share = pd.concat(shares).reset_index().groupby(["fold", "group"])["share"].mean()
    folds = tuple(int(f) for f in share.index.get_level_values("fold").unique())
    return GroupLosses(folds, int(known["seed"].nunique()), share)


class Bootstrap:
    """The same resamples of test groups for every arm that has the same folds."""

    def __init__(self, resamples: int, seed: int = 0) -> None:
        self._resamples, self._seed = resamples, seed

    def r2(self, losses: GroupLosses, folds: Sequence[int]) -> tuple[float, FloatArray]:
        """Return the fold-averaged R2 and its resamples (B,)."""
        share = losses.share[losses.share.index.get_level_values("fold").isin(folds)].sort_index()
        fold = share.index.get_level_values("fold").to_numpy()
        group = share.index.get_level_values("group").to_numpy().astype(str)
        ids = group.tolist()
        keys = Values.of(slide_ids=ids, patient_ids=ids, folds=fold, targets=np.zeros(len(ids)), predicted=share)
        drawn = resample_patients(keys, self._resamples, self._seed)
        weights = drawn.for_rows(keys.patient_ids, slice(None))
        count = len(set(folds))
        return float(1 - share.sum() / count), 1 - weights @ share.to_numpy() / count


def estimate(value: float, drawn: FloatArray) -> Estimate:
    """A value with the 2.5 and 97.5 % points of its resamples."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def recovery(
    student: tuple[float, FloatArray], low: tuple[float, FloatArray], high: tuple[float, FloatArray]
) -> Estimate | None:
    """(student - LR) / (HR - LR), each given as (value, resamples); not clipped.

    None unless the interval of HR - LR lies above 0: without a gap there is nothing to recover.
    """
    gap = estimate(high[0] - low[0], high[1] - low[1])
    if gap.low <= 0:
        return None
    return estimate((student[0] - low[0]) / gap.value, (student[1] - low[1]) / (high[1] - low[1]))


def results_table(
    answers: pd.DataFrame, targets: Sequence[str], resamples: int, primary: str | None = None
) -> pd.DataFrame:
    """One row for each target, arm and embedding.

    Columns: target, arm, embedding, folds, seeds, r2 (low, high), fold_sd; gain over lr with the same embedding (low,
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
        losses: dict[Arm, GroupLosses] = {}
        for (arm, embedding), part in own.groupby(["arm", "embedding"], sort=False):
            found = group_losses(part)
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
    row |= {"folds": len(own.folds), "seeds": own.seeds}
    row |= _three("r2", estimate(*bootstrap.r2(own, own.folds))) | {"fold_sd": float(own.by_fold().std())}

    def paired(other: Arm) -> tuple[tuple[float, FloatArray], tuple[float, FloatArray], list[int]] | None:
        if other not in losses or other == arm:
            return None
        folds = sorted(set(own.folds) & set(losses[other].folds))
        return (bootstrap.r2(own, folds), bootstrap.r2(losses[other], folds), folds) if folds else None

    # Arms without an embedding of their own (ceiling, colours) are held against the best-known one, the class token.
    kind = embedding if ("lr", embedding) in losses else "cls"
    against = paired(("lr", kind))
    if against is not None:
        mine, low, folds = against
        row |= _three("gain", estimate(mine[0] - low[0], mine[1] - low[1]))
        if ("hr", kind) in losses and name != "hr":
            high = bootstrap.r2(losses["hr", kind], folds)
            row |= _three("gap", estimate(high[0] - low[0], high[1] - low[1]))
            row |= _three("recovery", recovery(mine, low, high))
    unbroken = paired((primary, embedding)) if primary is not None and name not in ("hr", "lr", "random") else None
    if unbroken is not None:
        mine, best, _ = unbroken
        row |= _three("below_primary", estimate(best[0] - mine[0], best[1] - mine[1]))
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
            mean = own.groupby(["fold", "group"])["share"].mean()
            folds = mean.index.get_level_values("fold")
            # Each fold counts alike, and within it each group.
            share = (mean / mean.groupby(level="fold").transform("size")).rename("share")
            losses = GroupLosses(tuple(int(f) for f in folds.unique()), int(own["seed"].nunique()), share)
            value, drawn = Bootstrap(resamples).r2(losses, losses.folds)
            found = estimate(1 - value, 1 - drawn)
            row = {"arm": arm, "layer": int(layer), "last": int(layer) == last_layer, "folds": len(losses.folds)}
            rows.append(row | {"seeds": losses.seeds} | _three("retrieval", found))
    return pd.DataFrame(rows)


def _three(name: str, found: Estimate | None) -> dict[str, float]:
    if found is None:
        return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
