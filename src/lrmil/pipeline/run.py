"""`lrmil run`: from a config to cross-validated tables, a report and a deployed model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrmil.bags import Bag
from lrmil.encoders import create_encoder
from lrmil.evaluation import Cost
from lrmil.evaluation.report import Picture
from lrmil.pipeline.baselines import colour_answers
from lrmil.pipeline.config import RunSettings
from lrmil.pipeline.deploy import write_model
from lrmil.pipeline.distill import stored_student
from lrmil.pipeline.evaluate import (
    COLOUR,
    LR_ONLY,
    LRMIL,
    RANDOM,
    TEACHER,
    Scores,
    TestPredictions,
    score_methods,
)
from lrmil.pipeline.figures import attention_pictures, write_run_report
from lrmil.pipeline.folder import Failure, RunFolder
from lrmil.pipeline.heads import Outputs, stored_head
from lrmil.pipeline.keys import results_key
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.splits import deployment_split
from lrmil.pipeline.student import lr_only_outputs
from lrmil.pipeline.study import NEEDED, Study
from lrmil.pipeline.teacher import label_head_outputs
from lrmil.pipeline.timing import SlideCost, time_answers

Attentive = dict[str, tuple[dict[str, Bag], dict[str, Outputs]]]
"""Bags of all slides, and by fold what is said of them, of each baseline that has attention"""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: RunFolder
    failures: list[Failure]
    summary: list[str]
    """lines for the terminal"""
    scores: Scores | None = None


def run_all(
    settings: RunSettings, reporter: Reporter, *, title: str = "", command: str = "", simulated: bool = False
) -> Outcome:
    """Do everything: cross-validation, tables, report, deployed model.

    Raises:
        ConfigError, CohortError, EncoderError: nothing can be done. Slides that fail do not raise; see `Outcome`.
    """
    study = Study.begin(settings, reporter)
    run = study.run
    study.prepare()
    # Slides that failed may leave it without a part; that should be known before anything is trained.
    final = deployment_split(run, study.pictured) if settings.deploy else None
    found, others = cross_validate(study)
    costs = _measure(study)
    dataset = run.cohort.name
    measured = {m: mean_cost(c) for m, c in costs.items()}
    scores = score_methods(run, found.all(), measured, dataset, found.thresholds, found.censoring)
    with reporter.stage("report", "Drawing the report"):
        pictures = _pictures(study, others)
        report = write_run_report(
            run,
            study.folds,
            study.proof,
            scores,
            costs,
            pictures,
            study.encoder,
            title=title or f"LRMIL on {dataset}: {settings.cohort.task}",
            command=command or f"lrmil run {run.folder.config}",
            simulated=simulated,
        )
    run.folder.mark_done(run.folder.tables, results_key(run), made_from=results_key(run))
    summary = scores.table_lines()
    if final is not None:
        with reporter.stage("deploy", "Training the model to deploy, on everything"):
            study.teacher(final)
            study.distil(final)
            answers = study.student(final)
            write_model(run, final, study.grids, study.encoder, stored_student(run, final), scores, answers)
        summary.append(f"model: {run.folder.model}   (lrmil predict SLIDE --model {run.folder.model})")
    summary.append(f"report: {report}")
    reporter.event("run finished", failures=len(run.failures))
    return Outcome(run.folder, run.failures, summary, scores)


def cross_validate(study: Study) -> tuple[TestPredictions, Attentive]:
    """Train everything on every fold of a study that is tiled and encoded, and ask it about the test slides.

    Returns:
        What the 20x teacher, LRMIL and the baselines of the config say; and of those baselines that have attention the
        bags and answers.
    """
    for stage in ("distill", "teacher", "student"):
        study.do(stage)
    found = TestPredictions(study.run)
    for split in study.folds:
        found.add(TEACHER, split, study.teacher_answers[split.name])
        found.add(LRMIL, split, study.student_answers[split.name])
    return found, _baselines(study, found)


def run_until(stage: str, settings: RunSettings, reporter: Reporter) -> Outcome:
    """Do `stage` for every fold, and before it what it needs."""
    study = Study.begin(settings, reporter)
    for name in NEEDED[stage]:
        study.do(name)
    return Outcome(study.run.folder, study.run.failures, [f"{stage}: done, in {study.run.folder.root}"])


def _baselines(study: Study, found: TestPredictions) -> Attentive:
    """Train the baselines of the config on the same folds; return bags and answers of those that have attention."""
    run, wanted = study.run, study.run.settings.evaluation.baselines
    kept: Attentive = {}
    if "majority" in wanted:
        for split in study.folds:
            found.add_constant(split)
    if "colour_histogram" in wanted:
        histograms = {s: study.pixels.colours(s) for s in study.slides}
        for split in study.folds:
            answers = colour_answers(run, split, histograms, split.test)
            found.add_rows(COLOUR, split, dict(zip(split.test, answers, strict=True)))
    if "random_encoder" in wanted:
        seed = run.settings.seed
        encoder = create_encoder(
            run.settings.encoder.name, input_px=study.encoder.input_px, embedding="cls", random_seed=seed
        ).to(run.device)
        bags = study.encode_lr(encoder, "Encoding 5x regions with random weights", random_seed=seed)
        for split in study.folds:
            found.add(RANDOM, split, label_head_outputs(run, split, bags, encoder, "random_encoder", "random encoder"))
    if "lr_only" in wanted:
        bags, answers_of = study.frozen_lr_bags, {}
        for split in study.folds:
            answers_of[split.name] = lr_only_outputs(run, split, bags, study.frozen_lr_encoder)
            found.add(LR_ONLY, split, answers_of[split.name])
        kept[LR_ONLY] = (bags, answers_of)
    return kept


def _measure(study: Study) -> dict[str, list[SlideCost]]:
    """Time the teacher and LRMIL on some test slides of the first fold, from the files."""
    run, split = study.run, study.folds[0]
    chosen = [run.entry(slide) for slide in split.test][: run.settings.evaluation.timed_slides]
    fold = run.folder.fold(split.name)
    with run.reporter.stage("time", f"Timing answers on {len(chosen)} slides"):
        costs = {
            TEACHER: time_answers(run, TEACHER, chosen, study.encoder, stored_head(fold / "teacher"), "hr"),
            LRMIL: time_answers(run, LRMIL, chosen, stored_student(run, split), stored_head(fold / "student"), "lr"),
        }
        if "lr_only" in run.settings.evaluation.baselines:
            frozen = study.frozen_lr_encoder
            costs[LR_ONLY] = time_answers(run, LR_ONLY, chosen, frozen, stored_head(fold / "lr_only"), "lr")
    return costs


def mean_cost(costs: Sequence[SlideCost]) -> Cost:
    """Average what answers took."""
    if not costs:
        return Cost()
    return Cost(float(np.mean([c.patches_encoded for c in costs])), float(np.mean([c.total_s for c in costs])))


def _pictures(study: Study, others: Attentive) -> list[Picture]:
    split = study.folds[0]
    answers = {TEACHER: study.teacher_answers[split.name]}
    bags: dict[str, Mapping[str, Bag]] = {TEACHER: study.hr_bags}
    for method, (own_bags, own_answers) in others.items():
        answers[method], bags[method] = own_answers[split.name], own_bags
    answers[LRMIL], bags[LRMIL] = study.student_answers[split.name], study.student_bags(split)
    return attention_pictures(study.run, split, study.grids, answers, bags)
