from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lrmil.errors import ConfigError
from lrmil.evaluation import (
    Comparison,
    Cost,
    Predictions,
    compare_report,
    holm,
    paired_bootstrap,
    permutation_test,
    read_results,
    write_joint_tables,
)
from lrmil.evaluation.comparison import file_name
from lrmil.evaluation.comparison_figures import difference_forest
from lrmil.evaluation.comparison_files import write_comparison

Simulate = Callable[..., Predictions]
GROUPS = {
    "LRMIL": "Ours",
    "Max-P": "Full HR",
    "ABMIL": "Full HR",
    "ZOOMMIL": "SC",
    "LR without distillation": "LR only",
    "Majority class": "Reference",
}
COSTS = {
    "LRMIL": Cost(31, 0.4, 40, 1e6, (("tissue", 0.1), ("reading", 0.3))),
    "Max-P": Cost(500, 5.0, 600, 1e7, (("tissue", 0.1), ("reading", 4.0), ("encoding", 0.9))),
}


def _methods(simulate: Simulate, slides_per_patient: int = 1) -> dict[str, Predictions]:
    strength = {
        "Majority class": 0.0,
        "Max-P": 0.2,
        "ABMIL": 1.0,
        "ZOOMMIL": 0.8,
        "LR without distillation": 0.5,
        "LRMIL": 2.5,
    }
    return {
        method: simulate(np.random.default_rng(i), 40, separation=s, slides_per_patient=slides_per_patient)
        for i, (method, s) in enumerate(strength.items())
    }


