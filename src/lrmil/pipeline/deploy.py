"""The deployed model: trained like a fold, on everything but the patients who choose the epoch; written as a bundle."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from lrmil.bags import software_versions
from lrmil.encoders import Encoder, EncoderCard
from lrmil.geometry import MatchedGrid
from lrmil.inference.bundle import MANIFEST_FILE, BundleManifest, HeadSpec, TrainedOn, save_bundle
from lrmil.pipeline.config import decisive_settings
from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.evaluate import LR_ONLY, LRMIL, TEACHER, Scores, median_of_patients
from lrmil.pipeline.heads import Outputs, stored_head, stored_readout
from lrmil.pipeline.keys import results_key
from lrmil.settings import fingerprint
from lrmil.tasks import TaskKind


def write_model(
    run: Run,
    split: Split,
    grids: Mapping[str, MatchedGrid],
    teacher: Encoder,
    student: Encoder,
    scores: Scores,
    answers: Outputs,
) -> None:
    """Write model/ from the parts trained for the final split, unless it is there already.

    `answers` are what its head says about the slides.
    """
    s = run.settings
    head_step = run.folder.fold(split.name) / "student"
    head = stored_head(head_step)
    described = head.describe()
    spec = HeadSpec(
        name=described.pop("name"),
        in_dim=described.pop("in_dim"),
        num_classes=described.pop("num_classes"),
        options=described,
    )
    learned = [*split.train, *split.val]
    classes = run.cohort.classes
    counts = Counter(classes[run.cohort.label_of(slide)] for slide in learned) if classes else Counter[str]()
    readout = None if run.kind == "classification" else stored_readout(head_step)
    regions = np.percentile([grids[slide].num_regions for slide in learned], [5, 50, 95])
    manifest = BundleManifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=s.cohort.task,
        classes=list(classes),
        readout=readout,
        median_risk=_median_risk(run, split, answers),
        grid=s.grid,
        tissue=s.tissue,
        tiles=s.tiles,
        head=spec,
        encoder_origin=teacher.describe(),
        licence_note=licence_note(teacher, _began_as(run)),
        trained_on=TrainedOn(
            cohort=run.cohort.name,
            slides=len(learned),
            patients=len({run.cohort.patient_of(slide) for slide in learned}),
            slides_per_class=dict(counts),
            regions_per_slide=(float(regions[0]), float(regions[1]), float(regions[2])),
        ),
        cross_validation=_metrics(scores),
        recipe=recipe(run, teacher),
        software=software_versions(),
    )
    step = run.folder.fold(split.name)
    # The head's own key stands for its weights and for those of the encoder below it.
    content = manifest.model_dump(mode="json", exclude={"created", "software", *manifest.unused})
    key = fingerprint(content, run.folder.done_facts(head_step)["key"])
    if run.folder.is_done(step, key) and (run.folder.model / MANIFEST_FILE).is_file():
        return
    run.folder.begin(step)
    save_bundle(run.folder.model, manifest, student, head)
    run.folder.mark_done(step, key, made_from=results_key(run))


def recipe(run: Run, encoder: Encoder) -> dict[str, Any]:
    """Return the config as far as it made the model: without paths, and without what only this machine cares about."""
    config = decisive_settings(run.settings, {"cohort", "out", "device", "threads", "memory_gb", "deploy"})
    del config["encoder"]["weights"]
    config["encoder"]["name"] = encoder.card.name
    if run.own_student is not None:
        del config["stage1"]["student"]["weights"]
        config["stage1"]["student"]["name"] = run.own_student["name"]
    return config


def licence_note(encoder: Encoder, began_as: EncoderCard | None = None) -> str:
    """Say what may be done with a model that was distilled from `encoder`, and began as the weights of another card."""
    notes = [f"distilled from {_terms(encoder.card)}"]
    if began_as is not None:
        notes.append(f"its encoder began as {_terms(began_as)}")
    return " ".join(notes)


def _terms(card: EncoderCard) -> str:
    terms = {
        True: "a model distilled from it may be passed on, with credit.",
        False: "its terms forbid passing on models derived from it, this one included.",
        None: "read its licence before passing this model on: an encoder distilled from it is a derivative.",
    }[card.share_derivatives]
    return f"{card.title} ({card.licence}); {terms}"


def _began_as(run: Run) -> EncoderCard | None:
    """Return the card of the trained weights, other than the teacher's, that the student encoder began as."""
    own = run.settings.stage1.student
    return None if own is None or own.random_seed is not None else run.build_student().card


def _median_risk(run: Run, split: Split, answers: Outputs) -> float | None:
    if run.kind != "survival":
        return None
    return median_of_patients(run, {slide: answers[slide].value for slide in split.train})


_TOLD: dict[TaskKind, dict[str, str]] = {
    "classification": {"auc": "AUC", "acc": "accuracy"},
    "regression": {"r2": "R2", "mae": "mean absolute error", "spearman": "Spearman correlation"},
    "survival": {"c_index": "C-index"},
}
"""metrics of the model card"""


def _metrics(scores: Scores) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in scores.results.to_dict("records"):
        if row["method"] in (LRMIL, TEACHER, LR_ONLY):
            for name, title in _TOLD[scores.kind].items():
                value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
                text = f"{value:.3f}" if math.isfinite(value) else "undefined"
                interval = f"95 % interval {low:.3f} to {high:.3f}, " if math.isfinite(low) else ""
                found[f"{row['method']}, {title}"] = (
                    f"{text} ({interval}{row['folds']} folds, {row['patients']} patients)"
                )
    return found
