"""Seconds per slide, measured from the slide file: tissue, reading, encoding and head, with nothing cached."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrmil.encoders import Encoder
from lrmil.files import read_json, write_json
from lrmil.inference.timed import AnswerCost, Resolution, timed_answer
from lrmil.mil import MILHead
from lrmil.pipeline.context import Run, SlideEntry
from lrmil.pipeline.keys import tile_key
from lrmil.settings import fingerprint


@dataclass(frozen=True, kw_only=True)
class SlideCost(AnswerCost):
    """What the answer to one slide of a run took, as seconds.json keeps it."""

    slide_id: str
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
    took = timed_answer(
        entry.open,
        encoder,
        head,
        resolution,
        device=run.device,
        grid=s.grid,
        tissue=s.tissue,
        tiles=s.tiles,
        threads=s.threads,
        batch_size=s.encoder.stream_batch,
        forward_batch=s.encoder.batch_size,
        precision=s.encoder.precision,
    )
    return SlideCost(slide_id=entry.slide_id, **asdict(took.cost))
