"""Results tables: a frame shaped like the paper's Tables 1 and 2, and one text layout that every format prints.

A results frame has a row for each method on each task of each dataset. Columns: dataset, task, method, group, then for
each metric `m` the mean over folds (seeds averaged first) `m`, its sd over folds `m_sd` (ddof=1), the 95 % bootstrap
interval `m_low`, `m_high`; of survival also `uno_c` and `ibs` with their sd; then patches_per_slide, seconds_per_slide,
time_s (the cohort total, which is what the paper seems to print), folds, seeds, slides, patients, note. Metrics are
fractions here and percent in print.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lrmil.evaluation.intervals import RESAMPLES, bootstrap
from lrmil.evaluation.metrics import METRICS, SHOWN, fold_scores, metric
from lrmil.evaluation.scored import Scored
from lrmil.files import atomic_path

GROUP_ORDER = ("Reference", "Full HR", "SC", "LR only", "Ours")
"""SC: selective computation (ZoomMIL, HDMIL), the paper's word. Groups not named here follow in order of appearance."""
METHOD_ORDER = (
    *("Majority class", "Colour histogram", "Random encoder"),
    *("Max-P", "Mean-P", "ABMIL", "CLAM-MB", "CLAM-SB", "DSMIL", "TransMIL", "DTFD-MIL"),
    *("ZOOMMIL", "HDMIL", "HR teacher", "LR without distillation", "LRMIL"),
)
"""As in the paper; methods not named here follow in order of appearance."""

PAPER_METRICS = ("acc", "auc")

CENSORING = {"uno_c": ("Uno's C", True), "ibs": ("Integrated Brier", False)}
"""Columns of survival without intervals, see `survival_metrics.censoring_scores`: heading; whether more is better"""
CellScores = Mapping[tuple[int, int], Mapping[str, float]]
"""Scores by name, of each (fold, seed)"""

_KEYS = ["dataset", "task", "method", "group"]
_COUNTS = ["folds", "seeds", "slides", "patients"]


@dataclass(frozen=True)
class Cost:
    """What a method needs at inference, measured on slide files with no cached features."""

    patches_per_slide: float = float("nan")
    """Mean number of patches encoded, over all scales"""
    seconds_per_slide: float = float("nan")
    """Mean, tissue to answer"""
    patches_read_per_slide: float = float("nan")
    """Mean number of patches whose pixels were read, over all scales"""
    bytes_per_slide: float = float("nan")
    """Mean number of bytes read from the slide file"""
    parts: tuple[tuple[str, float], ...] = ()
    """Mean seconds of each part, in order (tissue, reading, encoding, MIL); empty if not measured apart"""


def result_row(
    predictions: Scored,
    *,
    dataset: str,
    task: str,
    method: str,
    group: str,
    seed: int,
    metrics: Sequence[str] | None = None,
    cost: Cost | None = None,
    level: str = "slide",
    resamples: int = RESAMPLES,
    censoring: CellScores | None = None,
) -> dict[str, Any]:
    """Score one method: a row of a results frame.

    Args:
        predictions: of all folds and seeds.
        dataset: name of the cohort.
        task: what is predicted.
        method: name of the method.
        group: a block of the table, see GROUP_ORDER.
        seed: of the bootstrap.
        metrics: names out of METRICS; None: the paper's for classes, all of its kind for numbers and survival.
        cost: measured cost; unknown (nan) if None.
        level: "slide", or "patient" for the mean probability over a patient's slides.
        resamples: of the bootstrap.
        censoring: survival: the scores of CENSORING of every fold and seed; unknown (nan) if None.
    """
    if metrics is None:
        metrics = PAPER_METRICS if predictions.kind == "classification" else SHOWN[predictions.kind]
    at_level = predictions.by_patient() if level == "patient" else predictions
    cost = cost or Cost()
    slides = len(np.unique(predictions.slide_ids.astype(str)))
    row: dict[str, Any] = {"dataset": dataset, "task": task, "method": method, "group": group}
    notes: dict[str, None] = {}
    tidy = fold_scores(at_level)
    tidy = tidy[tidy["level"] == "slide"]
    for name in metrics:
        metric(name)
        by_fold = tidy[tidy["metric"] == name].groupby("fold")["value"].mean().dropna()
        interval = bootstrap(at_level, name, seed=seed, resamples=resamples)
        row[name] = interval.value
        row[f"{name}_sd"] = float(by_fold.std(ddof=1)) if len(by_fold) > 1 else float("nan")
        row[f"{name}_low"], row[f"{name}_high"] = interval.low, interval.high
        notes.update(dict.fromkeys(interval.notes))
    if predictions.kind == "survival":
        row |= _over_folds(censoring or {})
    row |= {
        "patches_per_slide": cost.patches_per_slide,
        "seconds_per_slide": cost.seconds_per_slide,
        "time_s": cost.seconds_per_slide * slides,
        "folds": len(np.unique(predictions.folds)),
        "seeds": len(np.unique(predictions.seeds)),
        "slides": slides,
        "patients": len(np.unique(predictions.patient_ids.astype(str))),
        "note": "; ".join(notes),
    }
    return row


