"""What goes into a feed, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lrmil.errors import TooManyUnreadable
from lrmil.geometry import IntArray
from lrmil.inference.stream.reads import Read
from lrmil.slides import Slide

ImageArray = npt.NDArray[np.uint8]


@dataclass
class ReadingLog:
    """How reading the patches of one slide went."""

    patches: int = 0
    """how many could be decoded"""
    unreadable: list[int] = field(default_factory=list)
    """rows of those that could not"""
    first_error: str | None = None

    def raise_if_too_many(self, slide: str, limit: float) -> None:
        """Raise `TooManyUnreadable` if more than the share `limit` of the patches could not be decoded, or all."""
        total = self.patches + len(self.unreadable)
        if self.unreadable and (len(self.unreadable) > limit * total or self.patches == 0):
            raise TooManyUnreadable(
                f"{len(self.unreadable)} of {total} patches cannot be decoded, where {limit:.0%} are allowed "
                f"(max_unreadable). The first: {self.first_error}",
                slide=slide,
                fix="Copy the file again from its source.",
            )


@dataclass(frozen=True)
class SlideReads:
    """An open slide, and what is to be read from it."""

    slide: Slide
    reads: Sequence[Read]
    close: bool = True
    """whether the feed closes it once it is done with"""
    note: Any = None
    """whatever its opener wants to hand on"""


Source = Callable[[], SlideReads]
"""Opens a slide and says what to read; called by another thread, some slides ahead.

What it raises is that slide's failure, but for `ConfigError`, which ends all."""


@dataclass(frozen=True)
class SlideEnd:
    """All patches of a slide have been handed out, or it has failed."""

    index: int
    """which of the sources"""
    opened: SlideReads | None
    """open until `Feed.finish`; None if it could not be opened"""
    log: ReadingLog
    error: Exception | None


@dataclass(eq=False)
class Batch:
    """Patches of one slide or several."""

    images: ImageArray
    """(B, P, P, 3)"""
    slides: IntArray
    """(B,) which of the sources each is of, ascending"""
    rows: IntArray
    """(B,) rows of that slide's grid"""
    ends: list[SlideEnd]
    """slides that end with this batch, in the order of the sources"""
    memory: ImageArray | None
    """what `images` is a part of, where it is to be used again"""
