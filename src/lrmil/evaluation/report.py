"""One self-contained report.html: style inside, pictures as base64, no script and nothing from a network.

The pipeline fills `ReportData` with plain values; every text is escaped. A content security policy in the page itself
forbids the browser to load anything from elsewhere.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from lrmil.errors import ConfigError
from lrmil.evaluation.tables import TextTable, three_digits
from lrmil.files import write_text

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_PART_COLOURS = 7


@dataclass(frozen=True)
class KeyNumber:
    """One of the few numbers a reader should leave with."""

    value: str
    label: str
    detail: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure of the report: the bytes of a PNG or JPEG (see `plots.to_image`)."""

    image: bytes
    title: str
    caption: str = ""
    wide: bool = False
    """Takes the whole width of the page, where pictures otherwise stand side by side"""


@dataclass(frozen=True)
class SlideTime:
    """Mean seconds that one method spends on a slide, by part, in order (tissue, reading, encoding, MIL)."""

    method: str
    parts: tuple[tuple[str, float], ...]
    patches: float | None = None
    """Patches encoded per slide"""

    @property
    def total(self) -> float:
        """Seconds per slide."""
        return sum(seconds for _, seconds in self.parts)


@dataclass(frozen=True)
class Failure:
    """A slide that could not be used, as in failures.csv."""

    slide: str
    stage: str
    message: str


@dataclass(frozen=True)
class ReportData:
    """All that the report shows. Sections without content are left out, except failures and limits."""

    title: str
    headline: str
    """What came out, with the numbers, see `summary.headline`; the first line is set large"""
    results: TextTable
    limits: tuple[str, ...]
    """What the numbers do not show, see `summary.standard_limits`"""
    created: str = ""
    """When, by which version"""
    command: str = ""
    """What to type to get this report again"""
    key_numbers: tuple[KeyNumber, ...] = ()
    more_tables: tuple[TextTable, ...] = ()
    """Differences with intervals, patient level, per class, ..."""
    highlight: str = "LRMIL"
    """Method whose line is shaded"""
    heatmaps: tuple[Picture, ...] = ()
    heatmap_note: str = ""
    curves: tuple[Picture, ...] = ()
    times: tuple[SlideTime, ...] = ()
    time_note: str = ""
    """Machine, device, precision; what is counted"""
    cohort: tuple[tuple[str, str], ...] = ()
    """Name and value: slides, patients, classes, scales, encoder and its licence, ..."""
    splits: TextTable | None = None
    leakage_proof: str = ""
    settings: str = ""
    """The config as YAML"""
    seeds: tuple[int, ...] = ()
    software: tuple[tuple[str, str], ...] = ()
    failures: tuple[Failure, ...] = ()


def write_report(path: str | os.PathLike[str], data: ReportData) -> None:
    """Write the report atomically."""
    write_text(path, render_report(data))


