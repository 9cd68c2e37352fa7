"""One run of the benchmark: the chosen parts, one after the other, and their report."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lrmil.benchmarks.heads import head_rows, measure_heads
from lrmil.benchmarks.machine import describe_machine
from lrmil.benchmarks.reading import measure_reading
from lrmil.benchmarks.report import write_report
from lrmil.benchmarks.results import Part
from lrmil.benchmarks.scaling import measure_scaling
from lrmil.benchmarks.settings import DEFAULT_PARTS, BenchSettings, PartName
from lrmil.benchmarks.size import measure_sizes
from lrmil.benchmarks.tools import measure_tools
from lrmil.benchmarks.whole import measure_answers
from lrmil.benchmarks.workbench import Workbench, real_slides
from lrmil.pipeline.reporting import Reporter

MEASURES: dict[PartName, Callable[[Workbench], Part]] = {
    "reading": measure_reading,
    "answer": measure_answers,
    "tools": measure_tools,
    "size": measure_sizes,
    "threads": measure_scaling,
    "heads": measure_heads,
}


def run_benchmark(settings: BenchSettings, out: Path, reporter: Reporter) -> tuple[dict[str, Any], list[Part]]:
    """Measure, and write results.json, results.md and figures into `out`; after each part, so that none is lost.

    Returns:
        what is known of the run (machine, settings, slides, date), and its parts.

    Raises:
        ConfigError, SlideError, EncoderError, HeadError: slides, encoder or heads that cannot be used; before anything
            is measured.
        OutputError: the report cannot be written.
    """
    began = time.perf_counter()
    real, source = real_slides(settings.slides)
    head_rows(settings.heads)
    facts: dict[str, Any] = {
        "command": command_of(settings),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "settings": settings.model_dump(mode="json"),
        "slides": source,
    }
    reporter.line(f"slides: {source}")
    parts: list[Part] = []
    with tempfile.TemporaryDirectory(prefix="lrmil-bench-") as folder:
        bench = Workbench(settings, Path(folder), reporter, real)
        if set(settings.parts) != {"heads"}:
            bench.model.warm_up()
        for number, name in enumerate(settings.parts, 1):
            reporter.line(f"[{number}/{len(settings.parts)}] {name}")
            start = time.perf_counter()
            part = MEASURES[name](bench)
            part.seconds = time.perf_counter() - start
            parts.append(part)
            facts["seconds"] = time.perf_counter() - began
            write_report(out, facts, parts)
    return facts, parts


def command_of(settings: BenchSettings) -> str:
    """Return the call that measures with these settings; the number of threads is always told."""
    words = ["lrmil bench"]
    if settings.parts != DEFAULT_PARTS:
        words += settings.parts
    for name, value in settings.model_dump(exclude={"parts", "threads"}).items():
        if value == BenchSettings.model_fields[name].default:
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif name == "slides":
            words += [f"{flag} {slide}" for slide in value]
        else:
            words.append(f"{flag} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join([*words, f"--threads {settings.threads}"])
