"""Train a head for one fold, or take it from disk; then let it speak about every slide."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from lrmil.bags import Bag, read_bag
from lrmil.files import atomic_path, read_json, write_json, write_tensors
from lrmil.mil import MILHead, create_head
from lrmil.mil.base import Head
from lrmil.mil.readout import Readout
from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.folder import RunFolder
from lrmil.pipeline.keys import outputs_key
from lrmil.pipeline.reporting import without_python_warnings
from lrmil.training.loop import FitResult, OnEpoch
from lrmil.training.stage2 import BagPrediction, SlideBag, TrainedHead, predict_bags

Outputs = dict[str, BagPrediction]
"""what a head says, by slide id"""
_READOUT = "readout.json"
Train = Callable[[Sequence[SlideBag], Sequence[SlideBag], OnEpoch], TrainedHead]


def head_outputs(
    run: Run, step: Path, key: str, bags: Mapping[str, Bag], split: Split, title: str, train: Train
) -> Outputs:
    """Return what the head of `step` says about every slide in `bags`; train it first unless it is there with `key`.

    `train` is given the training and the validation slides of the fold, and no others. Writes head.safetensors,
    head.json and history.json into `step`, then done.json; and outputs.npz, with a key of its own, since test slides
    may come, go or change while the head stays.
    """
    if not run.folder.is_done(step, key):
        run.folder.begin(step)
        _train_and_store(run, step, key, bags, split, title, train)
    wanted = outputs_key(run, key, bags)
    outputs = load_outputs(step, wanted)
    if outputs is None:
        predictions = predict_bags(
            stored_head(step),
            [slide_bag(run, bag, s) for s, bag in bags.items()],
            device=run.device,
            readout=stored_readout(step),
        )
        store_outputs(predictions, step, wanted)
        outputs = {p.slide_id: p for p in predictions}
    return outputs


def slide_bag(run: Run, bag: Bag, slide_id: str) -> SlideBag:
    """Return a bag as the training loop wants it."""
    return SlideBag(slide_id, bag.features, coords=bag.coords_l0, **run.truth(slide_id))


def read_bags(paths: Mapping[str, Path]) -> dict[str, Bag]:
    """Read the feature files of several slides, without the CLS of distilled layers."""
    return {slide_id: read_bag(path, layers=()) for slide_id, path in paths.items()}


def store_head(head: Head, folder: Path, readout: Readout | None = None) -> None:
    """Write head.safetensors and head.json; and readout.json, where the logits do not stand for classes."""
    write_json(folder / "head.json", head.describe())
    if readout is None or readout.meaning == "classification":
        (folder / _READOUT).unlink(missing_ok=True)
    else:
        write_json(folder / _READOUT, readout.model_dump(mode="json"))
    write_tensors(folder / "head.safetensors", head.state_dict())


def stored_head(folder: Path) -> MILHead:
    """Build the head of head.json with the weights of head.safetensors; eval mode, CPU."""
    head = create_head(**read_json(folder / "head.json"))
    head.load_state_dict(load_file(folder / "head.safetensors"))
    return head.eval()


def stored_readout(folder: Path) -> Readout:
    """Return how the logits of a stored head are read."""
    path = folder / _READOUT
    return Readout.model_validate(read_json(path)) if path.is_file() else Readout()


def best_score(fit: FitResult) -> dict[str, float]:
    """Return what the best epoch reached on the validation slides, by the name that done.json gives it."""
    best = fit.best
    classes = best.name == "auc" or "auc" in best.details
    return {"val_auc": best.auc} if classes else {f"val_{best.name}": best.score}


def store_trained(
    folder: RunFolder, step: Path, key: str, trained: TrainedHead, epochs: Sequence[Mapping[str, Any]]
) -> None:
    """Write head.safetensors, head.json, history.json, and last done.json."""
    fit = trained.fit
    store_head(trained.head, step, trained.readout)
    write_json(
        step / "history.json",
        {"epochs": epochs, "best_epoch": fit.best_epoch, "selected_by": fit.selected_by, "notes": fit.notes},
    )
    folder.mark_done(step, key, best_epoch=fit.best_epoch, **best_score(fit), seconds=round(fit.seconds, 2))


def _train_and_store(
    run: Run, step: Path, key: str, bags: Mapping[str, Bag], split: Split, title: str, train: Train
) -> None:
    train_bags, val_bags = ([slide_bag(run, bags[s], s) for s in split.of(part)] for part in ("train", "val"))
    epochs: list[dict[str, Any]] = []
    with run.reporter.task(title, 0) as progress, without_python_warnings():

        def on_epoch(record: dict[str, Any]) -> None:
            epochs.append(record)
            progress.advance(note=f"epoch {record['epoch']}, val loss {record['val_loss']:.3f}")

        trained = train(train_bags, val_bags, on_epoch)
    fit = trained.fit
    for note in fit.notes:
        run.reporter.warn(f"{title}: {note}")
    store_trained(run.folder, step, key, trained, epochs)
    run.reporter.event("head trained", step=str(step), best_epoch=fit.best_epoch, **best_score(fit))


def store_outputs(outputs: Sequence[BagPrediction], step: Path, key: str) -> None:
    """Write outputs.npz into a head's folder."""
    # Not every head gives attention; then all pieces are empty.
    logits = [np.empty(0, np.float32) if o.attention_logits is None else o.attention_logits for o in outputs]
    attention = [np.empty(0, np.float32) if o.attention is None else o.attention for o in outputs]
    arrays = {
        "key": np.array(key),
        "slides": np.array([o.slide_id for o in outputs]),
        "logits": np.stack([o.logits for o in outputs]),
        "probabilities": np.stack([o.probabilities for o in outputs]),
        "lengths": np.array([len(piece) for piece in attention]),
        "attention_logits": np.concatenate(logits),
        "attention": np.concatenate(attention),
    }
    values = [o.value for o in outputs if o.value is not None]
    if values:
        arrays["values"] = np.array(values, dtype=np.float64)
    curves = [o.survival for o in outputs if o.survival is not None]
    if curves:
        arrays["survival"] = np.stack(curves)
    with atomic_path(step / "outputs.npz") as scratch:
        np.savez(scratch, allow_pickle=False, **arrays)


def load_outputs(step: Path, key: str) -> Outputs | None:
    """Read outputs.npz of a head's folder; None if there are none with this key."""
    try:
        with np.load(step / "outputs.npz", allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            arrays = {name: stored[name] for name in stored.files}
            if arrays["probabilities"].size and not np.allclose(arrays["probabilities"].sum(axis=1), 1.0, atol=1e-3):
                return None  # sigmoids, as they once were stored
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    ends = np.cumsum(arrays["lengths"])[:-1]
    pieces = zip(np.split(arrays["attention_logits"], ends), np.split(arrays["attention"], ends), strict=True)
    found: Outputs = {}
    for row, (slide, (logits, attention)) in enumerate(zip(arrays["slides"], pieces, strict=True)):
        found[str(slide)] = BagPrediction(
            slide_id=str(slide),
            logits=arrays["logits"][row],
            probabilities=arrays["probabilities"][row],
            attention_logits=logits if len(logits) else None,
            attention=attention if len(attention) else None,
            value=float(arrays["values"][row]) if "values" in arrays else None,
            survival=arrays["survival"][row] if "survival" in arrays else None,
        )
    return found
