"""One study of region probes: fields, folds, teacher, and the cells (arm x fold x seed), each done once.

Arms. `reference`: the teacher on the 16 children of a region (hr), the same network on the region at low resolution
without distillation (lr), with random weights (random), and statistics of colours (colour). Each recipe: the student
after stage 1 (its name). `ceiling`: the student's start fine-tuned on the truth.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrmil.distill import resolve_layers
from lrmil.encoders import Encoder, create_encoder, embed
from lrmil.errors import ConfigError
from lrmil.files import remove_leftovers, write_json
from lrmil.pipeline.reporting import Reporter, without_python_warnings
from lrmil.settings import fingerprint
from lrmil.studies.arms import CEILING, REFERENCE
from lrmil.studies.ceiling import ceiling_answers, train_ceiling
from lrmil.studies.fields import Field, FloatArray, load_fields
from lrmil.studies.kept import kept
from lrmil.studies.matches import MatchedViews, slot_retrieval, student_blocks
from lrmil.studies.ridge import ridge_probe
from lrmil.studies.settings import EMBEDDINGS, CeilingSettings, ProbeSettings, Stage1Recipe
from lrmil.studies.taught import TaughtViews, Teacher, join
from lrmil.studies.views import probe_views, training_views
from lrmil.training.folds import Splits, make_folds
from lrmil.training.loop import FitResult
from lrmil.training.seeds import derive_seed
from lrmil.training.stage1 import Stage1Settings, distil_encoder

_METHOD = 4
"""Raised whenever the same settings give other numbers than before; finished cells are then done anew."""
Features = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Cell:
    """One arm in one fold with one seed."""

    arm: str
    fold: int
    seed: int
    recipe: Stage1Recipe | None = None

    @property
    def path(self) -> str:
        """Of its file, within the cells."""
        return f"{self.arm}/seed{self.seed}_fold{self.fold}.json"


@dataclass(frozen=True)
class Seen:
    """What one encoder sees in the practice views and in the probe views, by embedding; (n, E) each."""

    practice: Mapping[str, Features]
    probe: Mapping[str, Features]


@dataclass
class ProbeStudy:
    """A study with all that its cells share."""

    settings: ProbeSettings
    reporter: Reporter
    folder: Path
    fields: list[Field]
    encoder: Encoder
    teacher: Teacher
    splits: dict[int, Splits]
    """by seed"""
    key: str

    @classmethod
    def begin(cls, settings: ProbeSettings, reporter: Reporter) -> ProbeStudy:
        """Read the fields, build the encoder, make the folds."""
        if settings.out is None:
            raise ConfigError("the study has no output folder.", fix="Set out.")
        folder = Path(settings.out)
        remove_leftovers(folder)
        encoder = build_encoder(settings)
        fields = load_fields(settings.fields, folder, settings.patch_px * settings.ratio)
        layers = {
            layer
            for recipe in settings.recipes
            for layer in resolve_layers(recipe.loss(encoder.depth).layers, encoder.depth)
        }
        layers.add(encoder.depth - 1)
        teacher = Teacher(encoder, settings, sorted(layers), folder / "teacher")
        splits = {seed: make_splits(fields, settings, seed) for seed in settings.seeds}
        # The number of folds says who is tested in fold k, and how many training views a field has.
        regions = ("patch_px", "ratio", "targets", "min_nuclei", "num_folds")
        names = (*regions, "train_views", "val_views", "views_seed", "random_seed")
        shared = {name: getattr(settings, name) for name in names}
        digests = [field.digest() for field in fields]
        key = fingerprint(_METHOD, shared, settings.precision, encoder.describe(), digests)
        return cls(settings, reporter, folder, fields, encoder, teacher, splits, key)

    def cells(self) -> Iterator[Cell]:
        """All cells, in the order in which they are done: one recipe in all folds, then more recipes, seeds."""
        s = self.settings
        yield from (Cell(REFERENCE, fold, seed) for seed in s.seeds for fold in range(s.num_folds))
        for number, recipe in enumerate(s.recipes):
            yield from (Cell(recipe.name, fold, seed, recipe) for seed, fold in self._runs(recipe))
            if number == 0 and s.ceiling is not None:
                yield from (Cell(CEILING, fold, seed) for seed, fold in self._runs(s.ceiling))

    def _runs(self, arm: Stage1Recipe | CeilingSettings) -> list[tuple[int, int]]:
        """(seed, fold) in which an arm is trained."""
        s = self.settings
        return [(seed, fold) for seed in s.seeds[: arm.seeds] for fold in range(s.num_folds)[: arm.folds]]

    def stored(self, cell: Cell) -> dict[str, Any] | None:
        """Return what a finished cell found, None where it is not done with these settings."""
        return kept(self.folder / "cells" / cell.path, self._key(cell))

    def do(self, cell: Cell) -> dict[str, Any]:
        """Do one cell and write it down."""
        began = time.monotonic()
        if cell.arm == REFERENCE:
            found = self._reference(cell)
        elif cell.recipe is None:
            found = self._ceiling(cell)
        else:
            found = self._recipe(cell, cell.recipe)
        found |= {"key": self._key(cell), "arm": cell.arm, "fold": cell.fold, "seed": cell.seed}
        found["views"] = self._rows(self.probe, cell, "test").tolist()
        found["seconds"] = round(time.monotonic() - began, 1)
        write_json(self.folder / "cells" / cell.path, found)
        return found

    @cached_property
    def probe(self) -> TaughtViews:
        """The probe views of all fields."""
        side_px = self.settings.patch_px * self.settings.ratio
        parts = []
        with self.reporter.task("Encoding the children of probe regions", len(self.fields)) as task:
            for number, own in enumerate(self.fields):
                parts.append(self.teacher.views(number, own, probe_views(own, side_px), "probe"))
                task.advance()
        return join(parts)

    @cached_property
    def groups(self) -> npt.NDArray[np.str_]:
        """Group of each probe view."""
        return self._groups(self.probe)

    @cached_property
    def practice(self) -> TaughtViews:
        """The training views of all fields, the same number of each.

        Stage 1 learns from those of its training fields; probes are fitted on those of all fields that are not tested.
        """
        s = self.settings
        most = -(-s.train_views // (len(self.fields) * (s.num_folds - 2) // s.num_folds))
        side_px, parts = s.patch_px * s.ratio, []
        with self.reporter.task("Encoding the children of training regions", len(self.fields)) as task:
            for number, own in enumerate(self.fields):
                views = training_views(own, most, side_px, s.views_seed)
                parts.append(self.teacher.views(number, own, views, f"seed{s.views_seed}"))
                task.advance()
        return join(parts)

    @cached_property
    def frozen(self) -> dict[str, Seen]:
        """What the arms without training see."""
        s = self.settings
        found = {
            "hr": Seen(_kinds(self.practice.embedding), _kinds(self.probe.embedding)),
            "lr": self._seen_by(self.encoder),
            "colour": Seen({"colours": colours(self.practice.images)}, {"colours": colours(self.probe.images)}),
        }
        if s.random_seed is not None:
            found["random"] = self._seen_by(build_encoder(s, s.random_seed))
        return found

    def taught(self, cell: Cell, part: str, count: int) -> TaughtViews:
        """Return `count` training views of the fields of a part of a fold, spread evenly over them."""
        rows = self._rows(self.practice, cell, part)
        # The first view of every field, then the second of every field, and so on.
        turn = rows - np.searchsorted(self.practice.field, self.practice.field[rows])
        return self.practice.take(rows[np.lexsort((rows, turn))][:count])

    def _reference(self, cell: Cell) -> dict[str, Any]:
        answers = [answer for arm, seen in self.frozen.items() for answer in self._probe(arm, seen, cell)]
        return {"answers": answers, "retrieval": self._retrieval(self.encoder, cell, (self.encoder.depth - 1,))}

    def _recipe(self, cell: Cell, recipe: Stage1Recipe) -> dict[str, Any]:
        s = self.settings
        loss = recipe.loss(self.encoder.depth)
        matched = {}
        for part, count in (("train", s.train_views), ("val", s.val_views)):
            views = self.taught(cell, part, count)
            broken = derive_seed(cell.seed, "broken match", cell.fold, part)
            matched[part] = MatchedViews(views, s.ratio, recipe.children, broken)
        student = copy.deepcopy(self.encoder)
        stage1 = Stage1Settings(
            loss=loss, batch_size=recipe.batch_size, learning_rate=recipe.learning_rate, epochs=recipe.epochs
        )
        seed = derive_seed(cell.seed, "stage1", cell.fold)
        with self.reporter.task(f"Stage 1, {_title(cell)}", recipe.epochs) as task, without_python_warnings():
            fit = distil_encoder(
                student,
                matched["train"],
                matched["val"],
                stage1,
                ratio=s.ratio,
                seed=seed,
                on_epoch=lambda record: task.advance(note=f"val loss {record['val_loss']:.4f}"),
            )
        layers = resolve_layers(loss.layers, self.encoder.depth)
        return {
            "answers": self._probe(recipe.name, self._seen_by(student), cell),
            "retrieval": self._retrieval(student, cell, layers),
            "fit": _told(fit),
        }

    def _ceiling(self, cell: Cell) -> dict[str, Any]:
        s = self.settings
        assert s.ceiling is not None
        train, val = (
            self.taught(cell, part, count) for part, count in (("train", s.train_views), ("val", s.val_views))
        )
        seed = derive_seed(cell.seed, "ceiling", cell.fold)
        network, fit = train_ceiling(copy.deepcopy(self.encoder), train, val, s.ceiling, seed=seed)
        said = ceiling_answers(network, self.probe.images[self._rows(self.probe, cell, "test")])
        answers = [
            {"arm": CEILING, "embedding": "direct", "target": target, "alpha": None, "predicted": said[:, column]}
            for column, target in enumerate(s.targets)
        ]
        return {"answers": answers, "fit": _told(fit)}

    def _seen_by(self, encoder: Encoder) -> Seen:
        """What an encoder sees in the regions at low resolution."""
        practice, probe = (
            _kinds(embed(encoder, views.images, precision=self.settings.precision).embedding)
            for views in (self.practice, self.probe)
        )
        return Seen(practice, probe)

    def _probe(self, arm: str, seen: Seen, cell: Cell) -> list[dict[str, Any]]:
        """Ridge probes of each embedding for each target, fitted on the training and validation groups."""
        test = self._rows(self.probe, cell, "test")
        known = np.concatenate([self._rows(self.practice, cell, part) for part in ("train", "val")])
        groups = self._groups(self.practice)[known]
        answers = []
        for kind, features in seen.practice.items():
            for column, target in enumerate(self.settings.targets):
                truth = self.practice.truth[known, column]
                said = ridge_probe(features[known], truth, groups, seen.probe[kind][test])
                answers.append(
                    {"arm": arm, "embedding": kind, "target": target, "alpha": said.alpha, "predicted": said.predicted}
                )
        return answers

    def _retrieval(self, student: Encoder, cell: Cell, layers: tuple[int, ...]) -> dict[str, list[float]]:
        """Slot retrieval on the test views, by distilled layer."""
        views = self.probe.take(self._rows(self.probe, cell, "test"))
        s = self.settings
        found = {}
        for layer in layers:
            blocks = student_blocks(student, views.images, s.ratio, layer, s.precision)
            found[str(layer)] = slot_retrieval(blocks, views.cls[layer]).tolist()
        return found

    def _groups(self, views: TaughtViews) -> npt.NDArray[np.str_]:
        return np.array([own.group for own in self.fields])[views.field]

    def _rows(self, views: TaughtViews, cell: Cell, part: str) -> npt.NDArray[np.int64]:
        """Return which views show groups of a part of the cell's fold."""
        parts = self.splits[cell.seed].part_of(cell.fold, [own.group for own in self.fields])
        return np.flatnonzero((parts == part)[views.field])

    def _key(self, cell: Cell) -> str:
        if cell.recipe is not None:
            return fingerprint(
                self.key, cell.recipe.model_dump(mode="json", exclude={"name", "title", "seeds", "folds"}), cell.seed
            )
        ceiling = self.settings.ceiling if cell.arm == CEILING else None
        own = None if ceiling is None else ceiling.model_dump(mode="json", exclude={"seeds", "folds"})
        return fingerprint(self.key, cell.arm, own, cell.seed)


