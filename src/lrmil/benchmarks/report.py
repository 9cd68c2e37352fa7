"""Results on paper: Markdown with figures, JSON, and tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from lrmil.benchmarks.figures import part_figures
from lrmil.benchmarks.machine import in_one_line
from lrmil.benchmarks.results import Check, Part, Table
from lrmil.evaluation.plots import save_figure
from lrmil.files import write_json, write_text

WIDE = 200
"""columns that a terminal is taken to have where there is none"""


def write_report(folder: Path, facts: dict[str, Any], parts: Sequence[Part]) -> None:
    """Write results.json, results.md and a figure for each table."""
    write_json(folder / "results.json", facts | {"parts": [part.as_json() for part in parts]})
    lines = _head(facts, parts)
    for part in parts:
        lines += ["", f"## {part.title}", ""]
        figures = part_figures(part)
        for name, figure in figures.items():
            save_figure(folder / f"{name}.png", figure)
        for table in part.tables:
            if table.name in figures:
                lines += [f"![{table.title}]({table.name}.png)", ""]
            lines += [*_markdown(table), ""]
            lines += [f"{note}\n" for note in table.notes]
        lines += [f"- Not measured: {what}" for what in part.skipped]
        lines += ["", f"Measured in {part.seconds:.0f} s."]
    write_text(folder / "results.md", "\n".join(lines).replace("\n\n\n", "\n\n") + "\n")


def print_report(console: Console, facts: dict[str, Any], parts: Sequence[Part]) -> None:
    """Print all tables and what became of the targets."""
    for part in parts:
        console.print(f"\n[bold]{part.title}[/bold]  ({part.seconds:.0f} s)", highlight=False)
        for table in part.tables:
            shown = RichTable(title=table.title, title_justify="left", header_style="bold", pad_edge=False)
            for column in table.columns:
                shown.add_column(column.heading, justify="right" if column.numeric else "left")
            for row in table.rows:
                cells = [column.text(row) for column in table.columns]
                shown.add_row(*[f"[red]{cell}[/red]" if cell == "NO" else cell for cell in cells])
            console.print(shown)
            for note in table.notes:
                console.print(note, style="dim", markup=False, highlight=False)
        for what in part.skipped:
            console.print(f"not measured: {what}", style="yellow", markup=False, highlight=False)
    missed = [check for part in parts for check in part.checks if not check.met]
    total = sum(len(part.checks) for part in parts)
    console.print(f"\n{in_one_line(facts['machine'])}", markup=False, highlight=False)
    if total:
        console.print(f"{total - len(missed)} of {total} targets met.", markup=False, highlight=False)
    for check in missed:
        console.print(f"missed: {in_words(check)}", style="red", markup=False, highlight=False)


def in_words(check: Check) -> str:
    """Return a target and what was measured, in a line."""
    return f"{check.what} {check.value:.3g}, target {check.target.sense} {check.target.limit:g}"


def _head(facts: dict[str, Any], parts: Sequence[Part]) -> list[str]:
    machine, checks = facts["machine"], [check for part in parts for check in part.checks]
    missed = [check for check in checks if not check.met]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    lines = [
        "# What reading and answering cost",
        "",
        f"`{facts['command']}`, {facts['date']}, {facts['seconds']:.0f} s.",
        "",
        f"- Machine: {in_one_line(machine)}; {machine['platform']}; load before the run {machine['load_before']}.",
        f"- Versions: {versions}.",
        f"- Slides: {facts['slides']}.",
        f"- Seed {facts['settings']['seed']}, {facts['settings']['threads']} threads. Ratios are taken in turns within "
        "one process; seconds depend on the machine and on what else it does.",
    ]
    if facts["settings"]["quick"]:
        lines.append("- **A quick run, to see whether all works: its numbers mean nothing.**")
    if checks:
        lines += ["", f"{len(checks) - len(missed)} of {len(checks)} targets met."]
    if missed:
        lines += ["", "Missed:", "", *(f"- {in_words(check)}" for check in missed)]
    return lines


def _markdown(table: Table) -> list[str]:
    head = "| " + " | ".join(column.heading for column in table.columns) + " |"
    rule = "|" + "|".join(" ---: " if column.numeric else " --- " for column in table.columns) + "|"
    rows = ["| " + " | ".join(column.text(row) for column in table.columns) + " |" for row in table.rows]
    return [f"**{table.title}**", "", head, rule, *rows]
