"""The report of a run: what came out, on what, how sure, where the models looked, how long it took."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from lrmil._version import __version__
from lrmil.bags import Bag, software_versions
from lrmil.encoders import Encoder
from lrmil.evaluation.metrics import MAIN, metric
from lrmil.evaluation.overlay import AttentionMap
from lrmil.evaluation.plots import TrainingCurve, metric_against_seconds, roc_curves, to_image, training_curves
from lrmil.evaluation.predictions import Predictions
from lrmil.evaluation.regression_plots import predicted_against_true
from lrmil.evaluation.report import Failure, KeyNumber, Picture, ReportData, SlideTime, write_report
from lrmil.evaluation.slide_figures import side_by_side
from lrmil.evaluation.summary import headline, standard_limits
from lrmil.evaluation.survival_plots import survival_of_risk_groups
from lrmil.evaluation.values import Values
from lrmil.files import atomic_path, read_json
from lrmil.geometry import MatchedGrid
from lrmil.pipeline.context import Run, SlideEntry, Split
from lrmil.pipeline.deploy import licence_note
from lrmil.pipeline.evaluate import LR_ONLY, LRMIL, TEACHER, Scores, per_fold_slides
from lrmil.pipeline.heads import Outputs
from lrmil.pipeline.timing import SlideCost, machine
from lrmil.training.predict import BagPrediction

OVERVIEW_MPP = 4.0


def attention_pictures(
    run: Run,
    split: Split,
    grids: Mapping[str, MatchedGrid],
    outputs: Mapping[str, Outputs],
    bags: Mapping[str, Mapping[str, Bag]],
) -> list[Picture]:
    """Draw test slides of a fold with the attention of each method side by side, true areas outlined where known.

    Slides are the first of each class in turn (survival: with and without event), in the cohort's order: chosen before
    anybody looked at an answer.
    """
    pictures = []
    for entry in _examples(run, split, run.settings.evaluation.heatmap_slides):
        maps = []
        for method, found in outputs.items():
            answer = found.get(entry.slide_id)
            bag = bags[method].get(entry.slide_id)
            if answer is None or answer.attention is None or bag is None:
                continue
            maps.append(AttentionMap(answer_title(run, method, answer), bag_boxes(bag), answer.attention))
        figure = slide_figure(run, entry, maps)
        pictures.append(Picture(to_image(figure, dpi=110), title=entry.slide_id, wide=True))
    return pictures


def slide_figure(run: Run, entry: SlideEntry, maps: Sequence[AttentionMap], note: str = "") -> Figure:
    """Draw a slide and, beside it, what each model looked at; true areas are outlined where known.

    Above it stands the slide's id, what is true of it, and `note`.
    """
    with entry.open() as slide:
        overview = slide.overview(max(OVERVIEW_MPP, slide.mpp * max(slide.dimensions) / 1200))
        return side_by_side(
            overview.rgb,
            maps,
            overview.downsample_l0,
            mpp_l0=slide.mpp,
            true_areas=true_areas(entry),
            title=f"{entry.slide_id}, truly {_truth(run, entry.slide_id)}{note}",
        )


def true_areas(entry: SlideEntry) -> list[np.ndarray[Any, Any]]:
    """Return outlines (V, 2), level-0 px, of the areas annotated in <slide>.geojson, beside the slide or in ../truth.

    Areas called "tissue" are left out: they do not say where to look. A file that is not understood shows nothing.
    """
    for folder in (entry.path.parent, entry.path.parent.parent / "truth"):
        path = folder / f"{entry.path.stem}.geojson"
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                features = content if isinstance(content, list) else content["features"]
                return [ring for feature in features for ring in _outlines(feature)]
            except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
                return []
    return []


def write_run_report(
    run: Run,
    folds: Sequence[Split],
    proof: str,
    scores: Scores,
    costs: Mapping[str, Sequence[SlideCost]],
    pictures: Sequence[Picture],
    encoder: Encoder,
    *,
    title: str,
    command: str,
    simulated: bool = False,
) -> Path:
    """Write report.html, and its pictures once more into figures/."""
    s = run.settings
    patients = len({run.cohort.patient_of(x) for fold in folds for x in fold.test})
    failed = len(run.failures)
    data = ReportData(
        title=title,
        headline=headline(
            scores.results,
            ours=LRMIL,
            teacher=TEACHER,
            baseline=LR_ONLY,
            name=MAIN[run.kind],
            gain=scores.differences.get(LR_ONLY),
            gap=scores.differences.get(TEACHER),
        ),
        results=scores.table,
        limits=standard_limits(patients=patients, folds=len(folds), seeds=1, simulated=simulated, failed=failed),
        created=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, lrmil {__version__}",
        command=command,
        key_numbers=_key_numbers(scores),
        heatmaps=tuple(pictures),
        heatmap_note=f"Test slides, the first{_OF_EACH[run.kind]} in the cohort's order. Colour is the rank of a "
        "region's attention within the slide; grey outlines are the true areas, where they are known.",
        curves=tuple(_curves(run, folds, scores)),
        times=tuple(_slide_time(method, found) for method, found in costs.items() if found),
        time_note=_time_note(run, costs),
        cohort=_cohort_facts(run, folds, encoder),
        splits=per_fold_slides(folds),
        leakage_proof=proof,
        settings=yaml.safe_dump(s.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        seeds=(s.seed,),
        software=tuple(software_versions().items()),
        failures=tuple(Failure(f.slide_id, f.stage, f.message) for f in run.failures),
    )
    write_report(run.folder.report, data)
    for picture in (*data.heatmaps, *data.curves):
        name = re.sub(r"[^a-z0-9]+", "_", picture.title.lower()).strip("_")
        with atomic_path(run.folder.figures / f"{name}.png") as scratch:
            scratch.write_bytes(picture.image)
    return run.folder.report


def _examples(run: Run, split: Split, count: int) -> list[SlideEntry]:
    entries = {e.slide_id: e for e in run.entries()}
    of_class: dict[int, list[str]] = {}
    for slide in split.test:
        of_class.setdefault(_group(run, slide), []).append(slide)
    # Classes take turns, the last one first: in a binary task that is the positive one, which has areas to find.
    queues = [of_class[c] for c in sorted(of_class, reverse=True)]
    turns = [slides[i] for i in range(max(map(len, queues), default=0)) for slides in queues if i < len(slides)]
    return [entries[slide] for slide in turns[:count]]


_OF_EACH = {"classification": " of each class", "regression": "", "survival": " with and without event"}


def _group(run: Run, slide_id: str) -> int:
    """Return the class of a slide, or whether its event was seen; numbers are all in one group."""
    if run.kind == "classification":
        return run.cohort.label_of(slide_id)
    return 0 if run.kind == "regression" else int(np.asarray(run.cohort.target_of(slide_id))[1])


def _truth(run: Run, slide_id: str) -> str:
    truth = run.cohort.target_of(slide_id)
    if run.kind == "classification":
        return run.cohort.classes[int(np.asarray(truth))]
    if run.kind == "regression":
        return f"{truth:.4g}"
    time, event = np.asarray(truth)
    return f"{'event' if event else 'censored'} at {time:.4g}"


def answer_title(run: Run, method: str, answer: BagPrediction) -> str:
    """Return a heading: the method, and what it says."""
    if answer.value is not None:
        return f"{method}: {'risk ' if run.kind == 'survival' else ''}{answer.value:.4g}"
    best = int(np.argmax(answer.probabilities))
    return f"{method}: {run.cohort.classes[best]} {answer.probabilities[best]:.0%}"


def bag_boxes(bag: Bag) -> np.ndarray[Any, Any]:
    """Return the boxes (N, 4) of a bag's instances, level-0 px."""
    assert bag.coords_l0 is not None
    assert bag.patch_side_l0 is not None
    side = round(bag.patch_side_l0)
    return np.concatenate([bag.coords_l0, bag.coords_l0 + side], axis=1)


