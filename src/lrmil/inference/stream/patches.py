"""The patches of one slide, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lrmil.geometry import IntArray
from lrmil.inference.stream.batches import ImageArray, ReadingLog, SlideReads
from lrmil.inference.stream.feed import Feed
from lrmil.inference.stream.reads import Read
from lrmil.slides import Slide


@dataclass(frozen=True)
class PatchBatch:
    """Some patches of one slide."""

    rows: IntArray
    """(B,) rows of the grid"""
    images: ImageArray
    """(B, P, P, 3)"""


def stream_patches(
    slide: Slide, reads: Sequence[Read], patch_px: int, *, batch_size: int, threads: int, log: ReadingLog
) -> Iterator[PatchBatch]:
    """Yield the patches of `reads` in order, in batches of `batch_size`; `log` is filled on the way.

    Patches that cannot be decoded are left out and entered in `log.unreadable`; nothing is put in their place. While a
    batch is worked on, `threads` threads read the next one, and no further: two batches (and what is left of a read
    that does not fit) are in memory at most.

    Raises:
        SlideError: the slide cannot be read any more, for another reason than damage.
    """
    with Feed(
        [lambda: SlideReads(slide, reads, close=False)], patch_px, batch_size=batch_size, threads=threads
    ) as feed:
        for batch in feed:
            for end in batch.ends:
                if end.error is not None:
                    raise end.error
                log.unreadable += end.log.unreadable
                log.first_error = log.first_error or end.log.first_error
            log.patches += len(batch.rows)
            if len(batch.rows):
                yield PatchBatch(batch.rows, batch.images)
            feed.free(batch)