def make_splits(fields: list[Field], settings: ProbeSettings, seed: int) -> Splits:
    """Deal groups to folds, spread evenly over thirds of the main target, so that each fold has something to tell."""
    side_px = settings.patch_px * settings.ratio
    main = settings.targets[:1]
    value = np.array([f.truth(0, 0, max(f.pixels.shape[0], side_px), main, 1)[0] for f in fields])
    cuts = np.nanquantile(value, [1 / 3, 2 / 3])
    third = np.digitize(np.nan_to_num(value), cuts)
    groups = [f.group for f in fields]
    return make_folds(groups, third.tolist(), num_folds=settings.num_folds, seed=seed)


def colours(images: npt.NDArray[np.uint8]) -> FloatArray:
    """Mean, standard deviation, and 10, 50 and 90 % points of red, green and blue: (n, P, P, 3) to (n, 15)."""
    pixels = images.reshape(len(images), -1, 3).astype(np.float64)
    parts = [pixels.mean(axis=1), pixels.std(axis=1), *np.quantile(pixels, [0.1, 0.5, 0.9], axis=1)]
    return np.concatenate(parts, axis=1)


def build_encoder(settings: ProbeSettings, random_seed: int | None = None) -> Encoder:
    """Return the encoder of a study, class token and token mean side by side; with weights drawn by `random_seed`."""
    own = settings.encoder
    return create_encoder(
        own.name,
        input_px=settings.patch_px,
        weights=own.weights if random_seed is None else None,
        embedding="cls+token_mean",
        random_seed=own.random_seed if random_seed is None else random_seed,
        position_embedding=own.position_embedding,
    )


def _kinds(embedding: Features) -> dict[str, Features]:
    """(n, 2 W) class token and token mean to the three that are probed."""
    width = embedding.shape[1] // 2
    return dict(zip(EMBEDDINGS, (embedding[:, :width], embedding[:, width:], embedding), strict=True))


def _told(fit: FitResult) -> dict[str, Any]:
    best = fit.history[fit.best_epoch - 1]
    losses = {k: v for k, v in best.items() if k.endswith("loss") or "layer" in k}
    return {"best_epoch": fit.best_epoch, "epochs": len(fit.history), **losses, "history": fit.history}


def _title(cell: Cell) -> str:
    return f"{cell.arm}, seed {cell.seed}, fold {cell.fold}"
