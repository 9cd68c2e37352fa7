from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from lrmil.evaluation import (
    Cost,
    Predictions,
    TextTable,
    Values,
    compare_methods,
    fold_scores,
    read_results,
    result_row,
    results_frame,
    text_table,
    write_results,
)
from lrmil.evaluation.table_formats import to_latex, to_markdown, to_rich
from lrmil.evaluation.tables import differences_table, paper_frame, three_digits

Simulate = Callable[..., Predictions]


@pytest.fixture(scope="module")
def results(simulate: Simulate) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    spec = [
        ("LRMIL", "Ours", 2.0, Cost(31.25, 0.4251)),
        ("A new one", "Full HR", 1.0, Cost(500, 5.2)),
        ("CLAM-MB", "Full HR", 1.0, Cost(500, 5.3)),
        ("Max-P", "Full HR", 0.5, Cost(500, 5.1)),
        ("ZOOMMIL", "SC", 0.5, Cost(80, 1.25)),
        ("Majority class", "Reference", 0.0, None),
    ]
    rows = [
        result_row(
            simulate(rng, 40, separation=s), dataset=d, task="subtype", method=m, group=g, seed=0, cost=c, resamples=100
        )
        for d in ("second", "first")
        for m, g, s, c in spec
    ]
    return results_frame(rows)


def test_order_of_lines_is_the_papers(results: pd.DataFrame) -> None:
    first = results[results["dataset"] == "second"]["method"].tolist()
    assert first == ["Majority class", "Max-P", "CLAM-MB", "A new one", "ZOOMMIL", "LRMIL"]
    assert results["dataset"].tolist() == ["second"] * 6 + ["first"] * 6


def test_mean_and_sd_are_over_folds_with_seeds_averaged_first(simulate: Simulate) -> None:
    p = simulate(np.random.default_rng(1), 40, seeds=3)
    row = result_row(p, dataset="d", task="t", method="m", group="g", seed=0, resamples=50, cost=Cost(10, 2.0))
    tidy = fold_scores(p)
    by_fold = tidy[tidy["metric"] == "auc"].groupby("fold")["value"].mean()
    assert row["auc"] == pytest.approx(by_fold.mean())
    assert row["auc_sd"] == pytest.approx(np.std(by_fold, ddof=1))
    assert row["auc_low"] <= row["auc"] <= row["auc_high"]
    assert (row["slides"], row["folds"], row["seeds"]) == (40, 5, 3)
    assert row["time_s"] == 80.0


def test_patient_level_scores_patients_and_counts_slides(simulate: Simulate) -> None:
    p = simulate(np.random.default_rng(1), 40, slides_per_patient=4)
    kw = {"dataset": "d", "task": "t", "method": "m", "group": "g", "seed": 0, "resamples": 50}
    slide, patient = result_row(p, **kw), result_row(p, **kw, level="patient")
    assert patient["auc"] > slide["auc"]
    assert (patient["slides"], patient["patients"]) == (160, 40)


def test_csv_round_trip(results: pd.DataFrame, tmp_path: Path) -> None:
    changed = results.assign(note=["", 'fold 1 left out: AUC undefined; a, "b"'] * 6)
    changed.loc[3, ["auc", "auc_sd", "auc_low", "auc_high"]] = float("nan")
    write_results(tmp_path / "results.csv", changed)
    pd.testing.assert_frame_equal(read_results(tmp_path / "results.csv"), changed, check_exact=True, check_dtype=False)


def test_paper_frame_has_the_papers_columns_and_percent(results: pd.DataFrame) -> None:
    paper = paper_frame(results)
    assert list(paper.columns) == ["dataset", "task", "method", "group", "acc", "auc", "time_s"]
    np.testing.assert_allclose(paper["auc"], (100 * results["auc"]).round(1))


