"""Negative controls of stage 2 on simulated or assembled slides: a teacher that learned nothing, losses of weight 0.

Four students on the same 5x features of the same stage-1 encoders, for every fold and seed of the heads:

    labels      labels alone, which is the baseline of the gains
    stage2      the student of the method: labels, and a teacher trained on the same slides
    shuffled    the same, but that teacher was trained on labels shuffled among its training and its validation slides
    zero        the true teacher, and all weights but that of the cross-entropy 0: must equal `labels` bit for bit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from lrmil.bags import Bag
from lrmil.errors import ConfigError
from lrmil.evaluation import Predictions, bootstrap, interval_columns, paired_bootstrap
from lrmil.files import write_json, write_text
from lrmil.pipeline.config import RunSettings, decisive_settings
from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.heads import slide_bag
from lrmil.pipeline.reporting import Reporter, without_python_warnings
from lrmil.pipeline.student import rows_of_children
from lrmil.pipeline.study import Study
from lrmil.settings import Settings, fingerprint
from lrmil.studies.configs import load_config
from lrmil.studies.kept import kept
from lrmil.studies.markdown import bracketed
from lrmil.studies.on_slides import OnSlides, prepared_run
from lrmil.studies.tables import write_table
from lrmil.training.seeds import derive_seed
from lrmil.training.stage2 import (
    SlideBag,
    TrainedHead,
    predict_bags,
    teacher_signal,
    train_student,
    train_teacher,
)

ARMS = {
    "teacher": "20x teacher",
    "labels": "5x after stage 1, labels alone",
    "stage2": "5x after stage 1, stage 2",
    "shuffled": "control: teacher of shuffled labels",
    "zero": "control: all weights 0",
}
_LESS = {"gain": "labels", "than_stage2": "stage2"}
"""Columns of differences, and the arm that is taken away"""
_NO_MATTER = frozenset({"out", "device", "threads", "memory_gb", "deploy", "compare", "evaluation", "targets"})
"""Sections of a run's config that change nothing of what is trained here"""
_METHOD = 1


class SlideControlSettings(OnSlides):
    """Negative controls of stage 2."""

    title: str = Field("Negative controls of stage 2", description="heading of tables")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="of the heads; stage 1 has the run's own seed")
    resamples: int = Field(2000, ge=100, description="of patients, for intervals")


def load_slide_controls(path: Path, overrides: Sequence[str] | None = None) -> SlideControlSettings:
    """Read the config; see `load_config`."""
    return load_config(SlideControlSettings, path, overrides)


@dataclass(frozen=True)
class FoldBags:
    """The bags of one fold, by slide id."""

    split: Split
    lr: Mapping[str, Bag]
    hr: Mapping[str, Bag]


def run_slide_controls(
    settings: SlideControlSettings, reporter: Reporter, *, publish: Path | None = None, train: bool = True
) -> list[Path]:
    """Make the cohort, encode, distil, then train every arm; resumes. `train` and `publish` as in `run_probe`."""
    out, run = settings.folder, prepared_run(settings, reporter)
    reporter.line(f"{settings.title}:")
    done = control_cells(run, settings.made_of, settings.seeds, out / "cells", reporter, train=train)
    if not done:
        raise ConfigError("no cell of this study is finished.", fix="Run it first.")
    folder = out / "report" if publish is None else publish
    told = {"settings": settings.model_dump(mode="json", exclude={"out"}), "cells_done": len(done)}
    summary = folder / f"{out.name}_summary.json"
    written = write_controls(done, folder, out.name, settings.resamples)
    write_json(summary, told)
    return [*written, summary]


def control_cells(
    run: RunSettings,
    made_of: Settings,
    seeds: Sequence[int],
    folder: Path,
    reporter: Reporter,
    *,
    train: bool = True,
) -> list[dict[str, Any]]:
    """Train every arm on every fold with every seed of the heads; resumes. Return the finished cells, see `do_cell`.

    Args:
        run: tiles, features and stage 1 are this run's, with its own seed.
        made_of: what the cohort of the run is made by.
        seeds: of the heads.
        folder: where finished cells are kept.
        reporter: told of progress.
        train: False returns what is finished, and trains nothing.

    Raises:
        ConfigError: the run asks for no classes.
    """
    if run.cohort.kind != "classification":
        raise ConfigError(
            f"controls of stage 2 shuffle labels, but task {run.cohort.task!r} asks for {run.cohort.kind}.",
            fix="Ask for classes, or leave the part controls out.",
        )
    key = controls_key(run, made_of)
    cells = [(seed, fold) for seed in seeds for fold in range(run.folds.num_folds)]
    waiting = [cell for cell in cells if kept(_path(folder, cell), key) is None] if train else []
    reporter.line(f"  {len(cells)} cells of controls, {len(waiting)} to do")
    if waiting:
        study = Study.begin(run, reporter)
        for stage in ("tile", "encode", "distill"):
            study.do(stage)
        for seed, fold in waiting:
            split = study.folds[fold]
            found = do_cell(study.run, FoldBags(split, study.student_bags(split), study.hr_bags), seed)
            write_json(_path(folder, (seed, fold)), found | {"key": key, "seed": seed, "fold": fold})
            reporter.line(f"  seed {seed}, fold {fold} done")
    return [found for found in (kept(_path(folder, cell), key) for cell in cells) if found is not None]


def controls_key(run: RunSettings, made_of: Settings) -> str:
    """Return what a cell depends on beside its seed and fold."""
    decisive = decisive_settings(run, _NO_MATTER)
    # What the table holds follows from `made_of`; where it lies does not matter.
    del decisive["cohort"]["table"]
    return fingerprint(_METHOD, made_of, decisive)


