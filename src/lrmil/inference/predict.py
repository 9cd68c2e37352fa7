"""Answer a slide from low-resolution pixels alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lrmil.errors import ConfigError
from lrmil.files import write_json
from lrmil.geometry import IntArray
from lrmil.inference.bundle import BundleManifest, load_parts
from lrmil.inference.prepare import PreparedSlide, finest_overview_mpp, prepare_slide
from lrmil.inference.stream import EncodedPatches, ReadingLog, SlideReads, encode_patches, encode_slides, region_reads
from lrmil.mil.readout import Readout
from lrmil.slides import Overview, Slide, io_counter

Progress = Callable[[int, int], None]
"""called with (regions done, regions in all)"""

_READ_AHEAD = 64
_PICTURE_SIDE_PX = 1000
"""where the tissue overview of a small slide is smaller than this, pictures get a finer one"""


@dataclass(frozen=True)
class Seconds:
    """Where the time went. The parts add up to the total."""

    tissue: float
    """overview, mask and grid"""
    reading: float
    """opening the file, and waiting for regions: readers run beside the encoder"""
    encoding: float
    mil: float
    total: float


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer to one slide, and what it rests on."""

    slide: str
    path: str
    task: str
    probabilities: dict[str, float]
    """by class; empty for tasks without classes"""
    predicted: str
    """the most probable class; empty for tasks without classes"""
    boxes_l0: IntArray
    """(N, 4) the regions that were looked at, level-0 pixels x0, y0, x1, y1"""
    attention: npt.NDArray[np.float32] | None
    """(N,) sums to 1; None for heads without attention"""
    seconds: Seconds
    unreadable: int
    """regions that could not be decoded; they are not among the N"""
    bytes_read: int | None
    """bytes that this process took from files meanwhile; None where the system does not count them"""
    scale: dict[str, Any]
    """the slide's mpp and where it comes from, the working mpp, the pyramid levels that were opened"""
    model: dict[str, Any]
    """which bundle answered"""
    overview: Overview = field(repr=False)
    """the slide at a glance, to paint attention on"""
    warnings: list[str] = field(default_factory=list)
    value: float | None = None
    """the number of a regression, in the unit of the training table, or the risk of survival, higher meaning earlier"""
    survival: dict[float, float] | None = None
    """probability of no event before each time, where the model tells a curve; None otherwise"""
    median_risk: float | None = None
    """survival: of the training patients"""
    is_risk: bool = False
    """whether `value` is a risk"""

    @property
    def risk_group(self) -> str | None:
        """Return "high" or "low", beside the training patients' median risk; None where that is not known."""
        if not self.is_risk or self.value is None or self.median_risk is None:
            return None
        return "high" if self.value > self.median_risk else "low"

    def in_words(self) -> str:
        """Return the answer in a few words."""
        if self.value is None:
            return f"{self.predicted}, {self.probabilities[self.predicted]:.1%}"
        if not self.is_risk:
            return f"{self.task} {self.value:.4g}"
        group = f" ({self.risk_group}: training median {self.median_risk:.4g})" if self.risk_group else ""
        return f"{self.task}: risk {self.value:.4g}{group}"

    @property
    def num_regions(self) -> int:
        """N, how many regions were looked at."""
        return len(self.boxes_l0)

    def as_json(self) -> dict[str, Any]:
        """Return the content of prediction.json."""
        attention = [None] * self.num_regions if self.attention is None else self.attention.tolist()
        return {
            "slide": self.slide,
            "path": self.path,
            "task": self.task,
            **self._answer(),
            "warnings": self.warnings,
            "seconds": {name: round(value, 4) for name, value in vars(self.seconds).items()},
            "patches": {"encoded": self.num_regions, "unreadable": self.unreadable},
            "bytes_read": self.bytes_read,
            "scale": self.scale,
            "model": self.model,
            "regions": [
                {"x_l0": x0, "y_l0": y0, "width_l0": x1 - x0, "height_l0": y1 - y0, "attention": weight}
                for (x0, y0, x1, y1), weight in zip(self.boxes_l0.tolist(), attention, strict=True)
            ],
        }

    def _answer(self) -> dict[str, Any]:
        if self.value is None:
            return {"predicted": self.predicted, "probabilities": self.probabilities}
        if not self.is_risk:
            return {"value": self.value}
        answer: dict[str, Any] = {"risk": self.value, "median_risk": self.median_risk, "risk_group": self.risk_group}
        if self.survival is not None:
            curve = [{"time": time, "probability": p} for time, p in self.survival.items()]
            answer["survival"] = curve
        return answer

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
        batch_size: int | None = None,
        threads: int = 2,
        picture: bool = False,
        on_progress: Progress | None = None,
    ) -> Prediction:
        """Answer one slide.

        Args:
            slide: a path, or a slide that is open already (it is left open).
            mpp: the slide's um per level-0 pixel, where the file does not say it or says it wrongly.
            batch_size: regions a forward pass; None: what suits the device.
            threads: reader threads.
            picture: look at a small slide more closely for the answer's `overview`, after the clock has stopped and at
                the model's low resolution at most.
            on_progress: called after each batch.

        Raises:
            SlideError: this slide cannot be answered; the message says why.
            ConfigError: `mpp` was given with an open slide, which has its own.
        """
        began, bytes_before = time.perf_counter(), io_counter()
        opened: AbstractContextManager[Slide]
        if isinstance(slide, Slide):
            if mpp is not None:
                raise ConfigError("mpp was given with a slide that is open already.", fix="Give it to `open_slide`.")
            opened = nullcontext(slide)
        else:
            opened = self.manifest.tiles.open(slide, mpp=mpp)
        with opened as source:
            return self._predict(source, batch_size, threads, picture, on_progress, began, bytes_before)

    def predict_slides(
        self,
        slides: Sequence[str | Path],
        *,
        mpp: float | None = None,
        batch_size: int | None = None,
        threads: int = 2,
        picture: bool = False,
    ) -> Generator[Prediction | Exception, None, None]:
        """Answer many slides, one after the other in this order; where one fails, its error takes the answer's place.

        One pool of threads reads for all of them: while the encoder works on a slide, the next ones are opened, looked
        at for tissue and read. An answer's `seconds` are therefore what it added to the whole: from the answer before
        to this one, and of tissue and reading only what the encoder had to wait for. Arguments as in `predict`.
        """
        m = self.manifest
        results = encode_slides(
            [partial(self._open, path, mpp) for path in slides],
            m.grid.patch_px,
            self.encoder,
            batch_size=batch_size or self._read_ahead,
            forward_batch=batch_size,
            threads=threads,
            max_unreadable=m.tiles.max_unreadable,
        )
        while True:
            began, bytes_before = time.perf_counter(), io_counter()
            result = next(results, None)
            if result is None:
                return
            if result.encoded is None or result.opened is None:
                assert result.error is not None
                yield result.error
                continue
            slide, prepared = result.opened.slide, result.opened.note
            try:
                answer = self._answer(slide, prepared, result.encoded, {}, picture, began, bytes_before)
            except Exception as error:
                yield error
            else:
                yield answer

    def _open(self, path: str | Path, mpp: float | None) -> SlideReads:
        m = self.manifest
        slide = m.tiles.open(path, mpp=mpp)
        try:
            prepared = prepare_slide(slide, m.grid, m.tissue, m.tiles)
        except BaseException:
            slide.close()
            raise
        return SlideReads(slide, region_reads(prepared.grid), note=prepared)

    @property
    def _read_ahead(self) -> int:
        """Regions that readers put together for the encoder; a GPU is to be kept busy for longer than a CPU."""
        return _READ_AHEAD if self.device.type == "cpu" else 4 * _READ_AHEAD

    def _predict(
        self,
        slide: Slide,
        batch_size: int | None,
        threads: int,
        picture: bool,
        on_progress: Progress | None,
        began: float,
        bytes_before: int | None,
    ) -> Prediction:
        m = self.manifest
        reads_before = dict(slide.stats.level_reads)
        prepared = prepare_slide(slide, m.grid, m.tissue, m.tiles, threads)
        grid = prepared.grid
        seen = encode_patches(
            slide,
            region_reads(grid),
            grid.scale.patch_px,
            self.encoder,
            batch_size=batch_size or self._read_ahead,
            forward_batch=batch_size,
            threads=threads,
            max_unreadable=m.tiles.max_unreadable,
            on_progress=(lambda done: on_progress(done, grid.num_regions)) if on_progress else None,
        )
        return self._answer(slide, prepared, seen, reads_before, picture, began, bytes_before)

    def _answer(
        self,
        slide: Slide,
        prepared: PreparedSlide,
        seen: EncodedPatches,
        reads_before: Mapping[int, int],
        picture: bool,
        began: float,
        bytes_before: int | None,
    ) -> Prediction:
        m, grid = self.manifest, prepared.grid
        boxes_l0 = grid.region_boxes_l0[seen.rows]
        head_began = time.perf_counter()
        with torch.inference_mode():
            # Training's features were rounded to float16 on disk, by less than an answer notices.
            bag = torch.from_numpy(seen.embedding).to(self.device, torch.float32)
            out = self.head(bag, coords=torch.from_numpy(boxes_l0[:, :2].copy()).to(self.device))
            reading = (m.readout or Readout()).read(self.head, out.logits)
            attention = None if out.attention is None else out.attention.cpu().float().numpy()
        ended = time.perf_counter()

        mil_s, total_s, bytes_after = ended - head_began, ended - began, io_counter()
        encoding_s = min(seen.encoding_s, total_s - mil_s)
        tissue_s = min(prepared.seconds, total_s - mil_s - encoding_s)
        reading_s = max(0.0, total_s - mil_s - encoding_s - tissue_s)
        levels = {
            level: reads - reads_before.get(level, 0)
            for level, reads in sorted(slide.stats.level_reads.items())
            if reads > reads_before.get(level, 0)
        }
        return Prediction(
            slide=slide.name,
            path=str(slide.path),
            task=m.task,
            probabilities={name: float(p) for name, p in zip(m.classes, reading.probabilities, strict=True)},
            predicted=m.classes[int(reading.probabilities.argmax())] if m.classes else "",
            boxes_l0=boxes_l0,
            attention=attention,
            seconds=Seconds(tissue_s, reading_s, encoding_s, mil_s, total_s),
            unreadable=len(seen.log.unreadable),
            bytes_read=None if bytes_before is None or bytes_after is None else bytes_after - bytes_before,
            scale=_scale_note(slide, prepared, levels),
            model={"folder": str(self.folder), "checksum": m.checksum, "created": m.created},
            overview=_closer_view(slide, prepared) if picture else prepared.overview,
            warnings=self._warnings(prepared, seen.log),
            value=None if reading.value is None else float(reading.value),
            survival=None if reading.survival is None else _curve(m.readout, reading.survival),
            median_risk=m.median_risk,
            is_risk=m.readout is not None and m.readout.meaning in ("cox", "hazards"),
        )

    def _warnings(self, prepared: PreparedSlide, log: ReadingLog) -> list[str]:
        notes = []
        low, _, high = self.manifest.trained_on.regions_per_slide
        count, scale = prepared.grid.num_regions, prepared.grid.scale
        if count < low:
            notes.append(
                f"little tissue: {_counted(count, 'region')}; 90 % of the training slides had {low:.0f} to {high:.0f}, "
                "so trust the answer less"
            )
        if log.unreadable:
            notes.append(f"{_counted(len(log.unreadable), 'region')} could not be decoded, left out: {log.first_error}")
        if prepared.overview.unreadable:
            lost = _counted(prepared.overview.unreadable, "block")
            notes.append(f"{lost} of the overview could not be decoded; tissue there was not looked at")
        if not scale.snapped:
            notes.append(
                f"regions were resampled: no power of two leads from {scale.mpp_l0:.4g} um/px of the slide to "
                f"{self.manifest.grid.lr_mpp:g} um/px of the model"
            )
        return notes


