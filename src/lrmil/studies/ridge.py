"""Ridge regression from embeddings to truths. All that is chosen is chosen on the training side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from lrmil.errors import TrainingError

FloatArray = npt.NDArray[np.float64]
ALPHAS = np.logspace(-1, 6, 15)
_INNER_FOLDS = 5


@dataclass(frozen=True)
class RidgeAnswer:
    """What a probe says of the test rows."""

    predicted: FloatArray
    """(n,)"""
    alpha: float


def ridge_probe(
    train: npt.NDArray[np.floating], truth: FloatArray, groups: npt.NDArray[np.str_], test: npt.NDArray[np.floating]
) -> RidgeAnswer:
    """Fit on the training rows that have a truth, answer for all test rows.

    Features are standardised on the training rows; alpha is the best of `ALPHAS` by squared error in a cross-validation
    within them that keeps groups together.

    Args:
        train: (m, E).
        truth: (m,), nan where unknown.
        groups: (m,) which rows belong together.
        test: (n, E).

    Raises:
        TrainingError: fewer than two groups have a truth.
    """
    known = np.isfinite(truth)
    folds = min(_INNER_FOLDS, len(np.unique(groups[known])))
    if folds < 2:
        raise TrainingError("a probe needs at least two groups with a truth.", fix="Use more fields.")
    scale = StandardScaler().fit(np.asarray(train[known], np.float64))
    features = scale.transform(np.asarray(train[known], np.float64))
    inner = list(GroupKFold(folds).split(features, truth[known], groups[known]))
    ridge = RidgeCV(ALPHAS, cv=inner, scoring="neg_mean_squared_error").fit(features, truth[known])
    return RidgeAnswer(ridge.predict(scale.transform(np.asarray(test, np.float64))), float(ridge.alpha_))
