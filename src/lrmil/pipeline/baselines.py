"""What LRMIL has to beat to be worth anything: the majority class, colour alone, an encoder that learned nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.pixels import RegionPixels

BINS = 6


def colour_histogram(pixels: RegionPixels, slide_id: str) -> npt.NDArray[np.float64]:
    """Return the joint RGB histogram of a slide's regions, BINS**3 shares."""
    colours = pixels[slide_id].images.reshape(-1, 3)
    codes = (colours.astype(np.int64) * BINS // 256) @ np.array([BINS * BINS, BINS, 1])
    return np.bincount(codes, minlength=BINS**3) / len(codes)


def colour_probabilities(
    run: Run, split: Split, histograms: Mapping[str, npt.NDArray[np.float64]], slides: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Return the class probabilities (n, C) of `slides` by a logistic regression on the training split's histograms.

    Square roots of the shares (Hellinger distance), standardised. A class that the training split lacks gets 0.
    """
    labelled = [s for s in split.train if s in histograms]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000, random_state=0))
    model.fit(np.sqrt(np.stack([histograms[s] for s in labelled])), [run.cohort.label_of(s) for s in labelled])
    found = model.predict_proba(np.sqrt(np.stack([histograms[s] for s in slides])))
    probabilities = np.zeros((len(slides), len(run.cohort.classes)))
    probabilities[:, model[-1].classes_] = found
    return probabilities