def _outlines(feature: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """Outer rings of a GeoJSON feature; a pathologist's file may hold points, and classes that are null."""
    named = ((feature.get("properties") or {}).get("classification") or {}).get("name")
    geometry = feature.get("geometry") or {}
    if named == "tissue" or geometry.get("type") not in ("Polygon", "MultiPolygon"):
        return []
    polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    return [np.asarray(rings[0], np.float64)[:, :2] for rings in polygons]


def _key_numbers(scores: Scores) -> tuple[KeyNumber, ...]:
    rows = {r["method"]: r for r in scores.results.to_dict("records")}
    main = MAIN[scores.kind]
    numbers = []
    for method in (LRMIL, TEACHER, LR_ONLY):
        if method in rows:
            row = rows[method]
            value, low, high = (_shown(row[name]) for name in (main, f"{main}_low", f"{main}_high"))
            detail = f"95 % interval {low} to {high}" if math.isfinite(row[main]) else ""
            numbers.append(KeyNumber(value, f"{metric(main).title}, {method}", detail))
    if LRMIL in rows and TEACHER in rows:
        ours, theirs = rows[LRMIL], rows[TEACHER]
        if ours["seconds_per_slide"] > 0 and theirs["seconds_per_slide"] > 0:
            numbers.append(
                KeyNumber(
                    f"{theirs['seconds_per_slide'] / ours['seconds_per_slide']:.1f}x",
                    "faster per slide",
                    f"{theirs['patches_per_slide']:.0f} patches at 20x, {ours['patches_per_slide']:.0f} at 5x",
                )
            )
    return tuple(numbers)


def _shown(value: float) -> str:
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.2f}" if 0.1 <= abs(value) < 100 or value == 0 else f"{value:.3g}"


