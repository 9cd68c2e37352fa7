"""The mask and how much of any box it covers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.geometry import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TissueMask:
    """Where a slide is tissue. Mask pixel (row i, column j) stands for level-0 [j*dx, (j+1)*dx) x [i*dy, (i+1)*dy)."""

    mask: BoolArray
    """(h, w)"""
    downsample_l0: tuple[float, float]
    """(dx, dy), level-0 pixels per mask pixel"""
    mpp: float
    """um per mask pixel"""
    pen: BoolArray
    """(h, w), what was cut out as pen"""
    threshold: float
    """least stain (optical density) that counted as tissue"""
    glass_rgb: tuple[float, float, float]
    """colour of the empty glass, against which stain is measured"""
    unreadable: int = 0
    """pieces of the overview that could not be decoded; they are not tissue"""

    @property
    def tissue_share(self) -> float:
        """Share of the mask that is tissue."""
        return float(self.mask.mean()) if self.mask.size else 0.0

    @property
    def tissue_mm2(self) -> float:
        """Tissue area in square millimetres."""
        return float(self.mask.sum()) * self.mpp**2 / 1e6

    @property
    def pen_share(self) -> float:
        """Share of the mask that was cut out as pen. Worth a look where it rivals `tissue_share`."""
        return float(self.pen.mean()) if self.pen.size else 0.0

    @cached_property
    def _integral(self) -> npt.NDArray[np.int32]:
        """(h+1, w+1): tissue pixels above and to the left of each corner of the mask."""
        return np.asarray(cv2.integral(self.mask.view(np.uint8), sdepth=cv2.CV_32S), dtype=np.int32)

    def coverage(self, boxes_l0: IntArray) -> npt.NDArray[np.float32]:
        """Return the share (N,) in 0..1 of each level-0 box (x0, y0, x1, y1) that is tissue; (N, 4) int64, half open.

        Exact also where an edge cuts through mask pixels: within one mask pixel the integral image is bilinear. What
        lies outside the mask is no tissue. A box without area has coverage 0.
        """
        boxes = np.asarray(boxes_l0, dtype=np.float64).reshape(-1, 4)
        x0, y0, x1, y1 = boxes.T
        tissue = self._upto(x1, y1) - self._upto(x0, y1) - self._upto(x1, y0) + self._upto(x0, y0)
        dx, dy = self.downsample_l0
        area = np.clip(x1 - x0, 0, None) * np.clip(y1 - y0, 0, None) / (dx * dy)
        share = np.divide(tissue, area, out=np.zeros_like(tissue), where=area > 0)
        return np.clip(share, 0.0, 1.0).astype(np.float32)

    def _upto(self, x_l0: FloatArray, y_l0: FloatArray) -> FloatArray:
        """Tissue above and to the left of each level-0 point, in mask pixels."""
        height, width = self.mask.shape
        x = np.clip(x_l0 / self.downsample_l0[0], 0, width)
        y = np.clip(y_l0 / self.downsample_l0[1], 0, height)
        j = np.minimum(x.astype(np.int64), width - 1)
        i = np.minimum(y.astype(np.int64), height - 1)
        fx, fy = x - j, y - i
        integral = self._integral
        above = integral[i, j] * (1 - fx) + integral[i, j + 1] * fx
        below = integral[i + 1, j] * (1 - fx) + integral[i + 1, j + 1] * fx
        return above * (1 - fy) + below * fy
