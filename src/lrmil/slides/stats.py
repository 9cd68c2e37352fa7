"""Counters: what was asked of a slide, and how many bytes the process has read."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

from lrmil.slides.levels import Level


class ReadStats:
    """What was asked of one slide so far. Safe to update from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reads = 0
        """Blocks of pixels read from the file; an ordinary region is one, an overview several."""
        self.output_px = 0
        """Pixels handed out."""
        self.source_px = 0
        """Pixels of the levels that were read to make them."""
        self.level_reads: dict[int, int] = {}
        """Blocks read from each level, by index."""
        self.tiles_decoded = 0
        """Compressed tiles that were decoded, each time counted; only the readers that decode themselves can tell."""
        self.bytes_read = 0
        """Compressed bytes of those tiles."""
        self.unreadable = 0
        """Boxes, and blocks of overviews, that could not be decoded."""
        self.finest_mpp_asked = math.inf
        """Smallest um per pixel that was ever asked for."""

    def add_asked(self, mpp: float) -> None:
        """Note the scale of a request, whether or not it can be served."""
        with self._lock:
            self.finest_mpp_asked = min(self.finest_mpp_asked, mpp)

    def add_read(self, level: Level, output_px: int, source_px: int) -> None:
        """Count one block that was read."""
        with self._lock:
            self.reads += 1
            self.output_px += output_px
            self.source_px += source_px
            self.level_reads[level.index] = self.level_reads.get(level.index, 0) + 1

    def add_tiles(self, count: int, length_bytes: int) -> None:
        """Count compressed tiles that were read and decoded, and their bytes."""
        with self._lock:
            self.tiles_decoded += count
            self.bytes_read += length_bytes

    def add_unreadable(self) -> None:
        """Count one box that could not be decoded."""
        with self._lock:
            self.unreadable += 1

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, ready for JSON."""
        with self._lock:
            return {
                "reads": self.reads,
                "output_px": self.output_px,
                "source_px": self.source_px,
                "level_reads": {str(index): count for index, count in sorted(self.level_reads.items())},
                "tiles_decoded": self.tiles_decoded,
                "bytes_read": self.bytes_read,
                "unreadable": self.unreadable,
                "finest_mpp_asked": self.finest_mpp_asked if math.isfinite(self.finest_mpp_asked) else None,
            }


def io_counter() -> int | None:
    """Return how many bytes this process has read so far, or None where the system does not tell.

    Linux counts the bytes that read calls returned, whether they came from the disk or from the page cache. The
    difference over a phase is what the phase read; other threads of the process count too.
    """
    try:
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "rchar":
                return int(value)
    except (OSError, ValueError):
        pass
    return None
