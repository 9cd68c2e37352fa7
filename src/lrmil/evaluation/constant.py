"""The answer of a model that saw nothing: what every method has to beat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lrmil.evaluation.scored import FloatArray
from lrmil.tasks import TaskKind


def constant_answer(kind: TaskKind, train_truth: npt.ArrayLike, num_classes: int = 0) -> FloatArray:
    """Return the one answer to all slides that the truth of the training slides gives. Take it fold by fold.

    Args:
        kind: of the task.
        train_truth: (m,) labels 0..C-1 or numbers; of survival it is not looked at, since no risk can be named without
            seeing the slide.
        num_classes: C, for classification.

    Returns:
        The shares of the classes (C,), whose accuracy is that of always naming the commonest training class, and whose
        AUC is 0.5 because all scores are equal; the mean number (), whose correlations are undefined; risk 0 ().
    """
    if kind == "survival":
        return np.zeros(())
    if kind == "regression":
        return np.asarray(np.mean(np.asarray(train_truth, dtype=np.float64)), dtype=np.float64)
    counts = np.bincount(np.asarray(train_truth, dtype=np.int64), minlength=num_classes)
    return counts / counts.sum()
