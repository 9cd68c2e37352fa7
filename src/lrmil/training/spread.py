"""How much an encoder's embedding varies between regions, and giving a distilled encoder back what it lost of that.

Eq. (2) compares raw tokens of some blocks. What is read out of a region, the class token after the final norm, is in no
loss: it keeps its length, which the norm sees to, but may come to vary little from region to region. What it still
says is not lost (a ridge regression, which standardises, finds it), but a MIL head, which does not, learns too slowly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lrmil.encoders import Encoder
from lrmil.encoders.embedding import embed
from lrmil.encoders.settings import Precision
from lrmil.errors import ConfigError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """Moments of an embedding over regions, per dimension."""

    mean: FloatArray
    """(E,)"""
    sd: FloatArray
    """(E,)"""

    @classmethod
    def of(cls, lists: Mapping[str, Sequence[float]]) -> Self:
        """Return what `as_lists` told."""
        return cls(np.asarray(lists["mean"], np.float64), np.asarray(lists["sd"], np.float64))

    def as_lists(self) -> dict[str, list[float]]:
        """Return both moments as JSON can hold them, exactly."""
        return {"mean": self.mean.tolist(), "sd": self.sd.tolist()}

    def share_of(self, other: Spread) -> float:
        """Return how much this varies for each unit that `other` varies: the ratio of root mean square deviations."""
        return float(np.sqrt(np.square(self.sd).mean() / np.square(other.sd).mean()))


def embedding_spread(
    encoder: Encoder, images: Iterable[npt.NDArray[np.uint8]], precision: Precision = "auto"
) -> Spread:
    """Return the moments over batches of regions (n, P, P, 3), uint8."""
    values = np.concatenate([embed(encoder, batch, precision=precision).embedding for batch in images])
    return Spread(values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64))


def require_restorable_spread(encoder: Encoder) -> nn.LayerNorm:
    """Return the norm whose outputs, or means of them, are the embedding.

    Raises:
        ConfigError: there is none that has a scale and a shift.
    """
    trunk = encoder.trunk
    last = trunk.norm if isinstance(trunk.fc_norm, nn.Identity) else trunk.fc_norm
    if (
        encoder.embedding not in ("cls", "token_mean")
        or not isinstance(last, nn.LayerNorm)
        or last.weight is None
        or last.bias is None
    ):
        raise ConfigError(
            f"stage1.restore_spread works through the scale of a final norm, and the embedding {encoder.embedding} of "
            f"{encoder.card.name} does not end with one.",
            fix="Set encoder.student_embedding to cls or token_mean, or leave restore_spread off.",
        )
    return last


def restore_spread(encoder: Encoder, found: Spread, wanted: Spread) -> None:
    """Change the final norm so that an embedding of moments `found` gets the moments `wanted`, per dimension.

    Blocks and tokens below it stay as they are, and what is said by the embedding stays said: it is an affine map of
    each dimension. A dimension that does not vary at all is only moved.

    Raises:
        ConfigError: the embedding does not come from a norm with a scale and a shift.
    """
    norm = require_restorable_spread(encoder)
    varies = found.sd > 1e-6 * max(float(found.sd.max()), 1e-12)
    scale = np.where(varies, wanted.sd / np.where(varies, found.sd, 1.0), 1.0)
    shift = wanted.mean - scale * found.mean
    with torch.no_grad():
        as_norm = [torch.as_tensor(x, dtype=torch.float64, device=norm.weight.device) for x in (scale, shift)]
        norm.weight.copy_(norm.weight.double() * as_norm[0])
        norm.bias.copy_(norm.bias.double() * as_norm[0] + as_norm[1])
