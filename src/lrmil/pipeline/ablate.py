"""`lrmil ablate`, `lrmil sensitivity` and recipes: a method with one thing changed, on the same slides, folds, seeds.

Variants share whatever their change does not touch: tiles, features, stage 1, teacher. The config itself is the
reference, trained as `lrmil run` trains it and where it keeps it, so that what is there is not trained again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from lrmil.bags import Bag
from lrmil.errors import CohortError, ConfigError, GridMismatch, LrmilError, SlideTooCoarse
from lrmil.evaluation import (
    Cost,
    TextTable,
    interval_columns,
    paired_bootstrap,
    write_results,
)
from lrmil.evaluation.comparison import Comparison
from lrmil.evaluation.comparison_files import write_comparison
from lrmil.evaluation.metrics import MAIN, metric
from lrmil.evaluation.table_formats import to_latex, to_markdown
from lrmil.evaluation.tables import metric_text, paper_metrics
from lrmil.files import write_json, write_text
from lrmil.geometry import GridSettings, check_token_grid, resolve_scale
from lrmil.pipeline.checks import require_fitting_parts
from lrmil.pipeline.config import RunSettings
from lrmil.pipeline.context import Split
from lrmil.pipeline.distill import features_folder, stored_student
from lrmil.pipeline.evaluate import LR_ONLY, TEACHER, TestPredictions, terminal_lines
from lrmil.pipeline.heads import Outputs, stored_head
from lrmil.pipeline.keys import results_key
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.run import Outcome, mean_cost
from lrmil.pipeline.said import Said, recovery_table
from lrmil.pipeline.seeds import under_each_seed
from lrmil.pipeline.study import Study
from lrmil.pipeline.timing import time_answers
from lrmil.pipeline.variants import (
    TERMS,
    Of,
    Plan,
    Variant,
    ablation_plan,
    recipes_plan,
    sensitivity_plan,
)
from lrmil.settings import fingerprint


def ablate(settings: RunSettings, reporter: Reporter) -> Outcome:
    """Train the six rows of the paper's Table 3 on every fold with every seed, score them, and write ablation/.

    Raises:
        ConfigError, CohortError, EncoderError, HeadError: nothing can be done. Slides that fail do not raise.
    """
    study = Study.begin(settings, reporter)
    plan = ablation_plan(settings)
    return _carry_out(study, plan, study.run.folder.ablation)


def sensitivity(settings: RunSettings, reporter: Reporter, of: Of, values: Sequence[Any] | None = None) -> Outcome:
    """Train the method with other values of one setting, score them, and write sensitivity/<of>/.

    Args:
        settings: the config, which is one of the rows and what all others are compared with.
        reporter: tells how it goes.
        of: what is varied.
        values: see `sensitivity_plan`; None: the usual ones.

    Raises:
        ConfigError: a value is impossible, or what is varied has no effect with this config.
        And what `ablate` raises.
    """
    study = Study.begin(settings, reporter)
    plan = sensitivity_plan(of, settings, study.encoder.depth, values)
    return _carry_out(study, plan, study.run.folder.sensitivity / plan.name)


def compare_recipes(settings: RunSettings, reporter: Reporter, changes: Mapping[str, Mapping[str, Any]]) -> Outcome:
    """Train the method with other recipes, score them beside the config's own, and write recipes/.

    Args:
        settings: the config, which is one of the rows and what all others are compared with.
        reporter: tells how it goes.
        changes: see `recipes_plan`.

    Raises:
        ConfigError: a recipe is impossible, or changes more than training.
        And what `ablate` raises.
    """
    study = Study.begin(settings, reporter)
    plan = recipes_plan(settings, changes)
    require_trainable(study, plan.variants)
    return _carry_out(study, plan, study.run.folder.recipes)


def require_trainable(study: Study, variants: Sequence[Variant]) -> None:
    """See before hours of training that every variant is possible, and that it is a matter of training alone.

    Tiles, 20x features and folds are those of the config: a change of what they depend on would have no effect.

    Raises:
        ConfigError: named by the variant's title.
    """
    settings = study.run.settings
    for variant in variants:
        own = variant.applied(settings)
        encoder = settings.encoder.model_copy(update={"student_embedding": own.encoder.student_embedding})
        allowed = {"stage1": own.stage1, "teacher": own.teacher, "student": own.student, "encoder": encoder}
        if settings.model_copy(update=allowed) != own:
            raise ConfigError(
                f"{variant.title}: a recipe changes how is trained, not what on.",
                fix="Change stage1, teacher, student, or encoder.student_embedding.",
            )
        try:
            require_fitting_parts(replace(study.run, settings=own), study.encoder)
        except LrmilError as error:
            raise ConfigError(f"{variant.title}: {error.message}", fix=error.fix) from error


def _carry_out(study: Study, plan: Plan, folder: Path) -> Outcome:
    run = study.run
    reporter, s = run.reporter, run.settings
    key = fingerprint(results_key(run), s.compare.seeds, plan.name, {v.title: dict(v.changes) for v in plan.variants})
    if run.folder.done_facts(folder).get("key") != key:
        shutil.rmtree(folder, ignore_errors=True)
    study.keep_layers_of(v.applied(s) for v in plan.variants)
    study.do("tile")
    plan = _possible(study, plan)
    study.do("encode")
    _require_others(plan)
    said = Said()
    if plan.own_scales:
        plan = _across_scales(study, plan, said)
        _require_others(plan)
    else:
        _variants(study, plan, said)
    for note in plan.notes:
        reporter.line(f"  {note}")
    titles = [*([TEACHER] if plan.with_teacher else []), *(v.title for v in plan.variants)]
    comparison = said.comparison(
        run, reference=plan.reference.title, groups=dict.fromkeys(titles, plan.heading), titles=titles
    )
    with reporter.stage("report", f"Writing {folder.name}"):
        write_comparison(comparison, folder)
        _write_more(comparison, plan, folder)
        _write_pairs(comparison, folder, s)
        if plan.with_teacher:
            others = [v.title for v in plan.variants if v.title != LR_ONLY]
            recovered = recovery_table(comparison, s, [(title, title, TEACHER) for title in others])
            write_results(folder / "recovery.csv", recovered)
    run.folder.mark_done(folder, key)
    reporter.event(f"{plan.name} finished", failures=len(run.failures))
    return Outcome(run.folder, run.failures, _summary(comparison, plan, folder))


def _variants(study: Study, plan: Plan, said: Said) -> None:
    """Train variants that look at the same features."""
    for own in under_each_seed(study):
        for stage in ("distill", "teacher", "student"):
            own.do(stage)
        answers = TestPredictions(own.run)
        reporter, suffix = own.run.reporter, "" if own is study else f"_seed_{own.run.settings.seed}"
        count, folds = len(plan.variants) - 1, len(own.folds)
        title = f"Training {count} variants on {folds} folds, seed {own.run.settings.seed}"
        studies = [(variant, _study_of(own, variant, suffix)) for variant in plan.variants]
        with reporter.stage("variants", title), reporter.task("variants", count * folds) as progress:
            for split in own.folds:
                # Read once for all variants, and a fold at a time, so that they fit into memory.
                bags = own.student_bags(split)
                if plan.with_teacher:
                    answers.add(TEACHER, split, own.teacher(split))
                for variant, changed in studies:
                    answers.add(variant.title, split, _student(own, changed, variant, split, bags))
                    if variant != plan.reference:
                        progress.advance(note=f"{variant.title}, {split.title}")
        said.add(answers)


def _study_of(own: Study, variant: Variant, suffix: str) -> Study:
    """Return the study of a variant; a variant that is the config itself is the config's study."""
    settings = variant.applied(own.run.settings)
    if settings == own.run.settings and "patch" in variant.terms:
        return own
    return own.variant(variant.name + suffix, settings)


