"""Table and figure of other ways of splitting, from answers made so that it is known what they must show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from tests.evaluation.conftest import answers

from lrmil.evaluation import Predictions, bootstrap, paired_bootstrap, recovered_share
from lrmil.pipeline.config import RunSettings
from lrmil.pipeline.evaluate import LR_ONLY, LRMIL, TEACHER
from lrmil.studies.fold_study import METHODS, _scored, figure, to_markdown

SAID = {
    "sure": {TEACHER: answers(0.3, 1), LR_ONLY: answers(20.0, 3), LRMIL: answers(1.5, 2)},
    "none": {TEACHER: answers(20.0, 4), LR_ONLY: answers(20.0, 5), LRMIL: answers(1.5, 6)},
}
DRAWN: Any = {"seed": 0, "resamples": 200}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """A way of splitting with a sure gap, and one without."""
    told = {"cohort": {"table": "cohort.csv"}, "out": "run", "evaluation": {"bootstrap": DRAWN["resamples"]}}
    run = SimpleNamespace(settings=RunSettings.model_validate(told), kind="classification")
    study: Any = SimpleNamespace(run=run)
    rows = [
        {"split": split, "train_patients": patients} | row
        for (split, said), patients in zip(SAID.items(), (12.5, 40.0), strict=True)
        for row in _scored(study, said)
    ]
    return pd.DataFrame(rows)


def _row(frame: pd.DataFrame, split: str, method: str) -> dict[str, Any]:
    (row,) = frame[(frame["split"] == split) & (frame["method"] == method)].to_dict("records")
    return {str(key): value for key, value in row.items()}


@pytest.mark.parametrize("split", SAID)
def test_every_method_is_scored_and_lrmil_compared_with_both(frame: pd.DataFrame, split: str) -> None:
    said: dict[str, Predictions] = SAID[split]
    for method in METHODS:
        row, own = _row(frame, split, method), bootstrap(said[method], "auc", **DRAWN)
        assert (row["value"], row["value_low"], row["value_high"]) == (own.value, own.low, own.high)
    for method in (TEACHER, LR_ONLY):
        row, gain = _row(frame, split, method), paired_bootstrap(said[LRMIL], said[method], "auc", **DRAWN)
        assert (row["gain"], row["gain_low"], row["gain_high"]) == (gain.value, gain.low, gain.high)
    assert _row(frame, "sure", LR_ONLY)["gain_low"] > 0 > _row(frame, "sure", TEACHER)["gain_high"]


def test_recovered_is_the_share_of_a_sure_gap_only(frame: pd.DataFrame) -> None:
    sure, none = _row(frame, "sure", LRMIL), _row(frame, "none", LRMIL)
    values = {method: _row(frame, "sure", method)["value"] for method in METHODS}
    share = (values[LRMIL] - values[LR_ONLY]) / (values[TEACHER] - values[LR_ONLY])
    assert sure["recovered"] == pytest.approx(share)
    assert 0 < sure["recovered_low"] < share < sure["recovered_high"]
    said = SAID["none"]
    assert recovered_share(said[LRMIL], said[TEACHER], said[LR_ONLY], "auc", **DRAWN).share is None
    assert np.isnan(none["recovered"])


def test_the_table_has_the_numbers_where_its_headings_say(frame: pd.DataFrame) -> None:
    heads, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in _lines(frame))
    assert [line[0] for line in lines] == ["sure", "none"]
    for line in lines:
        told, split = dict(zip(heads, line, strict=True)), line[0]
        assert told["training patients"] == {"sure": "12.5", "none": "40"}[split]
        for method in METHODS:
            assert told[f"AUC, {method}"] == _percent(_row(frame, split, method), "value")
        assert told["LRMIL - 5x, paired"] == _percent(_row(frame, split, LR_ONLY), "gain", "+")
        assert told["LRMIL - 20x, paired"] == _percent(_row(frame, split, TEACHER), "gain", "+")
    share = _row(frame, "sure", LRMIL)
    low, value, high = (f"{100 * share[f'recovered{end}']:.0f}" for end in ("_low", "", "_high"))
    assert [line[-1] for line in lines] == [f"{value} % [{low}, {high}]", "no gap"]


def test_the_figure_shows_the_numbers_of_the_table(frame: pd.DataFrame) -> None:
    left, right = figure(frame, "title").axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["none", "sure"], "the first is on top"
    shown = _shown(left)
    assert len(shown) == len(METHODS) * len(SAID)
    for height, split in enumerate(("none", "sure")):
        for method in METHODS:
            own = [100 * _row(frame, split, method)[f"value{end}"] for end in ("", "_low", "_high")]
            (y,) = [y for y, *numbers in shown if numbers == pytest.approx(own)]
            assert abs(y - height) < 0.5, "beside its name"
    gains = {round(y): numbers for y, *numbers in _shown(right)}
    for height, split in enumerate(("none", "sure")):
        row = _row(frame, split, LR_ONLY)
        assert gains[height] == pytest.approx([100 * row[f"gain{end}"] for end in ("", "_low", "_high")])


def _lines(frame: pd.DataFrame) -> list[str]:
    return to_markdown(frame).splitlines()


def _percent(row: dict[str, Any], name: str, sign: str = "") -> str:
    value, low, high = (f"{100 * row[f'{name}{end}']:{sign}.0f}" for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def _shown(ax: Axes) -> list[tuple[float, float, float, float]]:
    """Height, value, low and high of every row: an interval is drawn right before its point."""
    drawn = [(np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)) for line in ax.get_lines()]
    bars = [i for i, (x, y) in enumerate(drawn) if len(x) == 2 and y[0] == y[1]]
    return [(drawn[i][1][0], drawn[i + 1][0][0], drawn[i][0][0], drawn[i][0][1]) for i in bars]
