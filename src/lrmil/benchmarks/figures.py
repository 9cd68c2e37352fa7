"""A figure for each table that is easier seen than read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from lrmil.benchmarks.answering import PARTS
from lrmil.benchmarks.results import Part, Row, Table
from lrmil.benchmarks.scaling import EFFICIENCY
from lrmil.benchmarks.whole import LIMIT
from lrmil.evaluation.plots import BLUE, GREEN, ORANGE, SERIES, SKY, VERMILION, new_figure, set_title, style_axes

_PART_COLOURS = {"tissue_s": SKY, "reading_s": BLUE, "encoding_s": ORANGE, "mil_s": GREEN}
_PART_NAMES = {"tissue_s": "tissue", "reading_s": "reading", "encoding_s": "encoding", "mil_s": "MIL"}
_BAR_IN = 0.24


def part_figures(part: Part) -> dict[str, Figure]:
    """Return the figures of a part by the name of their file."""
    drawn: dict[str, Callable[[Table], Figure]] = {
        "reading": _reading,
        "answer": _answers,
        "tools": _tools,
        "size": _sizes,
        "threads": _threads,
        "heads": _heads,
    }
    return {table.name: drawn[table.name](table) for table in part.tables if table.name in drawn and table.rows}


def _reading(table: Table) -> Figure:
    """Ratio of every row with its quartiles, and its target."""
    rows = sorted(table.rows, key=lambda row: row["scale"] != "5x")
    figure = new_figure(8.4, 1.3 + _BAR_IN * len(rows))
    ax = figure.subplots()
    style_axes(ax, "times faster than OpenSlide + area resize, one thread", "")
    y = np.arange(len(rows))[::-1]
    colours = [BLUE if row["scale"] == "5x" else SKY for row in rows]
    ratio = np.array([row["ratio"] for row in rows])
    around = np.array([[row["ratio"] - row["ratio_low"], row["ratio_high"] - row["ratio"]] for row in rows]).T
    ax.barh(y, ratio, color=colours, height=0.7, xerr=np.clip(around, 0, None), ecolor="#555555", error_kw={"lw": 0.8})
    ax.plot([row["target"] for row in rows], y, "|", color=VERMILION, ms=9, mew=2, label="target")
    for place, row in zip(y, rows, strict=True):
        right = max(row["ratio_high"], row["target"])
        ax.annotate(f"{row['ratio']:.1f}", (right, place), (5, 0), textcoords="offset points", va="center", fontsize=7)
    ax.axvline(1, color="#777777", lw=0.8)
    ax.set_xscale("log")
    ax.set_xlim(0.7, 2 * max(ratio.max(), max(row["target"] for row in rows)))
    ax.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    labels = [f"{row['scale']}  {row['slide'].removeprefix('written ')}, {row['codec']}" for row in rows]
    ax.set_yticks(y, labels, fontsize=7)
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    set_title(figure, table.title)
    return figure


def _answers(table: Table) -> Figure:
    """Seconds by part at both resolutions, for every slide."""
    figure = new_figure(8.4, 1.6 + 2 * _BAR_IN * len(table.rows) + 0.5)
    ax = figure.subplots()
    style_axes(ax, "seconds of an answer", "")
    places, labels = [], []
    for index, row in enumerate(table.rows):
        for below, resolution in enumerate(("lr", "hr")):
            place = -(index * 2.6 + below)
            _stack(ax, place, [(key, row[f"{resolution}_{key}"]) for key in PARTS], index == below == 0)
            places.append(place)
            word = "5x" if resolution == "lr" else "20x"
            labels.append(f"{row['slide'].removeprefix('written ')}, children {row['children']}: {word}")
            text = f"{row[f'{resolution}_total_s']:.2f} s"
            if resolution == "lr":
                text += (
                    f"   1/{row['times_cheaper']:.1f}, patches 1/{1 / row['patch_ratio']:.1f}: {row['quotient']:.2f}"
                )
            right = row[f"{resolution}_total_s"]
            ax.annotate(text, (right, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set_yticks(places, labels, fontsize=7)
    ax.set_xlim(0, 1.25 * max(row["hr_total_s"] for row in table.rows))
    ax.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    set_title(figure, f"{table.title}; the last number should be at most {LIMIT}")
    return figure


def _stack(ax, place: float, parts: Sequence[tuple[str, float]], named: bool) -> None:  # type: ignore[no-untyped-def]
    left = 0.0
    for key, seconds in parts:
        ax.barh(place, seconds, left=left, color=_PART_COLOURS[key], label=_PART_NAMES[key] if named else None)
        left += seconds


def _tools(table: Table) -> Figure:
    """Patches a second of every tool, warm and with the start of workers."""
    slides = list(dict.fromkeys(row["slide"] for row in table.rows))
    figure = new_figure(4.2 * len(slides) + 0.6, 3.0)
    for ax, slide in zip(figure.subplots(1, len(slides), squeeze=False)[0], slides, strict=True):
        rows = [row for row in table.rows if row["slide"] == slide]
        style_axes(ax, "", "5x patches a second")
        x = np.arange(len(rows))
        first, warm = ([row[key] for row in rows] for key in ("first", "warm"))
        ax.bar(x - 0.2, first, 0.38, color=SKY, label="first slide, workers start")
        bars = ax.bar(x + 0.2, warm, 0.38, color=BLUE, label="warm")
        ax.bar_label(bars, fmt="{:.0f}", fontsize=7, padding=2)
        ax.set_xticks(x, [row["tool"] for row in rows], fontsize=8)
        ax.set_ylim(0, 1.2 * max(*first, *warm))
        ax.set_title(slide, fontsize=9)
    ax.legend(frameon=False, fontsize=8)
    set_title(figure, table.title)
    return figure


def _sizes(table: Table) -> Figure:
    """Seconds against tissue and against area, and peak memory against area."""
    figure = new_figure(11.0, 3.3)
    panels = (
        ("gigapixels", "total_s", "gigapixels of the slide", "seconds of an answer"),
        ("tissue_mm2", "total_s", "tissue, mm2", "seconds of an answer"),
        ("gigapixels", "peak_mb", "gigapixels of the slide", "peak MB beside the weights"),
    )
    for ax, (x, y, x_label, y_label) in zip(figure.subplots(1, 3), panels, strict=True):
        style_axes(ax, x_label, y_label)
        for index, series in enumerate(dict.fromkeys(row["series"] for row in table.rows)):
            rows = [row for row in table.rows if row["series"] == series and row[y] is not None]
            rows.sort(key=lambda row: (row[x], row["gigapixels"]))
            if rows:
                marker = "os"[index % 2]
                label = {"same share": "tissue grows with the slide", "same amount": "same tissue"}[series]
                ax.plot(
                    [r[x] for r in rows], [r[y] for r in rows], f"{marker}-", color=SERIES[index], ms=5, label=label
                )
        ax.set_xscale("log")
        if y == "total_s":
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=8)
    set_title(figure, table.title)
    return figure


def _threads(table: Table) -> Figure:
    """Regions a second against threads: bare decoding, the stream, and the target."""
    slides = list(dict.fromkeys(row["slide"] for row in table.rows))
    figure = new_figure(4.2 * len(slides) + 0.6, 3.2)
    for ax, slide in zip(figure.subplots(1, len(slides), squeeze=False)[0], slides, strict=True):
        rows: list[Row] = [row for row in table.rows if row["slide"] == slide]
        counts = [row["threads"] for row in rows]
        style_axes(ax, "threads", "5x regions a second")
        ideal = np.array(counts) * rows[0]["bare"] / rows[0]["threads"]
        ax.plot(counts, ideal, "--", color="#777777", lw=1, label="bare decoding x threads")
        ax.plot(counts, EFFICIENCY * ideal, ":", color=VERMILION, lw=1.4, label=f"target, {EFFICIENCY:.0%} of it")
        ax.plot(counts, [row["bare"] for row in rows], "s-", color=SKY, ms=5, label="bare decoding")
        ax.plot(counts, [row["stream"] for row in rows], "o-", color=BLUE, ms=5, label="the stream")
        ax.set_xticks(counts)
        ax.set_ylim(bottom=0)
        ax.set_title(slide, fontsize=9)
    ax.legend(frameon=False, fontsize=8)
    set_title(figure, table.title)
    return figure


def _heads(table: Table) -> Figure:
    """Steps a second and peak memory of training against the size of the bag."""
    figure = new_figure(10.0, 4.0)
    steps, memory = figure.subplots(1, 2)
    style_axes(steps, "instances of a bag", "training steps a second")
    style_axes(memory, "instances of a bag", "peak MB beyond bag and weights")
    for index, row in enumerate(table.rows):
        cases = [c for c in row["cases"] if c["work"] == "train" and "failed" not in c]
        theirs = row["head"].startswith("torchmil")
        look = {"color": SERIES[index % len(SERIES)], "ls": ":" if theirs else ("-", "--")[index // len(SERIES) % 2]}
        sizes = [c["size"] for c in cases]
        steps.plot(sizes, [c["steps_per_second"] for c in cases], marker="o", ms=3, lw=1.2, label=row["head"], **look)
        known = [c for c in cases if c["peak_mb"]]
        memory.plot([c["size"] for c in known], [max(c["peak_mb"], 1) for c in known], marker="o", ms=3, lw=1.2, **look)
    for ax in (steps, memory):
        ax.set_xscale("log")
        ax.set_yscale("log")
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    set_title(figure, table.title)
    return figure
