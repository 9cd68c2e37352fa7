"""Stage "encode": features of the frozen encoder, for the children (20x) and, as a baseline, for the regions (5x)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lrmil.bags import Bag, bag_is_current, write_bag
from lrmil.encoders import Encoder, embed
from lrmil.errors import EncoderError, LrmilError, NoTissue, SlideTooCoarse
from lrmil.geometry import MatchedGrid
from lrmil.inference.stream import child_reads, encode_patches
from lrmil.pipeline.context import Run, SlideEntry
from lrmil.pipeline.pixels import RegionPixels
from lrmil.pipeline.tile import tile_key
from lrmil.slides import Slide


def encode_children(run: Run, grids: Mapping[str, MatchedGrid], encoder: Encoder, layers: Sequence[int]) -> None:
    """Encode the children of every slide at high resolution, with the CLS of the distilled `layers` (may be empty).

    A slide without a single child cannot train (too coarse, or too little tissue); it is noted as a failure.
    """
    name = features_name(encoder, run.settings.grid.hr_mpp, run.settings.encoder.random_seed)
    entries = [e for e in run.entries() if e.slide_id in grids]
    described = encoder.describe()
    total = sum(grids[e.slide_id].num_children for e in entries)
    with (
        run.reporter.stage("encode", f"Encoding {total} patches at {run.settings.grid.hr_mpp:g} um/px with {name}"),
        run.reporter.task("encode", total) as progress,
    ):
        for entry in entries:
            grid = grids[entry.slide_id]
            path = run.folder.bag(name, entry.slide_id)
            provenance = bag_provenance(run, entry, described, grid.scale.hr_mpp, layers)
            if not bag_is_current(path, provenance):
                try:
                    _require_children(grid, entry.slide_id, run.settings.grid.hr_mpp)
                    with entry.open() as slide:
                        bag = _encode(run, entry.slide_id, slide, grid, encoder, layers, provenance)
                    write_bag(path, bag)
                except LrmilError as error:
                    if isinstance(error, EncoderError):
                        raise
                    run.fail(entry.slide_id, "encode", error)
            progress.advance(grid.num_children, note=entry.slide_id)


def encode_regions(
    run: Run, grids: Mapping[str, MatchedGrid], encoder: Encoder, pixels: RegionPixels, name: str, *, title: str
) -> None:
    """Encode every slide's regions at low resolution into features/`name`/, from pixels that are read only once."""
    entries = [e for e in run.entries() if e.slide_id in grids]
    described = encoder.describe()
    total = sum(grids[e.slide_id].num_regions for e in entries)
    with run.reporter.stage("encode", title), run.reporter.task("encode", total) as progress:
        for entry in entries:
            grid = grids[entry.slide_id]
            path = run.folder.bag(name, entry.slide_id)
            provenance = bag_provenance(run, entry, described, grid.scale.lr_mpp, ())
            if not bag_is_current(path, provenance):
                try:
                    write_bag(path, region_bag(run, entry, grid, encoder, pixels, provenance))
                except LrmilError as error:
                    if isinstance(error, EncoderError):
                        raise
                    run.fail(entry.slide_id, "encode", error)
            progress.advance(grid.num_regions, note=entry.slide_id)


def region_bag(
    run: Run,
    entry: SlideEntry,
    grid: MatchedGrid,
    encoder: Encoder,
    pixels: RegionPixels,
    provenance: dict[str, Any],
) -> Bag:
    """Encode the readable regions of one slide."""
    found = pixels[entry.slide_id]
    rows, images = found.rows, found.images
    batch = run.settings.encoder.stream_batch
    features = [
        embed(encoder, images[i : i + batch], precision=run.settings.encoder.precision).embedding
        for i in range(0, len(rows), batch)
    ]
    return Bag(
        features=np.concatenate(features).astype(np.float16),
        coords_l0=grid.region_boxes_l0[rows, :2],
        slide=entry.slide_id,
        mpp_l0=grid.scale.mpp_l0,
        dimensions_l0=grid.dimensions_l0,
        patch_px=grid.scale.patch_px,
        patch_side_l0=grid.scale.region_side_l0,
        mpp=grid.scale.lr_mpp,
        region=rows,
        provenance=provenance,
    )


def features_name(encoder: Encoder, mpp: float, random_seed: int | None = None) -> str:
    """Return the folder name of an encoder's features at a scale, like "conch_v1_0.5mpp"."""
    name = encoder.card.name.replace("/", "-") + ("" if random_seed is None else f"_random{random_seed}")
    return f"{name}_{mpp:g}mpp"


def bag_provenance(
    run: Run, entry: SlideEntry, described: dict[str, Any], mpp: float, layers: Sequence[int]
) -> dict[str, Any]:
    """Return what a feature file depends on; another provenance means that it must be made again.

    `described` is `Encoder.describe()`, which hashes all weights and so is called once for many slides.
    """
    return {
        "tiles": tile_key(run, entry),
        "encoder": described,
        "mpp": mpp,
        "cls_layers": sorted(layers),
        "precision": run.settings.encoder.precision,
    }


def _encode(
    run: Run,
    entry_id: str,
    slide: Slide,
    grid: MatchedGrid,
    encoder: Encoder,
    layers: Sequence[int],
    provenance: dict[str, Any],
) -> Bag:
    s = run.settings
    seen = encode_patches(
        slide,
        child_reads(grid),
        grid.scale.patch_px,
        encoder,
        batch_size=s.encoder.stream_batch,
        threads=s.threads,
        precision=s.encoder.precision,
        cls_layers=layers,
        dtype=np.float16,
        max_unreadable=s.tiles.max_unreadable,
    )
    if seen.log.unreadable:
        run.reporter.warn(f"{entry_id}: {len(seen.log.unreadable)} patches cannot be decoded and are left out")
    order = seen.rows
    return Bag(
        features=seen.embedding.astype(np.float16, copy=False),
        coords_l0=grid.child_boxes_l0[order, :2],
        slide=entry_id,
        mpp_l0=grid.scale.mpp_l0,
        dimensions_l0=grid.dimensions_l0,
        patch_px=grid.scale.patch_px,
        patch_side_l0=grid.scale.child_side_l0,
        mpp=grid.scale.hr_mpp,
        region=grid.child_region[order],
        slot=grid.child_slot[order],
        layer_cls=seen.cls,
        provenance=provenance,
    )


def _require_children(grid: MatchedGrid, slide_id: str, hr_mpp: float) -> None:
    if not grid.scale.has_hr:
        raise SlideTooCoarse(
            f"its pixels are {grid.scale.mpp_l0:.4g} um wide, coarser than hr_mpp = {hr_mpp:g}: it cannot train.",
            slide=slide_id,
            fix="It can still be predicted on. Leave it out, or choose a larger hr_mpp.",
        )
    if grid.num_children == 0:
        raise NoTissue(
            f"none of its {grid.num_regions} regions has a child with enough tissue: it cannot train.",
            slide=slide_id,
            fix="Leave it out, or lower tiles.min_child_tissue.",
        )
