"""Pictures of an answer: where the model looked."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from lrmil.errors import HeadError
from lrmil.evaluation.overlay import AttentionMap, attention_overlay
from lrmil.evaluation.slide_figures import side_by_side
from lrmil.inference.predict import Prediction

UInt8Image = npt.NDArray[np.uint8]

_MIN_SIDE_PX, _MAX_SIDE_PX = 600, 2048
_UNSEEN_GREY = 160


def draw_attention(answer: Prediction) -> UInt8Image:
    """Paint a prediction's attention over its slide; (H, W, 3) uint8, 600 to 2048 px on the longer side.

    The picture spans the whole slide, without a frame: it lies over any other view of the slide after mere scaling.
    Attention is shown by its rank within the slide, since softmaxed weights are mostly near zero; regions that were not
    looked at stay unpainted.

    Raises:
        HeadError: the head gives no attention.
    """
    rgb, downsample_l0 = _view(answer)
    shown = _attention_map(answer)
    return attention_overlay(rgb, shown.boxes_l0, shown.attention, downsample_l0)


def attention_figure(answer: Prediction) -> Figure:
    """The slide and, beside it, `draw_attention` with colour bar, scale bar and the answer; for people.

    Raises:
        HeadError: the head gives no attention.
    """
    rgb, downsample_l0 = _view(answer)
    title = f"{answer.slide}: {answer.in_words()}"
    return side_by_side(rgb, [_attention_map(answer)], downsample_l0, mpp_l0=answer.scale["mpp_l0"], title=title)


def _attention_map(answer: Prediction) -> AttentionMap:
    if answer.attention is None:
        raise HeadError(f"{answer.slide}: this model's head gives no attention to draw.")
    return AttentionMap("where the model looked", answer.boxes_l0, answer.attention)


def _view(answer: Prediction) -> tuple[UInt8Image, tuple[float, float]]:
    """Return the overview at a size to look at, and how many level-0 pixels (x, y) one of its pixels spans."""
    overview = answer.overview
    rgb = overview.rgb
    if overview.unreadable:
        # The background's colour would make glass of what could not be read.
        rgb = np.where(overview.scanned[..., None], rgb, np.uint8(_UNSEEN_GREY))
    height, width = rgb.shape[:2]
    longer = max(height, width)
    scale = min(1.0, _MAX_SIDE_PX / longer) if longer >= _MIN_SIDE_PX else float(-(-_MIN_SIDE_PX // longer))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if scale != 1:
        rgb = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC))
    dx, dy = overview.downsample_l0
    return rgb, (dx * width / size[0], dy * height / size[1])
