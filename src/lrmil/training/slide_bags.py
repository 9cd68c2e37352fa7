"""Slides as heads are trained on them: instances, target, and tensors of them on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrmil.errors import ConfigError, CorruptBag
from lrmil.geometry import IntArray

FloatArray = npt.NDArray[np.floating]

_SMALL_BAG = 1_000_000  # values


@dataclass(frozen=True)
class SlideBag:
    """One slide's instances and what is to be learned of it."""

    slide_id: str
    features: FloatArray
    """(N, D) float16 or float32"""
    label: int | None
    """class index; None for tasks without classes, and where nothing is trained or validated"""
    coords: FloatArray | IntArray | None = None
    """(N, 2) positions (x, y), for heads that use them"""
    target: FloatArray | float | None = None
    """for tasks without classes: the number of a regression, or (2,) time and event of survival"""


class ResidentBags:
    """Bags as float32 tensors on the device, as many as fit a budget; the rest are moved when asked for."""

    def __init__(self, bags: Sequence[SlideBag], device: torch.device) -> None:
        self._bags = bags
        self._device = device
        self.coords = [coords_tensor(bag, device) for bag in bags]
        budget = 2 << 30
        if device.type == "cuda":
            budget = torch.cuda.mem_get_info(device)[0] // 2
        self._tensors: list[Tensor | None] = []
        for bag in bags:
            # A float32 bag on the CPU is shared with its array and costs nothing.
            free = device.type == "cpu" and bag.features.dtype == np.float32 and bag.features.flags.c_contiguous
            cost = 0 if free else bag.features.size * 4
            fits = cost <= budget
            budget -= cost if fits else 0
            self._tensors.append(features_tensor(bag, device) if fits else None)

    def __getitem__(self, index: int) -> Tensor:
        tensor = self._tensors[index]
        return features_tensor(self._bags[index], self._device) if tensor is None else tensor


def features_tensor(bag: SlideBag, device: torch.device) -> Tensor:
    """Return the features (N, D) float32 on a device."""
    return _shared(bag.features).to(device, torch.float32)


def coords_tensor(bag: SlideBag, device: torch.device) -> Tensor | None:
    """Return the positions (N, 2) on a device, if there are any."""
    return None if bag.coords is None else _shared(bag.coords).to(device)


def check_splits(train: Sequence[SlideBag], val: Sequence[SlideBag]) -> int:
    """Look at every bag once, before training; return their width.

    Raises:
        ConfigError: a split is empty.
        CorruptBag: see `check_bag`.
    """
    for bags, split in ((train, "training"), (val, "validation")):
        if not bags:
            raise ConfigError(f"the {split} split has no slides.", fix="Use fewer folds, or more patients.")
    in_dim = train[0].features.shape[-1]
    for bag in (*train, *val):
        check_bag(bag, in_dim)
    return in_dim


def check_bag(bag: SlideBag, in_dim: int) -> None:
    """See that a head of this width can be fed a bag.

    Raises:
        CorruptBag: it is empty, has another width, or holds values that are not finite.
    """
    features = bag.features
    if features.ndim != 2 or len(features) == 0 or features.shape[1] != in_dim:
        raise CorruptBag(
            f"{bag.slide_id}: features have shape {features.shape}; wanted (N, {in_dim}) with N of at least 1.",
            fix="Encode all slides with one encoder, and leave slides without patches out.",
        )
    # The sum is not finite if any value is not (float64, so that it cannot overflow), and reads the bag only once.
    if not np.isfinite(features.sum(dtype=np.float64)):
        row = int((~np.isfinite(features)).any(axis=1).argmax())
        raise CorruptBag(f"{bag.slide_id}: features hold NaN or infinity, first in row {row}.", fix="Encode it again.")


@contextmanager
def few_threads(bags: Sequence[SlideBag], device: torch.device) -> Iterator[None]:
    """Use one thread where bags are small: on a CPU, handing out their work then takes longer than doing it."""
    before = torch.get_num_threads()
    if device.type == "cpu" and max(bag.features.size for bag in bags) < _SMALL_BAG:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shared(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