def test_markdown_reads_back(results: pd.DataFrame) -> None:
    one = results[results["dataset"] == "first"]
    table = text_table(one)
    lines = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    cells = [[c.strip().strip("*") for c in line.strip("|").split(" | ")] for line in lines]
    assert cells[0] == ["Group", *table.header]
    assert [tuple(c[1:]) for c in cells[2:]] == [row.cells for row in table.rows]
    assert len({len(line) for line in lines}) == 1


def test_cells_hold_mean_sd_interval_and_cost(results: pd.DataFrame) -> None:
    one = results[results["dataset"] == "first"]
    row = one[one["method"] == "LRMIL"].iloc[0]
    cells = text_table(one).rows[-1].cells
    wanted = f"{100 * row.auc:.1f} ± {100 * row.auc_sd:.1f} [{100 * row.auc_low:.1f}, {100 * row.auc_high:.1f}]"
    assert cells == ("LRMIL", cells[1], wanted, "31.2", "0.425")
    plain = text_table(one, show_sd=False, show_interval=False, show_cost=False)
    assert plain.rows[-1].cells == ("LRMIL", f"{100 * row.acc:.1f}", f"{100 * row.auc:.1f}")


def test_best_is_marked_in_each_column_and_ties_as_printed_share_it(results: pd.DataFrame) -> None:
    one = results[results["dataset"] == "first"].copy()
    one["auc"] = [0.5, 0.80004, 0.79996, 0.7, float("nan"), 0.6]
    table = text_table(one)
    assert [row.best[2] for row in table.rows] == [False, True, True, False, False, False]
    assert "**80.0" in to_markdown(table)


def test_lower_is_better_for_the_brier_score(simulate: Simulate) -> None:
    rng = np.random.default_rng(0)
    rows = [
        result_row(
            simulate(rng, 40, separation=s),
            dataset="d",
            task="t",
            method=m,
            group="",
            seed=0,
            metrics=["brier"],
            resamples=20,
        )
        for m, s in (("good", 4.0), ("bad", 0.0))
    ]
    table = text_table(results_frame(rows))
    assert [row.best[1] for row in table.rows] == [True, False]
    assert table.rows[0].cells[1].startswith("0.")


def test_undefined_says_so_with_the_reason_below(simulate: Simulate) -> None:
    p = simulate(np.random.default_rng(0), 40)
    one_class = p.take(p.labels == 1)
    row = result_row(one_class, dataset="d", task="t", method="m", group="g", seed=0, resamples=20)
    table = text_table(results_frame([row]))
    assert table.rows[0].cells[2] == "undefined"
    assert any("no 'negative'" in note for note in table.notes)


def test_several_datasets_stand_side_by_side_and_gaps_are_dashes(results: pd.DataFrame) -> None:
    table = text_table(results.drop(index=results.index[-1]))
    assert table.header[1] == "second subtype: Accuracy"
    assert len(table.header) == 1 + 2 * 4
    assert len(table.rows) == 6
    assert table.rows[-1].cells[5:] == ("–",) * 4


def test_latex_is_escaped_and_balanced() -> None:
    table = TextTable.of("A & B_1", ["Method", "50 %"], [["x_y & {z}", "1.0 ± 0.1 [−0.2, 3]"], ["a\\b", "#5"]])
    text = to_latex(table, label="tab:one")
    assert r"\caption{A \& B\_1}" in text
    assert r"x\_y \& \{z\} & 1.0 $\pm$ 0.1 [$-$0.2, 3] \\" in text
    assert r"a\textbackslash{}b & \#5 \\" in text
    for begin in ("table", "tabular"):
        assert text.count(rf"\begin{{{begin}}}") == text.count(rf"\end{{{begin}}}") == 1
    assert text.isascii()


