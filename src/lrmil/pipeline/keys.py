"""What each part of a run depends on, in one place. A part whose stored key differs from its key here is made again.

    tiles      <- slide file, mpp; grid, tissue, tiles
    features   <- tiles; encoder, precision                              (kept inside the feature file)
    stage 1    <- tiles of the fold's training and validation slides, of all tasks; 20x features; stage1
                  with lambda_attention_feature also <- the fold's teacher head
    a head     <- tiles and labels of those slides; its encoder; its settings
    student    <- the same; the student encoder; the teacher head; student
    outputs    <- the head; tiles of every slide it speaks about
    results    <- all settings, slides and labels

Test slides and their labels stand in no key of a trained part: what does not change a key cannot change the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from lrmil.encoders import Encoder
from lrmil.errors import NotASlide
from lrmil.pipeline.config import decisive_settings
from lrmil.pipeline.context import Run, SlideEntry, Split
from lrmil.settings import fingerprint
from lrmil.training.stage2 import TeacherSettings

_LEARNED = ("train", "val")


def tile_key(run: Run, entry: SlideEntry) -> str:
    """Return what the tiling of a slide, and its pixels at the working scale, depend on."""
    s = run.settings
    return fingerprint(entry.identity, s.grid, s.tissue, s.tiles)


def features_of(run: Run, encoder: Encoder) -> dict[str, Any]:
    """Return what features depend on beside the slide, the weights of the encoder among it."""
    return {"encoder": encoder.describe(), "precision": run.settings.encoder.precision}


def bag_provenance(run: Run, entry: SlideEntry, features: dict[str, Any], mpp: float) -> dict[str, Any]:
    """Return what a feature file must say about itself; `features` is of `features_of`, `mpp` the working one."""
    return {"tiles": tile_key(run, entry), "mpp": mpp, **features}


def stage1_key(run: Run, split: Split, teacher_encoder: Encoder) -> str:
    """Return what a fold's student encoder depends on, as training leaves it: restoring its spread changes nothing.

    `targets` is left out: both kinds agree up to float16.
    """
    s = run.settings
    stage1 = s.stage1.model_dump(mode="json", exclude={"student"}) | {"restore_spread": False}
    parts: list[Any] = [features_of(run, teacher_encoder), s.encoder.student_embedding, stage1, s.seed, split.name]
    if s.stage1.student is not None:
        # What it begins as says more than its name, and does not change when a weight file is moved.
        parts += [run.own_student, s.stage1.student.layer_pairs]
    if s.stage1.loss.lambda_attention_feature:
        parts.append(label_head_key(run, split, teacher_encoder, "teacher"))
    pictures = {part: {s: tile_key(run, run.entry(s)) for s in stage1_slides(run, split, part)} for part in _LEARNED}
    return fingerprint(*parts, pictures)


def stage1_slides(run: Run, split: Split, part: str) -> tuple[str, ...]:
    """Return the slides of "train" or "val" that stage 1 sees: it needs no labels, so those of all tasks.

    With `lambda_attention_feature` it needs what this task's teacher says, and sees this task's.
    """
    if run.settings.stage1.loss.lambda_attention_feature:
        return split.of(part)
    return split.pictured.get(part, split.of(part))


def label_head_key(run: Run, split: Split, encoder: Encoder, name: str) -> str:
    """Return what a head trained on labels alone depends on: the teacher, or the head of a baseline."""
    return head_key(run, split, features_of(run, encoder), name, label_head_settings(run, name))


def head_key(run: Run, split: Split, features: dict[str, Any], name: str, settings: TeacherSettings) -> str:
    """Return what a head trained on labels alone depends on; `features` is of `features_of`."""
    seed = run.settings.seed
    return fingerprint(name, features, settings, seed, split.name, _learned_from(run, split), _labels(run, split))


def label_head_settings(run: Run, name: str) -> TeacherSettings:
    """Return how a head is trained on labels alone: the teacher's way, and for 5x heads the student's but its loss.

    The 5x baselines then differ from LRMIL in what they were taught, and in nothing else.
    """
    if name == "teacher":
        return run.settings.teacher
    return TeacherSettings.model_validate(run.settings.student.model_dump(exclude={"loss"}))


def student_key(run: Run, split: Split, student_encoder: Encoder, teacher_encoder: Encoder) -> str:
    """Return what a fold's student head depends on."""
    teacher = label_head_key(run, split, teacher_encoder, "teacher")
    return fingerprint(teacher, features_of(run, student_encoder), run.settings.student)


def outputs_key(run: Run, head_key: str, slides: Collection[str]) -> str:
    """Return what a head's outputs for `slides` depend on."""
    return fingerprint(head_key, {slide: tile_key(run, run.entry(slide)) for slide in slides})


def results_key(run: Run) -> str:
    """Return what tables, report and model depend on, as far as it is known before anything is made."""
    s = run.settings
    settings = decisive_settings(s, {"out", "device", "threads", "memory_gb", "deploy", "targets", "compare"})
    table = run.cohort.labelled()
    truths = table[s.cohort.task] if run.kind == "classification" else _targets(run, table["slide_id"]).values()
    slides = zip(table["slide_id"], table["patient_id"], truths, strict=True)
    files = {entry.slide_id: _known_identity(entry) for entry in run.all_entries()}
    return fingerprint(settings, [[str(value) for value in row] for row in slides], files)


def _known_identity(entry: SlideEntry) -> dict[str, object] | None:
    try:
        return entry.identity
    except NotASlide:
        return None


def _learned_from(run: Run, split: Split) -> dict[str, dict[str, str]]:
    return {part: {slide: tile_key(run, run.entry(slide)) for slide in split.of(part)} for part in _LEARNED}


def _targets(run: Run, slides: Iterable[str]) -> dict[str, Any]:
    return {slide: np.asarray(run.cohort.target_of(slide)).tolist() for slide in slides}


def _labels(run: Run, split: Split) -> dict[str, Any]:
    cohort = run.cohort
    if run.kind != "classification":
        learned = (*split.train, *split.val)
        return {"kind": run.kind, "objective": run.settings.objective.model_dump(), "targets": _targets(run, learned)}
    return {
        "task": run.settings.cohort.task,
        "classes": cohort.classes,
        "labels": {slide: cohort.label_of(slide) for slide in (*split.train, *split.val)},
    }
