"""The ceiling: the same network, from the same start, fine-tuned end to end on the truth of regions at low resolution.

Where the ceiling is low, too, the pixels do not show it (or the images are too few to learn it from); where it is high
and distillation is low, distillation failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lrmil.encoders import Encoder
from lrmil.geometry import IntArray
from lrmil.studies.fields import FloatArray
from lrmil.studies.settings import CeilingSettings
from lrmil.studies.views import ImageArray
from lrmil.training.loop import FitResult, LoopSettings, Validation, fit, isolated_seed, run_epoch

_BATCH = 32


class KnownRegions(Protocol):
    """Regions of which the truth is known."""

    @property
    def images(self) -> ImageArray:
        """(n, P, P, 3)"""
        ...

    @property
    def truth(self) -> FloatArray:
        """(n, T); nan where it is not known"""
        ...

    def __len__(self) -> int: ...


class TruthNetwork(nn.Module):
    """An encoder and a linear layer; it answers in units of the training truths."""

    mean: Tensor
    sd: Tensor

    def __init__(self, encoder: Encoder, truth: FloatArray, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        with isolated_seed(seed):
            self.head = nn.Linear(encoder.embed_dim, truth.shape[1])
        self.register_buffer("mean", torch.from_numpy(np.nanmean(truth, axis=0)).float())
        self.register_buffer("sd", torch.from_numpy(np.nanstd(truth, axis=0)).float().clamp(min=1e-6))

    def forward(self, images: Tensor) -> Tensor:
        """(B, P, P, 3) uint8 to (B, T) standardised answers."""
        out: Tensor = self.head(self.encoder(self.encoder.normalise(images)).embedding)
        return out

    def loss(self, views: KnownRegions, rows: IntArray) -> Tensor:
        """Mean squared error over the truths that are known."""
        truth = torch.from_numpy(views.truth[rows]).float()
        error = self(torch.from_numpy(views.images[rows])) - (truth - self.mean) / self.sd
        known = torch.isfinite(truth)
        return torch.where(known, error, 0.0).square().sum() / known.sum().clamp(min=1)


def train_ceiling(
    encoder: Encoder,
    train: KnownRegions,
    val: KnownRegions,
    settings: CeilingSettings,
    *,
    seed: int,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[TruthNetwork, FitResult]:
    """Fine-tune all weights of `encoder`, in place; the epoch of the lowest validation loss is kept."""
    network = TruthNetwork(encoder, train.truth, seed)
    recipe = LoopSettings(learning_rate=settings.learning_rate, epochs=settings.epochs).paper_recipe("loss")
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)

    def learn(rows: IntArray) -> Mapping[str, Tensor]:
        loss = network.loss(train, rows)
        loss.backward()
        return {"loss": loss.detach()}

    def train_epoch(generator: torch.Generator) -> Mapping[str, float]:
        return run_epoch(
            len(train),
            settings.batch_size,
            load=lambda rows: rows,
            step=learn,
            optimizer=optimizer,
            generator=generator,
            name=lambda rows: f"the regions {rows[:4].tolist()}...",
        )

    def validate() -> Validation:
        pieces = [np.arange(i, min(i + _BATCH, len(val))) for i in range(0, len(val), _BATCH)]
        return Validation(sum(network.loss(val, rows).item() * len(rows) for rows in pieces) / len(val))

    result = fit(network, train=train_epoch, validate=validate, recipe=recipe, seed=seed, on_epoch=on_epoch)
    return network, result


def ceiling_answers(network: TruthNetwork, images: ImageArray) -> FloatArray:
    """(n, P, P, 3) regions to (n, T) predicted truths."""
    pieces = []
    with torch.inference_mode():
        for start in range(0, len(images), _BATCH):
            standard = network(torch.from_numpy(images[start : start + _BATCH]))
            pieces.append(standard * network.sd + network.mean)
    return torch.cat(pieces).double().numpy()
