"""Where heads that choose their patches get them from: several magnifications of one slide, read row by row.

A head of many scales never holds a slide. It asks a `PatchSource` for the rows that it wants, so that the same head
runs on stored features (`StoredScales`) and on a slide whose patches are read and encoded when they are asked for.

Order of rows. The children of row i of a scale are rows r*i .. r*i + r-1 of the next finer one; none may be missing.
The order within those r is free, as long as it is the same for every parent.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from lrmil.errors import HeadError


class PatchSource(Protocol):
    """The patches of one slide at several scales. Every call may cost reading and encoding: ask once, for few rows."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How many patches there are at each scale, coarsest first."""
        ...

    def fetch(self, scale: str, rows: Tensor) -> Tensor:
        """Return the features (n, D) float32 of `rows` (n,) int64 of that scale, in that order."""
        ...

    def thumbnails(self) -> Tensor:
        """Return one small image for every patch of the finest scale, (N, h, w, 3) uint8, in the order of its rows."""
        ...


def ratio_between(counts: Mapping[str, int], coarse: str, fine: str) -> int:
    """Return how many patches of `fine` lie in one of `coarse`.

    Raises:
        HeadError: not the same whole number for every parent.
    """
    parents, children = counts[coarse], counts[fine]
    if parents < 1 or children < parents or children % parents:
        raise HeadError(
            f"scale {fine!r} has {children} patches for {parents} of {coarse!r}, which is no whole number for each.",
            fix="Keep all children of every patch, also those without tissue.",
        )
    return children // parents


def children_of(rows: Tensor, ratio: int) -> Tensor:
    """Return the rows (n * ratio,) of the children of `rows` (n,), parent by parent."""
    return (rows[:, None] * ratio + torch.arange(ratio, device=rows.device)).flatten()


def nested_slots(mid_side: int, high_side: int) -> Tensor:
    """Return the row-major slots of a region's finest patches in the order that keeps each middle patch's together.

    A region holds mid_side**2 middle patches and high_side**2 fine ones; both sides count patches along the region.
    Fine patches listed row by row (`geometry.MatchedGrid`) are not grouped by middle patch: indexing them with this
    (high_side**2,) int64 tensor does that.
    """
    if mid_side < 1 or high_side % mid_side:
        raise HeadError(f"{high_side} fine patches along a region do not divide into {mid_side} middle ones.")
    step = high_side // mid_side
    slots = torch.arange(high_side**2).reshape(mid_side, step, mid_side, step)
    return slots.permute(0, 2, 1, 3).flatten()


