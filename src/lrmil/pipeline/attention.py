"""Where the stored models of a run look on a slide: each slide is shown to the models of the fold that tests it.

Nothing is trained here; what is missing, or was made with other settings, is named together with the command that makes
it.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrmil.bags import Bag, read_bag
from lrmil.encoders import Encoder
from lrmil.errors import BagError, ConfigError, HeadError
from lrmil.evaluation.overlay import AttentionMap
from lrmil.files import read_json
from lrmil.geometry import MatchedGrid
from lrmil.inference.selective import SelectiveAnswer, answer_slide
from lrmil.mil import MILHead
from lrmil.pipeline.context import Run, SlideEntry, Split
from lrmil.pipeline.distill import fold_bag, stored_student
from lrmil.pipeline.encode import features_name
from lrmil.pipeline.evaluate import LR_ONLY, LRMIL
from lrmil.pipeline.figures import answer_title, bag_boxes
from lrmil.pipeline.heads import slide_bag, stored_head, stored_readout
from lrmil.pipeline.keys import (
    bag_provenance,
    features_of,
    head_key,
    label_head_key,
    stage1_key,
    student_key,
    tile_key,
)
from lrmil.pipeline.live_scales import live_scales
from lrmil.pipeline.methods import Method, baseline_settings
from lrmil.pipeline.selective import stored_selective_head
from lrmil.pipeline.splits import known_splits
from lrmil.pipeline.tile import load_grid
from lrmil.training.stage2 import BagPrediction, predict_bags

TEACHER_NAME = "teacher"


@dataclass
class StoredModels:
    """The stored models of a run, and what they are asked about. Nothing is made, all is checked for being current."""

    run: Run

    def entry(self, slide_id: str) -> SlideEntry:
        """Return a slide of the cohort that a fold tests, or say why there is none."""
        self.run.cohort.patient_of(slide_id)  # says that there is no such slide
        if slide_id not in set(self.run.cohort.labelled()["slide_id"]):
            raise ConfigError(
                f"{slide_id} has no {self.run.settings.cohort.task}, so no fold tests it.",
                fix="`lrmil predict` draws what a deployed model looks at.",
            )
        if slide_id in self._failed:
            raise ConfigError(f"{slide_id} failed: {self._failed[slide_id]}", fix="Choose another slide.")
        self.tested_by(slide_id)
        return self.run.entry(slide_id)

    def shows(self, slide_id: str) -> bool:
        """True if `entry` finds a slide: it has not failed, and a fold tests it."""
        return slide_id not in self._failed and any(slide_id in split.test for split in self._folds)

    def tested_by(self, slide_id: str) -> Split:
        """Return the fold that tests a slide; the first, if there are several."""
        for split in self._folds:
            if slide_id in split.test:
                return split
        raise ConfigError(
            f"no fold tests {slide_id}: every model has trained on it, or was chosen by it, or left it out.",
            fix="Choose a slide of a test part.",
        )

    def attention(self, entry: SlideEntry, split: Split, method: Method) -> AttentionMap:
        """Return where a method's model of this fold looks on a slide."""
        if method.sees == "chosen":
            return self._chosen(entry, split, method)
        if method.sees == "lr":
            step, bag = self._lr_only(entry, split)
        elif method.sees == "lrmil":
            step, bag = self._lrmil(entry, split)
        else:
            step = self._hr_head(entry, split, method)
            bag = self._stored_bag(entry, self.encoder, self._hr_features, high=True)
        head, readout = _showing_head(step), stored_readout(step)
        answer = predict_bags(
            head, [slide_bag(self.run, bag, entry.slide_id)], device=self.run.device, readout=readout
        )[0]
        if answer.attention is None:
            raise HeadError(
                f"{method.title} weighs no patches, so there is no heatmap of it.", fix="Leave it out of --methods."
            )
        return AttentionMap(answer_title(self.run, method.title, answer), bag_boxes(bag), answer.attention)

    @cached_property
    def encoder(self) -> Encoder:
        """The frozen HR encoder."""
        return self.run.build_encoder().to(self.run.device)

    @cached_property
    def _lr_encoder(self) -> Encoder:
        return self.run.build_encoder(student=True)

    @cached_property
    def _hr_features(self) -> dict[str, Any]:
        return features_of(self.run, self.encoder)

    @cached_property
    def _lr_features(self) -> dict[str, Any]:
        return features_of(self.run, self._lr_encoder)

    @cached_property
    def _failed(self) -> dict[str, str]:
        """What failures.csv of the run says, by slide."""
        path = self.run.folder.failures
        if not path.is_file():
            return {}
        with path.open(newline="", encoding="utf-8") as handle:
            return {row["slide_id"]: row["message"] for row in csv.DictReader(handle)}

    @cached_property
    def _usable(self) -> list[str]:
        return [e.slide_id for e in self.run.all_entries() if e.slide_id not in self._failed]

    @cached_property
    def _folds(self) -> list[Split]:
        return known_splits(self.run, self._usable)

    def _hr_head(self, entry: SlideEntry, split: Split, method: Method) -> Path:
        fold = self.run.folder.fold(split.name)
        if method.name == TEACHER_NAME:
            key = label_head_key(self.run, split, self.encoder, TEACHER_NAME)
            return self._current(fold / TEACHER_NAME, key, entry, split, method.title, "lrmil run")
        return self._compared_head(entry, split, method)

    def _compared_head(self, entry: SlideEntry, split: Split, method: Method) -> Path:
        step = self.run.folder.fold(split.name) / "heads" / method.name.replace(":", "_")
        settings = baseline_settings(self.run.settings, method)
        key = head_key(self.run, split, self._hr_features, method.name, settings)
        return self._current(step, key, entry, split, method.title, f"lrmil compare --methods {method.name},lrmil")

    def _lr_only(self, entry: SlideEntry, split: Split) -> tuple[Path, Bag]:
        key = label_head_key(self.run, split, self._lr_encoder, "lr_only")
        first = "lrmil run (with lr_only among evaluation.baselines)"
        step = self._current(self.run.folder.fold(split.name) / "lr_only", key, entry, split, LR_ONLY, first)
        return step, self._stored_bag(entry, self._lr_encoder, self._lr_features, high=False)

    def _lrmil(self, entry: SlideEntry, split: Split) -> tuple[Path, Bag]:
        run, fold = self.run, self.run.folder.fold(split.name)
        trained = stage1_key(run, split, self.encoder)
        stage1 = (run.stage1_folder or run.folder).fold(split.name) / "stage1"
        self._current(stage1, trained, entry, split, "student encoder", "lrmil run")
        student = stored_student(run, split)
        key = student_key(run, split, student, self.encoder)
        step = self._current(fold / "student", key, entry, split, LRMIL, "lrmil run")
        expected = bag_provenance(run, entry, features_of(run, student), self._grid(entry).scale.lr_mpp)
        return step, self._read(fold_bag(run, split, entry.slide_id), expected, entry)

    def _chosen(self, entry: SlideEntry, split: Split, method: Method) -> AttentionMap:
        """Let a head choose from the slide file; show its patches of the finest scale by their attention."""
        run = self.run
        step = self._compared_head(entry, split, method)
        head = stored_selective_head(run, split, method.name)
        with entry.open() as slide:
            source = live_scales(run, slide, self._grid(entry), self.encoder, head.scales)
            found = answer_slide(head, source)
        finest = head.scales[-1]
        reading = stored_readout(step).read(head, torch.from_numpy(found.logits))
        value = None if reading.value is None else float(reading.value)
        answer = BagPrediction(entry.slide_id, found.logits, reading.probabilities, None, None, value)
        rows = found.selected[finest]
        layout = source.layouts[finest]
        title = f"{answer_title(run, method.title, answer)}\n{len(rows)} of {len(layout)} patches chosen"
        return AttentionMap(title, layout.boxes_l0[rows], _attention_of_chosen(found, finest))

    def _grid(self, entry: SlideEntry) -> MatchedGrid:
        grid = load_grid(self.run.folder.tiles(entry.slide_id), tile_key(self.run, entry))
        if grid is None:
            raise ConfigError(f"{entry.slide_id} is not tiled with these settings.", fix="Run `lrmil run` first.")
        return grid

    def _stored_bag(self, entry: SlideEntry, encoder: Encoder, features: dict[str, Any], *, high: bool) -> Bag:
        g, scale = self.run.settings.grid, self._grid(entry).scale
        wanted, real = (g.hr_mpp, scale.hr_mpp) if high else (g.lr_mpp, scale.lr_mpp)
        name = features_name(encoder, wanted, self.run.settings.encoder.random_seed)
        expected = bag_provenance(self.run, entry, features, real)
        return self._read(self.run.folder.bag(name, entry.slide_id), expected, entry)

    def _read(self, path: Path, expected: dict[str, Any], entry: SlideEntry) -> Bag:
        try:
            return read_bag(path, layers=(), expected=expected)
        except BagError as error:
            raise ConfigError(
                f"{entry.slide_id}: its features are missing, or are of other settings ({error.message})",
                fix="Run `lrmil run` first.",
            ) from error

    def _current(self, step: Path, key: str, entry: SlideEntry, split: Split, title: str, first: str) -> Path:
        if self.run.folder.is_done(step, key):
            return step
        was = "was trained with other settings, slides or labels" if (step / "done.json").is_file() else "is missing"
        raise ConfigError(
            f"{title} of {split.title}, which tests {entry.slide_id}, {was}.", fix=f"First: {first}, with this config."
        )


def _showing_head(step: Path) -> MILHead:
    """Return a stored head; one that computes attention for heatmaps only on demand is asked to."""
    head = stored_head(step)
    if "rollout" not in type(head).Options.model_fields:
        return head
    from lrmil.mil import create_head

    described = read_json(step / "head.json") | {"rollout": True}
    showing: MILHead = create_head(**described)
    showing.load_state_dict(head.state_dict())
    return showing.eval()


def _attention_of_chosen(found: SelectiveAnswer, scale: str) -> np.ndarray[Any, Any]:
    """Return the attention (n,) of the chosen patches; where each class has its own, that of the predicted one."""
    logits = found.output.scale_attention_logits[scale].float().cpu().numpy()
    return logits if logits.ndim == 1 else logits[:, int(np.argmax(found.logits))]