def render_report(data: ReportData) -> str:
    """Return the report as one HTML document.

    Raises:
        ConfigError: a picture is neither PNG nor JPEG.
    """
    sections = [
        ("results", "Results", _results(data)),
        ("heatmaps", "What the models looked at", _heatmaps(data)),
        ("curves", "Curves", _gallery(data.curves)),
        ("time", "Time per slide", _times(data)),
        ("cohort", "Cohort and splits", _cohort(data)),
        ("failures", "Slides that failed", _failures(data.failures)),
        ("limits", "What these numbers do not show", _limits(data.limits)),
        ("settings", "Settings, seeds and software", _settings(data)),
    ]
    shown = [(anchor, name, body) for anchor, name, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in shown)
    body = "\n".join(
        f'<section id="{anchor}">\n<h2>{escape(name)}</h2>\n{body}\n</section>' for anchor, name, body in shown
    )
    cards = "".join(
        f'<li><span class="value">{escape(n.value)}</span><span class="label">{escape(n.label)}</span>'
        f'<span class="detail">{escape(n.detail)}</span></li>'
        for n in data.key_numbers
    )
    first, *rest = data.headline.splitlines() or [""]
    headline = f'<p class="headline">{escape(first)}</p>' + "".join(f'<p class="sub">{escape(t)}</p>' for t in rest)
    style = files("lrmil.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(data.title)}</title>
<style>
{style}</style>
</head>
<body>
<header><div>
<p class="eyebrow">lrmil report</p>
<h1>{escape(data.title)}</h1>
<p class="meta">{escape(data.created)}</p>
<nav aria-label="Sections">{links}</nav>
</div></header>
<main>
<section id="headline">
{headline}
{f'<ul class="cards">{cards}</ul>' if cards else ""}
</section>
{body}
<footer>Research use only; not a medical device.</footer>
</main>
</body>
</html>
"""


def _results(data: ReportData) -> str:
    tables = [_table(data.results, data.highlight)]
    tables += [f"<h3>{escape(t.title)}</h3>\n{_table(t, data.highlight, caption=False)}" for t in data.more_tables]
    return "\n".join(tables)


def _table(table: TextTable, highlight: str = "", *, caption: bool = True) -> str:
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in table.header)
    lines, previous = [], ""
    for row in table.rows:
        if row.group and row.group != previous:
            span = len(table.header)
            lines.append(f'<tr class="group"><th scope="rowgroup" colspan="{span}">{escape(row.group)}</th></tr>')
        previous = row.group
        cells = [
            f'<td class="best">{_cell(c)}</td>' if best else f"<td>{_cell(c)}</td>"
            for c, best in zip(row.cells[1:], row.best[1:], strict=True)
        ]
        mark = ' class="ours"' if highlight and row.cells[0] == highlight else ""
        lines.append(f'<tr{mark}><th scope="row">{escape(row.cells[0])}</th>{"".join(cells)}</tr>')
    title = f"<caption>{escape(table.title)}</caption>" if caption and table.title else ""
    notes = "".join(f'<p class="note">{escape(n)}</p>' for n in table.notes)
    body = "\n".join(lines)
    inside = f"{title}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table>{inside}</table></div>\n{notes}'


def _cell(text: str) -> str:
    """The mean stands out; "± sd" and "[low, high]" are set smaller."""
    cuts = [i for i in (text.find(" ± "), text.find(" [")) if i > 0]
    if not cuts:
        return escape(text)
    cut = min(cuts)
    return f'{escape(text[:cut])}<span class="spread">{escape(text[cut:])}</span>'


def _heatmaps(data: ReportData) -> str:
    if not data.heatmaps:
        return ""
    return _paragraph(data.heatmap_note) + "\n".join(_figure(p) for p in data.heatmaps)


def _gallery(pictures: Sequence[Picture]) -> str:
    return f'<div class="gallery">{"".join(_figure(p) for p in pictures)}</div>' if pictures else ""


def _figure(picture: Picture) -> str:
    kind = next((kind for magic, kind in _MAGIC.items() if picture.image.startswith(magic)), None)
    if kind is None:
        raise ConfigError(f"the picture {picture.title!r} is neither PNG nor JPEG.", fix="Render it with to_image.")
    source = f"data:{kind};base64,{base64.b64encode(picture.image).decode('ascii')}"
    caption = f"<b>{escape(picture.title)}</b>" + (f" · {escape(picture.caption)}" if picture.caption else "")
    mark = ' class="wide"' if picture.wide else ""
    alt = escape(picture.caption or picture.title)
    return f'<figure{mark}><img src="{source}" alt="{alt}"><figcaption>{caption}</figcaption></figure>'


def _times(data: ReportData) -> str:
    times = [t for t in data.times if math.isfinite(t.total)]
    if not times:
        return ""
    names = list(dict.fromkeys(name for t in times for name, _ in t.parts))
    colour = {name: f"p{min(i, _PART_COLOURS - 1)}" for i, name in enumerate(names)}
    longest = max(t.total for t in times) or 1.0
    legend = "".join(f'<li><i class="{colour[n]}"></i>{escape(n)}</li>' for n in names)
    rows = []
    for time in times:
        spans = "".join(
            f'<span class="{colour[name]}" style="width:{100 * seconds / longest:.3f}%"></span>'
            for name, seconds in time.parts
            if seconds > 0
        )
        patches = "" if time.patches is None else f" · {three_digits(time.patches)} patches"
        rows.append(
            f'<div class="row"><span class="name">{escape(time.method)}</span>'
            f'<span class="track">{spans}</span>'
            f'<span class="sum">{three_digits(time.total)} s{patches}</span></div>'
        )
    lines = []
    for time in times:
        spent = dict(time.parts)
        cells = [three_digits(spent[name]) if name in spent else "–" for name in names]
        lines.append([time.method, *cells, three_digits(time.total)])
    table = TextTable.of("Seconds per slide", ["Method", *names, "total"], lines)
    chart = f'<ul class="legend">{legend}</ul><div class="bars" aria-hidden="true">{"".join(rows)}</div>'
    return _paragraph(data.time_note) + chart + _table(table, data.highlight)


def _cohort(data: ReportData) -> str:
    parts = [_facts(data.cohort)]
    if data.splits is not None:
        parts.append(_table(data.splits))
    if data.leakage_proof:
        parts.append(f'<h3>No patient on two sides</h3>\n<pre class="proof">{escape(data.leakage_proof)}</pre>')
    return "\n".join(p for p in parts if p)


def _failures(failures: Sequence[Failure]) -> str:
    if not failures:
        return "<p>None.</p>"
    rows = "".join(
        f'<tr><th scope="row">{escape(f.slide)}</th><td>{escape(f.stage)}</td><td>{escape(f.message)}</td></tr>'
        for f in failures
    )
    head = (
        '<thead><tr><th scope="col">Slide</th><th scope="col">Stage</th><th scope="col">What happened</th></tr></thead>'
    )
    return (
        f"<p>{len(failures)} could not be used; the numbers above are without them.</p>"
        f'<div class="scroll"><table class="prose failures">{head}<tbody>{rows}</tbody></table></div>'
    )


def _limits(limits: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in limits)
    return f'<div class="callout"><ul>{items}</ul></div>' if items else ""


def _settings(data: ReportData) -> str:
    facts = [("Seeds", ", ".join(str(s) for s in data.seeds))] if data.seeds else []
    parts = [_facts([*facts, *data.software])]
    if data.command:
        parts.append(f"<h3>To make this report again</h3>\n<pre>{escape(data.command)}</pre>")
    if data.settings:
        parts.append(f"<h3>Settings</h3>\n<pre>{escape(data.settings)}</pre>")
    return "\n".join(p for p in parts if p)


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f'<dl class="facts">{items}</dl>' if items else ""


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>\n" if text else ""
