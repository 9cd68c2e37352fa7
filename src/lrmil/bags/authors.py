"""Files of the LRMIL authors' release (hvcl/LRMIL): what stage 2 reads and writes.

    teacher_meta/fold{f}/<wsi>.pt   pid, label, coords_20x, attention, bag_repr, logits
    <wsi>_aggregated.pt             teacher_final, teacher_layers, coords_20x, coords_5x, links_5x_to_20x
    <wsi>.pt                        feats_5x, coords_5x, or the bare tensor

Coordinates are in pixels of the 20x image, as the names say; `l0_per_20x_px` (2 on a 40x scan) turns them into level 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrmil.bags._foreign_arrays import as_coords_l0, as_features
from lrmil.bags.bag import Bag, IntArray
from lrmil.bags.tensors import load_tensor_file, to_array
from lrmil.errors import BagError, CorruptBag

_HR_SIDE_20X_PX = 256.0
_LR_SIDE_20X_PX = 1024.0


@dataclass(frozen=True, eq=False)
class TeacherMeta:
    """What the released teacher stored for one slide."""

    patient_id: str | None
    label: int | None
    coords_20x: IntArray
    """(N, 2) in pixels of the 20x image"""
    attention_logits: npt.NDArray[np.float32]
    """(N,) before the softmax: the released head returns logits and calls them attention"""
    bag_feature: npt.NDArray[np.float32]
    """(D,)"""
    logits: npt.NDArray[np.float32]
    """(C,)"""
    swapped: bool
    """The file held the two the wrong way round"""


def read_teacher_meta(path: str | Path, *, swapped: bool | None = None) -> TeacherMeta:
    """Read a `teacher_meta` file, putting `attention` and `bag_repr` right where the release swapped them.

    The released dump unpacks (logits, bag, attention) as (logits, attention, bag), so its `attention` has the width of
    the features and its `bag_repr` one value a patch. The one with as many values as there are coordinates is the
    attention. Where the bag has exactly as many patches as features are wide, `swapped` must say.

    Raises:
        CorruptBag: a field is missing, or neither (or, without `swapped`, both) could be the attention.
    """
    raw = _mapping(path, ("coords_20x", "attention", "bag_repr", "logits"))
    coords = as_coords_l0(str(path), to_array(raw["coords_20x"]))
    attention, bag = (to_array(raw[k]).astype(np.float32).reshape(-1) for k in ("attention", "bag_repr"))
    n = len(coords)
    if swapped is None:
        if len(attention) == len(bag) == n:
            raise CorruptBag(
                f"{path}: attention and bag_repr both have {n} values, as many as there are patches.",
                fix="Say which it is: swapped=True for files of the released code, swapped=False for corrected ones.",
            )
        swapped = len(bag) == n
    if swapped:
        attention, bag = bag, attention
    if len(attention) != n:
        raise CorruptBag(f"{path}: {n} patches, but {len(attention)} attention values and {len(bag)} bag features.")
    label = raw.get("label")
    return TeacherMeta(
        patient_id=None if raw.get("pid") is None else str(raw["pid"]),
        label=None if label is None else int(label),
        coords_20x=coords,
        attention_logits=attention,
        bag_feature=bag,
        logits=to_array(raw["logits"]).astype(np.float32).reshape(-1),
        swapped=swapped,
    )


@dataclass(frozen=True, eq=False)
class Aggregated:
    """What the release stored of one slide at 20x, for stage 1."""

    hr: Bag
    """HR patches. `region` is known where every patch is linked to just one region, `slot` where the grids align too"""
    coords_5x: IntArray
    """(N_LR, 2) top-left corners of the regions, in pixels of the 20x image"""
    links: tuple[IntArray, ...]
    """For every region, the rows of its HR patches"""


def read_aggregated(path: str | Path, *, l0_per_20x_px: float | None = None) -> Aggregated:
    """Read an `_aggregated.pt` file. Without `l0_per_20x_px` the HR bag has no level-0 coordinates.

    Raises:
        CorruptBag: a field is missing, or a link points to a patch that is not there.
    """
    raw = _mapping(path, ("teacher_final", "teacher_layers", "coords_20x", "coords_5x", "links_5x_to_20x"))
    hr = as_coords_l0(str(path), to_array(raw["coords_20x"]))
    lr = as_coords_l0(str(path), to_array(raw["coords_5x"]))
    links = tuple(to_array(children).astype(np.int64).reshape(-1) for children in raw["links_5x_to_20x"])
    region = _regions(str(path), links, len(hr), len(lr))
    layers = {int(k): as_features(str(path), to_array(v)) for k, v in raw["teacher_layers"].items()}
    bag = Bag(
        features=as_features(str(path), to_array(raw["teacher_final"])),
        coords_l0=_to_l0(hr, l0_per_20x_px),
        patch_side_l0=None if l0_per_20x_px is None else _HR_SIDE_20X_PX * l0_per_20x_px,
        region=region,
        slot=None if region is None else _slots(hr, lr, region),
        layer_cls=layers,
        slide=Path(path).stem.removesuffix("_aggregated"),
        provenance={"source": "LRMIL release, aggregated"},
    )
    return Aggregated(bag, lr, links)


def read_student_features(path: str | Path, *, l0_per_20x_px: float | None = None) -> Bag:
    """Read the LR features of a slide: a dict of `feats_5x` and `coords_5x`, or a bare tensor without places."""
    raw = load_tensor_file(path)
    values, coords = raw, None
    if isinstance(raw, Mapping):
        raw = _mapping(path, ("feats_5x", "coords_5x"), raw)
        values = raw["feats_5x"]
        coords = _to_l0(as_coords_l0(str(path), to_array(raw["coords_5x"])), l0_per_20x_px)
    return Bag(
        features=as_features(str(path), to_array(values)),
        coords_l0=coords,
        patch_side_l0=None if l0_per_20x_px is None else _LR_SIDE_20X_PX * l0_per_20x_px,
        slide=Path(path).stem,
        provenance={"source": "LRMIL release, student features"},
    )


def _mapping(path: str | Path, names: Sequence[str], raw: Any = None) -> Mapping[str, Any]:
    raw = load_tensor_file(path) if raw is None else raw
    if not isinstance(raw, Mapping):
        raise BagError(f"{path}: one tensor, not a dict with {', '.join(names)}.")
    missing = [name for name in names if name not in raw]
    if missing:
        raise CorruptBag(f"{path}: lacks {', '.join(missing)} (it has {', '.join(map(str, raw))}).")
    return raw


def _to_l0(coords_20x: IntArray, l0_per_20x_px: float | None) -> IntArray | None:
    return None if l0_per_20x_px is None else np.round(coords_20x * l0_per_20x_px).astype(np.int64)


def _regions(where: str, links: Sequence[IntArray], num_hr: int, num_lr: int) -> IntArray | None:
    """The one region of every HR patch, or None where one has none or several (grids that were tiled independently)."""
    if len(links) != num_lr:
        raise CorruptBag(f"{where}: {num_lr} regions, but {len(links)} lists of links.")
    children = np.concatenate([*links, np.empty(0, np.int64)])
    outside = children[(children < 0) | (children >= num_hr)]
    if len(outside):
        raise CorruptBag(f"{where}: a region is linked to HR patch {outside[0]}; there are {num_hr}.")
    if (np.bincount(children, minlength=num_hr) != 1).any():
        return None
    region = np.empty(num_hr, dtype=np.int64)
    region[children] = np.repeat(np.arange(num_lr), [len(c) for c in links])
    return region


def _slots(hr: IntArray, lr: IntArray, region: IntArray) -> IntArray | None:
    offset = hr - lr[region]
    col, row = (offset // int(_HR_SIDE_20X_PX)).T
    ratio = int(_LR_SIDE_20X_PX / _HR_SIDE_20X_PX)
    aligned = (offset % int(_HR_SIDE_20X_PX) == 0).all() and (
        (col >= 0) & (col < ratio) & (row >= 0) & (row < ratio)
    ).all()
    return ratio * row + col if aligned else None
