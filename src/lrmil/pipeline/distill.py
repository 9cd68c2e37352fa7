"""Stage "distill" (1): for each fold, a fresh student encoder learns from that fold's training patients alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrmil.bags import bag_is_current, write_bag
from lrmil.distill import resolve_layers
from lrmil.encoders import Encoder, load_encoder, save_encoder
from lrmil.files import write_json
from lrmil.geometry import MatchedGrid
from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.encode import bag_provenance, features_name, region_bag
from lrmil.pipeline.heads import Outputs
from lrmil.pipeline.pixels import RegionPixels
from lrmil.pipeline.regions import CachedTargets, CohortRegions, LiveTargets, TargetSource
from lrmil.pipeline.tile import learned_from
from lrmil.settings import fingerprint
from lrmil.training.seeds import derive_seed
from lrmil.training.stage1 import distil_encoder


def distil_fold(
    run: Run,
    split: Split,
    grids: Mapping[str, MatchedGrid],
    pixels: RegionPixels,
    teacher: Encoder,
    teacher_outputs: Outputs | None = None,
) -> Encoder:
    """Train the student encoder of one fold, or load it; then encode every slide's regions with it.

    `teacher_outputs` are the HR head's, needed only with `lambda_attention_feature`; they are then of this fold too.
    """
    step = run.folder.fold(split.name) / "stage1"
    key = stage1_key(run, split, teacher)
    if not run.folder.is_done(step, key):
        # A new encoder for every fold: one that goes on from another fold has seen this fold's test patients.
        student = run.build_encoder(student=True)
        sets = {
            name: CohortRegions(
                [(pixels[s], _targets(run, s, grids, teacher, teacher_outputs)) for s in split.of(name) if s in grids],
                name,
            )
            for name in ("train", "val")
        }
        settings = run.settings.stage1
        total = settings.epochs * len(sets["train"])
        with run.reporter.task(f"stage 1, {split.title}", total) as progress:
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
                sets["train"],
                sets["val"],
                settings,
                ratio=run.settings.grid.ratio,
                seed=derive_seed(run.settings.seed, split.name, "stage1"),
                device=run.device,
                on_epoch=on_epoch,
                on_step=on_step,
            )
        # Features of an older student must not outlive it.
        shutil.rmtree(run.folder.fold(split.name) / "features", ignore_errors=True)
        save_encoder(student, step)
        write_json(
            step / "history.json",
            {"epochs": fit.history, "best_epoch": fit.best_epoch, "time": fit.time_shares(), "notes": fit.notes},
        )
        run.folder.mark_done(
            step, key, best_epoch=fit.best_epoch, val_loss=fit.best.loss, seconds=round(fit.seconds, 1)
        )
        run.reporter.line(
            f"  {split.title}: {len(sets['train'])} regions, val loss {fit.history[0]['val_loss']:.4f} after epoch 1, "
            f"{fit.best.loss:.4f} after epoch {fit.best_epoch}"
        )
    student = load_encoder(step).to(run.device)
    _encode_fold(run, split, grids, pixels, student)
    return student


def stage1_key(run: Run, split: Split, teacher: Encoder) -> str:
    """Return what a fold's student encoder depends on."""
    s = run.settings
    encoder = (teacher.describe(), s.encoder.student_embedding)
    return fingerprint(*encoder, s.grid, s.stage1, s.seed, split.name, learned_from(run, split))


def distilled_layers(run: Run, encoder: Encoder) -> tuple[int, ...]:
    """Return the blocks whose CLS the teacher has to give."""
    return resolve_layers(run.settings.stage1.loss.layers, encoder.depth)


def _targets(
    run: Run,
    slide_id: str,
    grids: Mapping[str, MatchedGrid],
    teacher: Encoder,
    outputs: Outputs | None,
) -> TargetSource:
    layers = distilled_layers(run, teacher)
    attention = None if outputs is None else outputs[slide_id].attention
    if run.settings.targets == "on_the_fly":
        entry = next(e for e in run.entries() if e.slide_id == slide_id)
        return LiveTargets(entry, grids[slide_id], teacher, layers)
    name = features_name(teacher, run.settings.grid.hr_mpp, run.settings.encoder.random_seed)
    return CachedTargets(run.folder.bag(name, slide_id), layers, attention)


def _encode_fold(
    run: Run, split: Split, grids: Mapping[str, MatchedGrid], pixels: RegionPixels, student: Encoder
) -> None:
    entries = [e for e in run.entries() if e.slide_id in grids]
    described = student.describe()
    with run.reporter.task(f"5x features, {split.title}", len(entries)) as progress:
        for entry in entries:
            grid = grids[entry.slide_id]
            path = fold_bag(run, split, entry.slide_id)
            provenance = bag_provenance(run, entry, described, grid.scale.lr_mpp, ())
            if not bag_is_current(path, provenance):
                write_bag(path, region_bag(run, entry, grid, student, pixels, provenance))
            progress.advance(note=entry.slide_id)


def fold_bag(run: Run, split: Split, slide_id: str) -> Path:
    """Return where the features of a fold's student encoder lie."""
    return run.folder.fold(split.name) / "features" / f"{slide_id}.h5"
