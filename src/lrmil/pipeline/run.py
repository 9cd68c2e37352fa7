"""From a config to a deployed model: the stages in order, each resumable, each skipped where it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lrmil.bags import Bag
from lrmil.cohorts.table import load_cohort
from lrmil.encoders import Encoder, create_encoder
from lrmil.errors import ConfigError
from lrmil.evaluation import Cost
from lrmil.evaluation.report import Picture
from lrmil.files import remove_leftovers
from lrmil.geometry import MatchedGrid
from lrmil.pipeline.baselines import colour_probabilities
from lrmil.pipeline.checks import require_fitting_parts, require_own_folder, require_usable_slides
from lrmil.pipeline.config import RunSettings, save_config
from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.deploy import write_model
from lrmil.pipeline.distill import distil_fold, distilled_layers, fold_bag, stored_student
from lrmil.pipeline.encode import encode_children, encode_regions, features_name, read_regions
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
from lrmil.pipeline.heads import Outputs, read_bags, stored_head
from lrmil.pipeline.keys import results_key
from lrmil.pipeline.pixels import RegionPixels
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.splits import deployment_split, make_splits
from lrmil.pipeline.stale import discard_stale_results
from lrmil.pipeline.student import lr_only_outputs, student_outputs
from lrmil.pipeline.teacher import label_head_outputs, teacher_bags, teacher_outputs
from lrmil.pipeline.tile import tile_cohort
from lrmil.pipeline.timing import SlideCost, time_answers

STAGES = ("tile", "encode", "distill", "teacher", "student")
NEEDED = {
    "tile": ("tile",),
    "encode": ("tile", "encode"),
    "distill": ("tile", "encode", "distill"),
    "teacher": ("tile", "encode", "teacher"),
    "student": STAGES,
}
"""stages that each stage needs, itself included"""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: RunFolder
    failures: list[Failure]
    summary: list[str]
    """lines for the terminal"""
    scores: Scores | None = None


@dataclass
class Study:
    """The state of a run between stages. Stages call `self.run`; what is expensive is made once and kept here."""

    run: Run
    encoder: Encoder
    """The frozen HR encoder, on the run's device"""
    grids: dict[str, MatchedGrid] = field(default_factory=dict)
    folds: list[Split] = field(default_factory=list)
    proof: str = ""
    teacher_answers: dict[str, Outputs] = field(default_factory=dict)
    student_answers: dict[str, Outputs] = field(default_factory=dict)

    @cached_property
    def pixels(self) -> RegionPixels:
        """LR pixels of all slides."""
        return RegionPixels(self.run, self.grids, self.run.settings.memory_gb * 2**30)

    @cached_property
    def hr_bags(self) -> dict[str, Bag]:
        """20x features of all slides, without the CLS of layers."""
        return teacher_bags(self.run, self.slides, self.encoder)

    @property
    def slides(self) -> list[str]:
        """Ids of the slides that are tiled and have not failed."""
        return [e.slide_id for e in self.run.entries() if e.slide_id in self.grids]

    def student_bags(self, split: Split) -> dict[str, Bag]:
        """5x features of all slides by a fold's student encoder."""
        return read_bags({s: fold_bag(self.run, split, s) for s in self.slides})


def run_all(
    settings: RunSettings, reporter: Reporter, *, title: str = "", command: str = "", simulated: bool = False
) -> Outcome:
    """Do everything: cross-validation, tables, report, deployed model.

    Raises:
        ConfigError, CohortError, EncoderError: nothing can be done. Slides that fail do not raise; see `Outcome`.
    """
    study = _start(settings, reporter)
    run = study.run
    final = None
    for stage in STAGES:
        _do(study, stage)
        if stage == "encode" and settings.deploy:
            # Slides that failed may leave it without a part; that should be known before anything is trained.
            final = deployment_split(run, study.slides)
    found = TestPredictions(run)
    for split in study.folds:
        found.add(TEACHER, split, study.teacher_answers[split.name])
        found.add(LRMIL, split, study.student_answers[split.name])
    others = _baselines(study, found)
    costs = _measure(study)
    dataset = run.cohort.name
    scores = score_methods(run, found.all(), {m: _cost(c) for m, c in costs.items()}, dataset)
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
    summary = _summary(scores)
    if final is not None:
        with reporter.stage("deploy", "Training the model to deploy, on everything"):
            _teacher(study, final)
            _distil(study, final)
            _student(study, final)
            write_model(run, final, study.grids, study.encoder, stored_student(run, final), scores)
        summary.append(f"model: {run.folder.model}   (lrmil predict SLIDE --model {run.folder.model})")
    summary.append(f"report: {report}")
    reporter.event("run finished", failures=len(run.failures))
    return Outcome(run.folder, run.failures, summary, scores)


def run_until(stage: str, settings: RunSettings, reporter: Reporter) -> Outcome:
    """Do `stage` for every fold, and before it what it needs."""
    study = _start(settings, reporter)
    for name in NEEDED[stage]:
        _do(study, name)
    return Outcome(study.run.folder, study.run.failures, [f"{stage}: done, in {study.run.folder.root}"])


def _start(settings: RunSettings, reporter: Reporter) -> Study:
    """Check all that can be checked at once, then write what the output folder begins with."""
    c = settings.cohort
    cohort = load_cohort(
        c.table,
        task=c.task,
        classes=c.classes,
        slides_dir=c.slides_dir,
        label_level=c.label_level,
        num_folds=settings.folds.num_folds,
    )
    reporter.line(cohort.summary())
    require_usable_slides(cohort)
    run = Run(settings, RunFolder(settings.out), cohort, reporter)
    require_own_folder(run.folder)
    encoder = run.build_encoder().to(run.device)
    require_fitting_parts(run, encoder)
    remove_leftovers(run.folder.root)
    discard_stale_results(run)
    save_config(settings, run.folder.config)
    cohort.write(run.folder.cohort)
    run.folder.write_failures([])
    reporter.event("run started", out=str(run.folder.root), slides=len(cohort.table))
    return Study(run, encoder)


