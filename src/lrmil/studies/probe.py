"""One study of region probes: fields, folds, teacher, and the cells (arm x fold x seed), each done once.

Arms. `reference`: the teacher on the 16 children of a region (hr), the same network on the region at low resolution
without distillation (lr), with random weights (random), and statistics of colours (colour). Each recipe: the student
after stage 1 (its name). `ceiling`: the student's start fine-tuned on the truth.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrmil.distill import resolve_layers
from lrmil.encoders import Encoder, create_encoder, embed
from lrmil.errors import ConfigError
from lrmil.files import read_json, remove_leftovers, write_json
from lrmil.pipeline.reporting import Reporter, without_python_warnings
from lrmil.settings import fingerprint
from lrmil.studies.ceiling import ceiling_answers, train_ceiling
from lrmil.studies.fields import Field, FloatArray, load_fields
from lrmil.studies.matches import MatchedViews, slot_retrieval, student_blocks
from lrmil.studies.ridge import ridge_probe
from lrmil.studies.settings import EMBEDDINGS, EmbeddingKind, ProbeSettings, Stage1Recipe
from lrmil.studies.taught import TaughtViews, Teacher, join
from lrmil.studies.views import probe_views, training_views
from lrmil.training.folds import Splits, make_folds
from lrmil.training.loop import FitResult
from lrmil.training.seeds import derive_seed
from lrmil.training.stage1 import Stage1Settings, distil_encoder

_METHOD = 2
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
    _taught: dict[tuple[int, int, int], TaughtViews] = field(default_factory=dict)

    @classmethod
    def begin(cls, settings: ProbeSettings, reporter: Reporter) -> ProbeStudy:
        """Read the fields, build the encoder, make the folds."""
        if settings.out is None:
            raise ConfigError("the study has no output folder.", fix="Set out.")
        folder = Path(settings.out)
        remove_leftovers(folder)
        encoder = _build(settings)
        fields = load_fields(settings.fields, folder, settings.patch_px * settings.ratio)
        layers = {
            layer
            for recipe in settings.recipes
            for layer in resolve_layers(recipe.loss(encoder.depth).layers, encoder.depth)
        }
        layers.add(encoder.depth - 1)
        teacher = Teacher(encoder, settings, sorted(layers), folder / "teacher")
        splits = {seed: make_splits(fields, settings, seed) for seed in settings.seeds}
        names = ("patch_px", "ratio", "targets", "min_nuclei", "train_views", "val_views", "views_seed", "random_seed")
        shared = {name: getattr(settings, name) for name in names}
        digests = [field.digest() for field in fields]
        key = fingerprint(_METHOD, shared, settings.precision, encoder.weights_sha256, digests)
        return cls(settings, reporter, folder, fields, encoder, teacher, splits, key)

    def cells(self) -> Iterator[Cell]:
        """All cells, in the order in which they are done: one recipe in all folds, then more recipes, seeds."""
        s = self.settings
        folds = range(s.num_folds)
        many = {recipe.name: s.seeds[: recipe.seeds] for recipe in s.recipes}
        yield from (Cell("reference", fold, seed) for seed in s.seeds for fold in folds)
        for number, recipe in enumerate(s.recipes):
            yield from (Cell(recipe.name, fold, seed, recipe) for seed in many[recipe.name] for fold in folds)
            if number == 0 and s.ceiling is not None:
                yield from (Cell("ceiling", fold, seed) for seed in s.seeds[: s.ceiling.seeds] for fold in folds)

    def stored(self, cell: Cell) -> dict[str, Any] | None:
        """Return what a finished cell found, None where it is not done with these settings."""
        path = self.folder / "cells" / cell.path
        if not path.is_file():
            return None
        found = read_json(path)
        return found if found.get("key") == self._key(cell) else None

    def do(self, cell: Cell) -> dict[str, Any]:
        """Do one cell and write it down."""
        began = time.monotonic()
        if cell.arm == "reference":
            found = self._reference(cell)
        elif cell.recipe is None:
            found = self._ceiling(cell)
        else:
            found = self._recipe(cell, cell.recipe)
        found |= {"key": self._key(cell), "arm": cell.arm, "fold": cell.fold, "seed": cell.seed}
        found["views"] = [int(i) for i in self._probe_rows(cell, "test")]
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
        return np.array([self.fields[i].group for i in self.probe.field])

    @cached_property
    def frozen(self) -> dict[str, dict[EmbeddingKind, Features] | Features]:
        """What the arms without training see in the probe views."""
        images, s = self.probe.images, self.settings
        found: dict[str, dict[EmbeddingKind, Features] | Features] = {
            "hr": _kinds(self.probe.embedding),
            "lr": _kinds(embed(self.encoder, images, precision=s.precision).embedding),
            "colour": colours(images),
        }
        if s.random_seed is not None:
            untrained = _build(s, s.random_seed)
            found["random"] = _kinds(embed(untrained, images, precision=s.precision).embedding)
        return found

    def taught(self, cell: Cell, part: str, count: int) -> TaughtViews:
        """Return `count` training views of the fields of a part of a fold, spread evenly over them."""
        s = self.settings
        numbers, seed = self._fields_of(cell, part), s.views_seed
        side_px = s.patch_px * s.ratio
        # The same number of views of every field, whatever its part, so that folds share what the teacher said.
        most = -(-s.train_views // (len(self.fields) * (s.num_folds - 2) // s.num_folds))
        each = -(-count // len(numbers))
        views = []
        with self.reporter.task(f"Encoding the children of {part} regions", len(numbers)) as task:
            for number in numbers:
                name = (seed, number, most)
                if name not in self._taught:
                    wanted = training_views(self.fields[number], most, side_px, seed)
                    self._taught[name] = self.teacher.views(number, self.fields[number], wanted, f"seed{seed}")
                views.append(self._taught[name])
                task.advance()
        order = [(number, view) for view in range(min(each, most)) for number in range(len(numbers))][:count]
        starts = np.cumsum([0, *(len(v) for v in views[:-1])])
        rows = np.array([starts[number] + view for number, view in order])
        return join(views).take(rows)

    def _reference(self, cell: Cell) -> dict[str, Any]:
        answers = []
        for arm, features in self.frozen.items():
            kinds = features if isinstance(features, dict) else {"colours": features}
            answers += self._probe(arm, kinds, cell)
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
        seen = embed(student, self.probe.images, precision=s.precision).embedding
        layers = resolve_layers(loss.layers, self.encoder.depth)
        return {
            "answers": self._probe(recipe.name, _kinds(seen), cell),
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
        said = ceiling_answers(network, self.probe.take(self._probe_rows(cell, "test")))
        answers = [
            {"arm": "ceiling", "embedding": "direct", "target": target, "alpha": None, "predicted": said[:, column]}
            for column, target in enumerate(s.targets)
        ]
        return {"answers": answers, "fit": _told(fit)}

    def _probe(self, arm: str, kinds: Mapping[Any, Features], cell: Cell) -> list[dict[str, Any]]:
        """Ridge probes of each embedding for each target, fitted on the training and validation groups."""
        test = self._probe_rows(cell, "test")
        known = np.concatenate([self._probe_rows(cell, "train"), self._probe_rows(cell, "val")])
        answers = []
        for kind, features in kinds.items():
            for column, target in enumerate(self.settings.targets):
                truth = self.probe.truth[known, column]
                said = ridge_probe(features[known], truth, self.groups[known], features[test])
                answers.append(
                    {"arm": arm, "embedding": kind, "target": target, "alpha": said.alpha, "predicted": said.predicted}
                )
        return answers

    def _retrieval(self, student: Encoder, cell: Cell, layers: tuple[int, ...]) -> dict[str, list[float]]:
        """Slot retrieval on the test views, by distilled layer."""
        views = self.probe.take(self._probe_rows(cell, "test"))
        s = self.settings
        found = {}
        for layer in layers:
            blocks = student_blocks(student, views.images, s.ratio, layer, s.precision)
            found[str(layer)] = slot_retrieval(blocks, views.cls[layer]).tolist()
        return found

    def _probe_rows(self, cell: Cell, part: str) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.splits[cell.seed].part_of(cell.fold, list(self.groups)) == part)

    def _fields_of(self, cell: Cell, part: str) -> list[int]:
        parts = self.splits[cell.seed].part_of(cell.fold, [own.group for own in self.fields])
        return [int(i) for i in np.flatnonzero(parts == part)]

    def _key(self, cell: Cell) -> str:
        if cell.recipe is not None:
            return fingerprint(
                self.key, cell.recipe.model_dump(mode="json", exclude={"name", "title", "seeds"}), cell.seed
            )
        ceiling = self.settings.ceiling if cell.arm == "ceiling" else None
        own = None if ceiling is None else ceiling.model_dump(mode="json", exclude={"seeds"})
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


def _build(settings: ProbeSettings, random_seed: int | None = None) -> Encoder:
    own = settings.encoder
    return create_encoder(
        own.name,
        input_px=settings.patch_px,
        weights=own.weights if random_seed is None else None,
        embedding="cls+token_mean",
        random_seed=own.random_seed if random_seed is None else random_seed,
        position_embedding=own.position_embedding,
    )


def _kinds(embedding: Features) -> dict[EmbeddingKind, Features]:
    """(n, 2 W) class token and token mean to the three that are probed."""
    width = embedding.shape[1] // 2
    return dict(zip(EMBEDDINGS, (embedding[:, :width], embedding[:, width:], embedding), strict=True))


def _told(fit: FitResult) -> dict[str, Any]:
    best = fit.history[fit.best_epoch - 1]
    losses = {k: v for k, v in best.items() if k.endswith("loss") or "layer" in k}
    return {"best_epoch": fit.best_epoch, "epochs": len(fit.history), **losses, "history": fit.history}


def _title(cell: Cell) -> str:
    return f"{cell.arm}, seed {cell.seed}, fold {cell.fold}"
