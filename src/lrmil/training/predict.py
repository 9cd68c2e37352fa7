"""Let a trained head speak about slides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrmil.mil.base import Head, HeadOutput, MILHead
from lrmil.mil.readout import Readout
from lrmil.training.slide_bags import SlideBag, check_bag, coords_tensor, features_tensor

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class BagPrediction:
    """What a head says about one slide."""

    slide_id: str
    logits: FloatArray
    """(C,) float32"""
    probabilities: FloatArray
    """(C,) float64: in float32, confident slides would tie at 1 and spoil an AUC; (0,) for tasks without classes"""
    attention_logits: FloatArray | None
    """(N,) float32"""
    attention: FloatArray | None
    """(N,) float32, sums to 1"""
    value: float | None = None
    """the number of a regression in its unit, or the risk of survival, higher meaning earlier; None for classes"""
    survival: FloatArray | None = None
    """(T,) float64, probability of no event before each of `Readout.times`; only for hazards"""


def predict_bags(
    head: MILHead,
    bags: Sequence[SlideBag],
    *,
    device: torch.device | str | None = None,
    readout: Readout | None = None,
) -> list[BagPrediction]:
    """Apply a head to bags, one at a time; labels and targets are not looked at. Puts the head in eval mode.

    Args:
        head: on any device.
        bags: any number of slides.
        device: where to compute; None is where the head is.
        readout: what the logits stand for, as `TrainedHead.readout` says; None is class probabilities.
    """
    device = next(head.parameters()).device if device is None else torch.device(device)
    readout = readout or Readout()
    head.to(device).eval()
    found = []
    with torch.inference_mode():
        for bag in bags:
            check_bag(bag, head.in_dim)
            output = head(features_tensor(bag, device), coords=coords_tensor(bag, device))
            found.append(prediction_of(bag.slide_id, head, output, readout))
    return found


def prediction_of(slide_id: str, head: Head, output: HeadOutput, readout: Readout) -> BagPrediction:
    """Put down what a head said about one slide, read as `readout` says."""
    reading = readout.read(head, output.logits)
    return BagPrediction(
        slide_id=slide_id,
        logits=_array(output.logits),
        probabilities=reading.probabilities,
        attention_logits=None if output.attention_logits is None else _array(output.attention_logits),
        attention=None if output.attention is None else _array(output.attention),
        value=None if reading.value is None else float(reading.value),
        survival=reading.survival,
    )


def _array(tensor: Tensor) -> FloatArray:
    return tensor.float().cpu().numpy()
