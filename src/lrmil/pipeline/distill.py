"""Stage "distill" (1): for each fold, a fresh student encoder learns from that fold's training patients alone.

What is on disk is the encoder as training leaves it. Where the config wants its spread restored, that is done whenever
it is read, by moments measured once: with and without are two views of one training, each with features of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrmil.bags import bag_is_current, write_bag
from lrmil.distill import resolve_layers
from lrmil.encoders import Encoder, load_encoder, save_encoder
from lrmil.errors import ConfigError
from lrmil.files import read_json, write_json
from lrmil.geometry import MatchedGrid
from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.encode import features_name, region_bag
from lrmil.pipeline.heads import Outputs
from lrmil.pipeline.keys import bag_provenance, features_of, stage1_key, stage1_slides
from lrmil.pipeline.pixels import RegionPixels
from lrmil.pipeline.regions import CachedTargets, CohortRegions, LiveTargets, TargetSource
from lrmil.pipeline.reporting import without_python_warnings
from lrmil.training.alignment import TeacherShape
from lrmil.training.loop import FitResult
from lrmil.training.seeds import derive_seed
from lrmil.training.spread import Spread, embedding_spread, restore_spread
from lrmil.training.stage1 import distil_encoder

SPREAD_SAMPLE = 512
"""training regions on which it is measured how much the embedding varies"""

_SPREADS = "spreads.json"
_FEATURES = {False: "features", True: "features_restored"}  # by whether the spread is restored


def distil_fold(
    run: Run,
    split: Split,
    grids: Mapping[str, MatchedGrid],
    pixels: RegionPixels,
    teacher: Encoder,
    teacher_outputs: Outputs | None = None,
) -> None:
    """Train the student encoder of one fold, unless it is there; then encode every slide's regions with it.

    It begins as the teacher, or as `stage1.student` says. Maps between their widths are not kept.

    It is kept on disk alone, see `stored_student`: several large encoders at once would not fit a GPU.
    `teacher_outputs` are the HR head's, needed only with `lambda_attention_feature`; they are then of this fold too.
    """
    step = _stage1(run, split)
    key = stage1_key(run, split, teacher)
    if not run.folder.is_done(step, key):
        run.folder.begin(step)
        # What was made of an older student must not outlive it.
        for kept in _FEATURES.values():
            shutil.rmtree(_home(run, split) / kept, ignore_errors=True)
        (step / _SPREADS).unlink(missing_ok=True)
        # A new encoder for every fold: one that goes on from another fold has seen this fold's test patients.
        student = run.build_student()
        fit = _train(run, split, grids, pixels, teacher, student, teacher_outputs)
        save_encoder(student, step)
        before, after = _measured_spreads(run, split, pixels)
        share = after.share_of(before)
        run.reporter.line(f"  {split.title}: between regions its embedding varies {share:.2f} x as much as before")
        write_json(
            step / "history.json",
            {
                "epochs": fit.history,
                "best_epoch": fit.best_epoch,
                "time": fit.time_shares(),
                "notes": fit.notes,
                "spread": round(share, 4),
            },
        )
        run.folder.mark_done(
            step, key, best_epoch=fit.best_epoch, val_loss=fit.best.loss, seconds=round(fit.seconds, 1)
        )
    if run.settings.stage1.restore_spread:
        _measured_spreads(run, split, pixels)
    _encode_fold(run, split, grids, pixels, stored_student(run, split).to(run.device))


def stored_student(run: Run, split: Split) -> Encoder:
    """Return the student encoder that `distil_fold` left for a fold, its spread restored if so wanted; eval mode, CPU.

    Raises:
        ConfigError: the spread is to be restored, and `distil_fold` has not been told so yet.
    """
    student = load_encoder(_stage1(run, split))
    if run.settings.stage1.restore_spread:
        path = _stage1(run, split) / _SPREADS
        if not path.is_file():
            raise ConfigError(
                f"{split.title}: the spread of the student encoder's embedding is not restored yet.",
                fix="Run `lrmil run` first; stage 1 is not trained again for it.",
            )
        spreads = read_json(path)
        restore_spread(student, Spread.of(spreads["after"]), Spread.of(spreads["before"]))
    return student


def distilled_layers(run: Run, encoder: Encoder) -> tuple[int, ...]:
    """Return the blocks whose CLS the teacher has to give."""
    return resolve_layers(run.settings.stage1.loss.layers, encoder.depth)


def fold_bag(run: Run, split: Split, slide_id: str) -> Path:
    """Return where the features of a fold's student encoder lie."""
    return features_folder(run, split) / f"{slide_id}.h5"


def features_folder(run: Run, split: Split) -> Path:
    """Return the folder of these features. Runs that share it have the same student encoder in this fold."""
    return _home(run, split) / _FEATURES[run.settings.stage1.restore_spread]


def _stage1(run: Run, split: Split) -> Path:
    return _home(run, split) / "stage1"


