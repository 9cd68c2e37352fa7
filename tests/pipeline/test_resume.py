"""A run that was killed goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import pkgutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Watch = Callable[[str, Callable[..., Any]], None]
BASELINES = {"baselines": ["majority", "colour_histogram", "lr_only"]}


class Killed(BaseException):
    """Like a kill: nothing in the package catches it."""


class Killer:
    """Kills at the n-th call of a function, once."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


# In the order in which a run comes by. "before" a call, since what matters is what is on disk then.
POINTS = [
    ("lrmil.pipeline.tile.save_grid", 3),
    ("lrmil.pipeline.encode.write_bag", 4),
    ("lrmil.pipeline.pixels.colour_histogram", 2),
    ("lrmil.pipeline.splits.leakage_proof", 1),
    ("lrmil.pipeline.distill.distil_encoder", 1),
    ("lrmil.pipeline.distill.save_encoder", 1),
    ("lrmil.pipeline.folder.RunFolder.mark_done", 1),
    ("lrmil.pipeline.distill.write_bag", 5),
    ("lrmil.pipeline.distill.write_json", 1),
    ("lrmil.pipeline.heads.store_head", 2),
    ("lrmil.pipeline.heads.store_outputs", 2),
    ("lrmil.pipeline.student.train_student", 2),
    ("lrmil.pipeline.encode.write_bag", 6),
    ("lrmil.pipeline.heads.write_json", 3),
    ("lrmil.pipeline.run.score_methods", 1),
    ("lrmil.pipeline.run.write_run_report", 1),
    ("lrmil.pipeline.deploy.save_bundle", 1),
    ("lrmil.inference.bundle.write_json", 1),
    ("lrmil.pipeline.folder.RunFolder.mark_done", 1),
]


@pytest.mark.usefixtures("no_report")
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_was_not(
    lab: Any, finished: Any, work: Counter[str], watch: Watch, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    encoded: Counter[str] = Counter()
    watch("lrmil.pipeline.encode._child_bag", lambda entry, *args: encoded.update([entry.slide_id]))
    for target, count in POINTS:
        with pytest.MonkeyPatch.context() as patch:
            _arm(patch, target, Killer(count))
            with pytest.raises(Killed):
                lab.run(out, evaluation=BASELINES)
    lab.run(out, evaluation=BASELINES)

    assert lab.predictions(out) == lab.predictions(finished.out)
    for path in sorted(finished.out.rglob("*.safetensors")):
        assert (out / path.relative_to(finished.out)).read_bytes() == path.read_bytes(), path
    assert (out / "model" / "bundle.json").is_file()
    # One slide was being encoded when the run was killed; no other was encoded twice.
    assert set(encoded) == {path.stem for path in (lab.table.parent / "slides").glob("*.tif")}
    assert sum(encoded.values()) == len(encoded) + 1
    # Four students; stage 1 was killed after one training (save_encoder) and after another (mark_done, write_json).
    assert work["stage 1"] == 4 + 3
    assert not list(out.rglob("*.tmp*"))


def _arm(patch: pytest.MonkeyPatch, target: str, killer: Killer) -> None:
    original = pkgutil.resolve_name(target)

    def armed(*args: Any, **kwargs: Any) -> Any:
        killer()
        return original(*args, **kwargs)

    patch.setattr(target, armed)


def test_a_run_ended_by_kill_9_resumes(lab: Any, finished: Any, tmp_path: Path) -> None:
    """A real process, really killed while it encodes; finished feature files are kept as they are."""
    out = tmp_path / "run"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(lab.tree(out, evaluation={"baselines": ["majority"]}, deploy=False)))
    call = [sys.executable, "-m", "lrmil", "run", str(config), "--quiet"]
    with subprocess.Popen(call, stderr=subprocess.PIPE) as process:
        for _ in range(3000):
            if len(list(out.glob("features/*/[!.]*.h5"))) >= 2 or process.poll() is not None:
                break
            time.sleep(0.02)
        process.kill()
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("features/*/[!.]*.h5")}
    assert len(kept) >= 2

    lab.run_until("student", out)
    assert len(list(out.glob("features/*/[!.]*.h5"))) == 12
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for step in ("stage1/encoder", "teacher/head", "student/head"):
        mine, theirs = (folder / "folds" / "2" / f"{step}.safetensors" for folder in (out, finished.out))
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("changes", "redone"),
    [
        ({"student": {"loss": {"hard_k": 2}}}, {"student head": 3}),
        ({"evaluation": {"bootstrap": 200}}, {}),
        ({"teacher": {"epochs": 2}}, {"label head": 3, "student head": 3}),
        ({"stage1": {"learning_rate": 2e-3}}, {"read 5x": 12, "stage 1": 3, "encode 5x": 36, "student head": 3}),
        ({"targets": "on_the_fly"}, {}),
    ],
    ids=["hard_k", "bootstrap", "teacher", "stage1", "targets"],
)
@pytest.mark.usefixtures("no_report")
def test_a_changed_setting_redoes_what_depends_on_it(
    lab: Any, finished: Any, work: Counter[str], tmp_path: Path, changes: dict[str, Any], redone: dict[str, int]
) -> None:
    out = finished.copy(tmp_path / "run")
    lab.run(out, **lab.merged({"evaluation": {"baselines": ["majority"]}, "deploy": False}, changes))
    assert dict(work) == redone


@pytest.mark.usefixtures("no_report")
def test_another_grid_redoes_everything(lab: Any, finished: Any, work: Counter[str], tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "run")
    lab.run(out, grid={"mpp_tolerance": 0.04}, evaluation={"baselines": ["majority"]}, deploy=False)
    assert work["tile"] == work["encode 20x"] == work["read 5x"] == 12
    assert work["stage 1"] == work["label head"] == work["student head"] == 3


def test_back_to_old_settings_after_a_kill_is_not_taken_for_done(lab: Any, finished: Any, tmp_path: Path) -> None:
    """Killed between the new weights and the note that they are there: the old note must not vouch for them."""
    out = finished.copy(tmp_path / "run")
    for target, changes in (
        ("lrmil.pipeline.heads.write_json", {"student": {"learning_rate": 0.3}}),
        ("lrmil.pipeline.distill.write_json", {"stage1": {"learning_rate": 0.003}}),
    ):
        with pytest.MonkeyPatch.context() as patch:
            _arm(patch, target, Killer(2 if "heads" in target else 1))
            with pytest.raises(Killed):
                lab.run_until("student", out, **changes)
    changed = [p for p in finished.out.rglob("folds/*/*/*.safetensors") if _differs(p, finished.out, out)]
    assert {p.parent.name for p in changed} >= {"stage1", "student"}
    lab.run_until("student", out)
    assert not [p for p in finished.out.rglob("folds/*/*/*.safetensors") if _differs(p, finished.out, out)]


def _differs(path: Path, root: Path, other: Path) -> bool:
    return (other / path.relative_to(root)).read_bytes() != path.read_bytes()