def _over_folds(cells: CellScores) -> dict[str, float]:
    """Return mean and sd over folds, seeds averaged first, of each score of CENSORING."""
    found: dict[str, float] = {}
    for name in CENSORING:
        values = pd.Series({cell: scores[name] for cell, scores in cells.items()}, dtype=np.float64)
        by_fold = values.groupby([fold for fold, _ in cells]).mean().dropna()
        found[name] = float(by_fold.mean())
        found[f"{name}_sd"] = float(by_fold.std(ddof=1))
    return found


def results_frame(rows: Sequence[Mapping[Any, Any]]) -> pd.DataFrame:
    """Put rows of `result_row` into the order of the paper: datasets and tasks as given, groups, then methods."""
    frame = pd.DataFrame(list(rows)).reset_index(drop=True)
    positions = [
        _positions(frame["dataset"].tolist(), ()),
        _positions(frame["task"].tolist(), ()),
        _positions(frame["group"].tolist(), GROUP_ORDER),
        _positions(frame["method"].tolist(), METHOD_ORDER),
    ]
    order = sorted(range(len(frame)), key=lambda i: tuple(p[i] for p in positions))
    return frame.iloc[order].reset_index(drop=True)


def metrics_in(results: pd.DataFrame) -> list[str]:
    """Names of the metrics of a results frame, in its order."""
    return [str(c) for c in results.columns if str(c) in METRICS]


def write_results(path: str | os.PathLike[str], results: pd.DataFrame) -> None:
    """Write a results frame as CSV with all digits, atomically."""
    with atomic_path(path) as scratch:
        results.to_csv(scratch, index=False)


