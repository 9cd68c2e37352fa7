"""Seconds per slide, measured from the slide file: tissue, reading, encoding and head, with nothing cached."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lrmil.encoders import Encoder
from lrmil.inference.prepare import prepare_slide
from lrmil.inference.stream import child_reads, encode_patches, region_reads
from lrmil.mil import MILHead
from lrmil.pipeline.context import Run, SlideEntry
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


def time_answers(
    run: Run, entries: Sequence[SlideEntry], encoder: Encoder, head: MILHead, resolution: Resolution
) -> list[SlideCost]:
    """Answer each slide from its file and time it; the first slide is answered once more before, to warm up."""
    encoder, head = encoder.to(run.device), head.to(run.device)
    if not entries:
        return []
    _answer(run, entries[0], encoder, head, resolution)
    return [_answer(run, entry, encoder, head, resolution) for entry in entries]


def _answer(run: Run, entry: SlideEntry, encoder: Encoder, head: MILHead, resolution: Resolution) -> SlideCost:
    s = run.settings
    began, bytes_before = time.perf_counter(), io_counter()
    with entry.open() as slide:
        prepared = prepare_slide(slide, s.grid, s.tissue, s.tiles)
        reads = region_reads(prepared.grid) if resolution == "lr" else child_reads(prepared.grid)
        seen = encode_patches(
            slide,
            reads,
            prepared.grid.scale.patch_px,
            encoder,
            batch_size=s.encoder.stream_batch,
            threads=s.threads,
            precision=s.encoder.precision,
        )
    start = time.perf_counter()
    with torch.inference_mode():
        # Moving the answer back waits for the device, so the clock stops when it is really there.
        head(torch.from_numpy(seen.embedding).float().to(run.device)).logits.cpu()
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
