"""What the frozen teacher says about views, computed once and kept on disk, a file for each field."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lrmil.encoders import Encoder, embed
from lrmil.files import atomic_path
from lrmil.settings import fingerprint
from lrmil.studies.fields import Field, FloatArray
from lrmil.studies.settings import ProbeSettings
from lrmil.studies.views import ImageArray, View, look


@dataclass(frozen=True)
class TaughtViews:
    """Views with what the teacher saw in their children."""

    images: ImageArray
    """(n, P, P, 3)"""
    truth: FloatArray
    """(n, T)"""
    cls: Mapping[int, npt.NDArray[np.float16]]
    """{layer: (n, K, W)} class tokens of the children, raw"""
    embedding: npt.NDArray[np.float32]
    """(n, 2 W): class token and token mean after the final norm, averaged over the children"""
    field: npt.NDArray[np.int64]
    """(n,) number of the field"""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: npt.NDArray[np.int64]) -> TaughtViews:
        """Return these views."""
        cls = {layer: values[rows] for layer, values in self.cls.items()}
        return TaughtViews(self.images[rows], self.truth[rows], cls, self.embedding[rows], self.field[rows])


class Teacher:
    """The frozen encoder with its answers kept in `folder`."""

    def __init__(self, encoder: Encoder, settings: ProbeSettings, layers: Sequence[int], folder: Path) -> None:
        self.encoder, self.settings, self.layers, self.folder = encoder, settings, tuple(layers), folder
        self._described = encoder.describe()

    def views(self, number: int, field: Field, views: Sequence[View], part: str) -> TaughtViews:
        """Return what is seen in the views of a field; `part` names the set of views in the cache."""
        s = self.settings
        seen = look(field, views, s.patch_px, s.ratio, s.targets, s.min_nuclei)
        key = fingerprint(
            field.digest(), [vars(v) for v in views], s.patch_px, s.ratio, s.precision, self._described, self.layers
        )
        path = self.folder / part / f"{field.name}.npz"
        stored = _read(path, key)
        if stored is None:
            stored = self._ask(seen.children)
            with atomic_path(path) as scratch:
                np.savez(scratch, allow_pickle=False, key=np.array(key), **stored)
        return TaughtViews(
            images=seen.images,
            truth=seen.truth,
            cls={layer: stored[f"cls{layer}"] for layer in self.layers},
            embedding=stored["embedding"],
            field=np.full(len(views), number),
        )

    def _ask(self, children: ImageArray) -> dict[str, npt.NDArray[np.floating]]:
        n, k = children.shape[:2]
        flat = children.reshape(n * k, *children.shape[2:])
        out = embed(self.encoder, flat, cls_layers=self.layers, precision=self.settings.precision)
        found: dict[str, npt.NDArray[np.floating]] = {
            f"cls{layer}": values.reshape(n, k, -1).astype(np.float16) for layer, values in out.cls.items()
        }
        found["embedding"] = out.embedding.reshape(n, k, -1).mean(axis=1)
        return found


def join(parts: Sequence[TaughtViews]) -> TaughtViews:
    """Put views of several fields behind each other."""
    return TaughtViews(
        images=np.concatenate([p.images for p in parts]),
        truth=np.concatenate([p.truth for p in parts]),
        cls={layer: np.concatenate([p.cls[layer] for p in parts]) for layer in parts[0].cls},
        embedding=np.concatenate([p.embedding for p in parts]),
        field=np.concatenate([p.field for p in parts]),
    )


def _read(path: Path, key: str) -> dict[str, npt.NDArray[np.floating]] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            return {name: stored[name] for name in stored.files if name != "key"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
