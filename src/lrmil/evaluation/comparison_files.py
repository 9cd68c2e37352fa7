"""A comparison on disk: tables, per-fold scores, every answer, figures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lrmil.evaluation.comparison import Comparison, file_name
from lrmil.evaluation.comparison_figures import comparison_figures
from lrmil.evaluation.plots import save_figure
from lrmil.evaluation.scored import Scored
from lrmil.evaluation.table_formats import to_latex, to_markdown
from lrmil.evaluation.tables import paper_frame, write_results
from lrmil.files import write_text


def write_comparison(
    comparison: Comparison, folder: str | os.PathLike[str], *, figures: bool = True
) -> tuple[Path, ...]:
    """Write every table as CSV, Markdown and LaTeX, per-fold scores, predictions and figures; return the paths.

    Files of an earlier comparison in the same folder are replaced, and those that this one does not write removed.
    """
    root = Path(folder)
    frames = {
        "results": comparison.results,
        "paper": paper_frame(comparison.results),
        "patients": comparison.patients,
        "differences": comparison.differences,
        "folds": comparison.folds,
        "calibration": comparison.calibration,
        "reliability": comparison.reliability,
        "times": comparison.times,
        "risk": comparison.risk,
    }
    written: list[Path] = []
    for name, frame in frames.items():
        if not frame.empty:
            write_results(root / f"{name}.csv", frame)
            written.append(root / f"{name}.csv")
    for name, table in comparison.tables().items():
        write_text(root / f"{name}.md", to_markdown(table))
        write_text(root / f"{name}.tex", to_latex(table, label=f"tab:{file_name(comparison.title)}-{name}"))
        written += [root / f"{name}.md", root / f"{name}.tex"]
    for path, found in _prediction_files(root / "predictions", comparison.predictions).items():
        found.write_csv(path)
        written.append(path)
    if figures:
        for name, figure in comparison_figures(comparison).items():
            save_figure(root / f"{name}.png", figure)
            written.append(root / f"{name}.png")
    _remove_others(root, written)
    return tuple(written)


def _prediction_files(folder: Path, predictions: Mapping[str, Scored]) -> dict[Path, Scored]:
    """A file for each method; names that would be the same file are told apart by a number."""
    files: dict[Path, Scored] = {}
    for method, found in predictions.items():
        name, path, number = file_name(method), folder / f"{file_name(method)}.csv", 1
        while path in files:
            number += 1
            path = folder / f"{name}_{number}.csv"
        files[path] = found
    return files


def _remove_others(root: Path, written: Sequence[Path]) -> None:
    """Delete what an earlier comparison left here under names that only `write_comparison` gives."""
    tables = ("results", "paper", "patients", "differences", "folds", "calibration", "reliability", "times", "risk")
    mine = [root / f"{name}.{suffix}" for name in tables for suffix in ("csv", "md", "tex")]
    mine += [*root.glob("predictions/*.csv"), *root.glob("figure_*.png")]
    for path in mine:
        if path not in written:
            path.unlink(missing_ok=True)
