"""The proof that no patient and no slide helps to train what it tests, in numbers that a reader can check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pandas as pd

from lrmil.errors import CohortError
from lrmil.training.folds import PARTS, UNUSED, Splits

_SHOWN = 10


def leakage_proof(
    splits: Splits,
    patients: Sequence[str],
    slides: Sequence[str],
    labels: Sequence[Any] | None = None,
    *,
    tested_once: bool = True,
    groups: tuple[str, Sequence[Any]] | None = None,
) -> str:
    """Count, for every fold, what each part holds and what two parts share, from the slides up.

    Args:
        splits: the folds.
        patients: patient of every slide.
        slides: name of every slide.
        labels: label of every slide; None, NaN and "" are not counted.
        tested_once: also demand that each patient is tested in exactly one fold. False for folds that a cohort brings
            and that are no cross-validation (one official split, repeated random ones). Not asked of a final split.
        groups: name of what must not be shared either, such as site, and the group of every slide.

    Returns:
        The proof, to be printed.

    Raises:
        CohortError: a patient, a slide or a group is in two parts of a fold, a patient is in no split, or, with
            `tested_once`, one is tested never or twice.
    """
    rows = pd.DataFrame({"patient_id": list(map(str, patients)), "slide_id": list(map(str, slides))})
    rows["label"] = None if labels is None else list(labels)
    never_shared = {"patient_id": "patients", "slide_id": "slides"}
    if groups is not None:
        rows["group"] = list(map(str, groups[1]))
        never_shared["group"] = f"values of {groups[0]}"
    strangers = sorted(set(rows["patient_id"]) - set(splits.table["patient_id"]))
    if strangers:
        raise CohortError(
            f"{len(strangers)} patients are in no split: {_some(strangers)}.", fix="Make the splits again."
        )
    # A merge, not a look-up: a patient that stands twice in the splits must come out twice.
    rows = rows.merge(splits.table, on="patient_id", how="left")

    lines = [f"Split of {rows['patient_id'].nunique()} patients with {rows['slide_id'].nunique()} slides:"]
    for name in splits.names:
        lines += _fold(rows, name, never_shared)
    lines += _tests(rows, splits, tested_once)
    lines += [f"WARNING: {gap}" for gap in class_gaps(splits, patients, labels)]
    whole = "" if groups is None else f", and no {groups[0]}"
    lines.append(f"No patient and no slide{whole} is in two parts of a fold.")
    return "\n".join(lines)


def class_gaps(splits: Splits, patients: Sequence[str], labels: Sequence[Any] | None) -> list[str]:
    """Say which classes are missing in which part of which fold; there, AUC is undefined or nothing can be learnt."""
    if labels is None:
        return []
    rows = pd.DataFrame({"patient_id": list(map(str, patients)), "label": list(labels)})
    rows = rows[rows["label"].notna() & (rows["label"] != "")].merge(splits.table, on="patient_id", how="left")
    classes = sorted(rows["label"].unique(), key=str)
    gaps = []
    for name in splits.names:
        for part in (p for p in PARTS if (splits.table[name] == p).any()):
            there = set(rows.loc[rows[name] == part, "label"])
            gaps += [f"{name}: no {part} slide of class {c!r}." for c in classes if c not in there]
    return gaps


def _fold(rows: pd.DataFrame, name: str, never_shared: Mapping[str, str]) -> list[str]:
    lines = [f"  {name}"]
    held = {}
    for part in PARTS:
        own = rows[rows[name] == part]
        held[part] = own
        counts = own["label"].value_counts()
        classes = ", ".join(f"{c} {counts[c]}" for c in sorted(counts.index, key=str) if c != "")
        lines.append(
            f"    {part:<5} {own['patient_id'].nunique():>5} patients {own['slide_id'].nunique():>6} slides"
            + (f"   ({classes})" if classes else "")
        )
    unused = rows.loc[rows[name] == UNUSED, "patient_id"].nunique()
    if unused:
        lines.append(f"    left out {unused:>2} patients")
    shared = []
    for one, other in combinations(PARTS, 2):
        common = {c: sorted(set(held[one][c]) & set(held[other][c])) for c in never_shared}
        for column, what in never_shared.items():
            if common[column]:
                raise CohortError(
                    f"leakage: {name}: {len(common[column])} {what} are in both {one} and {other}: "
                    f"{_some(common[column])}.",
                    fix="Give every slide one id and one patient, and every patient one part.",
                )
        counts_shared = ", ".join(f"{len(common[column])} {what}" for column, what in never_shared.items())
        shared.append(f"{one} and {other} {counts_shared}")
    lines.append("    shared by " + "; ".join(shared))
    return lines


def _tests(rows: pd.DataFrame, splits: Splits, tested_once: bool) -> list[str]:
    per_patient = rows.drop_duplicates("patient_id").set_index("patient_id")[list(splits.names)]
    times = (per_patient == "test").sum(axis=1)
    if not (times > 0).any():
        return ["  No part is for testing: this split is for the model that is deployed."]
    wrong = times[times != 1]
    if len(wrong) and tested_once:
        listed = _some([f"{p} ({n} times)" for p, n in wrong.items()])
        raise CohortError(
            f"{len(wrong)} patients are not tested exactly once: {listed}.",
            fix="Complete the fold column of the cohort.",
        )
    if not len(wrong):
        return [
            f"  Each of {len(times)} patients is tested exactly once. Elsewhere the same patient trains, which is no "
            "leakage: every fold has a model of its own."
        ]
    return [
        f"  Tested once: {(times == 1).sum()} patients; never: {(times == 0).sum()}; more often: {(times > 1).sum()}."
    ]


def _some(names: Sequence[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more
