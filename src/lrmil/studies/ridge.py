"""Ridge regression from embeddings to truths. All that is chosen is chosen on the training side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
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
    within them that keeps groups together. The same as scikit-learn's RidgeCV with those folds, which decomposes the
    features anew for every alpha.

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
    features, wanted = scale.transform(np.asarray(train[known], np.float64)), truth[known]
    errors = np.zeros(len(ALPHAS))
    for inside, outside in GroupKFold(folds).split(features, wanted, groups[known]):
        said = _ridge(features[inside], wanted[inside], features[outside], ALPHAS)
        errors += ((said - wanted[outside]) ** 2).mean(axis=1)
    alpha = float(ALPHAS[errors.argmin()])
    asked: FloatArray = scale.transform(np.asarray(test, np.float64))
    return RidgeAnswer(_ridge(features, wanted, asked, np.array([alpha]))[0], alpha)


def _ridge(train: FloatArray, truth: FloatArray, test: FloatArray, alphas: FloatArray) -> FloatArray:
    """(A, n) answers of ridge regression with an intercept, from one decomposition for all alphas."""
    centre, level = train.mean(axis=0), truth.mean()
    u, size, vt = np.linalg.svd(train - centre, full_matrices=False)
    shrunk = size / (size**2 + alphas[:, None]) * (u.T @ (truth - level))
    return shrunk @ (vt @ (test - centre).T) + level
