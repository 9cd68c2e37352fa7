"""From a slide to batches of patches: reader threads run ahead of the encoder, memory stays bounded.

A child patch costs almost as much to read as its whole region, so where the grid allows it (snapped scale) the children
of a region are cut from one read of it. The cut pixels equal those of single reads: both are box averages of the same
whole pixels of one level. (OpenSlide blends neighbours on levels whose size was rounded, see its reader; there the two
differ by about a grey level.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lrmil.bags.bag import within_range
from lrmil.encoders import Encoder, embed
from lrmil.encoders.settings import Precision
from lrmil.errors import NoTissue, TooManyUnreadable, UnreadableRegion
from lrmil.geometry import IntArray, MatchedGrid
from lrmil.slides import Slide

ImageArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Read:
    """One request to the reader, and the patches to cut from what it returns."""

    box_l0: tuple[int, int, int, int]
    size_px: tuple[int, int]
    """width and height of the picture that is asked for"""
    rows: IntArray
    """(n,) which patch each cut is, as a row of the grid's regions or children"""
    corners_px: IntArray
    """(n, 2) top-left (x, y) of each cut in the picture"""
    boxes_l0: IntArray
    """(n, 4) the cuts' own boxes, to read them one by one where the whole cannot be decoded"""


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
class PatchBatch:
    """Some patches of one slide."""

    rows: IntArray
    """(B,) rows of the grid"""
    images: ImageArray
    """(B, P, P, 3)"""


def region_reads(grid: MatchedGrid) -> list[Read]:
    """One read for each region, at the low resolution."""
    return [_single(row, box, grid.scale.patch_px) for row, box in enumerate(grid.region_boxes_l0)]


