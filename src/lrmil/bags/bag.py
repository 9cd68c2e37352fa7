"""One slide's patches as a model sees them: a row of features for each patch, and where the patch lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lrmil.errors import CorruptBag

FeatureArray = npt.NDArray[np.float16] | npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_EXPONENT = {np.dtype(np.float16): (np.uint16, 0x7C00), np.dtype(np.float32): (np.uint32, 0x7F800000)}
_PER_PATCH = ("coords_l0", "region", "slot", "region_tissue")
_SCALE_TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class Bag:
    """Features and places of the N patches of one slide. Checked when made; what is not known is None, never a guess.

    A bag whose features have width 0 holds places only.

    Raises:
        CorruptBag: shapes disagree, a dtype is wrong, or a value is NaN or infinite (the message gives the row).
    """

    features: FeatureArray
    """(N, D) float16 or float32"""
    coords_l0: IntArray | None
    """(N, 2) int64, top-left corners (x, y) in level-0 pixels"""
    patch_side_l0: float | None = None
    """Side of a patch in level-0 pixels. Not whole where the scale does not snap."""
    mpp: float | None = None
    """Effective um per pixel of the patch as it was encoded (2.0 for 5x), not of level 0"""
    region: IntArray | None = None
    """(N,) int64, row of the patch's region in the matched grid: itself for LR patches, the parent for HR patches"""
    slot: IntArray | None = None
    """(N,) int64, of HR patches: ratio*row + col within the parent"""
    layer_cls: Mapping[int, FeatureArray] = field(default_factory=dict)
    """(N, W) for each kept layer: the CLS token after that block, before the final norm"""
    region_tissue: npt.NDArray[np.float32] | None = None
    """(N,) float32, share of each patch that is tissue, 0 to 1"""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: config hash, encoder, scale, software. Plain values that JSON can hold"""
    slide: str = ""
    """Name of the slide"""
    mpp_l0: float | None = None
    """um per level-0 pixel"""
    patch_px: int | None = None
    """Side of the patch in pixels of `mpp`, before any resizing by the encoder"""
    dimensions_l0: tuple[int, int] | None = None
    """Width and height of the slide in level-0 pixels"""

    def __post_init__(self) -> None:
        self._check_matrix("features", self.features)
        for layer, values in self.layer_cls.items():
            self._check_matrix(f"layer_cls/{layer}", values)
            self._check_rows(f"layer_cls/{layer}", values)
        for name in _PER_PATCH:
            self._check_per_patch(name, getattr(self, name))
        for name in ("patch_side_l0", "mpp", "mpp_l0", "patch_px"):
            value = getattr(self, name)
            if value is not None and not (0 < value < float("inf")):
                self._fail(f"{name} is {value}, not a positive number.")
        self._check_scale()

    @property
    def num_patches(self) -> int:
        """N."""
        return len(self.features)

    @property
    def width(self) -> int:
        """D, the width of a feature row; 0 where only places were read."""
        return self.features.shape[1]

    def take(self, rows: slice | npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Bag:
        """Return the bag of the chosen rows."""
        chosen = {n: getattr(self, n)[rows] for n in _PER_PATCH if getattr(self, n) is not None}
        layers = {layer: values[rows] for layer, values in self.layer_cls.items()}
        return replace(self, features=self.features[rows], layer_cls=layers, **chosen)

    def __repr__(self) -> str:
        layers = f", layers {sorted(self.layer_cls)}" if self.layer_cls else ""
        scale = "unknown mpp" if self.mpp is None else f"{self.mpp:g} um/px"
        return f"Bag({self.slide or 'unnamed'}: {self.num_patches} x {self.width}, {scale}{layers})"

    def _check_matrix(self, name: str, values: FeatureArray) -> None:
        if values.ndim != 2:
            self._fail(f"{name} has shape {values.shape}; it should be (patches, width).")
        if values.dtype not in _EXPONENT:
            self._fail(f"{name} has dtype {values.dtype}; it should be float16 or float32.")
        row = first_bad_row(values)
        if row is not None:
            self._fail(f"{name} holds NaN or infinity, first in row {row} (counted from 0).")

    def _check_rows(self, name: str, values: npt.NDArray[Any]) -> None:
        if len(values) != len(self.features):
            self._fail(f"{name} has {len(values)} rows and features has {len(self.features)}.")

    def _check_per_patch(self, name: str, values: npt.NDArray[Any] | None) -> None:
        if values is None:
            return
        wanted: type = np.float32 if name == "region_tissue" else np.int64
        shape = "(N, 2)" if name == "coords_l0" else "(N,)"
        if values.ndim != (2 if name == "coords_l0" else 1) or values.shape[1:] not in ((), (2,)):
            self._fail(f"{name} has shape {values.shape}; it should be {shape}.")
        if values.dtype != wanted:
            self._fail(f"{name} has dtype {values.dtype}; it should be {np.dtype(wanted)}.")
        self._check_rows(name, values)
        if name == "region_tissue" and not np.isfinite(values).all():
            self._fail(f"{name} holds NaN or infinity, first in row {int(np.argmin(np.isfinite(values)))}.")
        if name in ("region", "slot") and len(values) and values.min() < 0:
            self._fail(f"{name} holds {values.min()} in row {int(values.argmin())}; it counts from 0.")

    def _check_scale(self) -> None:
        """Catch the mpp of one scale written beside the side of another."""
        known = (self.patch_side_l0, self.mpp, self.mpp_l0, self.patch_px)
        side_l0, mpp, mpp_l0, patch_px = known
        if side_l0 is None or mpp is None or mpp_l0 is None or patch_px is None:
            return
        if abs(side_l0 * mpp_l0 / (patch_px * mpp) - 1.0) > _SCALE_TOLERANCE:
            self._fail(
                f"a patch of {side_l0:g} level-0 px at {mpp_l0:g} um/px is {side_l0 * mpp_l0:g} um wide, "
                f"but {patch_px} px at {mpp:g} um/px are {patch_px * mpp:g} um."
            )

    def _fail(self, message: str) -> None:
        name = f"bag of {self.slide}" if self.slide else "bag"
        raise CorruptBag(f"{name}: {message}", fix="Encode the slide again.")


def within_range(values: npt.NDArray[np.floating], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return `values` as `dtype`, unless that is float16 and one of them lies beyond it (65504): then as they are.

    Class tokens between blocks are not normed, and some networks let a few channels of them grow to such sizes.
    """
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype, copy=False)
    if narrow.dtype != np.float16 or first_bad_row(narrow) is None:
        return narrow
    return values


def first_bad_row(values: FeatureArray) -> int | None:
    """Return the first row of a float16 or float32 matrix that holds NaN or infinity, or None.

    Looks at the exponent bits, which is several times quicker than `numpy.isfinite` on float16.
    """
    unsigned, mask = _EXPONENT[values.dtype]
    bad = (np.ascontiguousarray(values).view(unsigned) & unsigned(mask)) == mask
    if not bad.any():
        return None
    return int(np.argmax(bad.any(axis=1)))
