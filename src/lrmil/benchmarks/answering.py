"""One answer from a slide file, timed by part: what `lrmil predict` does, at either resolution."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from lrmil.benchmarks.settings import BenchSettings
from lrmil.encoders import Encoder, create_encoder, embed
from lrmil.encoders.settings import Precision
from lrmil.geometry import GridSettings
from lrmil.inference.predict import pick_device
from lrmil.inference.prepare import TileSettings
from lrmil.inference.timed import AnswerCost, Resolution, timed_answer
from lrmil.mil import MILHead, create_head
from lrmil.tissue import TissueSettings

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


@dataclass(frozen=True, kw_only=True)
class Answer(AnswerCost):
    """What one answer took, and how large its slide's tissue is."""

    regions: int
    tissue_mm2: float


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
    tiles = TileSettings(min_child_tissue=0.0) if all_children else TileSettings()
    took = timed_answer(
        lambda: tiles.open(path, mpp=mpp),
        model.encoder,
        model.head,
        resolution,
        device=model.device,
        grid=model.grid,
        tissue=TissueSettings(),
        tiles=tiles,
        threads=threads,
        batch_size=READ_AHEAD,
        precision=model.precision,
    )
    return Answer(
        regions=took.prepared.grid.num_regions,
        tissue_mm2=took.prepared.tissue.tissue_mm2,
        **asdict(took.cost),
    )
