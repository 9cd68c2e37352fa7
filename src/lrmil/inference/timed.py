"""One answer from a slide file at either resolution, timed by part, with nothing cached."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from lrmil.encoders import Encoder
from lrmil.encoders.settings import Precision
from lrmil.geometry import GridSettings
from lrmil.inference.prepare import PreparedSlide, TileSettings, prepare_slide
from lrmil.inference.stream import child_reads, encode_patches, region_reads
from lrmil.mil import MILHead
from lrmil.slides import Slide, io_counter
from lrmil.tissue import TissueSettings

Resolution = Literal["lr", "hr"]


@dataclass(frozen=True, kw_only=True)
class AnswerCost:
    """What one answer took."""

    tissue_s: float
    """overview, mask and grid"""
    reading_s: float
    """opening the file, and waiting for pixels: total less the other parts, since readers run beside the encoder"""
    encoding_s: float
    mil_s: float
    total_s: float
    patches_read: int
    patches_encoded: int
    bytes_read: int | None


@dataclass(frozen=True)
class TimedAnswer:
    """An answer's slide, and what the answer took."""

    prepared: PreparedSlide
    cost: AnswerCost


def timed_answer(
    open_it: Callable[[], Slide],
    encoder: Encoder,
    head: MILHead,
    resolution: Resolution,
    *,
    device: torch.device,
    grid: GridSettings,
    tissue: TissueSettings,
    tiles: TileSettings,
    threads: int,
    batch_size: int,
    forward_batch: int | None = None,
    precision: Precision = "auto",
) -> TimedAnswer:
    """Open a slide, find its tissue, read and encode its regions (lr) or their children (hr), and ask the head.

    Args:
        open_it: opens the slide; takes part in the time.
        encoder: of that resolution, on `device`.
        head: asked once, on `device`; what it says is not kept.
        resolution: which patches are read.
        device: where encoder and head are.
        grid, tissue, tiles, threads: see `prepare_slide`.
        batch_size, forward_batch, precision: see `encode_patches`.
    """
    began, bytes_before = time.perf_counter(), io_counter()
    with open_it() as slide:
        prepared = prepare_slide(slide, grid, tissue, tiles, threads)
        low = resolution == "lr"
        seen = encode_patches(
            slide,
            region_reads(prepared.grid) if low else child_reads(prepared.grid),
            prepared.grid.scale.patch_px,
            encoder,
            batch_size=batch_size,
            forward_batch=forward_batch,
            threads=threads,
            precision=precision,
        )
        boxes_l0 = prepared.grid.region_boxes_l0 if low else prepared.grid.child_boxes_l0
    start = time.perf_counter()
    with torch.inference_mode():
        # Moving the answer back waits for the device, so the clock stops when it is really there.
        bag = torch.from_numpy(seen.embedding).to(device, torch.float32)
        head(bag, coords=torch.from_numpy(boxes_l0[seen.rows, :2].copy()).to(device)).logits.cpu()
    ended = time.perf_counter()
    bytes_after = io_counter()
    total_s, mil_s = ended - began, ended - start
    cost = AnswerCost(
        tissue_s=prepared.seconds,
        reading_s=max(0.0, total_s - prepared.seconds - seen.encoding_s - mil_s),
        encoding_s=seen.encoding_s,
        mil_s=mil_s,
        total_s=total_s,
        patches_read=seen.log.patches,
        patches_encoded=len(seen.rows),
        bytes_read=None if bytes_before is None or bytes_after is None else bytes_after - bytes_before,
    )
    return TimedAnswer(prepared, cost)
