"""One tiny cohort, one tiny encoder and one finished run, made once and only read; tests that change things copy them.

Twelve simulated slides of 512 px, ten patients, three folds; regions of 32 px, whose 4 x 4 tokens lie one under each
child; a random ViT of width 32 and three blocks, saved to a folder.
"""

from __future__ import annotations

import io
import pkgutil
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lrmil.cohorts.simulated import preset, simulate_cohort
from lrmil.cohorts.table import load_cohort
from lrmil.encoders import Encoder, EncoderCard, save_encoder
from lrmil.encoders.vit import build_trunk
from lrmil.pipeline.config import RunSettings, parse_config
from lrmil.pipeline.context import Run
from lrmil.pipeline.folder import RunFolder
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.run import Outcome, run_all, run_until

BASELINES = ["majority", "colour_histogram", "lr_only"]


def quiet() -> Reporter:
    return Reporter(quiet=True, stream=io.StringIO())


@dataclass(frozen=True)
class Lab:
    """What tests work with."""

    table: Path
    encoder: Path

    def tree(self, out: Path, **changes: Any) -> dict[str, Any]:
        """Config of a tiny run into `out`, without the slow parts that few tests look at."""
        base = {
            "cohort": {"table": str(self.table)},
            "out": str(out),
            "grid": {"patch_px": 32},
            "encoder": {"name": str(self.encoder), "stream_batch": 256, "batch_size": 256},
            "folds": {"num_folds": 3},
            "stage1": {"epochs": 1, "learning_rate": 1e-3},
            "teacher": {"epochs": 3, "learning_rate": 1e-2},
            "student": {"epochs": 3, "learning_rate": 1e-2},
            "evaluation": {"bootstrap": 100, "timed_slides": 0, "heatmap_slides": 0},
            "device": "cpu",
            "threads": 1,
        }
        return self.merged(base, changes)

    @classmethod
    def merged(cls, base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """`base` with nested `changes`."""
        result = dict(base)
        for key, value in changes.items():
            inner = result.get(key)
            both = isinstance(value, Mapping) and isinstance(inner, Mapping)
            result[key] = cls.merged(inner, value) if both else value
        return result

    def settings(self, out: Path, **changes: Any) -> RunSettings:
        return parse_config(self.tree(out, **changes))

    def run(self, out: Path, **changes: Any) -> Outcome:
        return run_all(self.settings(out, **changes), quiet())

    def run_until(self, stage: str, out: Path, **changes: Any) -> Outcome:
        return run_until(stage, self.settings(out, **changes), quiet())

    @staticmethod
    def predictions(out: Path) -> dict[str, bytes]:
        """Bytes of every table of predictions."""
        return {path.name: path.read_bytes() for path in sorted((out / "tables" / "predictions").glob("*.csv"))}

    @staticmethod
    def times(out: Path, *folders: str) -> dict[str, int]:
        """Time of the last change of every file under these folders of a run."""
        paths = [p for folder in folders for p in (out / folder).rglob("*") if p.is_file()]
        assert paths
        return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in paths}

    def parts(self, out: Path, **changes: Any) -> Run:
        """The context of a run, for calling single stages."""
        settings = self.settings(out, **changes)
        return Run(settings, RunFolder(out), load_cohort(settings.cohort.table, task=settings.cohort.task), quiet())


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    settings = preset("test", slides=12, patients=10, slide_px=512, seed=5, nuclei={"shapes": 8})
    table = simulate_cohort(folder / "cohort", settings)
    card = EncoderCard(
        name="tiny",
        title="Tiny",
        architecture="vit_small_patch8_224",
        arch_args={"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8},
        width=32,
        depth=3,
        token_px=8,
        table_px=32,
        input_px=32,
        licence="Apache-2.0",
        share_derivatives=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = build_trunk(card)
    encoder = Encoder(card, trunk, input_px=32, embedding="cls", weights_source="drawn at random")
    return Lab(table, save_encoder(encoder, folder / "encoder"))


@dataclass(frozen=True)
class Finished:
    """A complete run that nobody may change."""

    out: Path
    settings: RunSettings
    outcome: Outcome
    started: str
    """what the terminal showed"""

    def copy(self, to: Path) -> Path:
        """The run in another folder, times of files kept."""
        return Path(shutil.copytree(self.out, to))

    def copy_features(self, to: Path) -> Path:
        """Tiles and 20x features alone: what a run of the same slides need not make again."""
        for name in ("tiles", "features"):
            shutil.copytree(self.out / name, to / name)
        return to

    @property
    def splits(self) -> dict[str, dict[str, set[str]]]:
        """Slides by fold and part, from splits.csv and cohort.csv alone."""
        splits = pd.read_csv(self.out / "splits.csv", dtype=str)
        slides = pd.read_csv(self.out / "cohort.csv", dtype=str).merge(splits, on="patient_id")
        names = [c for c in splits if c != "patient_id"]
        return {
            name.removeprefix("fold_"): {part: set(rows["slide_id"]) for part, rows in slides.groupby(name)}
            for name in names
        }


@pytest.fixture(scope="session")
def finished(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Everything on: two baselines with features, times, heatmaps, report, deployed model."""
    out = tmp_path_factory.mktemp("finished") / "run"
    changes = {"evaluation": {"timed_slides": 1, "heatmap_slides": 2, "baselines": BASELINES}}
    settings = lab.settings(out, **changes)
    shown = tmp_path_factory.mktemp("shown") / "terminal.txt"
    with shown.open("w") as stream:
        outcome = run_all(settings, Reporter(out / "log.jsonl", stream=stream))
    return Finished(out, settings, outcome, shown.read_text())


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing out, which takes longer than a tiny run."""
    monkeypatch.setattr("lrmil.pipeline.run.write_run_report", lambda run, *args, **kwargs: run.folder.report)


WORK = {
    "tile": "lrmil.pipeline.tile.prepare_slide",
    "encode 20x": "lrmil.pipeline.encode.child_reads",
    "read 5x": "lrmil.pipeline.pixels.stream_patches",
    "encode 5x": "lrmil.pipeline.encode.embed",
    "stage 1": "lrmil.pipeline.distill.distil_encoder",
    "label head": "lrmil.pipeline.teacher.train_teacher",
    "student head": "lrmil.pipeline.student.train_student",
    "time": "lrmil.pipeline.timing.timed_answer",
    "bundle": "lrmil.pipeline.deploy.save_bundle",
}


Before = Callable[..., Any]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Before], None]:
    """`watch("lrmil.room.function", before)` calls `before` with the arguments of each call, and then the function."""

    def watch(target: str, before: Before) -> None:
        original = pkgutil.resolve_name(target)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before(*args, **kwargs)
            return original(*args, **kwargs)

        monkeypatch.setattr(target, watched)

    return watch


@pytest.fixture
def work(watch: Callable[[str, Before], None]) -> Counter[str]:
    """Counts every piece of real work from here on; empty as long as all is taken from disk."""
    counts: Counter[str] = Counter()
    for name, target in WORK.items():
        watch(target, lambda *args, name=name, **kwargs: counts.update([name]))
    return counts