def _home(run: Run, split: Split) -> Path:
    return (run.stage1_folder or run.folder).fold(split.name)


def _measured_spreads(run: Run, split: Split, pixels: RegionPixels) -> tuple[Spread, Spread]:
    """Return the moments of the embedding before and after stage 1, measured once and kept beside the encoder."""
    path = _stage1(run, split) / _SPREADS
    if not path.is_file():
        sample, precision = _sample(run, split, pixels), run.settings.encoder.precision
        # One at a time: several large encoders would not fit a GPU.
        made = {"before": run.build_student, "after": lambda: load_encoder(_stage1(run, split))}
        found = {name: embedding_spread(make().to(run.device), sample, precision) for name, make in made.items()}
        write_json(path, {name: spread.as_lists() for name, spread in found.items()})
    spreads = read_json(path)
    return Spread.of(spreads["before"]), Spread.of(spreads["after"])


def _sample(run: Run, split: Split, pixels: RegionPixels) -> list[npt.NDArray[np.uint8]]:
    """Return regions of the fold's training slides, about `SPREAD_SAMPLE` of them, evenly from each."""
    slides = stage1_slides(run, split, "train")
    each = max(1, SPREAD_SAMPLE // max(1, len(slides)))
    found = [pixels[slide].images for slide in slides]
    return [
        images[np.unique(np.linspace(0, len(images) - 1, min(each, len(images))).astype(np.int64))]
        for images in found
        if len(images)
    ]


def _train(
    run: Run,
    split: Split,
    grids: Mapping[str, MatchedGrid],
    pixels: RegionPixels,
    teacher: Encoder,
    student: Encoder,
    teacher_outputs: Outputs | None,
) -> FitResult:
    """Train `student` on the fold's training slides; its validation slides choose the epoch."""
    train, val = (
        CohortRegions(
            [(pixels[s], _targets(run, s, grids, teacher, teacher_outputs)) for s in stage1_slides(run, split, part)],
            part,
            foreign_seed=_foreign_seed(run, split, part),
        )
        for part in ("train", "val")
    )
    settings = run.settings.stage1
    title = f"stage 1, {split.title}"
    with run.reporter.task(title, settings.epochs * len(train)) as progress, without_python_warnings():
        done = 0

        def on_step(so_far: int, of: int) -> None:
            nonlocal done
            progress.advance(so_far - done)
            done = 0 if so_far == of else so_far

        def on_epoch(record: dict[str, Any]) -> None:
            run.reporter.event("stage1 epoch", fold=split.name, **record)
            progress.advance(0, note=f"epoch {record['epoch']}, val loss {record['val_loss']:.4f}")

        fit = distil_encoder(
            student,
            train,
            val,
            settings,
            ratio=run.settings.grid.ratio,
            seed=derive_seed(run.settings.seed, split.name, "stage1"),
            teacher=None if settings.student is None else TeacherShape.of(teacher),
            device=run.device,
            on_epoch=on_epoch,
            on_step=on_step,
        )
    for note in fit.notes:
        run.reporter.warn(f"{title}: {note}")
    run.reporter.line(
        f"  {split.title}: {len(train)} regions, val loss {fit.history[0]['val_loss']:.4f} after epoch 1, "
        f"{fit.best.loss:.4f} after epoch {fit.best_epoch}"
    )
    return fit


def _foreign_seed(run: Run, split: Split, part: str) -> int | None:
    """Return the seed by which children of other slides are drawn, for the negative control."""
    own = run.settings.stage1.children == "own"
    return None if own else derive_seed(run.settings.seed, split.name, "foreign children", part)


def _targets(
    run: Run,
    slide_id: str,
    grids: Mapping[str, MatchedGrid],
    teacher: Encoder,
    outputs: Outputs | None,
) -> TargetSource:
    s = run.settings
    layers = distilled_layers(run, teacher)
    attention = None if outputs is None else outputs[slide_id].attention
    path = run.folder.bag(features_name(teacher, s.grid.hr_mpp, s.encoder.random_seed), slide_id)
    if s.targets == "cached":
        return CachedTargets(path, layers, attention)
    return LiveTargets(
        path,
        layers,
        attention,
        entry=run.entry(slide_id),
        grid=grids[slide_id],
        teacher=teacher,
        settings=s.encoder,
    )


def _encode_fold(
    run: Run, split: Split, grids: Mapping[str, MatchedGrid], pixels: RegionPixels, student: Encoder
) -> None:
    features = features_of(run, student)
    entries = [e for e in run.entries() if e.slide_id in grids]
    with run.reporter.task(f"5x features, {split.title}", len(entries)) as progress:
        for entry in entries:
            grid = grids[entry.slide_id]
            path = fold_bag(run, split, entry.slide_id)
            provenance = bag_provenance(run, entry, features, grid.scale.lr_mpp)
            if not bag_is_current(path, provenance):
                write_bag(path, region_bag(run, entry, grid, student, pixels, provenance))
            progress.advance(note=entry.slide_id)
