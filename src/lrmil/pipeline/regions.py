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
from lrmil.pipeline.config import HREncoderSettings
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
    """Targets from a 20x feature file that keeps the CLS of the distilled layers; read as they are needed."""

    def __init__(self, path: Path, layers: Sequence[int], attention: npt.NDArray[np.floating] | None = None) -> None:
        stored = map_rows(path, ["region", "slot", "features", *(f"layer_cls/{layer}" for layer in layers)])
        self._region, self._slot = stored["region"][:], stored["slot"][:]
        if (np.diff(self._region) < 0).any():
            raise BagError(f"{path}: children are not in the order of their regions.", fix="Encode the slide again.")
        self._cls = {layer: stored[f"layer_cls/{layer}"] for layer in layers}
        self._features, self._attention = stored["features"], attention

    def rows_with_children(self) -> IntArray:
        """See `TargetSource`."""
        return np.unique(self._region)

    def of(self, rows: IntArray) -> Targets:
        """See `TargetSource`."""
        first = np.searchsorted(self._region, rows, side="left")
        last = np.searchsorted(self._region, rows, side="right")
        children = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        cls = {layer: stored[children] for layer, stored in self._cls.items()}
        return self._targets(cls, np.repeat(np.arange(len(rows)), last - first), children)

    def _targets(self, cls: Mapping[int, npt.NDArray[np.floating]], position: IntArray, children: IntArray) -> Targets:
        """Add what the teacher head needs; `children` are rows of the feature file."""
        return Targets(
            cls=cls,
            region=position,
            slot=self._slot[children],
            embedding=None if self._attention is None else self._features[children],
            attention=None if self._attention is None else self._attention[children],
        )


class LiveTargets(CachedTargets):
    """Targets whose CLS the teacher encoder computes from the slide each time: slow, but no layers are stored.

    Which children could be read, and their embeddings, are in the 20x feature file all the same.
    """

    def __init__(
        self,
        path: Path,
        layers: Sequence[int],
        attention: npt.NDArray[np.floating] | None = None,
        *,
        entry: SlideEntry,
        grid: MatchedGrid,
        teacher: Encoder,
        settings: HREncoderSettings,
    ) -> None:
        super().__init__(path, (), attention)
        self._layers = tuple(layers)
        self._entry, self._grid, self._teacher, self._settings = entry, grid, teacher, settings
        # Rows of the feature file are children of the grid without those that could not be read.
        codes = grid.child_region * grid.scale.ratio**2 + grid.child_slot
        self._grid_row = np.searchsorted(codes, self._region * grid.scale.ratio**2 + self._slot)

    def of(self, rows: IntArray) -> Targets:
        """See `TargetSource`.

        Raises:
            TooManyUnreadable: none of the children can be decoded any more.
        """
        with self._entry.open() as slide:
            seen = encode_patches(
                slide,
                child_reads(self._grid, rows),
                self._grid.scale.patch_px,
                self._teacher,
                batch_size=self._settings.stream_batch,
                forward_batch=self._settings.batch_size,
                threads=1,
                precision=self._settings.precision,
                cls_layers=self._layers,
            )
        children = np.minimum(np.searchsorted(self._grid_row, seen.rows), len(self._grid_row) - 1)
        known = self._grid_row[children] == seen.rows
        position = np.full(self._grid.num_regions, -1, np.int64)
        position[rows] = np.arange(len(rows))
        cls = {layer: values[known] for layer, values in seen.cls.items()}
        return self._targets(cls, position[self._grid.child_region[seen.rows[known]]], children[known])


class CohortRegions:
    """Regions of several slides as one list, for `distil_encoder`. Regions without a child are left out.

    Args:
        slides: pixels and targets of each.
        split: which part of the cohort they are, for messages.
        foreign_seed: teach each region with the children of a region of another slide, drawn with this seed: a
            negative control. None: with its own.

    Raises:
        ConfigError: there is no region with a child, or too few slides to take children of others from.
    """

    def __init__(
        self, slides: Sequence[tuple[SlidePixels, TargetSource]], split: str, *, foreign_seed: int | None = None
    ) -> None:
        self._slides = slides
        pieces = []
        for index, (pixels, targets) in enumerate(slides):
            places = np.flatnonzero(np.isin(pixels.rows, targets.rows_with_children()))
            pieces.append(np.stack([np.full(len(places), index), places], axis=1))
        self._items = np.concatenate(pieces) if pieces else np.empty((0, 2), np.int64)
        if len(self._items) == 0:
            raise ConfigError(f"no region of the {split} split has a child to learn from.", fix="Use more slides.")
        self._taught = self._items
        if foreign_seed is not None:
            self._taught = self._items[of_other_slides(self._items[:, 0], foreign_seed, split)]

    def __len__(self) -> int:
        return len(self._items)

    def batch(self, indices: IntArray) -> RegionBatch:
        """Return these regions; see `RegionBatches`."""
        found = self._targets(self._taught[indices])
        layers = found[0][0].cls
        return RegionBatch(
            images=self._pictures(self._items[indices]),
            teacher_cls={layer: np.concatenate([t.cls[layer] for t, _ in found]) for layer in layers},
            region=np.concatenate([positions[t.region] for t, positions in found]),
            slot=np.concatenate([t.slot for t, _ in found]),
            teacher_embedding=_joined([t.embedding for t, _ in found]),
            teacher_attention=_joined([t.attention for t, _ in found]),
        )

    def _pictures(self, items: IntArray) -> npt.NDArray[np.uint8]:
        """Return the pixels of items (slide, place), in their order."""
        order, pictures = [], []
        for index in np.unique(items[:, 0]):
            positions = np.flatnonzero(items[:, 0] == index)
            order.append(positions)
            pictures.append(self._slides[index][0].images[items[positions, 1]])
        return np.concatenate(pictures)[np.argsort(np.concatenate(order))]

    def _targets(self, items: IntArray) -> list[tuple[Targets, IntArray]]:
        """Return the targets of items (slide, place) by slide, and at which positions of `items` its regions are."""
        found = []
        for index in np.unique(items[:, 0]):
            pixels, targets = self._slides[index]
            positions = np.flatnonzero(items[:, 0] == index)
            found.append((targets.of(pixels.rows[items[positions, 1]]), positions))
        return found


def of_other_slides(slide: IntArray, seed: int, split: str) -> IntArray:
    """Give each region one of another slide, and each to one: (n,) positions, drawn at random.

    Args:
        slide: (n,) slide of each region, 0...
        seed: of the draw.
        split: for messages.

    Raises:
        ConfigError: one slide has more than half of all regions.
    """
    if 2 * np.bincount(slide).max() > len(slide):
        raise ConfigError(
            f"stage1.children: foreign, but one slide has more than half of the regions of the {split} split.",
            fix="Use more slides.",
        )
    rng = np.random.default_rng(seed)
    given = rng.permutation(len(slide))
    while len(own := np.flatnonzero(slide[given] == slide)):
        for at, other in zip(own, rng.integers(0, len(slide), len(own)), strict=True):
            # A swap that helps one region must not give another its own slide back.
            if slide[given[other]] != slide[at] and slide[given[at]] != slide[other]:
                given[[at, other]] = given[[other, at]]
    return given


def _joined(parts: Sequence[npt.NDArray[np.floating] | None]) -> npt.NDArray[np.floating] | None:
    known = [p for p in parts if p is not None]
    return np.concatenate(known) if len(known) == len(parts) else None
