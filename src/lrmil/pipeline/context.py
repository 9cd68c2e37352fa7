"""What every stage of a run shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypedDict

import torch

from lrmil.cohorts.table import Cohort
from lrmil.encoders import Encoder, encoder_from_settings, shaped_encoder
from lrmil.errors import EncoderError, NotASlide, SlideError
from lrmil.inference.predict import pick_device
from lrmil.inference.prepare import TileSettings
from lrmil.pipeline.cohort import labelled_for_any
from lrmil.pipeline.config import RunSettings
from lrmil.pipeline.folder import Failure, RunFolder
from lrmil.pipeline.reporting import Reporter
from lrmil.slides import Slide
from lrmil.tasks import TaskKind
from lrmil.training.objectives import Objective, make_objective
from lrmil.training.slide_bags import FloatArray


@dataclass(frozen=True)
class SlideEntry:
    """One row of the cohort, as far as reading pixels needs it."""

    slide_id: str
    path: Path
    mpp: float | None
    """um per level-0 pixel from the cohort table; None: the file says it"""
    tiles: TileSettings = field(default_factory=TileSettings)
    """They name the reader"""

    def open(self) -> Slide:
        """Open the slide with the cohort's mpp, if the cohort gives one."""
        return self.tiles.open(self.path, mpp=self.mpp)

    @cached_property
    def identity(self) -> dict[str, object]:
        """What makes finished work on this slide stale: another file, or another mpp. Looked up once a run.

        Raises:
            NotASlide: the file cannot be looked at.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise NotASlide(
                f"{self.path} cannot be looked at ({error.strerror or error}).",
                slide=self.slide_id,
                fix="Check the path and its permissions.",
            ) from error
        return {"name": self.path.name, "bytes": status.st_size, "mtime": int(status.st_mtime), "mpp": self.mpp}


@dataclass(frozen=True)
class Split:
    """One fold by slides: "0".."n-1" with a test part, or "final" without one."""

    name: str
    title: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    pictured: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Slides of "train" and "val" that any task of the cohort labels, where these are more: what stage 1 sees"""

    def of(self, part: str) -> tuple[str, ...]:
        """Return the slides of "train", "val" or "test"."""
        parts: dict[str, tuple[str, ...]] = {"train": self.train, "val": self.val, "test": self.test}
        return parts[part]


class Truth(TypedDict):
    """What is to be learned of a slide; one of the two is None."""

    label: int | None
    """class index"""
    target: FloatArray | float | None
    """the number of a regression, or (2,) time and event of survival"""


@dataclass
class Run:
    """Settings, folder, cohort and reporter of one run, and the failures so far."""

    settings: RunSettings
    folder: RunFolder
    cohort: Cohort
    reporter: Reporter
    failures: list[Failure] = field(default_factory=list)
    stage1_folder: RunFolder | None = None
    """Where the folds' student encoders lie, if in another run's folder"""
    teacher_folder: RunFolder | None = None
    """Where the folds' teacher heads lie, if in another run's folder"""

    @classmethod
    def of(cls, settings: RunSettings, cohort: Cohort, reporter: Reporter) -> Self:
        """Return the run of a config. Where several tasks share a folder, stage 1 is not of one of them."""
        if not settings.cohort.tasks:
            return cls(settings, RunFolder(settings.out), cohort, reporter)
        # The released extra loss of stage 1 follows the attention of a task's own teacher.
        shared = None if settings.stage1.loss.lambda_attention_feature else RunFolder(settings.out)
        folder = RunFolder(settings.out, task=settings.cohort.task)
        return cls(settings, folder, cohort, reporter, stage1_folder=shared)

    @property
    def device(self) -> torch.device:
        """Where encoders and heads are trained and applied."""
        return pick_device(self.settings.device)

    @property
    def kind(self) -> TaskKind:
        """What is asked of a slide: a class, a number, or survival."""
        return self.cohort.task().kind

    @cached_property
    def objective(self) -> Objective:
        """What heads are trained for."""
        return make_objective(self.kind, len(self.cohort.classes), self.settings.objective)

    def truth(self, slide_id: str) -> Truth:
        """Return what is to be learned of a slide: `label`, or where there are no classes `target`."""
        if self.kind == "classification":
            return {"label": self.cohort.label_of(slide_id), "target": None}
        return {"label": None, "target": self.cohort.target_of(slide_id)}

    def entry(self, slide_id: str) -> SlideEntry:
        """Return a slide of the cohort, whether it has failed or not."""
        return self._entries[slide_id]

    def all_entries(self) -> list[SlideEntry]:
        """Return the cohort's labelled slides, failed or not, in the cohort's order."""
        return list(self._entries.values())

    def entries(self) -> list[SlideEntry]:
        """Return the cohort's labelled slides that have not failed, in the cohort's order."""
        failed = {f.slide_id for f in self.failures}
        return [entry for entry in self._entries.values() if entry.slide_id not in failed]

    def fail(self, slide_id: str, stage: str, error: SlideError) -> None:
        """Note that a slide cannot be used; the others go on."""
        failure = Failure.of(slide_id, stage, error)
        self.failures.append(failure)
        self.folder.write_failures(self.failures)
        self.reporter.warn(failure.message)

    def build_encoder(self, *, student: bool = False) -> Encoder:
        """Build the HR encoder; or, for the student's side, one of the same weights with the student's embedding."""
        chosen = self.settings.encoder
        if student:
            chosen = chosen.model_copy(update={"embedding": chosen.student_embedding})
        return encoder_from_settings(chosen, input_px=chosen.input_px or self.settings.grid.patch_px)

    def build_student(self) -> Encoder:
        """Build what the student encoder of every fold begins as."""
        s = self.settings
        if s.stage1.student is None:
            return self.build_encoder(student=True)
        try:
            return shaped_encoder(s.stage1.student, s.grid.patch_px)
        except EncoderError as error:
            raise type(error)(f"stage1.student: {error.message}", fix=error.fix) from error

    @cached_property
    def own_student(self) -> dict[str, Any] | None:
        """What the student encoder begins as, if it is another network than the HR encoder. Builds it once a run."""
        return None if self.settings.stage1.student is None else self.build_student().describe()

    @cached_property
    def _entries(self) -> dict[str, SlideEntry]:
        table = labelled_for_any(self.cohort)
        mpps = table["mpp"] if "mpp" in table else [None] * len(table)
        tiles = self.settings.tiles
        return {
            str(slide_id): SlideEntry(
                str(slide_id), Path(path), None if mpp is None or mpp != mpp else float(mpp), tiles
            )
            for slide_id, path, mpp in zip(table["slide_id"], table["path"], mpps, strict=True)
        }