def _curves(run: Run, folds: Sequence[Split], scores: Scores) -> list[Picture]:
    main = MAIN[run.kind]
    pictures = _task_pictures(run, scores)
    if scores.results["seconds_per_slide"].notna().sum() > 1 and scores.results[main].notna().any():
        image = to_image(metric_against_seconds(scores.results, main))
        pictures.append(Picture(image, f"{metric(main).title} against seconds per slide"))
    for step, title in (
        ("stage1", "Stage 1: patch-level distillation"),
        ("teacher", "20x teacher"),
        ("student", "5x student"),
    ):
        curves = [_curve(run.folder.fold(f.name) / step / "history.json", f.title) for f in folds]
        known = [c for c in curves if c is not None]
        if known:
            pictures.append(Picture(to_image(training_curves(known)), title, wide=True))
    return pictures


def _task_pictures(run: Run, scores: Scores) -> list[Picture]:
    """ROC curves of classes; predicted against true numbers; survival of the patients at high and at low risk."""
    if run.kind == "classification":
        classes = {method: p for method, p in scores.predictions.items() if isinstance(p, Predictions)}
        return [Picture(to_image(roc_curves(classes)), "ROC curves, mean over folds")]
    pictures = []
    for method in (LRMIL, TEACHER):
        values = scores.predictions.get(method)
        if isinstance(values, Values) and run.kind == "regression":
            figure = predicted_against_true(values, seed=run.settings.evaluation.seed, title=method)
            pictures.append(Picture(to_image(figure), f"Predicted against true, {method}"))
        elif isinstance(values, Values) and method in scores.thresholds:
            figure = survival_of_risk_groups(values, scores.thresholds[method], title=method)
            pictures.append(Picture(to_image(figure), f"Survival of risk groups, {method}"))
    return pictures


def _curve(path: Path, name: str) -> TrainingCurve | None:
    if not path.is_file():
        return None
    history = read_json(path)
    epochs = history["epochs"]
    aucs = tuple(float("nan") if e.get("val_auc") is None else e["val_auc"] for e in epochs)
    return TrainingCurve(
        name,
        tuple(e["train_loss"] for e in epochs),
        tuple(e["val_loss"] for e in epochs),
        () if all(np.isnan(aucs)) else aucs,
        history["best_epoch"] - 1,
    )


def _slide_time(method: str, costs: Sequence[SlideCost]) -> SlideTime:
    def mean(part: str) -> float:
        return float(np.mean([getattr(c, part) for c in costs]))

    parts = (("tissue", "tissue_s"), ("reading", "reading_s"), ("encoding", "encoding_s"), ("MIL", "mil_s"))
    return SlideTime(method, tuple((name, mean(part)) for name, part in parts), mean("patches_encoded"))


def _time_note(run: Run, costs: Mapping[str, Sequence[SlideCost]]) -> str:
    count = max((len(found) for found in costs.values()), default=0)
    return (
        f"Mean of {count} test slides, answered from the file after one warm-up; {machine(run)}. Reading is the time "
        "spent waiting for pixels: readers run beside the encoder."
    )


def _cohort_facts(run: Run, folds: Sequence[Split], encoder: Encoder) -> tuple[tuple[str, str], ...]:
    slides = dict.fromkeys(x for fold in folds for x in fold.test)
    g = run.settings.grid
    return (
        ("Slides", f"{len(slides)} of {len({run.cohort.patient_of(x) for x in slides})} patients"),
        _asked(run, list(slides)),
        ("High resolution", f"{g.hr_mpp:g} um/px, {g.patch_px}-px patches: training only"),
        ("Low resolution", f"{g.lr_mpp:g} um/px, {g.patch_px}-px regions of up to {g.children_per_region} children"),
        ("Encoder", f"{encoder.card.title}; licence {encoder.card.licence}"),
        ("Model", licence_note(encoder)),
    )


def _asked(run: Run, slides: Sequence[str]) -> tuple[str, str]:
    """Return what is asked of the slides, as a line of facts."""
    if run.kind == "classification":
        counts = {c: sum(run.cohort.classes[run.cohort.label_of(x)] == c for x in slides) for c in run.cohort.classes}
        return "Classes", ", ".join(f"{name}: {count} slides" for name, count in counts.items())
    targets = np.stack([np.asarray(run.cohort.target_of(x)) for x in slides])
    if run.kind == "regression":
        return "Number", f"{run.settings.cohort.task}, {targets.min():.4g} to {targets.max():.4g}"
    times, events = targets.T
    return "Survival", f"{int(events.sum())} events among {len(slides)} slides, times up to {times.max():.4g}"
