"""Answer a slide from low-resolution pixels alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lrmil.files import write_json
from lrmil.geometry import IntArray
from lrmil.inference.bundle import BundleManifest, load_parts
from lrmil.inference.prepare import PreparedSlide, prepare_slide
from lrmil.inference.stream import ReadingLog, encode_patches, region_reads
from lrmil.slides import Slide, io_counter, open_slide

Progress = Callable[[int, int], None]
"""called with (regions done, regions in all)"""


@dataclass(frozen=True)
class Seconds:
    """Where the time went. Reading runs ahead on threads while the encoder works, so the parts may exceed the total."""

    tissue: float
    reading: float
    encoding: float
    mil: float
    total: float


@dataclass(frozen=True)
class Prediction:
    """The answer to one slide, and what it rests on."""

    slide: str
    path: str
    task: str
    probabilities: dict[str, float]
    predicted: str
    boxes_l0: IntArray
    """(N, 4) the regions that were looked at, level-0 pixels x0, y0, x1, y1"""
    attention: npt.NDArray[np.float32] | None
    """(N,) sums to 1; None for heads without attention"""
    seconds: Seconds
    patches_read: int
    patches_encoded: int
    unreadable: int
    bytes_read: int | None
    """bytes that this process took from files meanwhile; None where the system does not count them"""
    scale: dict[str, Any]
    """the slide's mpp and where it comes from, the working mpp, the pyramid levels that were opened"""
    warnings: list[str] = field(default_factory=list)
    prepared: PreparedSlide | None = field(default=None, repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """Return the content of prediction.json."""
        attention = self.attention.tolist() if self.attention is not None else [None] * len(self.boxes_l0)
        return {
            "slide": self.slide,
            "path": self.path,
            "task": self.task,
            "predicted": self.predicted,
            "probabilities": self.probabilities,
            "warnings": self.warnings,
            "seconds": {k: round(v, 4) for k, v in vars(self.seconds).items()},
            "patches": {"read": self.patches_read, "encoded": self.patches_encoded, "unreadable": self.unreadable},
            "bytes_read": self.bytes_read,
            "scale": self.scale,
            "regions": [
                {"x_l0": int(x0), "y_l0": int(y0), "width_l0": int(x1 - x0), "height_l0": int(y1 - y0), "attention": a}
                for (x0, y0, x1, y1), a in zip(self.boxes_l0, attention, strict=True)
            ],
        }

    def write(self, path: Path) -> None:
        """Write prediction.json."""
        write_json(path, self.as_json())


class Bundle:
    """A deployed model. `load_bundle(folder)` makes one; `predict` answers slides."""

    def __init__(self, folder: str | Path, *, device: str | torch.device = "auto") -> None:
        self.folder = Path(folder)
        self.device = pick_device(device)
        self.manifest: BundleManifest
        self.manifest, encoder, head = load_parts(self.folder)
        self.encoder = encoder.to(self.device)
        self.head = head.to(self.device)

    def predict(
        self,
        slide: str | Path | Slide,
        *,
        mpp: float | None = None,
        batch_size: int = 64,
        threads: int = 2,
        on_progress: Progress | None = None,
    ) -> Prediction:
        """Answer one slide.

        Args:
            slide: a path, or a slide that is open already (it is left open).
            mpp: the slide's um per level-0 pixel, where the file does not say it or says it wrongly.
            batch_size: regions a forward pass.
            threads: reader threads.
            on_progress: called after each batch.

        Raises:
            SlideError: this slide cannot be answered; the message says why.
        """
        if isinstance(slide, Slide):
            return self._predict(slide, batch_size, threads, on_progress)
        with open_slide(slide, mpp=mpp) as opened:
            return self._predict(opened, batch_size, threads, on_progress)

    def _predict(self, slide: Slide, batch_size: int, threads: int, on_progress: Progress | None) -> Prediction:
        m = self.manifest
        began, bytes_before = time.perf_counter(), io_counter()
        prepared = prepare_slide(slide, m.grid, m.tissue, m.tiles)
        grid = prepared.grid

        seen = encode_patches(
            slide,
            region_reads(grid),
            grid.scale.patch_px,
            self.encoder,
            batch_size=batch_size,
            threads=threads,
            max_unreadable=m.tiles.max_unreadable,
            on_progress=(lambda done: on_progress(done, grid.num_regions)) if on_progress else None,
        )

        start = time.perf_counter()
        with torch.inference_mode():
            out = self.head(torch.from_numpy(seen.embedding).float().to(self.device))
            probabilities = self.head.probabilities(out.logits.double()).cpu().numpy()
            attention = None if out.attention is None else out.attention.float().cpu().numpy()
        mil_s = time.perf_counter() - start

        bytes_after = io_counter()
        return Prediction(
            slide=slide.name,
            path=str(slide.path),
            task=m.task,
            probabilities={name: float(p) for name, p in zip(m.classes, probabilities, strict=True)},
            predicted=m.classes[int(probabilities.argmax())],
            boxes_l0=grid.region_boxes_l0[seen.rows],
            attention=attention,
            seconds=Seconds(prepared.seconds, seen.log.busy_s, seen.encoding_s, mil_s, time.perf_counter() - began),
            patches_read=seen.log.patches,
            patches_encoded=len(seen.rows),
            unreadable=len(seen.log.unreadable),
            bytes_read=None if bytes_before is None or bytes_after is None else bytes_after - bytes_before,
            scale=_scale_note(slide, prepared),
            warnings=self._warnings(prepared, seen.log),
            prepared=prepared,
        )

    def _warnings(self, prepared: PreparedSlide, log: ReadingLog) -> list[str]:
        notes = []
        low, _, high = self.manifest.trained_on.regions_per_slide
        count = prepared.grid.num_regions
        if count < low:
            notes.append(
                f"little tissue: {count} regions; 90 % of the training slides had {low:.0f} to {high:.0f}. "
                "Trust the answer less."
            )
        if log.unreadable:
            notes.append(f"{len(log.unreadable)} regions could not be decoded and were left out")
        if prepared.overview.unreadable:
            notes.append(f"{prepared.overview.unreadable} blocks of the overview could not be decoded")
        if not prepared.grid.scale.snapped:
            notes.append("the slide's own scale is not near the model's, so regions were resampled")
        return notes


def load_bundle(folder: str | Path, *, device: str | torch.device = "auto") -> Bundle:
    """Load a deployed model. `device` is "auto" (a GPU where there is one), "cpu", "cuda", "mps" ...

    Raises:
        BundleError: no bundle there, another format, or altered files.
    """
    return Bundle(folder, device=device)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Resolve "auto" to CUDA, then Apple's MPS, then the CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _scale_note(slide: Slide, prepared: PreparedSlide) -> dict[str, Any]:
    scale = prepared.grid.scale
    return {
        "mpp_l0": slide.mpp,
        "mpp_source": slide.mpp_source,
        "working_mpp": scale.lr_mpp,
        "snapped": scale.snapped,
        "region_side_l0": scale.region_side_l0,
        "patch_px": scale.patch_px,
        "levels_opened": [
            {"level": level, "mpp": slide.mpp * slide.levels[level].downsample, "reads": reads}
            for level, reads in sorted(slide.stats.level_reads.items())
        ],
        "reader": slide.reader,
    }
