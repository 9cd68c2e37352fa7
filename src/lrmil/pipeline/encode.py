"""Stage "encode": features of the frozen encoder, for the children (20x) and, as a baseline, for the regions (5x)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from lrmil.bags import Bag, bag_is_current, write_bag
from lrmil.encoders import Encoder, embed
from lrmil.encoders.embedding import choose_dtype
from lrmil.errors import EncoderError, NoTissue, SlideError, SlideTooCoarse
from lrmil.geometry import MatchedGrid
from lrmil.inference.stream import EncodedPatches, SlideReads, child_reads, encode_slides
from lrmil.pipeline.context import Run, SlideEntry
from lrmil.pipeline.keys import bag_provenance, features_of
from lrmil.pipeline.pixels import RegionPixels


def encode_children(run: Run, grids: Mapping[str, MatchedGrid], encoder: Encoder, layers: Sequence[int]) -> None:
    """Encode the children of every slide at high resolution, with the CLS of the distilled `layers` (may be empty).

    A slide without a single child cannot train (too coarse, or too little tissue); it is noted as a failure.
    """
    hr_mpp = run.settings.grid.hr_mpp
    name = features_name(encoder, hr_mpp, run.settings.encoder.random_seed)
    features = features_of(run, encoder)
    waiting = []
    for entry in run.entries():
        if entry.slide_id in grids:
            provenance = bag_provenance(run, entry, features, grids[entry.slide_id].scale.hr_mpp)
            if not bag_is_current(run.folder.bag(name, entry.slide_id), provenance, layers=layers):
                waiting.append((entry, provenance))
    total = sum(grids[entry.slide_id].num_children for entry, _ in waiting)
    # Said and logged, since it depends on the processor, and what is trained on the features may depend on it.
    digits = str(choose_dtype(encoder, run.settings.encoder.precision)).removeprefix("torch.")
    title = f"Encoding {total} patches of {len(waiting)} slides at {hr_mpp:g} um/px with {encoder.card.name}, {digits}"
    if not waiting:
        with run.reporter.stage("encode", f"All slides are encoded at {hr_mpp:g} um/px with {encoder.card.name}"):
            return
    s = run.settings
    run.reporter.event("encoding", encoder=encoder.card.name, mpp=hr_mpp, patches=total, precision=digits)
    with run.reporter.stage("encode", title), run.reporter.task("encode", total) as progress:
        results = encode_slides(
            [partial(_open_children, entry, grids[entry.slide_id], hr_mpp) for entry, _ in waiting],
            s.grid.patch_px,
            encoder,
            batch_size=s.encoder.stream_batch,
            forward_batch=s.encoder.batch_size,
            threads=s.threads,
            precision=s.encoder.precision,
            cls_layers=layers,
            dtype=np.float16,
            max_unreadable=s.tiles.max_unreadable,
        )
        for result, (entry, provenance) in zip(results, waiting, strict=True):
            grid = grids[entry.slide_id]
            if isinstance(result.error, EncoderError):
                raise _about_slide(entry, result.error) from result.error
            if result.error is not None and not isinstance(result.error, SlideError):
                raise result.error
            if result.error is not None:
                run.fail(entry.slide_id, "encode", result.error)
            elif result.encoded is not None:
                if lost := len(result.encoded.log.unreadable):
                    run.reporter.warn(f"{entry.slide_id}: {lost} patches cannot be decoded and are left out")
                write_bag(run.folder.bag(name, entry.slide_id), _child_bag(entry, grid, result.encoded, provenance))
            progress.advance(grid.num_children, note=entry.slide_id)


def read_regions(run: Run, grids: Mapping[str, MatchedGrid], pixels: RegionPixels) -> None:
    """Read the regions of every slide, unless that was done before.

    It comes before the folds: a slide whose 5x pixels cannot be decoded fails here, not in the middle of training.
    """
    waiting = [e.slide_id for e in run.entries() if e.slide_id in grids and not pixels.is_known(e.slide_id)]
    total = sum(grids[slide_id].num_regions for slide_id in waiting)
    if not waiting:
        return
    title = f"Reading {total} regions of {len(waiting)} slides at {run.settings.grid.lr_mpp:g} um/px"
    with run.reporter.stage("read", title), run.reporter.task("read", total) as progress:
        for slide_id in waiting:
            try:
                pixels[slide_id]
            except SlideError as error:
                run.fail(slide_id, "read", error)
            progress.advance(grids[slide_id].num_regions, note=slide_id)


def encode_regions(
    run: Run, grids: Mapping[str, MatchedGrid], encoder: Encoder, pixels: RegionPixels, name: str, *, title: str
) -> None:
    """Encode every slide's regions at low resolution into features/`name`/."""
    features = features_of(run, encoder)
    entries = [e for e in run.entries() if e.slide_id in grids]
    with run.reporter.stage("encode", title), run.reporter.task("encode", len(entries)) as progress:
        for entry in entries:
            provenance = bag_provenance(run, entry, features, grids[entry.slide_id].scale.lr_mpp)
            path = run.folder.bag(name, entry.slide_id)
            if not bag_is_current(path, provenance):
                write_bag(path, region_bag(run, entry, grids[entry.slide_id], encoder, pixels, provenance))
            progress.advance(note=entry.slide_id)


def region_bag(
    run: Run,
    entry: SlideEntry,
    grid: MatchedGrid,
    encoder: Encoder,
    pixels: RegionPixels,
    provenance: dict[str, Any],
) -> Bag:
    """Encode the readable regions of one slide.

    Raises:
        EncoderError: the features are not finite; names the slide.
    """
    s = run.settings.encoder
    found = pixels[entry.slide_id]
    rows, images = found.rows, found.images
    try:
        features = [
            embed(encoder, images[i : i + s.stream_batch], precision=s.precision, batch_size=s.batch_size).embedding
            for i in range(0, len(rows), s.stream_batch)
        ]
    except EncoderError as error:
        raise _about_slide(entry, error) from error
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


def _open_children(entry: SlideEntry, grid: MatchedGrid, hr_mpp: float) -> SlideReads:
    """Open a slide and say which children are to be read.

    Raises:
        SlideError: it cannot be opened, or has no children.
    """
    _require_children(grid, entry.slide_id, hr_mpp)
    return SlideReads(entry.open(), child_reads(grid))


def _child_bag(entry: SlideEntry, grid: MatchedGrid, seen: EncodedPatches, provenance: dict[str, Any]) -> Bag:
    # Rows ascend, so children come in the order of their regions: that is how stage 1 finds them.
    order = np.argsort(seen.rows)
    rows = seen.rows[order]
    return Bag(
        features=seen.embedding[order],
        coords_l0=grid.child_boxes_l0[rows, :2],
        slide=entry.slide_id,
        mpp_l0=grid.scale.mpp_l0,
        dimensions_l0=grid.dimensions_l0,
        patch_px=grid.scale.patch_px,
        patch_side_l0=grid.scale.child_side_l0,
        mpp=grid.scale.hr_mpp,
        region=grid.child_region[rows],
        slot=grid.child_slot[rows],
        layer_cls={layer: values[order] for layer, values in seen.cls.items()},
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


def _about_slide(entry: SlideEntry, error: EncoderError) -> EncoderError:
    """Say at which slide an encoder failed."""
    return type(error)(f"{entry.slide_id}: {error.message}", fix=error.fix)
