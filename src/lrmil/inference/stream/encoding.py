"""Patches of one slide, or of many, through an encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from lrmil.bags.bag import within_range
from lrmil.encoders import Embedded, Encoder, embed
from lrmil.encoders.settings import Precision
from lrmil.errors import ConfigError, NoTissue, SlideError
from lrmil.geometry import IntArray
from lrmil.inference.stream.batches import Batch, ImageArray, ReadingLog, SlideEnd, SlideReads, Source
from lrmil.inference.stream.feed import Feed
from lrmil.inference.stream.reads import Read
from lrmil.inference.stream.upload import batches_for, page_locked, uploaded
from lrmil.slides import Slide

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class EncodedPatches:
    """What an encoder said about the patches of one slide that could be decoded."""

    rows: IntArray
    """(n,) rows of the grid, in reading order"""
    embedding: FloatArray
    """(n, E)"""
    cls: dict[int, FloatArray]
    """{layer: (n, W)}, the layers that were asked for"""
    log: ReadingLog
    encoding_s: float
    """in the encoder; of a batch that holds patches of several slides, this slide's share"""


@dataclass(frozen=True)
class EncodedSlide:
    """One slide of many: its patches, or why there are none."""

    index: int
    """which of the sources"""
    opened: SlideReads | None
    """open until the next slide is asked for; None if it could not be opened"""
    encoded: EncodedPatches | None
    error: Exception | None


@dataclass
class _Parts:
    """What has been encoded of one slide so far."""

    rows: list[IntArray] = field(default_factory=list)
    embedding: list[FloatArray] = field(default_factory=list)
    cls: dict[int, list[FloatArray]] = field(default_factory=dict)
    encoding_s: float = 0.0
    error: Exception | None = None

    def join(self, log: ReadingLog) -> EncodedPatches:
        cls = {layer: np.concatenate(parts) for layer, parts in self.cls.items()}
        return EncodedPatches(np.concatenate(self.rows), np.concatenate(self.embedding), cls, log, self.encoding_s)


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
    """Read and encode patches of one slide that is open, and stays so.

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
        EncoderError: see `embed`.
    """
    results = encode_slides(
        [lambda: SlideReads(slide, reads, close=False)],
        patch_px,
        encoder,
        batch_size=batch_size,
        threads=threads,
        precision=precision,
        cls_layers=cls_layers,
        dtype=dtype,
        max_unreadable=max_unreadable,
        forward_batch=forward_batch,
        on_progress=None if on_progress is None else lambda _, done: on_progress(done),
    )
    (result,) = results
    if result.error is not None:
        raise result.error
    assert result.encoded is not None
    return result.encoded


def encode_slides(
    sources: Iterable[Source],
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
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[EncodedSlide]:
    """Read and encode patches of many slides with one pool of threads, and yield the slides in order.

    The next slides are opened and read while the encoder works; a batch may hold patches of several slides. What fails
    with one slide (opening it, reading it, an encoder that overflows on it) is that slide's result. Only a
    `ConfigError` is raised, which would be the same for all.

    Args:
        sources: one for each slide.
        on_progress: called with the place of a slide among the sources, and the number of its patches done so far.

    The other arguments are those of `encode_patches`.
    """
    cuda = encoder.device.type == "cuda"
    encode = partial(embed, encoder, cls_layers=cls_layers, precision=precision, batch_size=forward_batch)
    parts: dict[int, _Parts] = {}
    with Feed(
        sources,
        patch_px,
        batch_size=batch_size,
        threads=threads,
        batches=batches_for(encoder.device),
        new_images=page_locked if cuda else None,
        reuse=True,
    ) as feed:
        for item in uploaded(feed, encoder.device):
            batch = item.batch
            if len(batch.rows):
                _encode_batch(batch, item.ready(), encode, parts, dtype)
                if on_progress:
                    for index in np.unique(batch.slides).tolist():
                        on_progress(index, sum(map(len, parts[index].rows)))
            for end in batch.ends:
                yield _result(end, parts.pop(end.index, None), max_unreadable)
                feed.finish(end)


def _encode_batch(
    batch: Batch,
    images: ImageArray | torch.Tensor,
    encode: Callable[[ImageArray | torch.Tensor], Embedded],
    parts: dict[int, _Parts],
    dtype: npt.DTypeLike,
) -> None:
    """Add what the encoder says about a batch to the parts of its slides."""
    starts = np.flatnonzero(np.diff(batch.slides, prepend=-1))
    places = {
        int(batch.slides[start]): slice(start, stop)
        for start, stop in zip(starts, [*starts[1:], len(batch.slides)], strict=True)
    }
    for index in places:
        parts.setdefault(index, _Parts())
    began = time.perf_counter()
    try:
        out = encode(images)
    except ConfigError:
        raise
    except Exception as error:
        if len(places) == 1:
            parts[next(iter(places))].error = error
            return
        # Each of its slides by itself, to see which one it is.
        for place in places.values():
            alone = Batch(batch.images, batch.slides[place], batch.rows[place], [], None)
            _encode_batch(alone, images[place], encode, parts, dtype)
        return
    seconds = time.perf_counter() - began
    for index, place in places.items():
        part = parts[index]
        # Copies: what is kept of a slide must not hold on to the rest of its batches.
        part.rows.append(batch.rows[place])
        part.embedding.append(within_range(np.array(out.embedding[place]), dtype))
        for layer, values in out.cls.items():
            part.cls.setdefault(layer, []).append(within_range(np.array(values[place]), dtype))
        part.encoding_s += seconds * (place.stop - place.start) / len(batch.rows)


def _result(end: SlideEnd, parts: _Parts | None, max_unreadable: float) -> EncodedSlide:
    if end.error is not None or end.opened is None:
        return EncodedSlide(end.index, end.opened, None, end.error)
    name = end.opened.slide.name
    if parts is not None and parts.error is not None:
        return EncodedSlide(end.index, end.opened, None, parts.error)
    try:
        if not end.opened.reads:
            raise NoTissue("no patch of it holds enough tissue.", slide=name, fix="Leave it out.")
        end.log.raise_if_too_many(name, max_unreadable)
    except SlideError as error:
        return EncodedSlide(end.index, end.opened, None, error)
    assert parts is not None
    return EncodedSlide(end.index, end.opened, parts.join(end.log), None)
