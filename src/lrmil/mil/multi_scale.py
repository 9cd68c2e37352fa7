"""Base of the heads that choose which patches to read: a source of several scales in, logits and the choice out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lrmil.errors import HeadError
from lrmil.mil.base import Head, HeadOutput
from lrmil.mil.recipe import Recipe
from lrmil.mil.scales import PatchSource


@dataclass(frozen=True, slots=True)
class MultiScaleOutput(HeadOutput):
    """What a head of many scales says about one slide, and which patches it read for that."""

    selected: dict[str, Tensor] = field(default_factory=dict)
    """Rows (n,) int64, ascending, of each scale that had to be read and encoded"""
    scale_attention_logits: dict[str, Tensor] = field(default_factory=dict)
    """Attention before its softmax over the patches read at each scale; in training over mixtures of patches"""
    selection_logits: dict[str, Tensor] = field(default_factory=dict)
    """What the choice was made by, at each scale from which patches were chosen"""

    def scale_attention(self, scale: str) -> Tensor:
        """Return the attention (n,), summing to 1, over `selected[scale]`; only where one logit a patch is given."""
        return torch.softmax(self.scale_attention_logits[scale], dim=0)


class MultiScaleHead(Head):
    """Base of the heads of many scales. A subclass defines `Options`, `scales` and `score`.

    In eval mode a head reads by `PatchSource.fetch` only what it reports in `MultiScaleOutput.selected`, each row once.
    """

    scales: ClassVar[tuple[str, ...]]
    """Names of the scales that it reads, coarsest first"""
    needs_thumbnails: ClassVar[bool] = False
    steps: ClassVar[tuple[str, ...]] = ("all",)
    """Trainings that follow one another, each of a part of the head; `begin_step` starts one"""
    step_recipes: ClassVar[Mapping[str, Recipe]] = {}
    """Recipe of each step, for a head whose steps have different ones"""

    def begin_step(self, step: str) -> None:
        """Get ready for one of `steps`: from here on `forward` gives that step's losses."""
        if step not in self.steps:
            raise HeadError(f"there is no training step {step!r}.", fix=f"Choose one of: {', '.join(self.steps)}.")

    def forward(self, source: PatchSource, *, label: Tensor | None = None) -> MultiScaleOutput:
        """Score one slide.

        Args:
            source: the slide's patches, at least at `scales`.
            label: scalar int64, the class of the slide; never changes the logits.

        Raises:
            HeadError: a scale is missing or empty, children are missing, or features are of another width than the
                head, or not finite.
        """
        if isinstance(source, Tensor):
            raise HeadError(
                f"head {self.card.name!r} chooses its patches from {' and '.join(self.scales)}; one bag does not do.",
                fix="Give it a PatchSource, such as StoredScales, or choose a head of one scale.",
            )
        missing = [scale for scale in self.scales if source.counts.get(scale, 0) < 1]
        if missing:
            raise HeadError(
                f"the slide has no patches at {' and '.join(map(repr, missing))}; it has {dict(source.counts)}.",
                fix=f"This head reads {', '.join(map(repr, self.scales))}; leave slides without patches out.",
            )
        return self.score(_CheckedSource(source, self.in_dim), label=label)

    def score(self, source: PatchSource, *, label: Tensor | None) -> MultiScaleOutput:
        """Do the work of `forward`; what `source` returns is checked."""
        raise NotImplementedError


class _CheckedSource:
    """A source whose answers are looked at, and brought to the device of the rows, as they come."""

    def __init__(self, source: PatchSource, in_dim: int) -> None:
        self._source = source
        self._in_dim = in_dim

    @property
    def counts(self) -> Mapping[str, int]:
        return self._source.counts

    def fetch(self, scale: str, rows: Tensor) -> Tensor:
        features = self._source.fetch(scale, rows).to(rows.device)
        if features.shape != (len(rows), self._in_dim):
            raise HeadError(
                f"scale {scale!r} gave shape {tuple(features.shape)} for {len(rows)} rows, but this head takes "
                f"(n, {self._in_dim}).",
                fix="Were these features made by another encoder than the one the head was built for?",
            )
        # The sum is finite unless a value is not, or it overflows: only then look at each.
        if not bool(torch.isfinite(features.sum())):
            broken = (~torch.isfinite(features)).any(dim=1).nonzero()
            if len(broken):
                raise HeadError(
                    f"{len(broken)} of {len(rows)} patches of scale {scale!r} hold NaN or infinity, first row "
                    f"{int(rows[broken[0, 0]])}.",
                    fix="Encode that slide again.",
                )
        return features

    def thumbnails(self) -> Tensor:
        thumbnails = self._source.thumbnails()
        if thumbnails.ndim != 4 or thumbnails.shape[3] != 3 or thumbnails.dtype != torch.uint8:
            raise HeadError(
                f"thumbnails are {thumbnails.dtype} of shape {tuple(thumbnails.shape)}, not uint8 (N, h, w, 3)."
            )
        return thumbnails