def test_latex_and_terminal_show_every_cell(results: pd.DataFrame) -> None:
    table = text_table(results[results["dataset"] == "first"], title="[bold]Demo")
    out = io.StringIO()
    Console(file=out, width=160).print(to_rich(table))
    shown = out.getvalue()
    latex = to_latex(table)
    for row in table.rows:
        for cell in row.cells:
            assert cell in shown
            assert cell.replace("±", r"$\pm$").replace("–", "--") in latex
    assert "[bold]Demo" in shown
    assert r"\textit{Full HR}" in latex


def test_markdown_escapes_bars() -> None:
    text = to_markdown(TextTable.of("", ["a|b", "c"], [["d|e", "f"]]))
    assert r"a\|b" in text
    assert r"d\|e" in text


def test_differences_table_tells_each_note_once(simulate: Simulate) -> None:
    rng = np.random.default_rng(0)
    others = {name: simulate(rng, 20) for name in ("one", "two")}
    frame = compare_methods(simulate(rng, 20), others, "auc", seed=0, permutations=99)
    frame["note"] = ["few patients; no DeLong" if method == "one" else "few patients" for method in frame["method"]]
    assert differences_table(frame).notes[1:] == ("all methods: few patients.", "one: no DeLong.")


def test_differences_table_prints_signs_and_small_p_values(simulate: Simulate) -> None:
    rng = np.random.default_rng(0)
    ours = simulate(rng, 60, separation=3.0)
    frame = compare_methods(ours, {"weak": simulate(rng, 60, separation=0.0)}, "auc", seed=0, permutations=4999)
    cells = differences_table(frame).rows[0].cells
    assert cells[:2] == ("weak", "AUC")
    assert cells[2].startswith("+")
    assert cells[3] == "< 0.001"
    frame["difference"], frame["low"], frame["high"], frame["p_delong"] = -0.031, -0.052, -0.011, float("nan")
    cells = differences_table(frame).rows[0].cells
    assert cells[2] == "−3.1 [−5.2, −1.1]"
    assert cells[5] == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (1234.5, "1,230"),
        (0.1, "0.100"),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


def test_survival_has_columns_that_weigh_by_censoring(simulate_values: Callable[..., Values], tmp_path: Path) -> None:
    nan = float("nan")
    cells = {
        "LRMIL": {(0, 0): (0.7, 0.1), (0, 1): (0.9, 0.2), (1, 0): (0.6, nan), (1, 1): (0.6, nan)},
        "ABMIL": {(0, 0): (0.5, nan), (0, 1): (0.5, nan), (1, 0): (0.6, nan), (1, 1): (0.6, nan)},
        "Constant risk": {},
    }
    rows = [
        result_row(
            simulate_values(np.random.default_rng(0), "survival", folds=2, seeds=2),
            dataset="d",
            task="t",
            method=method,
            group="Ours",
            seed=0,
            resamples=20,
            censoring={cell: {"uno_c": uno, "ibs": ibs} for cell, (uno, ibs) in own.items()},
        )
        for method, own in cells.items()
    ]
    write_results(tmp_path / "r.csv", results_frame(rows))
    results = read_results(tmp_path / "r.csv").set_index("method")
    # Seeds first, then folds; the fold without a score does not count as 0.
    assert results.loc["LRMIL", "uno_c"] == pytest.approx((0.8 + 0.6) / 2)
    assert results.loc["LRMIL", "uno_c_sd"] == pytest.approx(np.std([0.8, 0.6], ddof=1))
    assert results.loc["LRMIL", "ibs"] == pytest.approx(0.15)
    table = text_table(results.reset_index(), show_cost=False)
    assert table.header == ("Method", "C-index", "Uno's C", "Integrated Brier")
    cells_of = {row.cells[0]: (row.cells[2:], row.best[2:]) for row in table.rows}
    assert cells_of["LRMIL"] == (("0.700 ± 0.141", "0.150"), (True, False))
    assert cells_of["ABMIL"] == (("0.550 ± 0.071", "–"), (False, False))
    assert cells_of["Constant risk"] == (("–", "–"), (False, False))