def load_bundle(folder: str | Path, *, device: str | torch.device = "auto") -> Bundle:
    """Load a deployed model. `device` is "auto" (a GPU where there is one), "cpu", "cuda", "mps" ...

    Raises:
        BundleError: no bundle there, another format, or altered files.
        ConfigError: this machine has no such device.
    """
    return Bundle(folder, device=device)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Resolve "auto" to CUDA, then Apple's MPS, then the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r}: {reason}", fix="`lrmil doctor` lists the devices.") from error
    return chosen


def _curve(readout: Readout | None, survival: npt.NDArray[np.floating]) -> dict[float, float]:
    times = () if readout is None else readout.times
    return {time: float(p) for time, p in zip(times, survival, strict=True)}


def _closer_view(slide: Slide, prepared: PreparedSlide) -> Overview:
    overview = prepared.overview
    closest_mpp = finest_overview_mpp(prepared.grid.scale)
    wanted_mpp = max(closest_mpp, overview.mpp * max(overview.scanned.shape) / _PICTURE_SIDE_PX)
    return slide.overview(wanted_mpp) if wanted_mpp < overview.mpp else overview


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _scale_note(slide: Slide, prepared: PreparedSlide, levels: dict[int, int]) -> dict[str, Any]:
    scale, by_index = prepared.grid.scale, {level.index: level for level in slide.levels}
    return {
        "dimensions_l0": list(slide.dimensions),
        "mpp_l0": slide.mpp,
        "mpp_source": slide.mpp_source,
        "working_mpp": scale.lr_mpp,
        "snapped": scale.snapped,
        "region_side_l0": scale.region_side_l0,
        "patch_px": scale.patch_px,
        "reader": slide.reader,
        "levels_opened": [
            {"level": level, "mpp": slide.mpp * by_index[level].downsample, "reads": reads}
            for level, reads in levels.items()
        ],
    }
