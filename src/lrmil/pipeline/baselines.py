"""What LRMIL has to beat to be worth anything: one answer for all, colour alone, an encoder that learned nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lrmil.pipeline.context import Run, Split
from lrmil.tasks import TaskKind

MAJORITY, TRAINING_MEAN, CONSTANT_RISK = "Majority class", "Training mean", "Constant risk"
"""Titles of the answer that looks at no slide: of classes, a number, survival"""


def constant_title(kind: TaskKind) -> str:
    """Return what the answer that looks at no slide is called."""
    return {"classification": MAJORITY, "regression": TRAINING_MEAN, "survival": CONSTANT_RISK}[kind]


def colour_answers(
    run: Run, split: Split, histograms: Mapping[str, npt.NDArray[np.float64]], slides: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Return what colour alone says: class probabilities (n, C), or of a regression the numbers (n,) by ridge."""
    if run.kind == "classification":
        return colour_probabilities(run, split, histograms, slides)
    if not slides:
        return np.zeros(0)
    model = make_pipeline(StandardScaler(), Ridge(alpha=10.0))
    targets = [run.cohort.target_of(s) for s in split.train]
    model.fit(np.sqrt(np.stack([histograms[s] for s in split.train])), targets)
    found: npt.NDArray[np.float64] = model.predict(np.sqrt(np.stack([histograms[s] for s in slides])))
    return found


def colour_probabilities(
    run: Run, split: Split, histograms: Mapping[str, npt.NDArray[np.float64]], slides: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Return the class probabilities (n, C) of `slides` by a logistic regression on the training slides' histograms.

    `histograms` are of `RegionPixels.colours`; the square roots of their shares (Hellinger distance) are standardised.
    A class that the training split lacks gets 0.
    """
    labels = [run.cohort.label_of(s) for s in split.train]
    probabilities = np.zeros((len(slides), len(run.cohort.classes)))
    if not slides:
        return probabilities
    if len(set(labels)) == 1:
        probabilities[:, labels[0]] = 1.0
        return probabilities
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000, random_state=0))
    model.fit(np.sqrt(np.stack([histograms[s] for s in split.train])), labels)
    probabilities[:, model[-1].classes_] = model.predict_proba(np.sqrt(np.stack([histograms[s] for s in slides])))
    return probabilities
