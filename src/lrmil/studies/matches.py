"""What stage 1 trains on, true or deliberately broken, and whether a trained student knows which child lies where."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lrmil.distill import pool_token_blocks
from lrmil.encoders import Encoder, embed
from lrmil.encoders.settings import Precision
from lrmil.errors import ConfigError
from lrmil.geometry import IntArray
from lrmil.studies.settings import Children
from lrmil.studies.taught import TaughtViews
from lrmil.studies.views import ImageArray
from lrmil.training.stage1 import RegionBatch

FloatArray = npt.NDArray[np.float64]


class MatchedViews:
    """Views as stage 1 wants them. `children` says how region and children are matched; see `Children`."""

    def __init__(self, views: TaughtViews, ratio: int, children: Children, seed: int) -> None:
        self.images = views.images
        self.source, self.slot = broken_match(views.field, ratio, children, seed)
        self._cls = views.cls

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: IntArray) -> RegionBatch:
        """See `RegionBatches`."""
        slots = self.slot[indices]
        rows = self.source[indices]
        return RegionBatch(
            images=self.images[indices],
            teacher_cls={layer: values[rows].reshape(slots.size, -1) for layer, values in self._cls.items()},
            region=np.repeat(np.arange(len(indices)), slots.shape[1]),
            slot=slots.ravel(),
        )


def broken_match(field: IntArray, ratio: int, children: Children, seed: int) -> tuple[IntArray, IntArray]:
    """Return for each view whose children it is given, (n,), and to which slot each of them goes, (n, K).

    Raises:
        ConfigError: children of other images are wanted, and there is one image only.
    """
    count, k = len(field), ratio * ratio
    rng = np.random.default_rng(seed)
    source, slot = np.arange(count), np.tile(np.arange(k), (count, 1))
    if children == "transposed":
        slot = np.tile(ratio * (np.arange(k) % ratio) + np.arange(k) // ratio, (count, 1))
    elif children == "shuffled":
        slot = rng.permuted(slot, axis=1)
    elif children == "foreign":
        for row in range(count):
            others = np.flatnonzero(field != field[row])
            if not len(others):
                raise ConfigError("children of other images need more than one image.")
            source[row] = rng.choice(others)
    return source, slot


def student_blocks(
    student: Encoder, images: ImageArray, ratio: int, layer: int, precision: Precision = "auto"
) -> npt.NDArray[np.float32]:
    """Return the mean token under each child after a block, (n, K, W)."""
    tokens = embed(student, images, token_layers=(layer,), precision=precision).tokens[layer]
    return pool_token_blocks(torch.from_numpy(tokens), ratio).numpy()


def slot_retrieval(student: npt.NDArray[np.floating], teacher: npt.NDArray[np.floating]) -> FloatArray:
    """How often a block's nearest child, among those of its region, is the child that truly lies there: (n,) shares.

    Nearest by cosine, after each side's mean over the region is taken away: what all children of a region share says
    nothing about which is which. Chance is 1 / K. A student that learned transposed slots perfectly would find its own
    child on the diagonal only, ratio of K slots; one that learned them in part finds fewer there, and some elsewhere.

    Args:
        student: (n, K, W) block means of tokens.
        teacher: (n, K, W) class tokens of the children, true slots.
    """
    sides = []
    for values in (student, teacher):
        centred = values.astype(np.float64) - values.astype(np.float64).mean(axis=1, keepdims=True)
        length = np.linalg.norm(centred, axis=2, keepdims=True)
        sides.append(centred / np.maximum(length, 1e-12))
    nearest = np.einsum("nkw,njw->nkj", *sides).argmax(axis=2)
    return (nearest == np.arange(student.shape[1])).mean(axis=1)
