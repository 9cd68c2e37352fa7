"""One answer from a slide file, timed by part: what `lrmil predict` does, at either resolution."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lrmil.benchmarks.settings import BenchSettings
from lrmil.encoders import Encoder, create_encoder, embed
from lrmil.encoders.settings import Precision
from lrmil.geometry import GridSettings
from lrmil.inference.predict import pick_device
from lrmil.inference.prepare import TileSettings, prepare_slide
from lrmil.inference.stream import child_reads, encode_patches, region_reads
from lrmil.mil import MILHead, create_head
from lrmil.slides import io_counter
from lrmil.tissue import TissueSettings

Resolution = Literal["lr", "hr"]
READ_AHEAD = 64
"""patches that readers put together for the encoder, as `lrmil run` and `lrmil predict` do by default"""
LR_MPP, HR_MPP = 2.0, 0.5
PARTS = ("tissue_s", "reading_s", "encoding_s", "mil_s")


@dataclass(frozen=True)
class Model:
    """An encoder and a head that has learned nothing, which takes as long as one that has."""

    encoder: Encoder
    head: MILHead
    device: torch.device
    precision: Precision

    @property
    def grid(self) -> GridSettings:
        """5x regions and 20x children of the encoder's side."""
        return GridSettings(lr_mpp=LR_MPP, hr_mpp=HR_MPP, patch_px=self.encoder.input_px)

    def warm_up(self) -> None:
        """Encode a batch and ask the head once."""
        side = self.encoder.input_px
        images = np.random.default_rng(0).integers(0, 256, (READ_AHEAD, side, side, 3), np.uint8)
        seen = embed(self.encoder, images, precision=self.precision)
        with torch.inference_mode():
            bag = torch.from_numpy(seen.embedding).to(self.device)
            self.head(bag, coords=torch.zeros(len(bag), 2, dtype=torch.int64, device=self.device)).logits.cpu()


@dataclass(frozen=True)
class Answer:
    """What one answer took."""

    regions: int
    patches: int
    """read and encoded"""
    tissue_mm2: float
    tissue_s: float
    """overview, mask and grid"""
    reading_s: float
    """opening the file, and waiting for pixels: total less the other parts, since readers run beside the encoder"""
    encoding_s: float
    mil_s: float
    total_s: float
    bytes_read: int | None


def load_model(settings: BenchSettings) -> Model:
    """Build the encoder of the settings and a plain attention head, on their device."""
    device = pick_device(settings.device)
    encoder = create_encoder(
        settings.encoder,
        input_px=settings.patch_px,
        weights=settings.weights,
        random_seed=settings.seed if settings.random_weights else None,
    )
    torch.manual_seed(settings.seed)
    head = create_head("abmil", encoder.embed_dim, 2)
    return Model(encoder.to(device).eval(), head.to(device).eval(), device, settings.precision)


def answer(
    path: Path, mpp: float | None, model: Model, resolution: Resolution, *, threads: int, all_children: bool = False
) -> Answer:
    """Answer one slide from its file. `all_children`: a region keeps all its children, tissue or not."""
    began, bytes_before = time.perf_counter(), io_counter()
    tiles = TileSettings(min_child_tissue=0.0) if all_children else TileSettings()
    with tiles.open(path, mpp=mpp) as slide:
        prepared = prepare_slide(slide, model.grid, TissueSettings(), tiles, threads)
        grid = prepared.grid
        seen = encode_patches(
            slide,
            region_reads(grid) if resolution == "lr" else child_reads(grid),
            grid.scale.patch_px,
            model.encoder,
            batch_size=READ_AHEAD,
            threads=threads,
            precision=model.precision,
        )
        boxes_l0 = grid.region_boxes_l0 if resolution == "lr" else grid.child_boxes_l0
    start = time.perf_counter()
    with torch.inference_mode():
        # Moving the answer back waits for the device, so the clock stops when it is really there.
        bag = torch.from_numpy(seen.embedding).to(model.device, torch.float32)
        model.head(bag, coords=torch.from_numpy(boxes_l0[seen.rows, :2].copy()).to(model.device)).logits.cpu()
    ended = time.perf_counter()
    bytes_after = io_counter()
    total_s, mil_s = ended - began, ended - start
    return Answer(
        regions=grid.num_regions,
        patches=len(seen.rows),
        tissue_mm2=prepared.tissue.tissue_mm2,
        tissue_s=prepared.seconds,
        reading_s=max(0.0, total_s - prepared.seconds - seen.encoding_s - mil_s),
        encoding_s=seen.encoding_s,
        mil_s=mil_s,
        total_s=total_s,
        bytes_read=None if bytes_before is None or bytes_after is None else bytes_after - bytes_before,
    )
