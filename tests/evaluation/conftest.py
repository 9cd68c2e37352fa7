"""Simulated predictions with a known truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lrmil.evaluation.predictions import Predictions
from lrmil.evaluation.values import Values

Simulate = Callable[..., Predictions]


@pytest.fixture(scope="session")
def simulate() -> Simulate:
    """`simulate(rng, patients, ...)`: two classes, binormal scores `separation` apart, folds stratified by label."""

    def make(
        rng: np.random.Generator,
        patients: int = 40,
        *,
        slides_per_patient: int = 1,
        folds: int = 5,
        seeds: int = 1,
        separation: float = 1.0,
    ) -> Predictions:
        label = np.arange(patients) % 2
        fold = np.arange(patients) // 2 % folds
        rows = np.tile(np.repeat(np.arange(patients), slides_per_patient), seeds)
        count = patients * slides_per_patient
        score = rng.normal(size=count * seeds) + separation * label[rows]
        positive = 1 / (1 + np.exp(-(score - separation / 2)))
        return Predictions.of(
            slide_ids=np.tile([f"slide_{i}" for i in range(count)], seeds).tolist(),
            patient_ids=[f"patient_{r}" for r in rows],
            labels=label[rows],
            probabilities=np.stack([1 - positive, positive], axis=1),
            class_names=["negative", "positive"],
            folds=fold[rows],
            seeds=np.repeat(np.arange(seeds), count),
        )

    return make


SimulateValues = Callable[..., Values]


@pytest.fixture(scope="session")
def simulate_values() -> SimulateValues:
    """`simulate_values(rng, kind, patients, ...)`: a number, or censored survival, and its noisy prediction."""

    def make(
        rng: np.random.Generator,
        kind: str = "regression",
        patients: int = 60,
        *,
        slides_per_patient: int = 1,
        folds: int = 5,
        seeds: int = 1,
        noise: float = 0.5,
    ) -> Values:
        z = np.random.default_rng(4321).normal(size=patients)
        if kind == "regression":
            target = 50 + 10 * z
        else:
            life, leave = (np.random.default_rng(s) for s in (4322, 4323))
            died = life.exponential(30 * np.exp(-2 * z))
            until = leave.uniform(5, 80, size=patients)
            target = np.stack([np.minimum(died, until) + 0.1, died <= until], axis=1).astype(float)
        rows = np.tile(np.repeat(np.arange(patients), slides_per_patient), seeds)
        count = patients * slides_per_patient
        said = z[rows] + noise * rng.normal(size=len(rows))
        return Values.of(
            slide_ids=np.tile([f"slide_{i}" for i in range(count)], seeds).tolist(),
            patient_ids=[f"patient_{r}" for r in rows],
            targets=target[rows],
            predicted=50 + 10 * said if kind == "regression" else said,
            folds=(np.arange(patients) % folds)[rows],
            seeds=np.repeat(np.arange(seeds), count),
        )

    return make


def answers(noise: float, seed: int, patients: int = 120, offset: int = 0) -> Predictions:
    """Binary answers of one method in three folds; the less noise, the better. Equal for equal seeds."""
    rng = np.random.default_rng(seed)
    labels = np.arange(patients) % 2
    score = 1 / (1 + np.exp(-(labels * 2.0 - 1 + rng.normal(0, noise, patients))))
    ids = [f"p{i + offset}" for i in range(patients)]
    return Predictions.of(
        slide_ids=ids,
        patient_ids=ids,
        labels=labels,
        probabilities=np.stack([1 - score, score], axis=1),
        class_names=("a", "b"),
        folds=np.arange(patients) // 2 % 3,
        seeds=np.zeros(patients, int),
    )
