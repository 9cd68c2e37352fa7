"""Answer a slide with a head that chooses its patches, reading and encoding what it chooses and nothing else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lrmil.errors import HeadError
from lrmil.geometry import IntArray
from lrmil.inference.scales import PatchesLost, ScaleCost, SlideScales
from lrmil.mil import MultiScaleHead, MultiScaleOutput


@dataclass(frozen=True)
class SelectiveAnswer:
    """What a head says about one slide, which patches it chose for that, and what they cost."""

    logits: npt.NDArray[np.float32]
    """(C,)"""
    probabilities: npt.NDArray[np.float64]
    """(C,)"""
    selected: Mapping[str, IntArray]
    """by scale, the rows (n,) of `SlideScales.layouts` that were chosen, ascending"""
    output: MultiScaleOutput
    """rows in it count what is left of the layouts where patches could not be decoded"""
    costs: Mapping[str, ScaleCost]
    """by scale; thumbnails under "thumbnail" """
    mil_s: float
    """in the head, patches apart"""

    @property
    def reading_s(self) -> float:
        """Seconds spent waiting for pixels, over all scales."""
        return sum(cost.reading_s for cost in self.costs.values())

    @property
    def encoding_s(self) -> float:
        """Seconds spent in the encoder, over all scales."""
        return sum(cost.encoding_s for cost in self.costs.values())

    @property
    def patches_encoded(self) -> int:
        """Patches encoded, over all scales."""
        return sum(cost.patches_encoded for cost in self.costs.values())


def answer_slide(head: MultiScaleHead, source: SlideScales) -> SelectiveAnswer:
    """Let a head in eval mode choose from a slide, and check its account.

    The source should be fresh: what others asked of it counts, too. Where patches turn out to be undecodable the head
    is asked again without them; nothing is encoded twice.

    Raises:
        TooManyUnreadable: see `SlideScales`.
        HeadError: the head encoded a patch that it does not say it selected, or the other way round.
    """
    head.eval()
    began = time.perf_counter()
    in_source_s = source.seconds
    with torch.inference_mode():
        while True:
            try:
                output = head(source)
                break
            except PatchesLost:
                continue
        # Moving the answer waits for the device, so the clock stops when it is really there.
        logits = output.logits.float().cpu()
        probabilities = head.probabilities(output.logits.cpu().double()).numpy()
    mil_s = time.perf_counter() - began - (source.seconds - in_source_s)
    selected = {scale: source.original(scale, rows) for scale, rows in output.selected.items()}
    if not source.lost:
        _check_account(selected, source)
    return SelectiveAnswer(
        logits=logits.numpy(),
        probabilities=probabilities,
        selected=selected,
        output=output,
        costs=source.costs,
        mil_s=max(0.0, mil_s),
    )


def _check_account(selected: Mapping[str, IntArray], source: SlideScales) -> None:
    for scale in source.layouts:
        chosen = selected.get(scale, np.empty(0, np.int64))
        encoded = source.encoded(scale)
        for fault, rows in (
            ("encoded but not selected", np.setdiff1d(encoded, chosen)),
            ("selected but not encoded", np.setdiff1d(chosen, encoded)),
        ):
            if len(rows):
                raise HeadError(f"{len(rows)} patches of scale {scale!r} were {fault}, first row {rows[0]}.")
