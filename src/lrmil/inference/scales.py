"""A slide file as a source of patches: each is read and encoded when a head asks for it, once, and never unasked.

What this costs is counted scale by scale. Patches that cannot be decoded are not replaced: `fetch` raises
`PatchesLost`, which no head catches, and the source goes on without them. `selective.answer_slide` then asks the head
again; what is encoded already is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrmil.encoders import Encoder
from lrmil.encoders.settings import Precision
from lrmil.errors import TooManyUnreadable, UnreadableRegion
from lrmil.geometry import IntArray, MatchedGrid
from lrmil.inference.layouts import layouts_for, patch_reads
from lrmil.inference.stream import ReadingLog, encode_patches
from lrmil.inference.thumbnails import read_thumbnails
from lrmil.slides import Slide, io_counter

THUMBNAIL = "thumbnail"
"""Name of the thumbnails beside the scales, in `SlideScales.costs`"""


class PatchesLost(UnreadableRegion):
    """Some patches that were asked for cannot be decoded. The source has left them out: ask it afresh."""


@dataclass
class ScaleCost:
    """What was asked of the slide, and of the encoder, for one scale."""

    patches_read: int = 0
    """patches cut from the slide"""
    patches_encoded: int = 0
    reads: int = 0
    """blocks of pixels asked of the file"""
    source_px: int = 0
    """pixels of the file's levels that were read, those around the patches with them"""
    bytes_read: int | None = 0
    """bytes that the process read meanwhile; None where the system does not tell"""
    reading_s: float = 0.0
    """waiting for pixels; reader threads run beside the encoder"""
    encoding_s: float = 0.0

    def as_json(self) -> dict[str, int | float | None]:
        """Return the counts and seconds by name."""
        return asdict(self)