def _student(own: Study, changed: Study, variant: Variant, split: Split, bags: Mapping[str, Bag]) -> Outputs:
    """Train a variant on one fold; `bags` are the 5x features by the config's own student encoder of the fold."""
    if "patch" not in variant.terms:
        # Without L_patch there is no stage 1: the student looks at 5x with the frozen encoder's eyes.
        return changed.student(split, own.frozen_lr_bags, own.frozen_lr_encoder)
    if features_folder(changed.run, split) == features_folder(own.run, split):
        return changed.student(split, bags)
    changed.distil(split)
    return changed.student(split)


def _possible(study: Study, plan: Plan) -> Plan:
    """Leave out what the task has no meaning for, and magnifications that the tokens or a slide do not allow."""
    kept, notes = [], list(plan.notes)
    for variant in plan.variants:
        settings = variant.applied(study.run.settings)
        try:
            study.run.objective.check_loss(settings.student.loss)
            for side in _token_grids(study):
                check_token_grid(side, settings.grid.ratio)
        except (ConfigError, GridMismatch) as error:
            notes.append(f"{variant.title} is left out: {error.message}")
            continue
        grids = study.grids.items()
        coarse = [slide for slide, g in grids if g.scale.has_hr and not _fine_enough(g.scale.mpp_l0, settings.grid)]
        if coarse:
            notes.append(
                f"{variant.title} is left out: {len(coarse)} slides are coarser than that (first: {coarse[0]})."
            )
            continue
        kept.append(variant)
    titles = {v.title for v in kept}
    lines = {name: tuple(p for p in points if p[1] in titles) for name, points in plan.lines.items()}
    drawn = {name: points for name, points in lines.items() if len(points) > 1}
    return replace(plan, variants=tuple(kept), lines=drawn, notes=tuple(notes))


