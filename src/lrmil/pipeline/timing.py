"""Seconds per slide, measured from the slide file: tissue, reading, encoding and head, with nothing cached."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lrmil.encoders import Encoder
from lrmil.files import read_json, write_json
from lrmil.inference.prepare import prepare_slide
from lrmil.inference.stream import child_reads, encode_patches, region_reads
from lrmil.mil import MILHead
from lrmil.pipeline.context import Run, SlideEntry
from lrmil.pipeline.keys import tile_key
from lrmil.settings import fingerprint
from lrmil.slides import io_counter

Resolution = Literal["lr", "hr"]


@dataclass(frozen=True)
class SlideCost:
    """What one answer took."""

    slide_id: str
    tissue_s: float
    reading_s: float
    """waiting for pixels: total less the other parts, since readers run beside the encoder"""
    encoding_s: float
    mil_s: float
    total_s: float
    patches_read: int
    patches_encoded: int
    bytes_read: int | None
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """of methods that choose their patches: `ScaleCost` by scale, thumbnails beside the scales"""


def time_answers(
    run: Run, method: str, entries: Sequence[SlideEntry], encoder: Encoder, head: MILHead, resolution: Resolution
) -> list[SlideCost]:
    """Answer each slide from its file and time it; the first slide is answered once more before, to warm up.

    What was measured is kept in seconds.json, and measured again only where slides, settings, machine, encoder
    or head are others. Their weights take no part in it: they do not change how long an answer takes.
    """
    key = fingerprint(timing_key(run, entries, encoder), head.describe(), resolution)

    def answer(entry: SlideEntry) -> SlideCost:
        return _answer(run, entry, encoder.to(run.device), head.to(run.device), resolution)

    return kept_costs(run, method, key, entries, answer)


def kept_costs(
    run: Run, method: str, key: str, entries: Sequence[SlideEntry], answer: Callable[[SlideEntry], SlideCost]
) -> list[SlideCost]:
    """Return the costs in seconds.json under `method`, if they have that key; else answer each slide, and keep them.

    The first slide is answered once more before, to warm up.
    """
    if not entries:
        return []
    path = run.folder.seconds
    known = _read(path)
    if known.get(method, {}).get("key") != key:
        answer(entries[0])
        costs = [answer(entry) for entry in entries]
        known[method] = {"key": key, "slides": [asdict(cost) for cost in costs]}
        write_json(path, known)
    return [SlideCost(**cost) for cost in known[method]["slides"]]


def machine(run: Run) -> str:
    """Say what answers are timed on."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else str(run.device)
    threads = f"{torch.get_num_threads()} torch threads, {run.settings.threads} reader threads"
    return f"{platform.machine()}, {device}, {threads}"


def _read(path: Path) -> dict[str, Any]:
    try:
        known = read_json(path)
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def timing_key(run: Run, entries: Sequence[SlideEntry], encoder: Encoder) -> str:
    """Return what seconds depend on: slides, settings, machine, and the encoder but for its weights."""
    architecture = encoder.describe()
    del architecture["weights_sha256"]
    tiles = {entry.slide_id: tile_key(run, entry) for entry in entries}
    s = run.settings.encoder
    return fingerprint(tiles, architecture, (s.precision, s.stream_batch, s.batch_size), machine(run))


def _answer(run: Run, entry: SlideEntry, encoder: Encoder, head: MILHead, resolution: Resolution) -> SlideCost:
    s = run.settings
    began, bytes_before = time.perf_counter(), io_counter()
    with entry.open() as slide:
        prepared = prepare_slide(slide, s.grid, s.tissue, s.tiles, s.threads)
        low = resolution == "lr"
        reads = region_reads(prepared.grid) if low else child_reads(prepared.grid)
        boxes_l0 = prepared.grid.region_boxes_l0 if low else prepared.grid.child_boxes_l0
        seen = encode_patches(
            slide,
            reads,
            prepared.grid.scale.patch_px,
            encoder,
            batch_size=s.encoder.stream_batch,
            forward_batch=s.encoder.batch_size,
            threads=s.threads,
            precision=s.encoder.precision,
        )
    start = time.perf_counter()
    with torch.inference_mode():
        # Moving the answer back waits for the device, so the clock stops when it is really there.
        bag = torch.from_numpy(seen.embedding).to(run.device, torch.float32)
        head(bag, coords=torch.from_numpy(boxes_l0[seen.rows, :2].copy()).to(run.device)).logits.cpu()
    ended = time.perf_counter()
    bytes_after = io_counter()
    known = prepared.seconds + seen.encoding_s + (ended - start)
    return SlideCost(
        slide_id=entry.slide_id,
        tissue_s=prepared.seconds,
        reading_s=max(0.0, ended - began - known),
        encoding_s=seen.encoding_s,
        mil_s=ended - start,
        total_s=ended - began,
        patches_read=seen.log.patches,
        patches_encoded=len(seen.rows),
        bytes_read=None if bytes_before is None or bytes_after is None else bytes_after - bytes_before,
    )
