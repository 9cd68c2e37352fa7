"""Features of all patches of all regions at three scales, tissue or not: what ZoomMIL trains on.

One folder a scale, features/<encoder>_<mpp>mpp_all/<slide>.h5, patches in the order of `inference.layouts`. Children
with tissue are taken from the 20x features that the teacher learns from, and regions from 5x features of the same
encoder, where these files are there; all others are encoded. A region of which any part cannot be decoded is left out
at all three scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrmil.bags import Bag, bag_is_current, map_rows, read_bag, write_bag
from lrmil.encoders import Encoder
from lrmil.errors import BagError, EncoderError, SlideError
from lrmil.geometry import IntArray, MatchedGrid
from lrmil.inference.layouts import ZOOM_SCALES, ScaleLayout, layouts_for, require_middle, scale_mpps
from lrmil.inference.scales import PatchesLost, SlideScales
from lrmil.mil import PatchSource, StoredScales
from lrmil.pipeline.context import Run, SlideEntry
from lrmil.pipeline.encode import features_name
from lrmil.pipeline.keys import bag_provenance, features_of
from lrmil.pipeline.live_scales import live_scales

_SLOTS = 1 << 20
"""More than the patches of a region"""


def encode_zoom(run: Run, grids: Mapping[str, MatchedGrid], encoder: Encoder) -> None:
    """Encode every slide that has not failed at all three scales, unless that is done.

    Raises:
        ConfigError: the magnifications leave no middle one.
    """
    require_middle(run.settings.grid.ratio)
    features = features_of(run, encoder)
    waiting = []
    for entry in run.entries():
        if entry.slide_id not in grids:
            continue
        try:
            layouts = layouts_for(ZOOM_SCALES, grids[entry.slide_id], slide=entry.slide_id)
        except SlideError as error:
            run.fail(entry.slide_id, "encode", error)
            continue
        paths = _paths(run, encoder, entry.slide_id)
        wanted = {scale: _provenance(run, entry, features, layout) for scale, layout in layouts.items()}
        if not all(bag_is_current(paths[scale], wanted[scale]) for scale in ZOOM_SCALES):
            waiting.append((entry, paths, wanted, sum(map(len, layouts.values()))))
    total = sum(count for *_, count in waiting)
    mpps = ", ".join(f"{mpp:g}" for mpp in scale_mpps(ZOOM_SCALES, run.settings.grid).values())
    title = f"Encoding all {total} patches of {len(waiting)} slides at {mpps} um/px with {encoder.card.name}"
    if not waiting:
        title = f"All patches of all slides are encoded at {mpps} um/px with {encoder.card.name}"
    with run.reporter.stage("encode", title), run.reporter.task("encode", total) as progress:
        for entry, paths, wanted, count in waiting:
            try:
                bags = _encode_slide(run, entry, grids[entry.slide_id], encoder, features, wanted)
                for scale, bag in bags.items():
                    write_bag(paths[scale], bag)
            except SlideError as error:
                run.fail(entry.slide_id, "encode", error)
            except EncoderError as error:
                raise type(error)(f"{entry.slide_id}: {error.message}", fix=error.fix) from error
            progress.advance(count, note=entry.slide_id)


def zoom_sources(
    run: Run, grids: Mapping[str, MatchedGrid], slides: Sequence[str], encoder: Encoder
) -> dict[str, PatchSource]:
    """Return the patches of `slides` that `encode_zoom` encoded, as float16.

    They are in memory up to `memory_gb`, and beyond that read when asked for.

    Raises:
        BagError: a file is missing, was made in another way, or does not fit the others of its slide.
    """
    features, room = features_of(run, encoder), run.settings.memory_gb * 2**30
    found: dict[str, PatchSource] = {}
    for slide_id in slides:
        entry, paths = run.entry(slide_id), _paths(run, encoder, slide_id)
        layouts = layouts_for(ZOOM_SCALES, grids[slide_id], slide=slide_id)
        places = {
            scale: read_bag(path, features=False, layers=(), expected=_provenance(run, entry, features, layouts[scale]))
            for scale, path in paths.items()
        }
        _require_whole_regions(paths, places, layouts)
        stored = FileScales(paths)
        found[slide_id] = stored
        if stored.nbytes <= room:
            room -= stored.nbytes
            found[slide_id] = stored.in_memory()
    return found


class FileScales:
    """Feature files as a `PatchSource`, coarsest scale first, of which no more is read than is asked for."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._rows = {scale: map_rows(path, ["features"])["features"] for scale, path in paths.items()}

    @property
    def counts(self) -> Mapping[str, int]:
        """How many patches there are at each scale, coarsest first."""
        return {scale: len(rows) for scale, rows in self._rows.items()}

    @property
    def nbytes(self) -> int:
        """What `in_memory` takes."""
        return sum(int(np.prod(rows.shape)) * rows.dtype.itemsize for rows in self._rows.values())

    def fetch(self, scale: str, rows: Tensor) -> Tensor:
        """Read the features (n, D) float32 of `rows` (n,)."""
        return torch.from_numpy(self._rows[scale][rows.cpu().numpy()]).float()

    def thumbnails(self) -> Tensor:
        """There are none.

        Raises:
            BagError: always.
        """
        raise BagError("these features were stored without thumbnails.")

    def in_memory(self) -> StoredScales:
        """Read everything."""
        return StoredScales({scale: torch.from_numpy(rows[:]) for scale, rows in self._rows.items()})