def _do(study: Study, stage: str) -> None:
    run, s = study.run, study.run.settings
    if stage == "tile":
        study.grids.update(tile_cohort(run))
        _require_some(study)
    elif stage == "encode":
        layers = distilled_layers(run, study.encoder) if s.targets == "cached" else ()
        encode_children(run, study.grids, study.encoder, layers)
        read_regions(run, study.grids, study.pixels)
        _require_some(study)
        study.folds, study.proof = make_splits(run, study.slides)
    elif stage == "distill":
        if s.stage1.loss.lambda_attention_feature:
            # The released extra loss weighs children by a teacher head's attention, which must then exist first.
            _do(study, "teacher")
        with run.reporter.stage("distill", "Stage 1: teaching the student encoder of each fold"):
            for split in study.folds:
                _distil(study, split)
    elif stage == "teacher":
        with run.reporter.stage("teacher", "Stage 2.1: training the 20x teacher head of each fold"):
            for split in study.folds:
                _teacher(study, split)
    else:
        with run.reporter.stage("student", "Stage 2.2: training the 5x student head of each fold"):
            for split in study.folds:
                _student(study, split)


def _require_some(study: Study) -> None:
    if not study.slides:
        failures = study.run.failures
        raise ConfigError(
            f"none of the {len(failures)} slides can be used; the first: {failures[0].message}",
            fix=f"Every reason is in {study.run.folder.failures}.",
        )


def _distil(study: Study, split: Split) -> None:
    answers = None
    if study.run.settings.stage1.loss.lambda_attention_feature:
        answers = _teacher(study, split)
    distil_fold(study.run, split, study.grids, study.pixels, study.encoder, answers)


def _teacher(study: Study, split: Split) -> Outputs:
    if split.name not in study.teacher_answers:
        study.teacher_answers[split.name] = teacher_outputs(study.run, split, study.hr_bags, study.encoder)
    return study.teacher_answers[split.name]


def _student(study: Study, split: Split) -> None:
    study.student_answers[split.name] = student_outputs(
        study.run,
        split,
        study.student_bags(split),
        study.hr_bags,
        study.teacher_answers[split.name],
        study.encoder,
        stored_student(study.run, split),
    )


def _baselines(study: Study, found: TestPredictions) -> dict[str, tuple[dict[str, Bag], dict[str, Outputs]]]:
    """Train the baselines of the config on the same folds; return bags and answers of those that have attention."""
    run, wanted = study.run, study.run.settings.evaluation.baselines
    kept: dict[str, tuple[dict[str, Bag], dict[str, Outputs]]] = {}
    if "majority" in wanted:
        for split in study.folds:
            found.add_majority(split)
    if "colour_histogram" in wanted:
        histograms = {s: study.pixels.colours(s) for s in study.slides}
        for split in study.folds:
            answers = colour_probabilities(run, split, histograms, split.test)
            found.add_rows(COLOUR, split, dict(zip(split.test, answers, strict=True)))
    lr_mpp = run.settings.grid.lr_mpp
    if "random_encoder" in wanted:
        seed = run.settings.seed
        encoder = create_encoder(
            run.settings.encoder.name, input_px=study.encoder.input_px, embedding="cls", random_seed=seed
        ).to(run.device)
        name = features_name(encoder, lr_mpp, random_seed=seed)
        encode_regions(run, study.grids, encoder, study.pixels, name, title="Encoding 5x regions with random weights")
        bags = read_bags({s: run.folder.bag(name, s) for s in study.slides})
        for split in study.folds:
            found.add(RANDOM, split, label_head_outputs(run, split, bags, encoder, "random_encoder", "random encoder"))
    if "lr_only" in wanted:
        encoder = run.build_encoder(student=True).to(run.device)
        name = features_name(encoder, lr_mpp, run.settings.encoder.random_seed)
        encode_regions(run, study.grids, encoder, study.pixels, name, title="Encoding 5x regions without distillation")
        bags = read_bags({s: run.folder.bag(name, s) for s in study.slides})
        answers_of = {}
        for split in study.folds:
            answers_of[split.name] = lr_only_outputs(run, split, bags, encoder)
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
            encoder = run.build_encoder(student=True)
            costs[LR_ONLY] = time_answers(run, LR_ONLY, chosen, encoder, stored_head(fold / "lr_only"), "lr")
    return costs


def _cost(costs: Sequence[SlideCost]) -> Cost:
    if not costs:
        return Cost()
    return Cost(float(np.mean([c.patches_encoded for c in costs])), float(np.mean([c.total_s for c in costs])))


def _pictures(study: Study, others: Mapping[str, tuple[dict[str, Bag], dict[str, Outputs]]]) -> list[Picture]:
    split = study.folds[0]
    answers = {TEACHER: study.teacher_answers[split.name]}
    bags: dict[str, Mapping[str, Bag]] = {TEACHER: study.hr_bags}
    for method, (own_bags, own_answers) in others.items():
        answers[method], bags[method] = own_answers[split.name], own_bags
    answers[LRMIL], bags[LRMIL] = study.student_answers[split.name], study.student_bags(split)
    return attention_pictures(study.run, split, study.grids, answers, bags)


def _summary(scores: Scores) -> list[str]:
    from io import StringIO

    from rich.console import Console

    from lrmil.evaluation.table_formats import to_rich

    text = StringIO()
    Console(file=text, width=150, highlight=False).print(to_rich(scores.table))
    return text.getvalue().rstrip("\n").split("\n")