class StoredScales:
    """Features that are all in memory, as a `PatchSource`."""

    def __init__(
        self,
        scales: Mapping[str, Tensor],
        *,
        thumbnails: Tensor | None = None,
        parents: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Check and keep the features of one slide.

        Args:
            scales: features (N, D) of each scale, coarsest first, any float type. Not copied.
            thumbnails: (N, h, w, 3 or more) uint8, one for each patch of the finest scale; channels past 3 are dropped.
            parents: for any scale but the coarsest, the row (N,) of each patch's parent at the scale before; given,
                they are checked.

        Raises:
            HeadError: a scale is empty or no matrix, the children are not contiguous or not equally many for each
                parent, or there is not one thumbnail a patch.
        """
        if not scales:
            raise HeadError("a slide needs the features of at least one scale.")
        for name, features in scales.items():
            if features.ndim != 2 or not features.is_floating_point():
                raise HeadError(
                    f"scale {name!r} holds {features.dtype} of shape {tuple(features.shape)}, not floats (N, D)."
                )
            if len(features) == 0:
                raise HeadError(f"there are no patches at scale {name!r}.", fix="Leave slides without patches out.")
        self._scales = dict(scales)
        self._counts = {name: len(features) for name, features in scales.items()}
        names = list(scales)
        for coarse, fine in pairwise(names):
            ratio = ratio_between(self._counts, coarse, fine)
            if parents is not None and fine in parents:
                _check_parents(parents[fine], self._counts[coarse], ratio, fine)
        if parents is not None and (unknown := set(parents) - set(names[1:])):
            raise HeadError(f"parents are given for {sorted(unknown)}, but the scales are {names}, coarsest first.")
        self._thumbnails = None if thumbnails is None else _checked_thumbnails(thumbnails, self._counts[names[-1]])

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process as arrays, which several of them can map from one file."""
        thumbnails = None if self._thumbnails is None else self._thumbnails.cpu().numpy()
        return {"scales": {k: v.cpu().numpy() for k, v in self._scales.items()}, "thumbnails": thumbnails}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` packed; it was checked there."""
        self._scales = {name: _tensor(rows) for name, rows in state["scales"].items()}
        self._counts = {name: len(rows) for name, rows in self._scales.items()}
        self._thumbnails = None if state["thumbnails"] is None else _tensor(state["thumbnails"])

    @property
    def counts(self) -> Mapping[str, int]:
        """How many patches there are at each scale, coarsest first."""
        return self._counts

    def fetch(self, scale: str, rows: Tensor) -> Tensor:
        """Return the features (n, D) float32 of `rows` (n,) int64. All rows in their order: nothing is copied."""
        features = self._scales[scale]
        rows = rows.to(features.device)
        if len(rows) == len(features) and torch.equal(rows, torch.arange(len(features), device=features.device)):
            return features.float()
        return features[rows].float()

    def thumbnails(self) -> Tensor:
        """Return the small images (N, h, w, 3) uint8.

        Raises:
            HeadError: none were given.
        """
        if self._thumbnails is None:
            raise HeadError("this slide was stored without thumbnails.", fix="Give StoredScales(thumbnails=...).")
        return self._thumbnails


class RecordedSource:
    """A `PatchSource` that writes down what is asked of another one, so that a head's account can be checked."""

    def __init__(self, source: PatchSource) -> None:
        self._source = source
        self.fetched: dict[str, list[int]] = {}
        """The rows that were asked for, by scale, in order of asking"""
        self.thumbnail_reads = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """How many patches there are at each scale, coarsest first."""
        return self._source.counts

    def fetch(self, scale: str, rows: Tensor) -> Tensor:
        """Write `rows` down and pass them on."""
        self.fetched.setdefault(scale, []).extend(rows.tolist())
        return self._source.fetch(scale, rows)

    def thumbnails(self) -> Tensor:
        """Count, and pass on."""
        self.thumbnail_reads += 1
        return self._source.thumbnails()

    def check(self, selected: Mapping[str, Tensor]) -> None:
        """Compare what was read with what a head says that it selected.

        Raises:
            HeadError: a row was read twice, read but not selected, or selected but not read.
        """
        for scale in sorted(self.fetched.keys() | selected.keys()):
            read = self.fetched.get(scale, [])
            chosen = selected[scale].tolist() if scale in selected else []
            for fault, rows in (
                ("read twice", {row for row, times in Counter(read).items() if times > 1}),
                ("selected twice", {row for row, times in Counter(chosen).items() if times > 1}),
                ("read but not selected", set(read) - set(chosen)),
                ("selected but not read", set(chosen) - set(read)),
            ):
                if rows:
                    raise HeadError(f"{len(rows)} rows of scale {scale!r} were {fault}, first row {min(rows)}.")


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    with warnings.catch_warnings():  # mapped arrays cannot be written to, and nobody does
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(array)


def _check_parents(parents: Tensor, count: int, ratio: int, scale: str) -> None:
    wanted = torch.arange(count, device=parents.device).repeat_interleave(ratio)
    if parents.shape != wanted.shape or not torch.equal(parents.to(wanted.dtype), wanted):
        raise HeadError(
            f"the patches at scale {scale!r} are not listed parent by parent, {ratio} each.",
            fix="Sort them by the row of their parent, and keep all children of every patch.",
        )


def _checked_thumbnails(thumbnails: Tensor, count: int) -> Tensor:
    if thumbnails.dtype != torch.uint8 or thumbnails.ndim != 4 or thumbnails.shape[3] < 3 or 0 in thumbnails.shape:
        raise HeadError(
            f"thumbnails are {thumbnails.dtype} of shape {tuple(thumbnails.shape)}, not uint8 (N, h, w, 3)."
        )
    if len(thumbnails) != count:
        raise HeadError(f"there are {len(thumbnails)} thumbnails for {count} patches.", fix="Give one for each patch.")
    return thumbnails[..., :3]