def _encode_slide(
    run: Run,
    entry: SlideEntry,
    grid: MatchedGrid,
    encoder: Encoder,
    features: dict[str, Any],
    provenance: Mapping[str, dict[str, Any]],
) -> dict[str, Bag]:
    s = run.settings
    with entry.open() as slide:
        source = live_scales(run, slide, grid, encoder, ZOOM_SCALES)
        for scale, asked_mpp, mpp in (
            ("low", s.grid.lr_mpp, grid.scale.lr_mpp),
            ("high", s.grid.hr_mpp, grid.scale.hr_mpp),
        ):
            path = _path(run, encoder, asked_mpp, "", entry.slide_id)
            if bag_is_current(path, bag_provenance(run, entry, features, mpp)):
                _take_over(source, scale, read_bag(path, layers=()))
        values = _all_features(source)
    low = ZOOM_SCALES[0]
    if left_out := len(source.layouts[low]) - source.counts[low]:
        run.reporter.warn(f"{entry.slide_id}: {left_out} regions hold patches that cannot be decoded and are left out")
    bags = {}
    for scale, layout in source.layouts.items():
        rows = source.original(scale)
        bags[scale] = Bag(
            features=values[scale].astype(np.float16),
            coords_l0=layout.boxes_l0[rows, :2],
            slide=entry.slide_id,
            mpp_l0=grid.scale.mpp_l0,
            dimensions_l0=grid.dimensions_l0,
            patch_px=grid.scale.patch_px,
            patch_side_l0=layout.side_l0,
            mpp=layout.mpp,
            region=layout.region[rows],
            slot=layout.slot[rows],
            provenance=provenance[scale],
        )
    return bags


def _take_over(source: SlideScales, scale: str, bag: Bag) -> None:
    """Let a source know the features of a bag, whose patches are among its own."""
    layout = source.layouts[scale]
    codes = layout.region * _SLOTS + layout.slot
    order = np.argsort(codes)
    rows = order[np.searchsorted(codes[order], _codes(bag))]
    source.remember(scale, rows, bag.features)


def _all_features(source: SlideScales) -> dict[str, npt.NDArray[np.float32]]:
    while True:
        try:
            return {scale: source.fetch(scale, torch.arange(n)).numpy() for scale, n in source.counts.items()}
        except PatchesLost:
            continue


def _require_whole_regions(
    paths: Mapping[str, Path], places: Mapping[str, Bag], layouts: Mapping[str, ScaleLayout]
) -> None:
    """See that three files hold the same regions, each with all its patches, in the order of the layouts."""
    kept = places[ZOOM_SCALES[0]].region
    assert kept is not None
    for scale, layout in layouts.items():
        rows = np.isin(layout.region, kept)
        if not np.array_equal(_codes(places[scale]), (layout.region * _SLOTS + layout.slot)[rows]):
            raise BagError(
                f"{paths[scale]}: these are not all patches of the {len(kept)} regions beside them.",
                fix="Delete it and encode the slide again.",
            )


def _codes(bag: Bag) -> IntArray:
    """(N,) one number for each place within the grid; regions themselves have no slot."""
    assert bag.region is not None
    return bag.region * _SLOTS + (0 if bag.slot is None else bag.slot)


def _provenance(run: Run, entry: SlideEntry, features: dict[str, Any], layout: ScaleLayout) -> dict[str, Any]:
    return {**bag_provenance(run, entry, features, layout.mpp), "patches": "all of every region"}


def _paths(run: Run, encoder: Encoder, slide_id: str) -> dict[str, Path]:
    mpps = scale_mpps(ZOOM_SCALES, run.settings.grid)
    return {scale: _path(run, encoder, mpp, "_all", slide_id) for scale, mpp in mpps.items()}


def _path(run: Run, encoder: Encoder, mpp: float, suffix: str, slide_id: str) -> Path:
    return run.folder.bag(features_name(encoder, mpp, run.settings.encoder.random_seed) + suffix, slide_id)