def child_reads(grid: MatchedGrid, regions: IntArray | None = None) -> list[Read]:
    """Reads for the children of all regions, or of the given ones, at the high resolution."""
    wanted = np.ones(grid.num_regions, bool)
    if regions is not None:
        wanted = np.isin(np.arange(grid.num_regions), regions)
    patch_px, ratio = grid.scale.patch_px, grid.scale.ratio
    starts = np.searchsorted(grid.child_region, np.arange(grid.num_regions + 1))
    reads: list[Read] = []
    for region in np.flatnonzero(wanted):
        rows = np.arange(starts[region], starts[region + 1])
        boxes = grid.child_boxes_l0[rows]
        if grid.scale.snapped and 2 * len(rows) > ratio * ratio:
            slots = grid.child_slot[rows]
            corners = np.stack([slots % ratio, slots // ratio], axis=1) * patch_px
            side = ratio * patch_px
            reads.append(Read(_as_box(grid.region_boxes_l0[region]), (side, side), rows, corners, boxes))
        else:
            reads += [_single(int(row), box, patch_px) for row, box in zip(rows, boxes, strict=True)]
    return reads


def stream_patches(
    slide: Slide, reads: Sequence[Read], patch_px: int, *, batch_size: int, threads: int, log: ReadingLog
) -> Iterator[PatchBatch]:
    """Yield the patches of `reads` in order, in batches of up to `batch_size`; `log` is filled on the way.

    Patches that cannot be decoded are left out and entered in `log.unreadable`; nothing is put in their place. While a
    batch is worked on, `threads` threads read the next one, and no further: two batches (or two reads a thread, if that
    is more) are in memory at most.
    """
    images: list[ImageArray] = []
    rows: list[int] = []
    for good_rows, pictures, result in _run_ahead(slide, reads, patch_px, max(1, threads), batch_size):
        log.unreadable += result.unreadable
        log.first_error = log.first_error or result.first_error
        log.patches += len(good_rows)
        rows += good_rows
        images += pictures
        while len(images) >= batch_size:
            yield PatchBatch(np.asarray(rows[:batch_size], dtype=np.int64), np.stack(images[:batch_size]))
            images, rows = images[batch_size:], rows[batch_size:]
    if images:
        yield PatchBatch(np.asarray(rows, dtype=np.int64), np.stack(images))


@dataclass(frozen=True)
class EncodedPatches:
    """What an encoder said about the patches of one slide that could be decoded."""

    rows: IntArray
    """(n,) rows of the grid, in reading order"""
    embedding: npt.NDArray[np.floating]
    """(n, E)"""
    cls: dict[int, npt.NDArray[np.floating]]
    """{layer: (n, W)}, the layers that were asked for"""
    log: ReadingLog
    encoding_s: float


def encode_patches(
    slide: Slide,
    reads: Sequence[Read],
    patch_px: int,
    encoder: Encoder,
    *,
    batch_size: int,
    threads: int,
    precision: Precision = "auto",
    cls_layers: Sequence[int] = (),
    dtype: npt.DTypeLike = np.float32,
    max_unreadable: float = 1.0,
    forward_batch: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> EncodedPatches:
    """Read and encode patches of one slide.

    Args:
        slide: where they are read.
        reads: see `region_reads` and `child_reads`; not empty.
        patch_px: side of a patch.
        encoder: what encodes them, where it is.
        batch_size: patches that are read ahead and handed over together.
        threads: reader threads.
        precision: see `embed`.
        cls_layers: blocks whose class tokens are wanted as well.
        dtype: of the result; what float16 cannot hold stays float32.
        max_unreadable: share of the patches that may be undecodable.
        forward_batch: images in one forward pass of the encoder; None: what suits the device.
        on_progress: called with the number of patches done so far.

    Raises:
        TooManyUnreadable: more than the share `max_unreadable` cannot be decoded, or all of them.
        NoTissue: there is no patch to read.
    """
    if not reads:
        raise NoTissue("no patch of it holds enough tissue.", slide=slide.name, fix="Leave it out.")
    log = ReadingLog()
    rows, embeddings = [], []
    cls: dict[int, list[npt.NDArray[np.floating]]] = {layer: [] for layer in cls_layers}
    encoding_s = 0.0
    for batch in stream_patches(slide, reads, patch_px, batch_size=batch_size, threads=threads, log=log):
        began = time.perf_counter()
        out = embed(encoder, batch.images, cls_layers=cls_layers, precision=precision, batch_size=forward_batch)
        encoding_s += time.perf_counter() - began
        rows.append(batch.rows)
        embeddings.append(within_range(out.embedding, dtype))
        for layer in cls_layers:
            cls[layer].append(within_range(out.cls[layer], dtype))
        if on_progress:
            on_progress(sum(map(len, rows)))
    log.raise_if_too_many(slide.name, max_unreadable)
    joined = {layer: np.concatenate(parts) for layer, parts in cls.items()}
    return EncodedPatches(np.concatenate(rows), np.concatenate(embeddings), joined, log, encoding_s)


_Result = tuple[list[int], list[ImageArray], ReadingLog]


def _run_ahead(
    slide: Slide, reads: Sequence[Read], patch_px: int, threads: int, patches_ahead: int
) -> Iterator[_Result]:
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        pending: deque[tuple[Future[_Result], int]] = deque()
        ahead = 0
        try:
            for read in reads:
                pending.append((pool.submit(_perform, slide, read, patch_px), len(read.rows)))
                ahead += len(read.rows)
                if ahead >= patches_ahead and len(pending) >= 2 * threads:
                    future, patches = pending.popleft()
                    ahead -= patches
                    yield future.result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()


def _perform(slide: Slide, read: Read, patch_px: int) -> _Result:
    rows: list[int] = read.rows.tolist()
    try:
        picture = slide.read_box(read.box_l0, read.size_px)
        return rows, [picture[y : y + patch_px, x : x + patch_px] for x, y in read.corners_px], ReadingLog()
    except UnreadableRegion as error:
        reason = error.message.removeprefix(f"{error.slide}: ")
    if len(rows) == 1:
        return [], [], ReadingLog(unreadable=rows, first_error=reason)
    # One bad tile need not cost the whole region: ask for its children one by one.
    log = ReadingLog(first_error=reason)
    good: list[int] = []
    pictures: list[ImageArray] = []
    for row, box in zip(rows, read.boxes_l0, strict=True):
        try:
            pictures.append(slide.read_box(_as_box(box), (patch_px, patch_px)))
            good.append(row)
        except UnreadableRegion:
            log.unreadable.append(row)
    return good, pictures, log


def _single(row: int, box: IntArray, patch_px: int) -> Read:
    return Read(_as_box(box), (patch_px, patch_px), np.array([row]), np.zeros((1, 2), np.int64), box[None])


def _as_box(box: IntArray) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (int(v) for v in box)
    return x0, y0, x1, y1
