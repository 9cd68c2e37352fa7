"""Jobs: one head each, in any process, and no longer than somebody waits for it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from lrmil.pipeline.jobs import BagJob, do_job
from lrmil.training.objectives import make_objective
from lrmil.training.stage2 import SlideBag, TeacherSettings


def job_in(step: Path) -> BagJob:
    rng = np.random.default_rng(0)
    bags = tuple(SlideBag(f"S{i}", rng.normal(size=(5, 8)).astype(np.float32), i % 2) for i in range(8))
    return BagJob(
        title="a head",
        step=step,
        key="key",
        outputs_key="outputs",
        settings=TeacherSettings(epochs=2),
        objective=make_objective("classification", 2),
        seed=0,
        device="cpu",
        train=bags[:4],
        val=bags[4:6],
        asked=bags[6:],
    )


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_worker_ends_with_the_process_that_waits_for_it(tmp_path: Path, waited_for: bool) -> None:
    parent = os.getpid() if waited_for else os.getpid() + 1
    worker = multiprocessing.get_context("spawn").Process(target=do_job, args=(job_in(tmp_path), parent))
    worker.start()
    worker.join()
    assert worker.exitcode == (0 if waited_for else 1)
    assert (tmp_path / "done.json").exists() is waited_for


def test_a_finished_job_is_not_done_again(tmp_path: Path) -> None:
    first = do_job(job_in(tmp_path))
    before = (tmp_path / "head.safetensors").stat().st_mtime_ns
    again = do_job(job_in(tmp_path))
    assert (tmp_path / "head.safetensors").stat().st_mtime_ns == before
    assert (again.best_epoch, again.notes) == (first.best_epoch, ())
