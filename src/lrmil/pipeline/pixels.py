"""LR pixels of the cohort: read from the slides once, then kept in memory, or in plain files where memory is short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lrmil.errors import TooManyUnreadable
from lrmil.files import atomic_path
from lrmil.geometry import IntArray, MatchedGrid
from lrmil.inference.stream import ReadingLog, region_reads, stream_patches
from lrmil.pipeline.context import Run, SlideEntry
from lrmil.pipeline.tile import tile_key

ImageArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SlidePixels:
    """The readable regions of one slide."""

    rows: IntArray
    """(n,) rows in the slide's grid, ascending"""
    images: ImageArray
    """(n, P, P, 3), in memory or mapped from a file"""


class RegionPixels:
    """`pixels[slide_id]` gives the readable regions of a slide.

    Up to `memory_bytes` stay in memory; beyond that pixels go, uncompressed, to tiles/<slide>.pixels.npy in the run's
    folder and are mapped, so that regions can be drawn from all slides in any order.
    """

    def __init__(self, run: Run, grids: Mapping[str, MatchedGrid], memory_bytes: float) -> None:
        self._run, self._grids = run, grids
        self._entries = {e.slide_id: e for e in run.entries()}
        self._room = memory_bytes
        self._known: dict[str, SlidePixels] = {}

    def __getitem__(self, slide_id: str) -> SlidePixels:
        """Return a slide's pixels, reading them if this is the first time.

        Raises:
            TooManyUnreadable: too many regions cannot be decoded.
            NotASlide: the file is gone.
        """
        if slide_id not in self._known:
            self._known[slide_id] = self._load(self._entries[slide_id])
        return self._known[slide_id]

    def _load(self, entry: SlideEntry) -> SlidePixels:
        path = self._run.folder.tiles(entry.slide_id).with_suffix(".pixels.npy")
        key_path = path.with_suffix(".key.npz")
        key = tile_key(self._run, entry)
        if path.is_file() and key_path.is_file():
            with np.load(key_path, allow_pickle=False) as stored:
                if str(stored["key"]) == key:
                    return SlidePixels(stored["rows"], np.load(path, mmap_mode="r", allow_pickle=False))
        found = self._read(entry)
        if found.images.nbytes <= self._room:
            self._room -= found.images.nbytes
            return found
        with atomic_path(path) as scratch:
            np.save(scratch, found.images, allow_pickle=False)
        with atomic_path(key_path) as scratch:
            np.savez(scratch, allow_pickle=False, key=np.array(key), rows=found.rows)
        return SlidePixels(found.rows, np.load(path, mmap_mode="r", allow_pickle=False))

    def _read(self, entry: SlideEntry) -> SlidePixels:
        grid = self._grids[entry.slide_id]
        settings = self._run.settings
        log = ReadingLog()
        with entry.open() as slide:
            batches = list(
                stream_patches(
                    slide,
                    region_reads(grid),
                    grid.scale.patch_px,
                    batch_size=256,
                    threads=settings.threads,
                    log=log,
                )
            )
        log.raise_if_too_many(entry.slide_id, settings.tiles.max_unreadable)
        if not batches:
            raise TooManyUnreadable(
                f"no region can be decoded; first: {log.first_error}",
                slide=entry.slide_id,
                fix="Copy the file again from its source.",
            )
        if log.unreadable:
            self._run.reporter.warn(f"{entry.slide_id}: {len(log.unreadable)} regions cannot be decoded, left out")
        return SlidePixels(np.concatenate([b.rows for b in batches]), np.concatenate([b.images for b in batches]))
