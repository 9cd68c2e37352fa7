"""Linear maps from a student's widths to its teacher's, for a student that is another network. Training alone has them.

Begun by least squares over some regions, so that the first gradients already tell the student what it lacks, and not
how large the teacher's numbers are; then trained along with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from lrmil.distill import linear_fit

if TYPE_CHECKING:
    from lrmil.encoders import Encoder

Rows = tuple[Mapping[int, Tensor], Tensor | None]
"""({block of the teacher: (M, width)}, (M, width of the embedding) or None), one row a child"""


@dataclass(frozen=True)
class TeacherShape:
    """Sizes of a teacher, as far as a student of another architecture must know them."""

    depth: int
    width: int
    embed_dim: int

    @classmethod
    def of(cls, encoder: Encoder) -> Self:
        """Return those of an encoder."""
        return cls(encoder.depth, encoder.trunk_width, encoder.embed_dim)


class Alignment(nn.Module):
    """The maps; none where the widths agree. They hold zeros until `fit`."""

    def __init__(self, layers: Mapping[int, nn.Linear] | None = None, embedding: nn.Linear | None = None) -> None:
        super().__init__()
        self.of_layers = dict(layers or {})
        """{block of the teacher: map}"""
        self._maps = nn.ModuleList([*self.of_layers.values(), *([embedding] if embedding else [])])
        self._embedding = embedding

    @classmethod
    def between(cls, student: Encoder, teacher: TeacherShape, layers: Iterable[int], *, with_embedding: bool) -> Self:
        """Return maps for `layers`, and `with_embedding` for the embedding, as far as the widths differ."""
        width, embed_dim = student.trunk_width, student.embed_dim
        mapped = {layer: _linear(width, teacher.width) for layer in layers} if width != teacher.width else {}
        embedding = _linear(embed_dim, teacher.embed_dim) if with_embedding and embed_dim != teacher.embed_dim else None
        return cls(mapped, embedding)

    @property
    def is_needed(self) -> bool:
        """Whether there is any map."""
        return len(self._maps) > 0

    def of_embedding(self, embedding: Tensor) -> Tensor:
        """Map the student's embedding to the teacher's width."""
        return embedding if self._embedding is None else self._embedding(embedding)

    def fit(self, seen: Sequence[Rows], told: Sequence[Rows]) -> None:
        """Set every map to the least-squares fit of what the teacher told by what the student saw, batch by batch."""
        for layer, linear in self.of_layers.items():
            _set(linear, [rows[layer] for rows, _ in seen], [rows[layer] for rows, _ in told])
        if self._embedding is not None:
            _set(self._embedding, [e for _, e in seen if e is not None], [e for _, e in told if e is not None])


def _linear(width: int, out_width: int) -> nn.Linear:
    """A map of zeros. Nothing is drawn: what is random in training must not depend on whether there are maps."""
    linear = nn.utils.skip_init(nn.Linear, width, out_width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _set(linear: nn.Linear, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    weight, bias = linear_fit(torch.cat(list(inputs)), torch.cat(list(targets)))
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
