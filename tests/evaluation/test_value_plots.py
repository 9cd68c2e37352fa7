from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from lrmil.errors import ConfigError
from lrmil.evaluation import Cost, Values, compare_report, constant_answer, log_rank
from lrmil.evaluation.comparison_files import write_comparison
from lrmil.evaluation.plots import to_image
from lrmil.evaluation.regression_plots import predicted_against_true
from lrmil.evaluation.survival import kaplan_meier, risk_groups
from lrmil.evaluation.survival_plots import survival_curves, survival_of_risk_groups

SimulateValues = Callable[..., Values]
GROUPS = {"ABMIL": "Full HR", "LRMIL": "Ours", "Training mean": "Reference"}
COSTS = {"ABMIL": Cost(500, 5.0), "LRMIL": Cost(31, 0.4)}


def _texts(figure: Figure) -> list[str]:
    found = [t.get_text() for ax in figure.axes for t in (*ax.texts, ax.xaxis.label, ax.yaxis.label)]
    for legend in (ax.get_legend() for ax in figure.axes):
        found += [] if legend is None else [legend.get_title().get_text(), *(t.get_text() for t in legend.get_texts())]
    return found


def test_curves_are_those_of_kaplan_meier_and_the_numbers_those_at_risk(simulate_values: SimulateValues) -> None:
    values = simulate_values(np.random.default_rng(0), "survival")
    limits = dict.fromkeys(range(5), 0.0)
    figure = survival_of_risk_groups(values, limits, unit="months")
    patients, high = risk_groups(values, limits)
    curve = kaplan_meier(patients.time[high], patients.event[high])
    ax, below = figure.axes
    line = next(x for x in ax.lines if str(x.get_label()).startswith("high risk"))
    np.testing.assert_allclose(line.get_ydata(), np.r_[1.0, curve.survival])
    np.testing.assert_allclose(line.get_xdata(), np.r_[0.0, curve.times])
    assert line.get_drawstyle() == "steps-post"
    texts = _texts(figure)
    assert f"high risk (n = {high.sum()}, {int(patients.event[high].sum())} events)" in texts
    p = log_rank(patients.time, patients.event, high).p_value
    assert any(t.startswith("log-rank p") and (f"{p:.3f}" in t or p < 0.001) for t in texts)
    assert "time (months)" in texts
    assert any("training" in t for t in texts)
    shown = [t.get_text() for t in below.texts if t.get_position()[1] == 1]
    assert shown == [str(n) for n in curve.risk_set([x for x in ax.get_xticks() if 0 <= x <= ax.get_xlim()[1]])]


def test_groups_without_a_patient_or_an_event_are_said() -> None:
    figure = survival_curves([1, 2, 3], [1, 0, 1], ["low", "low", "low"], order=("high", "low"))
    texts = _texts(figure)
    assert "high (no patient)" in texts
    assert "no log-rank test: all are in one group" in texts
    calm = survival_curves([1, 2, 3, 4], [0, 0, 0, 0], ["a", "a", "b", "b"])
    assert "no log-rank test: no event" in _texts(calm)
    assert to_image(calm).startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot be told apart"):
        survival_curves(range(1, 7), [1] * 6, list("abcdef"))


