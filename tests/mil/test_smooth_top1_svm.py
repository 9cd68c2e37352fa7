"""The smooth top-1 SVM loss, against its definition and its authors' program."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.mil.smooth_top1_svm import smooth_top1_svm


def _row(scores: list[float], target: int, margin: float = 1.0, temperature: float = 1.0) -> float:
    """One row in double precision, class by class."""
    raised = [s + (0.0 if c == target else margin) for c, s in enumerate(scores)]
    best, second = sorted(scores)[:-3:-1]
    if best - second >= temperature * math.log(1000):
        return max(raised) - scores[target]
    return temperature * math.log(sum(math.exp((r - scores[target]) / temperature) for r in raised))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3), min_size=1, max_size=5),
    target=st.integers(0, 2),
    margin=st.sampled_from([0.5, 1.0, 2.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_it_follows_its_definition(rows: list[list[float]], target: int, margin: float, temperature: float) -> None:
    targets = torch.full((len(rows),), target)
    got = smooth_top1_svm(torch.tensor(rows, dtype=torch.float64), targets, margin=margin, temperature=temperature)
    wanted = sum(_row(row, target, margin, temperature) for row in rows) / len(rows)
    assert float(got) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_golden(golden: Callable[[str], Any]) -> None:
    file = golden("smooth_top1_svm")
    scores, targets = torch.from_numpy(file["in/x"]), torch.from_numpy(file["in/y"])
    rows = [smooth_top1_svm(scores[i : i + 1], targets[i : i + 1]) for i in range(len(scores))]
    file.expect("loss/per_row", torch.stack(rows))
    file.expect("loss/mean", smooth_top1_svm(scores, targets))
    assert {k for k in file.arrays if k.startswith(("out/", "loss/"))} == {"loss/per_row", "loss/mean"}


def test_rows_with_a_large_lead_use_the_hard_form() -> None:
    """The lead is that of the bare scores, whichever class is true, and the switch is at ln(1000)."""
    edge = math.log(1000.0)
    for true, hard in ((0, 0.0), (1, edge + 1 + 0.01)):
        scores = torch.tensor([[edge + 0.01, 0.0]], dtype=torch.float64)
        assert float(smooth_top1_svm(scores, torch.tensor([true]))) == pytest.approx(hard, abs=1e-9)
        scores = torch.tensor([[edge - 0.01, 0.0]], dtype=torch.float64)
        smooth = float(smooth_top1_svm(scores, torch.tensor([true])))
        assert smooth == pytest.approx(_row(scores[0].tolist(), true))
        assert smooth > hard - 0.02 + 1e-6


def test_gradients_are_finite_and_those_of_the_form_used() -> None:
    scores = torch.tensor([[1e4, -1e4], [0.3, 0.1], [-1e4, 1e4]], requires_grad=True)
    smooth_top1_svm(scores, torch.tensor([1, 0, 1])).backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    # Hard and wrong: 1/3 each way. Smooth: softmax of the violations. Hard and right: nothing.
    torch.testing.assert_close(scores.grad[0], torch.tensor([1 / 3, -1 / 3]))
    pushed = 1 / (1 + math.exp(-0.8)) / 3
    torch.testing.assert_close(scores.grad[1], torch.tensor([-pushed, pushed]))
    assert scores.grad[2].tolist() == [0.0, 0.0]
