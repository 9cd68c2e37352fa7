"""Heads that do not wait for each other: trained one by one, or several at a time in processes of their own."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from joblib import Parallel, delayed

from lrmil.mil import MILHead
from lrmil.mil.readout import Readout
from lrmil.pipeline.context import Run
from lrmil.pipeline.folder import RunFolder
from lrmil.pipeline.heads import Outputs, load_outputs, store_outputs, store_trained, stored_head, stored_readout
from lrmil.training.loop import OnEpoch
from lrmil.training.objectives import Objective
from lrmil.training.predict import BagPrediction
from lrmil.training.stage2 import SlideBag, TeacherSettings, predict_bags, train_teacher

Epochs = list[dict[str, Any]]
"""What was noted of every epoch so far"""
SlideT = TypeVar("SlideT")
"""What a head is shown of a slide"""


@dataclass(frozen=True)
class HeadJob(ABC, Generic[SlideT]):
    """All that training one head on labels takes, so that any process can do it. Same job, same head, wherever."""

    title: str
    step: Path
    """Folder of the head"""
    key: str
    """What it depends on"""
    outputs_key: str
    """What its answers depend on"""
    settings: TeacherSettings
    objective: Objective
    seed: int
    device: str
    train: tuple[SlideT, ...]
    val: tuple[SlideT, ...]
    asked: tuple[SlideT, ...]
    """What it answers"""

    @abstractmethod
    def train_and_store(self, folder: RunFolder, epochs: Epochs, on_epoch: OnEpoch) -> tuple[str, ...]:
        """Train the head and mark its folder as done; return what is to be told. `on_epoch` fills `epochs`."""

    @abstractmethod
    def answer(self, head: MILHead, readout: Readout) -> list[BagPrediction]:
        """Ask the trained head."""


@dataclass(frozen=True)
class BagJob(HeadJob[SlideBag]):
    """A head on bags of one scale."""

    def train_and_store(self, folder: RunFolder, epochs: Epochs, on_epoch: OnEpoch) -> tuple[str, ...]:
        """Train on labels alone."""
        trained = train_teacher(
            self.train,
            self.val,
            self.settings,
            objective=self.objective,
            seed=self.seed,
            device=self.device,
            on_epoch=on_epoch,
        )
        store_trained(folder, self.step, self.key, trained, epochs)
        return tuple(trained.fit.notes)

    def answer(self, head: MILHead, readout: Readout) -> list[BagPrediction]:
        """Ask the trained head about its bags."""
        return predict_bags(head, self.asked, device=self.device, readout=readout)


@dataclass(frozen=True)
class JobReport:
    """What is to be told of a job."""

    title: str
    notes: tuple[str, ...]
    best_epoch: int
    score: dict[str, float]
    """of the best epoch on the validation slides, by name"""


def workers_for(run: Run, wanted: int) -> int:
    """Return how many heads to train at a time: as many as asked for; if 0, one a core, but one alone on a GPU."""
    if wanted:
        return wanted
    return 1 if run.device.type != "cpu" else os.cpu_count() or 1


def do_jobs(run: Run, jobs: Sequence[HeadJob[Any]], workers: int) -> None:
    """Do those that are not done, and tell of them. Bags are shared between processes, not copied to each."""
    waiting = [
        job
        for job in jobs
        if not run.folder.is_done(job.step, job.key) or load_outputs(job.step, job.outputs_key) is None
    ]
    with run.reporter.task("heads", len(waiting)) as progress:
        for report in _reports(waiting, min(workers, max(1, len(waiting)))):
            for note in report.notes:
                run.reporter.warn(f"{report.title}: {note}")
            run.reporter.event("head trained", head=report.title, best_epoch=report.best_epoch, **report.score)
            progress.advance(note=report.title)


def job_outputs(job: HeadJob[Any]) -> Outputs:
    """Return what the head of a finished job says about the slides that it is asked about."""
    outputs = load_outputs(job.step, job.outputs_key)
    assert outputs is not None, f"{job.title} was not done"
    return outputs


def do_job(job: HeadJob[Any], parent: int | None = None) -> JobReport:
    """Train, store and ask one head, as far as that is not done.

    With `parent`, the process that waits for the answer: if it was killed, the work ends with the epoch. A worker would
    else train on for hours, for nobody, on cores that the resumed run needs.
    """
    folder = RunFolder(job.step)
    notes: tuple[str, ...] = ()
    if not folder.is_done(job.step, job.key):
        folder.begin(job.step)
        epochs: Epochs = []

        def on_epoch(record: dict[str, Any]) -> None:
            if parent is not None and os.getppid() != parent:
                os._exit(1)
            epochs.append(record)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module=r"lrmil\.")
            notes = job.train_and_store(folder, epochs, on_epoch)
    facts = folder.done_facts(job.step)
    if load_outputs(job.step, job.outputs_key) is None:
        store_outputs(job.answer(stored_head(job.step), stored_readout(job.step)), job.step, job.outputs_key)
    score = {name: value for name, value in facts.items() if name.startswith("val_")}
    return JobReport(job.title, notes, facts["best_epoch"], score)


def _reports(jobs: Sequence[HeadJob[Any]], workers: int) -> Iterator[JobReport]:
    if workers == 1:
        yield from map(do_job, jobs)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Arrays above max_nbytes are written to disk once and mapped by every process.
    pool = Parallel(n_jobs=workers, return_as="generator_unordered", max_nbytes="256K", mmap_mode="r")
    yield from pool(delayed(_do_job_with)(threads, os.getpid(), job) for job in jobs)


def _do_job_with(threads: int, parent: int, job: HeadJob[Any]) -> JobReport:
    torch.set_num_threads(threads)
    return do_job(job, parent)
