"""What stage 1 trains on: regions at low resolution, and what the teacher said about the children inside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lrmil.bags import map_rows
from lrmil.encoders import Encoder
from lrmil.errors import BagError, ConfigError
from lrmil.geometry import IntArray, MatchedGrid
from lrmil.inference.stream import child_reads, encode_patches
from lrmil.pipeline.context import SlideEntry
from lrmil.pipeline.pixels import SlidePixels
from lrmil.training.stage1 import RegionBatch


@dataclass(frozen=True)
class Targets:
    """What the teacher said about the children of some regions of one slide."""

    cls: Mapping[int, npt.NDArray[np.floating]]
    """{layer: (M, W)}"""
    region: IntArray
    """(M,) position 0.. in the list of rows that was asked for"""
    slot: IntArray
    """(M,)"""
    embedding: npt.NDArray[np.floating] | None = None
    """(M, E), where the bag has it"""
    attention: npt.NDArray[np.floating] | None = None
    """(M,), where a teacher head gave it"""


class TargetSource(Protocol):
    """Targets of one slide, from a cache or computed when asked for."""

    def rows_with_children(self) -> IntArray:
        """Return the rows of the grid's regions that have at least one target, ascending."""
        ...

    def of(self, rows: IntArray) -> Targets:
        """Return the targets of these rows of the grid."""
        ...


class CachedTargets:
    """Targets from a feature file that keeps the CLS of the distilled layers; mapped, so that a cohort need not fit."""

    def __init__(self, path: Path, layers: Sequence[int], attention: npt.NDArray[np.floating] | None = None) -> None:
        names = {layer: f"layer_cls/{layer}" for layer in layers}
        stored = map_rows(path, ["region", "slot", "features", *names.values()])
        self._region, self._slot = np.asarray(stored["region"]), np.asarray(stored["slot"])
        if (np.diff(self._region) < 0).any():
            raise BagError(f"{path}: children are not in the order of their regions.", fix="Encode the slide again.")
        self._cls = {layer: stored[name] for layer, name in names.items()}
        self._embedding = None if attention is None else stored["features"]
        self._attention = attention

    def rows_with_children(self) -> IntArray:
        """See `TargetSource`."""
        return np.unique(self._region)

    def of(self, rows: IntArray) -> Targets:
        """See `TargetSource`."""
        first = np.searchsorted(self._region, rows, side="left")
        last = np.searchsorted(self._region, rows, side="right")
        counts = last - first
        chosen = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        return Targets(
            cls={layer: values[chosen] for layer, values in self._cls.items()},
            region=np.repeat(np.arange(len(rows)), counts),
            slot=self._slot[chosen],
            embedding=None if self._embedding is None else self._embedding[chosen],
            attention=None if self._attention is None else self._attention[chosen],
        )


class LiveTargets:
    """Targets that the teacher encoder computes from the slide each time: slow, but nothing is stored."""

    def __init__(self, entry: SlideEntry, grid: MatchedGrid, teacher: Encoder, layers: Sequence[int]) -> None:
        self._entry, self._grid, self._teacher, self._layers = entry, grid, teacher, tuple(layers)

    def rows_with_children(self) -> IntArray:
        """See `TargetSource`."""
        return np.flatnonzero(self._grid.children_per_region > 0)

    def of(self, rows: IntArray) -> Targets:
        """See `TargetSource`.

        Raises:
            TooManyUnreadable: none of the children can be decoded.
        """
        with self._entry.open() as slide:
            seen = encode_patches(
                slide,
                child_reads(self._grid, rows),
                self._grid.scale.patch_px,
                self._teacher,
                batch_size=64,
                threads=1,
                cls_layers=self._layers,
            )
        position = {int(row): i for i, row in enumerate(rows)}
        return Targets(
            cls=seen.cls,
            region=np.array([position[int(r)] for r in self._grid.child_region[seen.rows]], dtype=np.int64),
            slot=self._grid.child_slot[seen.rows],
        )


class CohortRegions:
    """Regions of several slides as one list, for `distil_encoder`. Regions without a child are left out."""

    def __init__(self, slides: Sequence[tuple[SlidePixels, TargetSource]], split: str) -> None:
        self._slides = slides
        pieces = []
        for index, (pixels, targets) in enumerate(slides):
            places = np.flatnonzero(np.isin(pixels.rows, targets.rows_with_children()))
            pieces.append(np.stack([np.full(len(places), index), places], axis=1))
        self._items = np.concatenate(pieces) if pieces else np.empty((0, 2), np.int64)
        if len(self._items) == 0:
            raise ConfigError(f"no region of the {split} split has a child to learn from.", fix="Use more slides.")

    def __len__(self) -> int:
        return len(self._items)

    def batch(self, indices: IntArray) -> RegionBatch:
        """Return these regions; see `RegionBatches`."""
        items = self._items[indices]
        images: list[npt.NDArray[np.uint8] | None] = [None] * len(items)
        found: list[tuple[Targets, IntArray]] = []
        for index in np.unique(items[:, 0]):
            pixels, targets = self._slides[index]
            positions = np.flatnonzero(items[:, 0] == index)
            places = items[positions, 1]
            for position, place in zip(positions, places, strict=True):
                images[position] = pixels.images[place]
            found.append((targets.of(pixels.rows[places]), positions))
        layers = found[0][0].cls
        return RegionBatch(
            images=np.stack([image for image in images if image is not None]),
            teacher_cls={layer: np.concatenate([t.cls[layer] for t, _ in found]) for layer in layers},
            region=np.concatenate([positions[t.region] for t, positions in found]),
            slot=np.concatenate([t.slot for t, _ in found]),
            teacher_embedding=_joined([t.embedding for t, _ in found]),
            teacher_attention=_joined([t.attention for t, _ in found]),
        )


def _joined(parts: Sequence[npt.NDArray[np.floating] | None]) -> npt.NDArray[np.floating] | None:
    known = [p for p in parts if p is not None]
    return np.concatenate(known) if len(known) == len(parts) else None