def do_cell(run: Run, fold: FoldBags, seed: int) -> dict[str, Any]:
    """Train every arm of one fold with one seed; return what each says of the test slides."""
    split, s = fold.split, run.settings
    head_seed = derive_seed(seed, "controls", split.name)
    hr_train, hr_val, hr_all = (
        [slide_bag(run, fold.hr[i], i) for i in ids] for ids in (split.train, split.val, split.train + split.val)
    )
    lr_train, lr_val = ([slide_bag(run, fold.lr[i], i) for i in ids] for ids in (split.train, split.val))
    rng = np.random.default_rng(derive_seed(seed, "shuffled labels", split.name))
    common: dict[str, Any] = {"objective": run.objective, "seed": head_seed, "device": run.device}

    def student(teacher: TrainedHead, **lambdas: float) -> TrainedHead:
        told = predict_bags(teacher.head, hr_all, device=run.device, readout=teacher.readout)
        signals = {
            p.slide_id: teacher_signal(p, rows_of_children(fold.lr[p.slide_id], fold.hr[p.slide_id])) for p in told
        }
        own = s.student.model_copy(update={"loss": s.student.loss.model_copy(update=lambdas)})
        return train_student(lr_train, lr_val, signals, own, **common)

    with without_python_warnings():
        teacher = train_teacher(hr_train, hr_val, s.teacher, **common)
        fooled = train_teacher(shuffled_labels(hr_train, rng), shuffled_labels(hr_val, rng), s.teacher, **common)
        heads = {
            "teacher": teacher,
            "labels": train_teacher(lr_train, lr_val, s.student, **common),
            "stage2": student(teacher),
            "shuffled": student(fooled),
            "zero": student(teacher, lambda_bag=0.0, lambda_soft=0.0, lambda_hard=0.0),
        }
    answers = {}
    for arm, trained in heads.items():
        bags = fold.hr if arm == "teacher" else fold.lr
        asked = [slide_bag(run, bags[i], i) for i in split.test]
        said = predict_bags(trained.head, asked, device=run.device, readout=trained.readout)
        answers[arm] = [p.probabilities.tolist() for p in said]
    return {
        "slides": list(split.test),
        "patients": [run.cohort.patient_of(i) for i in split.test],
        "labels": [run.cohort.label_of(i) for i in split.test],
        "classes": list(run.cohort.classes),
        "answers": answers,
        "zero_equals_labels": same_weights(heads["zero"], heads["labels"]),
    }


def shuffled_labels(bags: Sequence[SlideBag], rng: np.random.Generator) -> list[SlideBag]:
    """Deal the labels of slides anew; each part keeps its number of each."""
    order = rng.permutation(len(bags))
    return [replace(bag, label=bags[i].label) for bag, i in zip(bags, order, strict=True)]


def same_weights(first: TrainedHead, second: TrainedHead) -> bool:
    """Whether two heads are equal bit for bit, in the weights that both have."""
    one, other = first.head.state_dict(), second.head.state_dict()
    shared = one.keys() & other.keys()
    return bool(shared) and all(one[name].equal(other[name]) for name in shared)


def write_controls(done: Sequence[Mapping[str, Any]], folder: Path, name: str, resamples: int) -> list[Path]:
    """Write results.csv, cells.csv and table.md of the finished cells; intervals resample patients."""
    found = {arm: _predictions(done, arm) for arm in ARMS}
    rows = []
    for arm, predictions in found.items():
        row: dict[str, Any] = {"arm": arm}
        row |= interval_columns("auc", bootstrap(predictions, "auc", seed=0, resamples=resamples))
        for column, other in _LESS.items():
            less = None
            if arm != other:
                less = paired_bootstrap(predictions, found[other], "auc", seed=0, resamples=resamples)
            row |= interval_columns(column, less)
        rows.append(row)
    results = pd.DataFrame(rows)
    equal = sum(bool(cell["zero_equals_labels"]) for cell in done)
    cells = pd.DataFrame(
        {"seed": cell["seed"], "fold": cell["fold"], "zero_equals_labels": cell["zero_equals_labels"]} for cell in done
    )
    lines = ["| | AUC | more than labels alone | more than stage 2 |", "|---|---:|---:|---:|"]
    for told in results.to_dict("records"):
        more = [bracketed(told, c, "+.1f", scale=100) if np.isfinite(told[c]) else "" for c in _LESS]
        lines.append(f"| {ARMS[told['arm']]} | {bracketed(told, 'auc', '.1f', scale=100)} | {' | '.join(more)} |")
    lines.append(
        f"\nWith all weights 0, {equal} of {len(done)} heads equal the one trained on labels alone, bit for bit."
    )
    paths = [folder / f"{name}_{part}" for part in ("results.csv", "cells.csv", "table.md")]
    for path, frame in zip(paths[:2], (results, cells), strict=True):
        write_table(path, frame)
    write_text(paths[2], "\n".join(lines) + "\n")
    return paths


def _predictions(done: Sequence[Mapping[str, Any]], arm: str) -> Predictions:
    columns: dict[str, list[Any]] = {n: [v for c in done for v in c[n]] for n in ("slides", "patients", "labels")}
    counts = [len(cell["slides"]) for cell in done]
    return Predictions.of(
        slide_ids=columns["slides"],
        patient_ids=columns["patients"],
        labels=columns["labels"],
        probabilities=np.array([p for cell in done for p in cell["answers"][arm]], np.float64),
        class_names=done[0]["classes"],
        folds=np.repeat([cell["fold"] for cell in done], counts),
        seeds=np.repeat([cell["seed"] for cell in done], counts),
    )


def _path(folder: Path, cell: tuple[int, int]) -> Path:
    return folder / f"seed{cell[0]}_fold{cell[1]}.json"
