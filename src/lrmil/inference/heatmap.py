"""The picture of an answer: where the model looked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lrmil.evaluation.overlay import attention_overlay
from lrmil.inference.predict import Prediction


def draw_attention(answer: Prediction) -> npt.NDArray[np.uint8]:
    """Paint a prediction's attention over its slide's overview; (H, W, 3) uint8.

    Attention is shown by its rank within the slide, since softmaxed weights are mostly near zero; regions that were not
    looked at stay unpainted.
    """
    if answer.prepared is None or answer.attention is None:
        raise ValueError("this prediction holds no picture; it comes from a file, or from a head without attention")
    overview = answer.prepared.overview
    return attention_overlay(overview.rgb, answer.boxes_l0, answer.attention, overview.downsample_l0)
