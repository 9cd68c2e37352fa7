"""What the parts of a benchmark share: settings, slides, a folder for written ones, the encoder, and a way to tell."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import cv2
import torch

from lrmil.benchmarks.answering import Model, load_model
from lrmil.benchmarks.material import Material, find_material
from lrmil.benchmarks.settings import FULL, QUICK, BenchSettings, RealSlide, Scope, given_slides
from lrmil.benchmarks.written import SlideSpec, TileStock, write_slide
from lrmil.errors import ConfigError, ImplausibleMpp, MissingMpp, NotASlide
from lrmil.pipeline.reporting import Reporter
from lrmil.slides import open_slide

ASSUMED_MPP = 0.25
"""for slides of the test data that do not say how large their pixels are: only how fast they are read depends on it"""
_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".dcm", ".bif")


@dataclass
class Workbench:
    """One run of the benchmark."""

    settings: BenchSettings
    folder: Path
    """for slides that are written and deleted"""
    reporter: Reporter
    real: list[RealSlide] = field(default_factory=list)
    _stocks: dict[tuple[float, int], TileStock] = field(default_factory=dict)
    _number: int = 0

    @property
    def scope(self) -> Scope:
        """How much is measured."""
        return QUICK if self.settings.quick else FULL

    @cached_property
    def model(self) -> Model:
        """Encoder and head."""
        return load_model(self.settings)

    def stock(self, mpp: float) -> TileStock:
        """Return tiles of tissue and glass at `mpp` um per pixel."""
        key = mpp, self.scope.block_px
        if key not in self._stocks:
            self._stocks[key] = TileStock(self.material(mpp))
        return self._stocks[key]

    def material(self, mpp: float) -> Material:
        """Return blocks of tissue and glass at `mpp` um per pixel."""
        return find_material(mpp, self.real, self.scope.block_px, self.settings.seed)

    @contextlib.contextmanager
    def written(self, spec: SlideSpec) -> Iterator[Path]:
        """Write a slide, and delete it at the end."""
        self._number += 1
        path = self.folder / f"written-{self._number}.svs"
        try:
            yield write_slide(path, spec, self.stock(spec.mpp))
        finally:
            path.unlink(missing_ok=True)


def real_slides(words: tuple[str, ...] | None) -> tuple[list[RealSlide], str]:
    """Return the slides that were named, or else those of the test data; and a sentence about where they come from.

    Raises:
        ConfigError: a named slide is not there, cannot be opened, or does not say how large its pixels are.
    """
    if words is not None:
        named = given_slides(words)
        for known in named:
            try:
                open_slide(known.path, mpp=known.mpp).close()
            except (MissingMpp, ImplausibleMpp) as error:
                raise ConfigError(error.message, fix=f"Write --slides {known.path}=MPP, its um per pixel.") from error
        return named, f"{len(named)} slides, as named"
    folder = Path(os.environ.get("LRMIL_TEST_DATA", "../shared/data")) / "slides"
    found = []
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.suffix.lower() not in _SUFFIXES:
            continue
        try:
            open_slide(path).close()
            found.append(RealSlide(path, None))
        except (MissingMpp, ImplausibleMpp):
            found.append(RealSlide(path, ASSUMED_MPP, f"does not say its mpp; read as {ASSUMED_MPP} um/px"))
        except NotASlide:
            continue
    if not found:
        return [], "none: give some with --slides"
    return found, "those of the test data: " + ", ".join(slide.path.name for slide in found)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch and OpenCV use `count` threads; give them back what they had."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(count)
    cv2.setNumThreads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
