"""Thumbnails of the children of every slide, in features/thumbnails_<mpp>mpp/<slide>.npz, read once for all folds."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lrmil.bags import Bag
from lrmil.errors import BagError, SlideError
from lrmil.files import atomic_path
from lrmil.geometry import MatchedGrid
from lrmil.inference.layouts import CHILD_SCALES
from lrmil.inference.scales import PatchesLost, SlideScales
from lrmil.inference.thumbnails import THUMBNAIL_FACTOR
from lrmil.mil import StoredScales
from lrmil.pipeline.context import Run, SlideEntry
from lrmil.pipeline.keys import tile_key
from lrmil.settings import fingerprint


def store_thumbnails(run: Run, grids: Mapping[str, MatchedGrid]) -> None:
    """Read the thumbnails of every slide that has not failed, unless they are there for the slide as it is now."""
    entries = [e for e in run.entries() if e.slide_id in grids]
    waiting = [e for e in entries if _load_thumbnails(run, e) is None]
    if not waiting:
        return
    mpp = _thumbnail_mpp(run)
    title = f"Reading thumbnails of the patches of {len(waiting)} slides at {mpp:g} um/px"
    with run.reporter.stage("encode", title), run.reporter.task("encode", len(waiting)) as progress:
        for entry in waiting:
            try:
                with entry.open() as slide:
                    source = SlideScales(
                        slide,
                        grids[entry.slide_id],
                        None,
                        CHILD_SCALES,
                        threads=run.settings.threads,
                        max_unreadable=run.settings.tiles.max_unreadable,
                    )
                    images = _all_thumbnails(source)
            except SlideError as error:
                run.fail(entry.slide_id, "encode", error)
                continue
            finally:
                progress.advance(note=entry.slide_id)
            if source.lost:
                run.reporter.warn(f"{entry.slide_id}: {source.lost} thumbnails cannot be decoded and are left out")
            layout, rows = source.layouts["high"], source.original("high")
            with atomic_path(_thumbnail_path(run, entry.slide_id)) as scratch:
                np.savez(
                    scratch,
                    allow_pickle=False,
                    key=np.array(_thumbnail_key(run, entry)),
                    region=layout.region[rows],
                    slot=layout.slot[rows],
                    images=images,
                )


def with_thumbnails(run: Run, entry: SlideEntry, grid: MatchedGrid, bag: Bag) -> StoredScales:
    """Join the teacher's bag of a slide with its thumbnails: the patches that have both.

    Raises:
        BagError: there are no thumbnails of the slide as it is now, or the bag does not say where its patches lie.
    """
    stored = _load_thumbnails(run, entry)
    if stored is None:
        raise BagError(
            f"{_thumbnail_path(run, entry.slide_id)}: no thumbnails of these patches.", fix="Encode the slide again."
        )
    slots = grid.scale.ratio**2
    if bag.region is None or bag.slot is None:
        raise BagError(f"{entry.slide_id}: the bag does not tell which patch is which.", fix="Encode the slide again.")
    _, here, there = np.intersect1d(
        bag.region * slots + bag.slot, stored["region"] * slots + stored["slot"], return_indices=True
    )
    features, images = bag.features, stored["images"]
    # Mostly it is all of them, in the same order: then nothing is copied.
    if not np.array_equal(here, np.arange(len(features))):
        features = features[here]
    if not np.array_equal(there, np.arange(len(images))):
        images = images[there]
    return StoredScales({"high": torch.from_numpy(features)}, thumbnails=torch.from_numpy(images))


def _all_thumbnails(source: SlideScales) -> npt.NDArray[np.uint8]:
    try:
        return source.thumbnails().numpy()
    except PatchesLost:
        return source.thumbnails().numpy()


def _load_thumbnails(run: Run, entry: SlideEntry) -> dict[str, npt.NDArray[Any]] | None:
    try:
        with np.load(_thumbnail_path(run, entry.slide_id), allow_pickle=False) as stored:
            if str(stored["key"]) != _thumbnail_key(run, entry):
                return None
            return {name: stored[name] for name in ("region", "slot", "images")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _thumbnail_mpp(run: Run) -> float:
    return run.settings.grid.hr_mpp * THUMBNAIL_FACTOR


def _thumbnail_path(run: Run, slide_id: str) -> Path:
    return run.folder.bag(f"thumbnails_{_thumbnail_mpp(run):g}mpp", slide_id).with_suffix(".npz")


def _thumbnail_key(run: Run, entry: SlideEntry) -> str:
    return fingerprint("thumbnails", tile_key(run, entry), _thumbnail_mpp(run))