def _token_grids(study: Study) -> list[int]:
    """Return the tokens along a side of an image, of the HR encoder and of a student of another architecture."""
    own = study.run.own_student
    return [study.encoder.token_grid_side, *([] if own is None else [own["token_grid_side"]])]


def _fine_enough(mpp_l0: float, grid: GridSettings) -> bool:
    """Say whether a slide of these pixels can be read at the high resolution."""
    try:
        return resolve_scale(grid, mpp_l0).has_hr
    except SlideTooCoarse:
        return False


def _require_others(plan: Plan) -> None:
    """See that something is left to compare the config with."""
    if len(plan.variants) < 2:
        raise ConfigError(
            f"there is nothing to compare {plan.reference.title} with. {' '.join(plan.notes)}".strip(),
            fix="Name other values, or use other slides.",
        )


def _across_scales(study: Study, plan: Plan, said: Said) -> Plan:
    """Do a run of its own for each pair of magnifications, in variants/<name>/, on the folds of the main run.

    A pair on which another set of slides can be used is left out: its results could not be paired with the others.
    """
    kept, notes = [], list(plan.notes)
    for variant in plan.variants:
        try:
            here = study if variant == plan.reference else _begun(study, variant)
        except (ConfigError, CohortError) as error:
            notes.append(f"{variant.title} is left out: {error.message}")
            continue
        lost = sorted(set(study.slides) ^ set(here.slides))
        if lost:
            notes.append(f"{variant.title} is left out: {len(lost)} slides cannot be used (first: {lost[0]}).")
            continue
        for own in under_each_seed(here):
            answers = TestPredictions(own.run)
            for stage in ("distill", "teacher", "student"):
                own.do(stage)
            for split in own.folds:
                answers.add(variant.title, split, own.student(split))
            said.add(answers)
        said.costs[variant.title] = _cost(next(under_each_seed(here)), variant.title)
        kept.append(variant)
    return replace(plan, variants=tuple(kept), notes=tuple(notes))