def read_results(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read what `write_results` wrote."""
    # Numbers are parsed by Python, which gives back every digit whatever the version of pandas.
    frame = pd.read_csv(Path(path), dtype=str, keep_default_na=False)
    whole = [c for c in _COUNTS if c in frame]
    numbers = [c for c in frame.columns if c not in (*_KEYS, *_COUNTS, "note")]
    frame[numbers] = frame[numbers].replace("", "nan")
    return frame.astype(dict.fromkeys(whole, int) | dict.fromkeys(numbers, float))


def paper_metrics(results: pd.DataFrame) -> list[str]:
    """The metrics that the paper prints, or all where it has none: it leaves numbers and survival for later."""
    return [m for m in metrics_in(results) if m in PAPER_METRICS] or metrics_in(results)


def paper_frame(results: pd.DataFrame) -> pd.DataFrame:
    """The paper's columns and units: dataset, task, method, group, acc and auc in percent, time_s; one decimal.

    Tasks of other kinds have their own metrics in place of the two, unrounded.
    """
    names = paper_metrics(results)
    out = results[[*_KEYS, *names, "time_s"]].copy()
    for name in names:
        if metric(name).percent:
            out[name] = (100 * results[name]).round(1)
    return out


def paper_table(results: pd.DataFrame, title: str = "") -> TextTable:
    """The paper's Tables 1 and 2: groups of methods in lines; accuracy, AUC and seconds of the whole cohort in columns.

    Without sd and interval, as there; `text_table` has them. Several datasets and tasks stand side by side.
    """
    table = text_table(
        results,
        title=title,
        metrics=paper_metrics(results),
        show_sd=False,
        show_interval=False,
        show_cost=False,
        show_total=True,
    )
    if results["time_s"].isna().all():
        return table
    return replace(table, notes=(*table.notes, "Time: seconds of all slides of the cohort together, tissue to answer."))


def times_frame(costs: Mapping[str, Cost], groups: Mapping[str, str], slides: int) -> pd.DataFrame:
    """Where the time goes, a row for each method whose cost is known, in the order of `costs`.

    Columns: method, group, `<part>_s` of each part, seconds_per_slide, time_s (all slides), patches_read_per_slide,
    patches_per_slide (encoded), bytes_per_slide. Parts that a method does not have are nan.
    """
    names = list(dict.fromkeys(name for cost in costs.values() for name, _ in cost.parts))
    rows = []
    for method, cost in costs.items():
        if not math.isfinite(cost.seconds_per_slide):
            continue
        spent = dict(cost.parts)
        row: dict[str, Any] = {"method": method, "group": groups.get(method, "Other")}
        row |= {f"{name}_s": spent.get(name, float("nan")) for name in names}
        row |= {
            "seconds_per_slide": cost.seconds_per_slide,
            "time_s": cost.seconds_per_slide * slides,
            "patches_read_per_slide": cost.patches_read_per_slide,
            "patches_per_slide": cost.patches_per_slide,
            "bytes_per_slide": cost.bytes_per_slide,
        }
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class TableRow:
    """Cells of one line; `best` marks the cells that hold the best mean of their column."""

    group: str
    cells: tuple[str, ...]
    best: tuple[bool, ...]


@dataclass(frozen=True)
class TextTable:
    """A table as text, before Markdown, LaTeX, terminal or HTML. The first column is the method's name."""

    title: str
    header: tuple[str, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> TextTable:
        """A plain table without groups."""
        lines = tuple(TableRow("", tuple(str(c) for c in row), (False,) * len(row)) for row in rows)
        return cls(title, tuple(header), lines)


def text_table(
    results: pd.DataFrame,
    *,
    title: str = "",
    metrics: Sequence[str] | None = None,
    show_sd: bool = True,
    show_interval: bool = True,
    show_cost: bool = True,
    show_total: bool = False,
) -> TextTable:
    """Lay out a results frame for reading: methods in lines; in columns, for each dataset and task, metrics and cost.

    A cell reads "90.7 ± 2.1 [86.0, 94.1]": mean and sd over folds, then the 95 % interval. Best means (as printed) of a
    column are marked. What is undefined says so; the reasons follow as notes.

    Args:
        results: see the top of this file.
        title: of the table.
        metrics: those to show; None shows all that the frame has.
        show_sd: over folds.
        show_interval: over patients.
        show_cost: patches and seconds per slide.
        show_total: seconds of all slides together, which is what the paper seems to print.
    """
    tasks = list(dict.fromkeys(zip(results["dataset"], results["task"], strict=True)))
    methods = list(dict.fromkeys(zip(results["group"], results["method"], strict=True)))
    names = metrics_in(results) if metrics is None else list(metrics)
    costs = [("patches_per_slide", "Patches / slide"), ("seconds_per_slide", "Seconds / slide")] if show_cost else []
    costs += [("time_s", "Time (s)")] if show_total else []
    header = ["Method"]
    columns: list[list[str]] = []
    marks: list[list[bool]] = []
    for dataset, task in tasks:
        part = results[(results["dataset"] == dataset) & (results["task"] == task)]
        lines = {(r["group"], r["method"]): r for r in part.to_dict("records")}
        lead = "" if len(tasks) == 1 else f"{dataset} {task}: "
        for name in names:
            header.append(lead + metric(name).title)
            columns.append([_metric_cell(lines.get(m), name, show_sd, show_interval) for m in methods])
            marks.append(_best([_shown(lines.get(m), name) for m in methods], metric(name).higher_is_better))
        for key, (heading, higher) in CENSORING.items():
            if metrics is None and key in part and part[key].notna().any():
                header.append(lead + heading)
                columns.append([_censoring_cell(lines.get(m), key, show_sd) for m in methods])
                marks.append(_best([round(lines[m][key], 3) if m in lines else math.nan for m in methods], higher))
        for key, heading in costs:
            if part[key].notna().any():
                header.append(lead + heading)
                columns.append([_cost_cell(lines.get(m), key) for m in methods])
                marks.append([False] * len(methods))
    rows = tuple(
        TableRow(str(group), (str(method), *(c[i] for c in columns)), (False, *(m[i] for m in marks)))
        for i, (group, method) in enumerate(methods)
    )
    notes = _notes(results, len(tasks) > 1, show_sd, show_interval)
    if (show_cost or show_total) and results["seconds_per_slide"].isna().all():
        notes.append("Patches and seconds per slide are unknown: no answer was timed on slide files.")
    return TextTable(title, tuple(header), rows, tuple(notes))


def _notes(results: pd.DataFrame, several: bool, show_sd: bool, show_interval: bool) -> list[str]:
    parts = ["mean over folds"]
    if show_sd:
        parts.append("± sd over folds (seeds averaged first)")
    if show_interval:
        parts.append("[95 % bootstrap interval over patients within test folds]")
    notes = [" ".join(parts) + "; metrics in percent where the paper's are. Bold marks the best mean, not a test."]
    told = results["note"].map(lambda note: note if show_interval else _without_intervals(note))
    for note, part in results[told != ""].groupby(told[told != ""], sort=False):
        where = [f"{r.dataset} {r.task}: {r.method}" if several else str(r.method) for r in part.itertuples()]
        notes.append(f"{'all methods' if 1 < len(where) == len(results) else ', '.join(where)}: {note}.")
    return notes


def _without_intervals(note: str) -> str:
    """Leave out what a note says of intervals, where none are shown."""
    return "; ".join(part for part in note.split("; ") if "interval" not in part and "resamples" not in part)


def _metric_cell(row: dict[Any, Any] | None, name: str, show_sd: bool, show_interval: bool) -> str:
    if row is None:
        return "–"
    if not math.isfinite(row[name]):
        return "undefined"
    text = metric_text(row[name], name)
    if show_sd and math.isfinite(row[f"{name}_sd"]):
        text += f" ± {metric_text(row[f'{name}_sd'], name)}"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if show_interval and math.isfinite(low):
        text += f" [{metric_text(low, name)}, {metric_text(high, name)}]"
    return text


def _censoring_cell(row: dict[Any, Any] | None, name: str, show_sd: bool) -> str:
    if row is None or not math.isfinite(row[name]):
        return "–"
    sd = row[f"{name}_sd"]
    return f"{row[name]:.3f}" + (f" ± {sd:.3f}" if show_sd and math.isfinite(sd) else "")


def metric_text(value: float, name: str, *, sign: bool = False) -> str:
    """A value, or with `sign` a difference, of a metric as tables print it: percent, three decimals, or three digits.

    A true minus; a dash if undefined.
    """
    if not math.isfinite(value):
        return "–"
    of = metric(name)
    if of.in_unit:
        text = ("+" if sign and value >= 0 else "") + three_digits(value)
    else:
        text = f"{100 * value if of.percent else value:{'+' if sign else ''}.{1 if of.percent else 3}f}"
    return text.replace("-", "−")


def _shown(row: dict[Any, Any] | None, name: str) -> float:
    """The value as printed, so that equal print is equally marked; nan if there is none."""
    if row is None or not math.isfinite(row[name]):
        return float("nan")
    return float(metric_text(row[name], name).replace("−", "-").replace(",", ""))


def _best(values: list[float], higher: bool) -> list[bool]:
    known = [v for v in values if math.isfinite(v)]
    if len(known) < 2:
        return [False] * len(values)
    top = max(known) if higher else min(known)
    return [v == top for v in values]


def _cost_cell(row: dict[Any, Any] | None, key: str) -> str:
    if row is None or not math.isfinite(row[key]):
        return "–"
    return three_digits(row[key])


def differences_table(differences: pd.DataFrame, title: str = "") -> TextTable:
    """Lay out what `paired.compare_methods` returned: difference with its interval, and the tests."""
    parametric = "auc" in set(differences["metric"])
    rows = []
    for row in differences.to_dict("records"):
        of = metric(row["metric"])
        numbers = [metric_text(row[k], of.name, sign=True) for k in ("difference", "low", "high")]
        text = "undefined" if numbers[0] == "–" else numbers[0]
        if numbers[1] != "–":
            text += f" [{numbers[1]}, {numbers[2]}]"
        tests = [p_value_text(row[k]) for k in ("p_permutation", "p_holm", "p_delong")[: 3 if parametric else 2]]
        rows.append([row["method"], of.title + ("" if of.higher_is_better else " (lower is better)"), text, *tests])
    header = ["Against", "Metric", "Difference [95 % interval]", "p, permutation", "p, Holm"]
    header += ["p, DeLong"] if parametric else []
    table = TextTable.of(title, header, rows)
    lead = (
        "Paired over the same patients: bootstrap interval; permutations swap whole patients between the methods; "
        "Holm over the baselines, for each metric by itself (a dash: no baseline)"
    )
    lead += "; DeLong within folds, for two classes and one slide per patient." if parametric else "."
    return replace(table, notes=(lead, *_shared_notes(differences)))


def _shared_notes(differences: pd.DataFrame) -> list[str]:
    """Tell each note once, with the methods that it is about."""
    about: dict[str, dict[str, None]] = {}
    for method, notes in zip(differences["method"], differences["note"], strict=True):
        for note in filter(None, str(notes).split("; ")):
            about.setdefault(note, {})[str(method)] = None
    everyone = set(map(str, differences["method"]))
    return [
        f"{'all methods' if 1 < len(methods) == len(everyone) else ', '.join(methods)}: {note}."
        for note, methods in about.items()
    ]


def p_value_text(value: float) -> str:
    """Three decimals, or "< 0.001"; a dash if undefined."""
    if not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 1.23, 12.3, 123, 1,230."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    rounded = round(value, 2 - math.floor(math.log10(abs(value))))
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{min(decimals, 6)}f}"


def _positions(values: list[str], known: Sequence[str]) -> list[int]:
    order = list(dict.fromkeys([*known, *values]))
    return [order.index(v) for v in values]