def test_scatter_has_a_point_for_each_slide_and_means_with_intervals(simulate_values: SimulateValues) -> None:
    values = simulate_values(np.random.default_rng(0), seeds=2)
    figure = predicted_against_true(values, seed=0, resamples=100, unit="years")
    ax = figure.axes[0]
    points = next(line for line in ax.lines if line.get_label() == "slide")
    wanted = {(round(v, 9), t) for v, t in zip(_seed_means(values), values.targets[:60], strict=True)}
    got = {(round(float(x), 9), float(y)) for x, y in zip(points.get_xdata(), points.get_ydata(), strict=True)}
    assert got == wanted
    diamonds = [line for line in ax.lines if line.get_marker() == "D"]
    assert np.mean([line.get_ydata()[0] for line in diamonds]) == pytest.approx(values.targets.mean())
    whiskers = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1]]
    assert len(whiskers) == len(diamonds) == 5
    for whisker, diamond in zip(whiskers, diamonds, strict=True):
        assert whisker.get_ydata()[0] < diamond.get_ydata()[0] < whisker.get_ydata()[1]
    texts = " ".join(_texts(figure))
    assert "predicted (years)" in texts
    assert "MAE " in texts
    with pytest.raises(ConfigError, match="predictions of a number"):
        predicted_against_true(simulate_values(np.random.default_rng(0), "survival"), seed=0)


def _seed_means(values: Values) -> list[float]:
    return [float(values.predicted[values.slide_ids == s].mean()) for s in values.slide_ids[:60]]


def test_comparison_of_numbers(simulate_values: SimulateValues, tmp_path: Path) -> None:
    methods = {m: simulate_values(np.random.default_rng(i), noise=n) for i, (m, n) in enumerate(_noise().items())}
    mean = np.full(len(methods["LRMIL"]), constant_answer("regression", [50.0]))
    methods["Training mean"] = replace(methods["LRMIL"], predicted=mean)
    comparison = compare_report(
        methods,
        reference="LRMIL",
        dataset="X",
        task="age",
        groups=GROUPS,
        costs=COSTS,
        seed=0,
        resamples=50,
        permutations=99,
    )
    names = {p.name for p in write_comparison(comparison, tmp_path)}
    assert {"figure_predicted_against_true.png", "figure_mae_against_seconds.png", "folds.csv"} <= names
    assert not {"figure_roc.png", "calibration.csv", "reliability.csv"} & names
    table = comparison.paper_table()
    assert table.header == ("Method", "MAE", "RMSE", "R²", "Pearson r", "Spearman ρ", "Time (s)")
    line = next(row for row in table.rows if row.cells[0] == "Training mean")
    assert line.cells[4:6] == ("undefined", "undefined")
    lowest = next(row for row in table.rows if row.cells[0] == "LRMIL")
    assert lowest.best[1:6] == (True,) * 5
    header = comparison.differences_table().header
    assert "p, DeLong" not in header
    assert r"R$^2$" in (tmp_path / "results.tex").read_text()
    assert (tmp_path / "results.tex").read_text().isascii()


def test_comparison_of_survival_divides_risk_by_training_thresholds(
    simulate_values: SimulateValues, tmp_path: Path
) -> None:
    methods = {
        m: simulate_values(np.random.default_rng(i), "survival", noise=n) for i, (m, n) in enumerate(_noise().items())
    }
    limits = dict.fromkeys(range(5), -0.2)
    given = {
        "reference": "LRMIL",
        "dataset": "X",
        "task": "survival",
        "groups": GROUPS,
        "costs": {},
        "seed": 0,
        "resamples": 50,
        "permutations": 99,
    }
    comparison = compare_report(methods, thresholds={"LRMIL": limits}, **given)  # type: ignore[arg-type]
    names = {p.name for p in write_comparison(comparison, tmp_path)}
    assert {"figure_survival_lrmil.png", "risk.csv", "risk.md", "risk.tex"} <= names
    patients, high = risk_groups(methods["LRMIL"], limits)
    row = comparison.risk.iloc[0]
    assert (row["high_patients"], row["low_patients"]) == (high.sum(), (~high).sum())
    assert row["p_value"] == log_rank(patients.time, patients.event, high).p_value
    assert comparison.differences["metric"].unique().tolist() == ["c_index"]
    # Nothing of risk is shown without thresholds: none is made up from the test slides.
    assert compare_report(methods, **given).risk_table() is None  # type: ignore[arg-type]


def _noise() -> dict[str, float]:
    return {"ABMIL": 1.5, "LRMIL": 0.2}