def _begun(study: Study, variant: Variant) -> Study:
    """Tile and encode the cohort at other magnifications."""
    settings = variant.applied(study.run.settings)
    out = study.run.folder.root / "variants" / variant.name
    study.run.reporter.line(f"{variant.title}, in {out}")
    other = Study.begin(settings.model_copy(update={"out": str(out)}), study.run.reporter)
    for stage in ("tile", "encode"):
        other.do(stage)
    return other


def _cost(study: Study, title: str) -> Cost:
    """Answer some test slides of the first fold from their files, and take the time."""
    run, split = study.run, study.folds[0]
    entries = [run.entry(slide) for slide in split.test][: run.settings.evaluation.timed_slides]
    encoder, head = stored_student(run, split), stored_head(run.folder.fold(split.name) / "student")
    return mean_cost(time_answers(run, title, entries, encoder, head, "lr"))


def _write_more(comparison: Comparison, plan: Plan, folder: Path) -> None:
    """Write what a comparison does not have: what each row changed, its figure, and Table 3."""
    from lrmil.evaluation.plots import save_figure
    from lrmil.evaluation.variant_figures import variant_lines, variant_rows

    title, reference = f"{comparison.title}, {plan.heading[0].lower()}{plan.heading[1:]}", comparison.reference
    rows = [{"title": v.title, "folder": v.name, "terms": v.terms, "changes": v.changes} for v in plan.variants]
    write_json(folder / "variants.json", {"reference": reference, "variants": rows, "notes": plan.notes})
    if plan.lines:
        figure = variant_lines(comparison.results, plan.lines, axis=plan.axis, reference=reference, title=title)
    else:
        figure = variant_rows(comparison.results, reference=reference, title=title)
    save_figure(folder / f"figure_{plan.name}.png", figure)
    if plan.name == "ablation":
        _write_table_3(comparison, plan, folder)


def _write_pairs(comparison: Comparison, folder: Path, settings: RunSettings) -> None:
    """Write pairs.csv: the paired difference of every two rows, where differences.csv has the reference alone."""
    said, name, own = comparison.predictions, MAIN[settings.cohort.kind], settings.evaluation
    pairs: list[dict[str, Any]] = []
    for first, second in combinations(said, 2):
        less = paired_bootstrap(said[first], said[second], name, seed=own.seed, resamples=own.bootstrap)
        pairs.append({"method": first, "less": second, "metric": name} | interval_columns("difference", less))
    write_results(folder / "pairs.csv", pd.DataFrame(pairs))


def _write_table_3(comparison: Comparison, plan: Plan, folder: Path) -> None:
    """Write table3.csv, .md, .tex: losses in columns, as the paper prints it, then its metrics without intervals."""
    frame = comparison.results
    names = paper_metrics(frame)
    lines = {row["method"]: row for row in frame.to_dict("records")}
    on = {v.title: [term in v.terms for term in TERMS] for v in plan.variants}
    marks = [f"L_{term}" for term in TERMS]
    table = frame[["dataset", "task", *names]].copy()
    for column, mark in enumerate(marks):
        table.insert(2 + column, mark, [int(on[method][column]) for method in frame["method"]])
    write_results(folder / "table3.csv", table)
    cells = [
        [*("x" if there else "" for there in on[title]), *(metric_text(lines[title][name], name) for name in names)]
        for title in on
    ]
    text = TextTable.of(f"{comparison.title}, losses", [*marks, *(metric(name).title for name in names)], cells)
    write_text(folder / "table3.md", to_markdown(text))
    write_text(folder / "table3.tex", to_latex(text, label="tab:ablation"))


def _summary(comparison: Comparison, plan: Plan, folder: Path) -> list[str]:
    lines = [*terminal_lines(comparison.results_table()), "", *terminal_lines(comparison.differences_table())]
    return [*lines, *plan.notes, f"tables and figures: {folder}"]
