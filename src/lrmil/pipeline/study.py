"""The state of a run between its stages, and the stages themselves, each resumable, each skipped where it is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lrmil.bags import Bag
from lrmil.encoders import Encoder
from lrmil.errors import ConfigError
from lrmil.files import remove_leftovers
from lrmil.geometry import MatchedGrid
from lrmil.mil import PatchSource
from lrmil.pipeline.checks import require_fitting_parts, require_own_folder, require_usable_slides
from lrmil.pipeline.cohort import settings_cohort
from lrmil.pipeline.config import RunSettings, save_config
from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.distill import distil_fold, distilled_layers, fold_bag, stored_student
from lrmil.pipeline.encode import encode_children, encode_regions, features_name, read_regions
from lrmil.pipeline.heads import Outputs, read_bags
from lrmil.pipeline.keys import features_of
from lrmil.pipeline.pixels import RegionPixels
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.scales import encode_scales, scale_sources
from lrmil.pipeline.splits import make_splits
from lrmil.pipeline.stale import discard_stale_results
from lrmil.pipeline.student import student_outputs
from lrmil.pipeline.teacher import teacher_bags, teacher_outputs
from lrmil.pipeline.tile import tile_cohort
from lrmil.pipeline.variants import distilled_blocks

STAGES = ("tile", "encode", "distill", "teacher", "student")
NEEDED = {
    "tile": ("tile",),
    "encode": ("tile", "encode"),
    "distill": ("tile", "encode", "distill"),
    "teacher": ("tile", "encode", "teacher"),
    "student": STAGES,
}
"""stages that each stage needs, itself included"""


@dataclass
class Study:
    """One run, its folds, and what its heads said. What is expensive is made once and kept here."""

    run: Run
    encoder: Encoder
    """The frozen HR encoder, on the run's device"""
    grids: dict[str, MatchedGrid] = field(default_factory=dict)
    folds: list[Split] = field(default_factory=list)
    proof: str = ""
    teacher_answers: dict[str, Outputs] = field(default_factory=dict)
    """What a split's HR head says about every slide"""
    student_answers: dict[str, Outputs] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    """Distilled layers that variants of the run need beside its own"""
    choosers: tuple[str, ...] = ()
    """Heads that choose their patches, whose inputs are encoded, too"""
    main: Study | None = None
    """The study that this one is a variant of"""
    _sources: dict[str, dict[str, PatchSource]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        settings: RunSettings,
        reporter: Reporter,
        *,
        layers: tuple[int, ...] = (),
        choosers: tuple[str, ...] = (),
    ) -> Study:
        """Check all that can be checked at once, then write what the output folder begins with."""
        cohort = settings_cohort(settings)
        reporter.line(cohort.summary())
        require_usable_slides(cohort)
        run = Run.of(settings, cohort, reporter)
        require_own_folder(run.folder)
        encoder = run.build_encoder().to(run.device)
        require_fitting_parts(run, encoder)
        remove_leftovers(run.folder.root)
        discard_stale_results(run)
        save_config(settings, run.folder.config)
        cohort.write(run.folder.cohort)
        run.folder.write_failures([])
        reporter.event("run started", out=str(run.folder.root), slides=len(cohort.table))
        return cls(run, encoder, layers=layers, choosers=choosers)

    def variant(self, name: str, settings: RunSettings) -> Study:
        """Return a study on the same slides and features, with other settings of training, another seed or other folds.

        Its own trained parts lie in variants/<name>/. Stage 1 and teacher are shared where their settings are equal.
        """
        here = self.run.settings
        same = settings.seed == here.seed and settings.folds == here.folds
        shared, stage1 = (self.run.folder, self.run.stage1_folder or self.run.folder) if same else (None, None)
        run = replace(
            self.run,
            settings=settings,
            folder=self.run.folder.variant(name),
            stage1_folder=stage1 if _same_stage1(settings, here) else None,
            teacher_folder=shared if settings.teacher == here.teacher else None,
        )
        folds, proof = self.folds, self.proof
        if settings.folds != here.folds:
            folds, proof = make_splits(run, self.pictured)
        return Study(run, self.encoder, self.grids, folds, proof, main=self)

    def keep_layers_of(self, settings: Iterable[RunSettings]) -> None:
        """See to it that encoding keeps every block that one of several configs distils, where targets are cached."""
        if self.run.settings.targets == "cached":
            self.layers = distilled_blocks(settings, self.encoder.depth)

    @cached_property
    def pixels(self) -> RegionPixels:
        """LR pixels of all slides."""
        if self.main is not None:
            return self.main.pixels
        return RegionPixels(self.run, self.grids, self.run.settings.memory_gb * 2**30)

    @cached_property
    def hr_bags(self) -> dict[str, Bag]:
        """20x features of all slides, without the CLS of layers."""
        return self.main.hr_bags if self.main is not None else teacher_bags(self.run, self.slides, self.encoder)

    @cached_property
    def frozen_lr_bags(self) -> dict[str, Bag]:
        """5x features of all slides by the frozen encoder, with the student's embedding but without distillation."""
        if self.main is not None:
            return self.main.frozen_lr_bags
        return self.encode_lr(self.frozen_lr_encoder, "Encoding 5x regions without distillation")

    @cached_property
    def frozen_lr_encoder(self) -> Encoder:
        """What a student encoder begins as, on the run's device."""
        return self.run.build_encoder(student=True).to(self.run.device)

    @property
    def features(self) -> dict[str, Any]:
        """What the 20x features depend on beside the slide."""
        return features_of(self.run, self.encoder)

    @property
    def width(self) -> int:
        """Width of the 20x features."""
        return self.encoder.embed_dim

    @property
    def slides(self) -> list[str]:
        """Ids of the slides that have a label, are tiled, and have not failed."""
        labelled = set(self.run.cohort.labelled()["slide_id"])
        return [e.slide_id for e in self.run.entries() if e.slide_id in self.grids and e.slide_id in labelled]

    @property
    def pictured(self) -> list[str]:
        """Ids of the slides that any task labels, are tiled, and have not failed."""
        return [e.slide_id for e in self.run.entries() if e.slide_id in self.grids]

    def student_bags(self, split: Split) -> dict[str, Bag]:
        """5x features of all slides by a split's student encoder."""
        return read_bags({s: fold_bag(self.run, split, s) for s in self.slides})

    def sources(self, head: str) -> dict[str, PatchSource]:
        """Return the patches of all slides as a head that chooses among them trains on them."""
        if self.main is not None:
            return self.main.sources(head)
        if head not in self._sources:
            bags = self.hr_bags
            self._sources[head] = scale_sources(self.run, self.grids, self.slides, self.encoder, head, child_bags=bags)
        return self._sources[head]

    def encode_lr(self, encoder: Encoder, title: str, random_seed: int | None = None) -> dict[str, Bag]:
        """Encode the 5x regions of all slides by an encoder that no fold trained, where that is not done."""
        seed = self.run.settings.encoder.random_seed if random_seed is None else random_seed
        name = features_name(encoder, self.run.settings.grid.lr_mpp, seed)
        encode_regions(self.run, self.grids, encoder, self.pixels, name, title=title)
        return read_bags({s: self.run.folder.bag(name, s) for s in self.slides})

    def prepare(self) -> None:
        """Tile, encode and make the folds."""
        for stage in ("tile", "encode"):
            self.do(stage)

    def do(self, stage: str) -> None:
        """Do one stage for every fold."""
        run, s = self.run, self.run.settings
        if stage == "tile":
            self.grids.update(tile_cohort(run))
            self._require_some()
        elif stage == "encode":
            layers = distilled_layers(run, self.encoder) if s.targets == "cached" else ()
            encode_children(run, self.grids, self.encoder, tuple(sorted({*layers, *self.layers})))
            read_regions(run, self.grids, self.pixels)
            for head in self.choosers:
                encode_scales(run, self.grids, self.encoder, head)
            self._require_some()
            self.folds, self.proof = make_splits(run, self.pictured)
        elif stage == "distill":
            if s.stage1.loss.lambda_attention_feature:
                # The released extra loss weighs children by a teacher head's attention, which must then exist first.
                self.do("teacher")
            with run.reporter.stage("distill", "Stage 1: teaching the student encoder of each fold"):
                for split in self.folds:
                    self.distil(split)
        elif stage == "teacher":
            if self.folds and all(split.name in self.teacher_answers for split in self.folds):
                return  # stage 1 asked for them
            with run.reporter.stage("teacher", "Stage 2.1: training the 20x teacher head of each fold"):
                for split in self.folds:
                    self.teacher(split)
        else:
            with run.reporter.stage("student", "Stage 2.2: training the 5x student head of each fold"):
                for split in self.folds:
                    self.student(split)

    def distil(self, split: Split) -> None:
        """Stage 1 for one split."""
        answers = self.teacher(split) if self.run.settings.stage1.loss.lambda_attention_feature else None
        distil_fold(self.run, split, self.grids, self.pixels, self.encoder, answers)

    def teacher(self, split: Split) -> Outputs:
        """Stage 2.1 for one split."""
        if split.name not in self.teacher_answers:
            self.teacher_answers[split.name] = teacher_outputs(self.run, split, self.hr_bags, self.encoder)
        return self.teacher_answers[split.name]

    def student(self, split: Split, bags: Mapping[str, Bag] | None = None, encoder: Encoder | None = None) -> Outputs:
        """Stage 2.2 for one split, on its student encoder's features, or on others together with what made them."""
        if split.name not in self.student_answers:
            self.student_answers[split.name] = student_outputs(
                self.run,
                split,
                self.student_bags(split) if bags is None else bags,
                self.hr_bags,
                self.teacher(split),
                self.encoder,
                stored_student(self.run, split) if encoder is None else encoder,
            )
        return self.student_answers[split.name]

    def _require_some(self) -> None:
        if not self.slides:
            failures = self.run.failures
            raise ConfigError(
                f"none of the {len(failures)} slides can be used; the first: {failures[0].message}",
                fix=f"Every reason is in {self.run.folder.failures}.",
            )


def _same_stage1(one: RunSettings, other: RunSettings) -> bool:
    """Whether stage 1 is trained the same, be its spread restored or not.

    With the released extra loss it depends on the teacher head.
    """
    heads = one.teacher == other.teacher or not one.stage1.loss.lambda_attention_feature
    trained, others = (s.stage1.model_copy(update={"restore_spread": False}) for s in (one, other))
    return trained == others and one.encoder == other.encoder and heads