class SlideScales:
    """A `PatchSource` over an open slide. `scales` are those of a head: `MultiScaleHead.scales`.

    Rows are those of `layouts`, without the ones left out because they cannot be decoded; `original` translates.
    """

    def __init__(
        self,
        slide: Slide,
        grid: MatchedGrid,
        encoder: Encoder | None,
        scales: Sequence[str],
        *,
        batch_size: int = 64,
        threads: int = 2,
        precision: Precision = "auto",
        forward_batch: int | None = None,
        max_unreadable: float = 0.2,
    ) -> None:
        """Lay the scales over the slide. Reads no pixels.

        Args:
            slide: stays open for as long as something is asked of this.
            grid: the slide's.
            encoder: on the device where it should work; None where thumbnails alone are wanted.
            scales: see `layouts_for`.
            batch_size: patches that readers put together for the encoder.
            threads: reader threads.
            precision: of the encoder.
            forward_batch: images in one forward pass; None: what suits the device.
            max_unreadable: share of the regions (of the children, where the head reads one scale) that may be lost.

        Raises:
            SlideTooCoarse, NoTissue, ConfigError: see `layouts_for`.
        """
        self.layouts = layouts_for(scales, grid, slide=slide.name)
        self._slide, self._grid, self._encoder = slide, grid, encoder
        self._threads, self._max_unreadable = threads, max_unreadable
        self._batch_size, self._precision, self._forward_batch = batch_size, precision, forward_batch
        self._rows = {scale: np.arange(len(layout)) for scale, layout in self.layouts.items()}
        # Row of each patch in the features of its scale; -1 where it has not been encoded.
        self._place = {scale: np.full(len(layout), -1) for scale, layout in self.layouts.items()}
        self._features: dict[str, npt.NDArray[np.float32]] = {}
        self._thumbnails: npt.NDArray[np.uint8] | None = None
        self.costs: dict[str, ScaleCost] = {scale: ScaleCost() for scale in self.layouts}
        self.seconds = 0.0
        """spent in `fetch` and `thumbnails`"""
        self.lost = 0
        """patches that could not be decoded"""

    @property
    def counts(self) -> Mapping[str, int]:
        """How many patches there are at each scale, coarsest first."""
        return {scale: len(rows) for scale, rows in self._rows.items()}

    def original(self, scale: str, rows: Tensor | None = None) -> IntArray:
        """Return `rows` (n,) of this source, or all, as rows of `layouts[scale]`."""
        return self._rows[scale] if rows is None else self._rows[scale][rows.cpu().numpy()]

    def encoded(self, scale: str) -> IntArray:
        """Return the rows of `layouts[scale]` that have been encoded, ascending."""
        return np.flatnonzero(self._place[scale] >= 0)

    def remember(self, scale: str, rows: IntArray, features: npt.NDArray[np.floating]) -> None:
        """Take features (n, E) of `rows` (n,) of `layouts[scale]` as known: these are not read, encoded or counted."""
        new = self._place[scale][rows] < 0
        known = self._features.get(scale)
        first = 0 if known is None else len(known)
        self._place[scale][rows[new]] = np.arange(first, first + int(new.sum()))
        added = features[new].astype(np.float32, copy=False)
        self._features[scale] = added if known is None else np.concatenate([known, added])

    def fetch(self, scale: str, rows: Tensor) -> Tensor:
        """Return the features (n, E) float32 of `rows` (n,), on the CPU; read and encode those not known yet.

        Raises:
            PatchesLost: some cannot be decoded.
            TooManyUnreadable: so many that the slide is given up.
        """
        wanted = self.original(scale, rows)
        missing = np.unique(wanted[self._place[scale][wanted] < 0])
        if len(missing):
            with self._counted(scale) as cost:
                log = self._encode(scale, missing, cost)
            self._leave_out(scale, log)
        if not len(wanted):
            width = self._features[scale].shape[1] if scale in self._features else self._required_encoder().embed_dim
            return torch.empty((0, width), dtype=torch.float32)
        return torch.from_numpy(self._features[scale][self._place[scale][wanted]])

    def thumbnails(self) -> Tensor:
        """Return a thumbnail (N, t, t, 3) uint8 of every patch of the finest scale; see `read_thumbnails`.

        Raises:
            PatchesLost, TooManyUnreadable: as `fetch`.
        """
        finest = list(self.layouts)[-1]
        if self._thumbnails is None:
            cost = self.costs.setdefault(THUMBNAIL, ScaleCost())
            with self._counted(THUMBNAIL):
                images, log = read_thumbnails(self._slide, self._grid, self.layouts[finest], threads=self._threads)
            cost.patches_read += log.patches
            self._thumbnails = images
            self._leave_out(finest, log)
        return torch.from_numpy(self._thumbnails[self._rows[finest]])

    def _encode(self, scale: str, rows: IntArray, cost: ScaleCost) -> ReadingLog:
        layout, patch_px = self.layouts[scale], self._grid.scale.patch_px
        try:
            seen = encode_patches(
                self._slide,
                patch_reads(layout, rows, patch_px, snapped=self._grid.scale.snapped),
                patch_px,
                self._required_encoder(),
                batch_size=self._batch_size,
                forward_batch=self._forward_batch,
                threads=self._threads,
                precision=self._precision,
            )
        except TooManyUnreadable as error:
            # Of these few patches none can be decoded, which need not mean that the slide is lost.
            return ReadingLog(unreadable=rows.tolist(), first_error=error.message)
        self.remember(scale, seen.rows, seen.embedding)
        cost.patches_read += seen.log.patches
        cost.patches_encoded += len(seen.rows)
        cost.encoding_s += seen.encoding_s
        return seen.log

    def _leave_out(self, scale: str, log: ReadingLog) -> None:
        """Go on without what cannot be decoded: without its region where a head reads several scales."""
        if not log.unreadable:
            return
        self.lost += len(log.unreadable)
        if len(self.layouts) > 1:
            regions = np.unique(self.layouts[scale].region[log.unreadable])
            for name, rows in self._rows.items():
                self._rows[name] = rows[~np.isin(self.layouts[name].region[rows], regions)]
        else:
            self._rows[scale] = np.setdiff1d(self._rows[scale], log.unreadable)
        coarsest = next(iter(self.layouts))
        total, left = len(self.layouts[coarsest]), len(self._rows[coarsest])
        if total - left > self._max_unreadable * total or left == 0:
            raise TooManyUnreadable(
                f"{total - left} of {total} patches of scale {coarsest!r}, or parts of them, cannot be decoded, where "
                f"{self._max_unreadable:.0%} are allowed (max_unreadable). The first: {log.first_error}",
                slide=self._slide.name,
                fix="Copy the file again from its source.",
            )
        raise PatchesLost(
            f"{len(log.unreadable)} patches of scale {scale!r} cannot be decoded. The first: {log.first_error}",
            slide=self._slide.name,
            fix="Ask again: they have been left out.",
        )

    @contextmanager
    def _counted(self, name: str) -> Iterator[ScaleCost]:
        """Add to the cost of a scale what is read from the file meanwhile, and the seconds."""
        cost, stats = self.costs[name], self._slide.stats
        reads, source_px, bytes_before, encoded_s = stats.reads, stats.source_px, io_counter(), cost.encoding_s
        began = time.perf_counter()
        try:
            yield cost
        finally:
            seconds, bytes_after = time.perf_counter() - began, io_counter()
            self.seconds += seconds
            cost.reading_s += max(0.0, seconds - (cost.encoding_s - encoded_s))
            cost.reads += stats.reads - reads
            cost.source_px += stats.source_px - source_px
            known = None not in (cost.bytes_read, bytes_before, bytes_after)
            cost.bytes_read = cost.bytes_read + bytes_after - bytes_before if known else None  # type: ignore[operator]

    def _required_encoder(self) -> Encoder:
        if self._encoder is None:
            raise ValueError("this source was made without an encoder")
        return self._encoder
