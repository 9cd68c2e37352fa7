"""Stage "tile": find the tissue of every slide and lay the matched grid over it."""

from __future__ import annotations

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np

from lrmil.errors import SlideError
from lrmil.files import atomic_path
from lrmil.geometry import MatchedGrid, SlideScale
from lrmil.inference.images import save_image
from lrmil.inference.prepare import prepare_slide
from lrmil.pipeline.context import Run, SlideEntry
from lrmil.pipeline.keys import tile_key
from lrmil.tissue import overlay


def tile_cohort(run: Run) -> dict[str, MatchedGrid]:
    """Tile every slide that is not tiled yet; return the grids of all slides that could be tiled."""
    grids: dict[str, MatchedGrid] = {}
    entries = run.entries()
    with (
        run.reporter.stage("tile", f"Tiling {len(entries)} slides"),
        run.reporter.task("tile", len(entries)) as progress,
        ThreadPoolExecutor(run.settings.threads) as pool,
    ):
        jobs = {entry.slide_id: pool.submit(_tile_slide, run, entry) for entry in entries}
        try:
            for slide_id, job in jobs.items():
                try:
                    grids[slide_id] = job.result()
                except SlideError as error:
                    run.fail(slide_id, "tile", error)
                progress.advance(note=slide_id)
        except BaseException:
            # Leaving the pool waits for what it has begun, not for a thousand slides in its queue.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    regions = sum(g.num_regions for g in grids.values())
    children = sum(g.num_children for g in grids.values())
    snapped = sum(g.scale.snapped for g in grids.values())
    run.reporter.line(
        f"  {len(grids)} slides, {regions} regions, {children} children; {snapped} slides on whole-pixel scales"
    )
    return grids


def save_grid(grid: MatchedGrid, path: Path, key: str) -> None:
    """Write a grid as .npz, atomically."""
    arrays = {f.name: getattr(grid, f.name) for f in fields(grid) if f.name not in ("scale", "dimensions_l0")}
    scale = {f.name: getattr(grid.scale, f.name) for f in fields(grid.scale)}
    meta = json.dumps({"key": key, "scale": scale, "dimensions_l0": grid.dimensions_l0})
    with atomic_path(path) as scratch, scratch.open("wb") as handle:
        np.savez(handle, allow_pickle=False, meta=np.array(meta), **arrays)


def load_grid(path: Path, key: str) -> MatchedGrid | None:
    """Read a grid; None if the file is missing, damaged, or made with another key."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            meta = json.loads(str(stored["meta"]))
            if meta["key"] != key:
                return None
            arrays = {name: stored[name] for name in stored.files if name != "meta"}
        width_l0, height_l0 = meta["dimensions_l0"]
        return MatchedGrid(scale=SlideScale(**meta["scale"]), dimensions_l0=(width_l0, height_l0), **arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _tile_slide(run: Run, entry: SlideEntry) -> MatchedGrid:
    path = run.folder.tiles(entry.slide_id)
    key = tile_key(run, entry)
    known = load_grid(path, key)
    if known is not None:
        return known
    with entry.open() as slide:
        s = run.settings
        prepared = prepare_slide(slide, s.grid, s.tissue, s.tiles)
    picture = overlay(prepared.overview.rgb, prepared.tissue, boxes_l0=prepared.grid.region_boxes_l0)
    save_image(path.with_suffix(".jpg"), picture)
    save_grid(prepared.grid, path, key)
    return prepared.grid
