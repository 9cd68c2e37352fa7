"""A `TextTable` as Markdown, LaTeX, or on the terminal. CSV, with all digits, is written by `tables.write_results`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrmil.evaluation.tables import TextTable

if TYPE_CHECKING:
    from rich.table import Table

_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "µ": r"$\mu$",
    "²": r"$^2$",
    "ρ": r"$\rho$",
    "<": r"$<$",
    ">": r"$>$",
}


def to_markdown(table: TextTable) -> str:
    """GitHub Markdown, columns padded so that the source reads well. Groups become a first column if there are any."""
    grouped = any(row.group for row in table.rows)
    lines = [[*(["Group"] if grouped else []), *table.header]]
    for row in table.rows:
        cells = [f"**{c}**" if best else c for c, best in zip(row.cells, row.best, strict=True)]
        lines.append([*([row.group] if grouped else []), *cells])
    lines = [[_markdown_cell(c) for c in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    left = 2 if grouped else 1
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    text = []
    for line in [lines[0], rule, *lines[1:]]:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        text.append(f"| {' | '.join(padded)} |")
    title = [f"**{_markdown_cell(table.title)}**", ""] if table.title else []
    notes = ["", *(f"<sub>{_markdown_cell(n)}</sub>  " for n in table.notes)] if table.notes else []
    return "\n".join([*title, *text, *notes]) + "\n"


def to_latex(table: TextTable, label: str = "") -> str:
    """A `table` environment with booktabs rules, groups set apart by a rule; needs \\usepackage{booktabs}."""
    columns = "l" + "r" * (len(table.header) - 1)
    body: list[str] = []
    previous = None
    for row in table.rows:
        if row.group != previous and row.group:
            if previous is not None:
                body.append(r"\midrule")
            body.append(rf"\multicolumn{{{len(columns)}}}{{l}}{{\textit{{{_latex(row.group)}}}}} \\")
        previous = row.group
        cells = [rf"\textbf{{{_latex(c)}}}" if best else _latex(c) for c, best in zip(row.cells, row.best, strict=True)]
        body.append(" & ".join(cells) + r" \\")
    notes = [rf"\par\footnotesize {_latex(' '.join(table.notes))}"] if table.notes else []
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            *([rf"\caption{{{_latex(table.title)}}}"] if table.title else []),
            *([rf"\label{{{label}}}"] if label else []),
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(_latex(h) for h in table.header) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *notes,
            r"\end{table}",
            "",
        ]
    )


def to_rich(table: TextTable) -> Table:
    """A table for `rich.print`: groups set apart by a line, best means bold, notes below."""
    from rich.markup import escape
    from rich.table import Table

    out = Table(title=escape(table.title) or None, caption="\n".join(escape(n) for n in table.notes) or None)
    out.caption_justify = "left"
    for index, heading in enumerate(table.header):
        out.add_column(escape(heading), justify="left" if index == 0 else "right", no_wrap=index == 0)
    for index, row in enumerate(table.rows):
        cells = [f"[bold]{escape(c)}[/bold]" if b else escape(c) for c, b in zip(row.cells, row.best, strict=True)]
        last = index + 1 == len(table.rows) or table.rows[index + 1].group != row.group
        out.add_row(*cells, end_section=last)
    return out


def _markdown_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