def _compare(methods: dict[str, Predictions], **changes: object) -> Comparison:
    given: dict[str, object] = {
        "reference": "LRMIL",
        "dataset": "TCGA-X",
        "task": "subtype",
        "groups": GROUPS,
        "costs": COSTS,
        "seed": 3,
        "resamples": 60,
        "permutations": 199,
    }
    return compare_report(methods, **(given | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def methods(simulate: Simulate) -> dict[str, Predictions]:
    return _methods(simulate)


@pytest.fixture(scope="module")
def comparison(methods: dict[str, Predictions]) -> Comparison:
    return _compare(methods)


def test_differences_are_those_of_the_paired_functions(methods: dict[str, Predictions], comparison: Comparison) -> None:
    rows = comparison.differences.set_index(["metric", "method"])
    for name in ("acc", "auc"):
        for other in ("Max-P", "Majority class"):
            interval = paired_bootstrap(methods["LRMIL"], methods[other], name, seed=3, resamples=60)
            test = permutation_test(methods["LRMIL"], methods[other], name, seed=3, permutations=199)
            row = rows.loc[(name, other)]
            assert (row["difference"], row["low"], row["high"]) == (interval.value, interval.low, interval.high)
            assert row["p_permutation"] == test.p_value


def test_holm_is_over_the_baselines_of_each_metric_and_nothing_else(comparison: Comparison) -> None:
    assert comparison.baselines == ("Max-P", "ABMIL", "ZOOMMIL")
    for name, part in comparison.differences.groupby("metric"):
        inside = part["method"].isin(comparison.baselines)
        np.testing.assert_array_equal(part.loc[inside, "p_holm"], holm(part.loc[inside, "p_permutation"]), str(name))
        assert part.loc[~inside, "p_holm"].isna().all()
        assert set(part.loc[~inside, "method"]) == {"LR without distillation", "Majority class"}
    # Were the lines that only give a scale counted, a small p would be multiplied by five, not three.
    auc = comparison.differences.set_index(["metric", "method"]).loc[("auc", "Max-P")]
    assert auc["p_holm"] == pytest.approx(3 * auc["p_permutation"])


def test_baselines_can_be_named_and_default_to_all_where_no_group_says(methods: dict[str, Predictions]) -> None:
    assert _compare(methods, baselines=["ABMIL"]).baselines == ("ABMIL",)
    two = {m: methods[m] for m in ("LRMIL", "Majority class")}
    assert _compare(two, groups={}).baselines == ("Majority class",)
    with pytest.raises(ConfigError, match="no predictions of the baselines HDMIL"):
        _compare(methods, baselines=["HDMIL"])


def test_wrong_methods_are_refused_by_name(methods: dict[str, Predictions]) -> None:
    with pytest.raises(ConfigError, match="reference 'Nobody' is not among the methods"):
        _compare(methods, reference="Nobody")
    fewer = methods | {"ABMIL": methods["ABMIL"].take(np.arange(39))}
    with pytest.raises(ConfigError, match="LRMIL and ABMIL: two methods differ in their test design"):
        _compare(fewer)


def test_order_groups_and_folds(comparison: Comparison) -> None:
    assert comparison.results["method"].tolist() == [
        *("Majority class", "Max-P", "ABMIL", "ZOOMMIL", "LR without distillation", "LRMIL")
    ]
    assert comparison.folds["group"].unique().tolist() == ["Reference", "Full HR", "SC", "LR only", "Ours"]
    tidy = comparison.folds[(comparison.folds["metric"] == "auc") & (comparison.folds["level"] == "slide")]
    mean = tidy.groupby("method")["value"].mean()
    for row in comparison.results.to_dict("records"):
        assert row["auc"] == pytest.approx(mean[row["method"]])
    assert comparison.reliability.groupby("method")["count"].sum().tolist() == [40] * 6


def test_patient_level_only_where_patients_have_several_slides(simulate: Simulate, comparison: Comparison) -> None:
    assert comparison.patients.empty
    assert "patients" not in comparison.tables()
    several = _compare(_methods(simulate, slides_per_patient=3))
    both = several.patients.set_index("method")["auc"], several.results.set_index("method")["auc"]
    assert both[0]["ABMIL"] > both[1]["ABMIL"]
    assert set(several.folds["level"]) == {"slide", "patient"}


def test_paper_table_prints_cohort_seconds_and_groups(comparison: Comparison) -> None:
    table = comparison.paper_table()
    assert table.header == ("Method", "Accuracy", "AUC", "Time (s)")
    line = next(row for row in table.rows if row.cells[0] == "Max-P")
    assert line.group == "Full HR"
    assert line.cells[3] == "200"  # 5.0 s for each of 40 slides
    assert next(row for row in table.rows if row.cells[0] == "ABMIL").cells[3] == "–"
    assert not any("interval" in note for note in table.notes)


def test_times_have_a_column_for_each_part(comparison: Comparison) -> None:
    times = comparison.times.set_index("method")
    assert list(times.index) == ["Max-P", "LRMIL"]
    assert times.loc["Max-P", "encoding_s"] == 0.9
    assert np.isnan(times.loc["LRMIL", "encoding_s"])
    assert times.loc["LRMIL", "time_s"] == pytest.approx(16.0)
    table = comparison.times_table()
    assert table is not None
    assert table.header[1:4] == ("tissue (s)", "reading (s)", "encoding (s)")
    assert table.rows[1].cells[3] == "–"


def test_write_holds_everything_and_removes_what_an_earlier_comparison_left(
    comparison: Comparison, tmp_path: Path
) -> None:
    (tmp_path / "predictions").mkdir()
    for stale in ("predictions/old.csv", "patients.md", "figure_old.png"):
        (tmp_path / stale).write_text("old")
    (tmp_path / "mine.txt").write_text("kept")
    written = write_comparison(comparison, tmp_path)
    there = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert there == {*written, tmp_path / "mine.txt"}
    names = {p.name for p in written}
    for name in ("results", "paper", "differences", "calibration", "times"):
        assert {f"{name}.csv", f"{name}.md", f"{name}.tex"} <= names
    assert {"folds.csv", "reliability.csv", "figure_differences_auc.png", "figure_auc_against_seconds.png"} <= names
    pd.testing.assert_frame_equal(read_results(tmp_path / "results.csv"), comparison.results, check_dtype=False)
    back = Predictions.read_csv(tmp_path / "predictions" / "lr_without_distillation.csv")
    np.testing.assert_array_equal(back.probabilities, comparison.predictions["LR without distillation"].probabilities)
    with Image.open(tmp_path / "figure_differences_auc.png") as image:
        assert min(image.size) > 300


def test_methods_whose_names_give_one_file_name_get_two_files(simulate: Simulate, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    both = {name: simulate(rng, 30) for name in ("torchmil:SETMIL", "torchmil/SETMIL", "LRMIL")}
    write_comparison(_compare(both), tmp_path, figures=False)
    assert len(list((tmp_path / "predictions").glob("*.csv"))) == 3
    assert file_name("../CLAM-MB (CE)") == "clam-mb_ce"


def test_forest_places_each_method_at_its_difference(comparison: Comparison) -> None:
    part = comparison.differences[comparison.differences["metric"] == "auc"].reset_index(drop=True)
    part.loc[part["method"] == "ABMIL", ["difference", "low", "high"]] = float("nan")
    figure = difference_forest(part, GROUPS, reference="LRMIL")
    ax = figure.axes[0]
    names = [t.get_text() for t in ax.get_yticklabels()]
    points = {names[round(float(line.get_ydata()[0]))]: line for line in ax.lines if len(line.get_xdata()) == 1}
    assert "ABMIL" not in points
    assert "undefined" in [t.get_text() for t in ax.texts]
    for row in part[part["method"] != "ABMIL"].to_dict("records"):
        line = points[row["method"]]
        assert line.get_xdata()[0] == pytest.approx(100 * row["difference"])
        filled = np.isfinite(row["p_holm"]) and row["p_holm"] < 0.05
        assert (line.get_markerfacecolor() == "white") != filled
    assert sum("(uncorrected)" in t.get_text() for t in ax.texts) == 2


def test_joint_tables_stand_side_by_side(
    comparison: Comparison, methods: dict[str, Predictions], tmp_path: Path
) -> None:
    other = _compare(methods, dataset="BRACS", costs={})
    write_joint_tables(tmp_path, [comparison, other])
    text = (tmp_path / "paper.md").read_text()
    assert "TCGA-X subtype: AUC" in text
    assert "BRACS subtype: AUC" in text
    assert text.count("| LRMIL ") == 1
    assert len(read_results(tmp_path / "results.csv")) == 12
