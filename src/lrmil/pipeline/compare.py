"""`lrmil compare`: many methods on the same slides, folds and features, and what their differences are worth."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lrmil.errors import ConfigError, HeadError
from lrmil.evaluation import Cost, write_results
from lrmil.evaluation.comparison import Comparison
from lrmil.evaluation.comparison_files import write_comparison
from lrmil.mil import create_head, head_cards
from lrmil.pipeline.cohort import brings_features_alone, settings_cohort
from lrmil.pipeline.config import RunSettings
from lrmil.pipeline.context import Split
from lrmil.pipeline.distill import stored_student
from lrmil.pipeline.evaluate import LRMIL, TestPredictions, terminal_lines
from lrmil.pipeline.feature_study import FeatureStudy
from lrmil.pipeline.heads import Outputs, slide_bag, stored_head
from lrmil.pipeline.jobs import BagJob, HeadJob, do_jobs, job_outputs, workers_for
from lrmil.pipeline.keys import head_key, outputs_key, results_key
from lrmil.pipeline.methods import Method, baseline_settings, for_features, for_task, methods_named, reference_of
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.run import Outcome, mean_cost
from lrmil.pipeline.said import Said, recovery_table
from lrmil.pipeline.seeds import under_each_seed
from lrmil.pipeline.selective import ChoiceJob, selective_job, stored_selective_head, time_selective
from lrmil.pipeline.student import lr_only_outputs
from lrmil.pipeline.study import Study
from lrmil.pipeline.timing import time_answers
from lrmil.settings import fingerprint
from lrmil.training.seeds import derive_seed
from lrmil.training.stage2 import trainable_head

AnyStudy = Study | FeatureStudy


def compare(settings: RunSettings, reporter: Reporter) -> Outcome:
    """Train every method of `settings.compare` on every fold with every seed, score them, and write compare/.

    Whatever is done is kept: a second call trains what is missing, and methods may be added later. `lrmil run` with
    the same config shares tiles, features, stage 1, teacher and student. A cohort that brings features and no slides is
    compared on those, by the methods that see one scale, without costs.

    Raises:
        ConfigError, CohortError, EncoderError, HeadError: nothing can be done, or a method does not exist. Slides that
            fail do not raise; see `Outcome`.
    """
    cohort = settings_cohort(settings)
    alone = brings_features_alone(cohort)
    settings = for_task(settings, reporter)
    if alone:
        settings = for_features(settings, reporter)
    methods = methods_named(settings.compare.methods, settings.cohort.kind)
    reference = reference_of(settings.compare.reference, methods, features_alone=alone)
    study: AnyStudy
    if alone:
        coordinates = any(":" in m.head for m in methods)
        study = FeatureStudy.begin(settings, cohort, reporter, coordinates=coordinates)
    else:
        choosers = tuple(m.head for m in methods if m.sees == "chosen")
        study = Study.begin(settings, reporter, choosers=choosers)
    _require_heads(study, methods)
    folder = study.run.folder
    key = fingerprint(results_key(study.run), settings.compare)
    if folder.done_facts(folder.comparison).get("key") != key:
        shutil.rmtree(folder.comparison, ignore_errors=True)
    study.prepare()
    said = Said()
    for each in under_each_seed(study):
        said.add(_predictions(each, methods))
    if isinstance(study, Study):
        # Of the first seed there are heads to time; the config's own seed need not be among those compared.
        said.costs.update(_measure(next(under_each_seed(study)), methods))
    comparison = said.comparison(study.run, reference=reference.title, groups={m.title: m.group for m in methods})
    recovered = recovery_table(comparison, settings, [(m.title, LRMIL, m.title) for m in methods if m.sees == "hr"])
    with reporter.stage("report", "Writing the comparison"):
        write_comparison(comparison, folder.comparison)
        write_results(folder.comparison / "recovery.csv", recovered)
    folder.mark_done(folder.comparison, key)
    reporter.event("comparison finished", failures=len(study.run.failures))
    return Outcome(folder, study.run.failures, [*_summary(comparison, study), *_recovery_lines(recovered)])


def _recovery_lines(recovered: pd.DataFrame) -> list[str]:
    """Say it for the terminal."""
    return [
        f"Of what {row['method']} has more than 5x without distillation, LRMIL recovers {100 * row['recovered']:.0f} % "
        f"[{100 * row['recovered_low']:.0f}, {100 * row['recovered_high']:.0f}]."
        for row in recovered[recovered["recovered"].notna()].to_dict("records")
    ]


def _predictions(study: AnyStudy, methods: Sequence[Method]) -> TestPredictions:
    """Train with one seed; return what each method says about the test slides of every fold."""
    run, found = study.run, TestPredictions(study.run)
    sees = {m.sees for m in methods}
    if "lrmil" in sees and isinstance(study, Study):
        for stage in ("distill", "teacher", "student"):
            study.do(stage)
    jobs: dict[str, Sequence[HeadJob[Any]]] = {m.name: _jobs(study, m, found) for m in methods if m.sees == "hr"}
    if isinstance(study, Study):
        jobs |= {m.name: _choices(study, m, found) for m in methods if m.sees == "chosen"}
    workers = workers_for(run, run.settings.compare.jobs)
    count = sum(map(len, jobs.values()))
    if count:
        with run.reporter.stage("heads", f"Training {count} heads, {workers} at a time, seed {run.settings.seed}"):
            do_jobs(run, [job for own in jobs.values() for job in own], workers)
    for method in methods:
        for number, split in enumerate(study.folds):
            if method.sees == "nothing":
                found.add_constant(split)
            elif method.name in jobs:
                found.add(method.title, split, job_outputs(jobs[method.name][number]))
            elif isinstance(study, Study):
                found.add(method.title, split, _of_slides(study, method, split))
    return found


def _of_slides(study: Study, method: Method, split: Split) -> Outputs:
    """Return what a method says that sees 5x."""
    if method.sees == "lr":
        return lr_only_outputs(study.run, split, study.frozen_lr_bags, study.frozen_lr_encoder)
    return study.student(split)


def _jobs(study: AnyStudy, method: Method, found: TestPredictions) -> list[BagJob]:
    """Return the training of a head on 20x features, for every fold."""
    run = study.run
    features, settings = study.features, baseline_settings(study.run.settings, method)
    jobs = []
    for split in study.folds:
        key = head_key(run, split, features, method.name, settings)
        to_answer = found.asked(split)
        train, val, asked = (
            tuple(slide_bag(run, study.hr_bags[s], s) for s in slides) for slides in (split.train, split.val, to_answer)
        )
        jobs.append(
            BagJob(
                title=f"{method.title}, {split.title}",
                step=run.folder.fold(split.name) / "heads" / method.name.replace(":", "_"),
                key=key,
                outputs_key=outputs_key(run, key, to_answer),
                settings=settings,
                objective=run.objective,
                # The seed of teacher and student too: ABMIL is the teacher, bit for bit, if the teacher is an ABMIL.
                seed=derive_seed(run.settings.seed, split.name, "head"),
                device=str(run.device),
                train=train,
                val=val,
                asked=asked,
            )
        )
    return jobs


def _choices(study: Study, method: Method, found: TestPredictions) -> list[ChoiceJob]:
    """Return the training of a head that chooses its patches, for every fold."""
    sources, settings = study.sources(method.head), baseline_settings(study.run.settings, method)
    return [
        selective_job(
            study.run,
            split,
            sources,
            method.name,
            settings,
            study.encoder,
            title=method.title,
            slides=found.asked(split),
        )
        for split in study.folds
    ]


def _require_heads(study: AnyStudy, methods: Sequence[Method]) -> None:
    """Build every head once, so that a wrong name or option, or a task that a head cannot learn, is told of before
    anything is computed.
    """
    known = {card.name for card in head_cards()}
    for method in methods:
        if method.head in known or ":" in method.head:
            try:
                head = trainable_head(baseline_settings(study.run.settings, method), study.run.objective)
            except ConfigError as error:
                fix = f"{error.fix or ''} Or leave it out of compare.methods.".strip()
                raise ConfigError(f"compare.methods, {method.name}: {error.message}", fix=fix) from error
            create_head(head.name, study.width, study.run.objective.outputs, **head.options)
    unknown = sorted(set(study.run.settings.compare.options) - {m.name for m in methods})
    if unknown:
        raise HeadError(
            f"compare.options speaks of {', '.join(unknown)}, which compare.methods does not list.",
            fix="Check the spelling, or add the method.",
        )


def _measure(study: Study, methods: Sequence[Method]) -> dict[str, Cost]:
    """Answer some test slides of the first fold from their files with every method, and take the time."""
    run, split = study.run, study.folds[0]
    entries = [run.entry(slide) for slide in split.test][: run.settings.evaluation.timed_slides]
    timed = [m for m in methods if m.sees != "nothing"]
    costs: dict[str, Cost] = {}
    with (
        run.reporter.stage("time", f"Timing answers of {len(timed)} methods on {len(entries)} slides"),
        run.reporter.task("methods", len(timed)) as progress,
    ):
        for method in timed:
            costs[method.title] = _cost(study, method, split, entries)
            progress.advance(note=method.title)
    return costs


def _cost(study: Study, method: Method, split: Split, entries: Sequence[Any]) -> Cost:
    run = study.run
    fold = run.folder.fold(split.name)
    if method.sees == "hr":
        head = stored_head(fold / "heads" / method.name.replace(":", "_"))
        return mean_cost(time_answers(run, method.title, entries, study.encoder, head, "hr"))
    if method.sees == "chosen":
        chooser = stored_selective_head(run, split, method.name)
        return mean_cost(time_selective(run, method.title, entries, study.encoder, chooser))
    if method.sees == "lr":
        head = stored_head(fold / "lr_only")
        return mean_cost(time_answers(run, method.title, entries, study.frozen_lr_encoder, head, "lr"))
    encoder, head = stored_student(run, split), stored_head(fold / "student")
    return mean_cost(time_answers(run, method.title, entries, encoder, head, "lr"))


def _summary(comparison: Comparison, study: AnyStudy) -> list[str]:
    tables: Mapping[str, Any] = comparison.tables()
    lines = terminal_lines(comparison.results_table())
    lines += ["", *terminal_lines(comparison.differences_table())] if len(tables) > 1 else []
    return [*lines, f"tables and figures: {study.run.folder.comparison}"]
