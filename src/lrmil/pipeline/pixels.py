"""LR pixels of the cohort: read from the slides once, then kept in memory, or in plain files where memory is short."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lrmil.files import atomic_path
from lrmil.geometry import IntArray, MatchedGrid
from lrmil.inference.stream import ReadingLog, region_reads, stream_patches
from lrmil.pipeline.context import Run, SlideEntry
from lrmil.pipeline.keys import tile_key

ImageArray = npt.NDArray[np.uint8]
COLOUR_BINS = 6
"""along each of red, green and blue"""
_READ_AHEAD = 256


class Images(Protocol):
    """(n, P, P, 3) uint8, in memory or in a file."""

    def __len__(self) -> int:
        """Return n."""
        ...

    def __getitem__(self, rows: slice | IntArray, /) -> ImageArray:
        """Return the images of these rows, in memory."""
        ...


@dataclass(frozen=True)
class SlidePixels:
    """The readable regions of one slide."""

    rows: IntArray
    """(n,) rows in the slide's grid, ascending"""
    images: Images
    """(n, P, P, 3)"""


@dataclass(frozen=True)
class FileImages:
    """Images in an .npy file, open only while it is read: a cohort has more slides than a process may open files."""

    path: Path
    count: int

    def __len__(self) -> int:
        """Return the number of images."""
        return self.count

    def __getitem__(self, rows: slice | IntArray, /) -> ImageArray:
        """Read the images of these rows."""
        return np.array(np.load(self.path, mmap_mode="r", allow_pickle=False)[rows])


class RegionPixels:
    """`pixels[slide_id]` gives the readable regions of a slide.

    Up to `memory_bytes` stay in memory; beyond that pixels go, uncompressed, to tiles/<slide>.pixels.npy in the run's
    folder, so that regions can be drawn from all slides in any order. In either case tiles/<slide>.regions.npz keeps
    which regions were readable, and their colour histogram.
    """

    def __init__(self, run: Run, grids: Mapping[str, MatchedGrid], memory_bytes: float) -> None:
        self._run, self._grids = run, grids
        self._room = memory_bytes
        self._known: dict[str, SlidePixels] = {}

    def __getitem__(self, slide_id: str) -> SlidePixels:
        """Return a slide's pixels, reading them if this is the first time.

        Raises:
            TooManyUnreadable: too many regions cannot be decoded.
            NotASlide: the file is gone.
        """
        if slide_id not in self._known:
            self._known[slide_id] = self._load(self._run.entry(slide_id))
        return self._known[slide_id]

    def is_known(self, slide_id: str) -> bool:
        """Say whether the slide, as it is now, was read before, in this run or an earlier one."""
        return self._record(self._run.entry(slide_id)) is not None

    def colours(self, slide_id: str) -> npt.NDArray[np.float64]:
        """Return the joint RGB histogram of a slide's regions: COLOUR_BINS**3 shares. Seldom reads any pixels."""
        entry = self._run.entry(slide_id)
        record = self._record(entry)
        if record is None:
            self._known[slide_id] = self._load(entry)
            record = self._record(entry)
        assert record is not None
        return record["colours"]

    def _load(self, entry: SlideEntry) -> SlidePixels:
        record_path, images_path = self._path(entry, ".regions.npz"), self._path(entry, ".pixels.npy")
        record = self._record(entry)
        if record is not None and images_path.is_file():
            return SlidePixels(record["rows"], FileImages(images_path, len(record["rows"])))
        rows, images = self._read(entry)
        # The record vouches for the pixels beside it, so it goes first and comes last.
        record_path.unlink(missing_ok=True)
        images_path.unlink(missing_ok=True)
        kept: Images = images
        if images.nbytes <= self._room:
            self._room -= images.nbytes
        else:
            with atomic_path(images_path) as scratch:
                np.save(scratch, images, allow_pickle=False)
            kept = FileImages(images_path, len(images))
        key = np.array(tile_key(self._run, entry))
        with atomic_path(record_path) as scratch:
            np.savez(scratch, allow_pickle=False, key=key, rows=rows, colours=colour_histogram(images))
        return SlidePixels(rows, kept)

    def _record(self, entry: SlideEntry) -> dict[str, npt.NDArray[Any]] | None:
        """Return what was noted about a slide, unless the slide or the settings have changed since."""
        try:
            with np.load(self._path(entry, ".regions.npz"), allow_pickle=False) as stored:
                if str(stored["key"]) == tile_key(self._run, entry):
                    return {name: stored[name] for name in ("rows", "colours")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
        return None

    def _path(self, entry: SlideEntry, suffix: str) -> Path:
        return self._run.folder.tiles(entry.slide_id).with_suffix(suffix)

    def _read(self, entry: SlideEntry) -> tuple[IntArray, ImageArray]:
        grid = self._grids[entry.slide_id]
        settings = self._run.settings
        log = ReadingLog()
        with entry.open() as slide:
            batches = list(
                stream_patches(
                    slide,
                    region_reads(grid),
                    grid.scale.patch_px,
                    batch_size=_READ_AHEAD,
                    threads=settings.threads,
                    log=log,
                )
            )
        log.raise_if_too_many(entry.slide_id, settings.tiles.max_unreadable)
        if log.unreadable:
            self._run.reporter.warn(f"{entry.slide_id}: {len(log.unreadable)} regions cannot be decoded, left out")
        return np.concatenate([b.rows for b in batches]), np.concatenate([b.images for b in batches])


def colour_histogram(images: ImageArray) -> npt.NDArray[np.float64]:
    """Return the joint RGB histogram of images (n, P, P, 3): COLOUR_BINS**3 shares, which sum to 1."""
    counts = np.zeros(COLOUR_BINS**3, np.int64)
    for image in images:
        red, green, blue = (image.reshape(-1, 3).astype(np.int64) * COLOUR_BINS // 256).T
        counts += np.bincount((red * COLOUR_BINS + green) * COLOUR_BINS + blue, minlength=len(counts))
    return counts / counts.sum()
