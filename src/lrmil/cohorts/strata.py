"""What folds are stratified by: a text for each slide, for tasks of every kind and for several tasks at once.

Strata that are too rare to reach every fold are made coarser, so that dealing patients to folds always has enough of
each. Only what cannot be mended stays rare, and `training.folds` then refuses it by name: a class, or the event of
survival, with fewer patients than there are folds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Strata: TypeAlias = list[str | None]
"""One entry a slide; None where it is unlabelled"""

MAX_BINS = 5
_JOIN = " | "
_NOTHING = "–"


def number_strata(
    patients: Sequence[str], values: npt.NDArray[np.float64], *, num_folds: int, bins: int = MAX_BINS
) -> Strata:
    """Quantile bins of a patient's mean number: as many as possible up to `bins` with a patient for every fold in each.

    Args:
        patients: (S,).
        values: (S,) nan where unlabelled.
        num_folds: how many patients a bin must have.
        bins: at most.
    """
    mean = _per_patient(patients, values)
    for count in range(bins, 0, -1):
        found = {p: f"quantile {i + 1} of {count}" for p, i in _bins(mean, count).items()}
        if count == 1 or _enough(found, num_folds):
            return [found[p] if np.isfinite(v) else None for p, v in zip(patients, values, strict=True)]
    raise AssertionError("unreachable: one bin always ends the loop")


def survival_strata(patients: Sequence[str], targets: npt.NDArray[np.float64], *, num_folds: int) -> Strata:
    """Event or censored, times tertile of the time among these.

    Tertiles become halves, then nothing, where a stratum has fewer patients than there are folds; if the censored alone
    are too few, strata are tertiles of the time of all. Too few events stay visible.

    Args:
        patients: (S,).
        targets: (S, 2) time and event, nan where unlabelled.
        num_folds: how many patients a stratum must have.
    """
    time, event = _per_patient(patients, targets[:, 0]), _per_patient(patients, targets[:, 1])
    status = {p: "event" if seen > 0 else "censored" for p, seen in event.items()}
    too_few_events = sum(s == "event" for s in status.values()) < num_folds
    fallbacks = ["", "", ""] if too_few_events else ["all", "all", "all"]
    found: dict[str, str] = {}
    for count, whole in zip((3, 2, 1, 3, 2, 1), ["", "", "", *fallbacks], strict=True):
        found = {}
        for name in dict.fromkeys([whole] if whole else status.values()):
            own = {p: t for p, t in time.items() if whole or status[p] == name}
            label = "survival" if whole else name
            tail = f", time {{}} of {count}" if count > 1 else ""
            found |= {p: label + tail.format(i + 1) for p, i in _bins(own, count).items()}
        if _enough(found, num_folds):
            break
    known = np.isfinite(targets[:, 0]) & np.isfinite(targets[:, 1])
    return [found[p] if known[i] else None for i, p in enumerate(patients)]


def joint_strata(patients: Sequence[str], parts: Sequence[Strata], *, num_folds: int) -> Strata:
    """Combinations of the strata of several tasks, the main one first, for folds that all tasks share.

    A combination with fewer patients than there are folds is put together with the other rare ones that agree in all
    tasks but the last; if these are still too few, with the smallest common combination among those that agree; then
    the same with one task less, down to the stratum of the main task, which is never mixed with another of its strata.
    So the main task is stratified as if it were alone, the others as far as numbers allow. Slides that no task labels
    are None, and so are rare ones without a label of the main task.

    Args:
        patients: (S,).
        parts: of each task, from `number_strata` and the like, or classes.
        num_folds: how many patients a stratum must have.
    """
    keys: list[tuple[str, ...] | None] = []
    for row in zip(*parts, strict=True):
        keys.append(None if all(p is None for p in row) else tuple(_NOTHING if p is None else p for p in row))
    for level in range(len(parts) - 1, 0, -1):
        _merge_rare(patients, keys, level, num_folds)
    count = _count(patients, keys)
    return [None if key is None or (key[0] == _NOTHING and count[key] < num_folds) else _JOIN.join(key) for key in keys]


def _merge_rare(patients: Sequence[str], keys: list[tuple[str, ...] | None], level: int, num_folds: int) -> None:
    """Join rare keys that agree in their first `level` parts; the rest of the key becomes one word."""
    count = _count(patients, keys)
    siblings: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for key in sorted(count):
        siblings[key[:level]].append(key)
    renamed: dict[tuple[str, ...], tuple[str, ...]] = {}
    for prefix, own in siblings.items():
        rare = [key for key in own if count[key] < num_folds]
        if not rare:
            continue
        pooled = len({p for p, key in zip(patients, keys, strict=True) if key in rare})
        target = (*prefix, "other")
        common = [key for key in own if key not in rare]
        if pooled < num_folds and common:
            smallest = min(common, key=lambda key: (count[key], key))
            target = (*prefix, f"{_JOIN.join(smallest[level:])} or other")
            renamed[smallest] = target
        renamed |= dict.fromkeys(rare, target)
    keys[:] = [None if key is None else renamed.get(key, key) for key in keys]


def _count(patients: Sequence[str], keys: Sequence[tuple[str, ...] | None]) -> dict[tuple[str, ...], int]:
    owners: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for patient, key in zip(patients, keys, strict=True):
        if key is not None:
            owners[key].add(patient)
    return {key: len(own) for key, own in owners.items()}


def _per_patient(patients: Sequence[str], values: npt.NDArray[np.float64]) -> dict[str, float]:
    """Mean of the labelled slides of each patient who has one."""
    own: dict[str, list[float]] = defaultdict(list)
    for patient, value in zip(patients, values, strict=True):
        if np.isfinite(value):
            own[patient].append(float(value))
    return {patient: float(np.mean(found)) for patient, found in own.items()}


def _bins(values: dict[str, float], count: int) -> dict[str, int]:
    """Number of the quantile bin of each; equal values share one, so that bins may be empty."""
    if not values:
        return {}
    inner = np.quantile(list(values.values()), np.arange(1, count) / count)
    return {name: int(np.searchsorted(inner, value, side="left")) for name, value in values.items()}


def _enough(found: dict[str, str], num_folds: int) -> bool:
    names = list(found.values())
    return all(names.count(name) >= num_folds for name in set(names))
