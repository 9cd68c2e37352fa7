"""Part `size`: what an answer costs, in seconds and in memory, as slides grow with their tissue and without it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lrmil.benchmarks.answering import answer, load_model
from lrmil.benchmarks.child import in_own_process
from lrmil.benchmarks.results import Check, Column, Part, Row, Table, Target
from lrmil.benchmarks.settings import BenchSettings
from lrmil.benchmarks.timing import PeakMemory
from lrmil.benchmarks.workbench import Workbench, threads
from lrmil.benchmarks.written import SlideSpec, cells_with_tissue

SHARE = 0.1
"""of the blocks that hold tissue, in the series whose tissue grows with the slide"""
AMOUNT = 2
"""blocks that hold tissue, in the other series"""
LARGE_PX = (100_000, 80_000)
MEMORY_MB = 1_500.0
_MPP, _DOWNSAMPLES = 0.25, (1, 4, 16)
_LIMIT_S = 900.0
_BYTES_PX = 0.5
"""of compressed tissue, at most"""


def measure_sizes(bench: Workbench) -> Part:
    """Answer 40x slides of growing area, each in a process of its own."""
    rows: list[Row] = []
    skipped: list[str] = []
    specs = [
        (series, spec)
        for gigapixels in bench.scope.gigapixels
        for series in ("same share", "same amount")
        for spec in [_spec(gigapixels, series, bench.scope.block_px)]
    ]
    if bench.scope.few_variants:
        specs = specs[:1]
    with bench.reporter.task("size", len(specs)) as progress:
        for series, spec in specs:
            name = f"{spec.gigapixels:.2g} gigapixels, {series}"
            needed = _file_bytes(spec)
            if shutil.disk_usage(bench.folder).free < 1.2 * needed:
                skipped.append(f"{name}: needs {needed / 1e9:.1f} GB of disk in {bench.folder}.")
                continue
            with bench.written(spec) as path:
                row = _measured(bench, path)
                row |= {"series": series, "width": spec.size_px[0], "height": spec.size_px[1]}
                row |= {"gigapixels": spec.gigapixels, "file_mb": path.stat().st_size / 1e6}
            if "failed" in row:
                skipped.append(f"{name}: {row['failed']}.")
            else:
                rows.append(row)
            progress.advance(note=name)
    notes = [
        f"40x slides with levels 1-4-16, answered at 5x by {bench.settings.encoder}, {bench.settings.threads} threads; "
        "each in a process of its own, after a first batch. Memory: the highest of the whole process above what it "
        "held with weights loaded.",
        f"Same share: {SHARE:.0%} of the blocks hold tissue. Same amount: {AMOUNT} blocks do, whatever the area.",
    ]
    table = Table("size", "An answer against the size of the slide", _COLUMNS, rows, notes)
    return Part("size", "Cost against size", [table], _checks(rows), skipped)


def _spec(gigapixels: float, series: str, block: int) -> SlideSpec:
    if gigapixels == 8.0:
        size = LARGE_PX
        across, down = (math.ceil(side / block) for side in size)
    else:
        blocks = max(1.0, gigapixels * 1e9 / block**2)
        down = max(1, round(math.sqrt(blocks * 0.8)))
        across = max(1, round(blocks / down))
        size = across * block, down * block
    tissue = max(1, round(SHARE * across * down)) if series == "same share" else min(AMOUNT, across * down)
    kept = tuple(d for d in _DOWNSAMPLES if block // d >= 256)
    return SlideSpec(_MPP, size, kept, "JPEG 4:4:4", cells_with_tissue(across, down, tissue))


def _file_bytes(spec: SlideSpec) -> float:
    cells = len(spec.cells) * len(spec.cells[0])
    return 1e9 * spec.gigapixels * 1.1 * (_BYTES_PX * spec.tissue_cells / cells + 0.05)


def _measured(bench: Workbench, path: Path) -> Row:
    case = {"path": str(path), "settings": bench.settings.model_dump(mode="json")}
    row = in_own_process("size", case, _LIMIT_S)
    return {key: value for key, value in row.items() if key not in case}


def measure_slide(case: dict[str, Any]) -> dict[str, Any]:
    """Answer one slide in this process, and take its peak memory."""
    settings = BenchSettings.model_validate_json(json.dumps(case["settings"]))
    with threads(settings.threads):
        model = load_model(settings)
        model.warm_up()
        peak = PeakMemory()
        seen = answer(Path(case["path"]), None, model, "lr", threads=settings.threads)
        added_mb = peak.added_mb()
    return asdict(seen) | {"peak_mb": added_mb, "idle_mb": peak.before_mb}


def _checks(rows: list[Row]) -> list[Check]:
    checks = [
        Check(f"{row['width']} x {row['height']} px, {row['series']}: MB beside the weights", row["peak_mb"], limit)
        for row in rows
        if (row["width"], row["height"]) == LARGE_PX and row["peak_mb"] is not None
        for limit in [Target(MEMORY_MB, "at most")]
    ]
    shared = sorted((row for row in rows if row["series"] == "same share"), key=lambda row: row["gigapixels"])
    if len(shared) > 2:
        mm2, seconds = (np.log([row[key] for row in shared]) for key in ("tissue_mm2", "total_s"))
        slope = float(np.polyfit(mm2, seconds, 1)[0])
        checks.append(Check("seconds grow as tissue to the power of", slope, Target(1.1, "at most")))
    same = sorted((row for row in rows if row["series"] == "same amount"), key=lambda row: row["gigapixels"])
    if len(same) > 1:
        growth = (same[-1]["total_s"] / same[0]["total_s"]) / (same[-1]["gigapixels"] / same[0]["gigapixels"])
        what = f"same tissue on {same[-1]['gigapixels'] / same[0]['gigapixels']:.0f} times the area: growth of seconds"
        checks.append(Check(f"{what} over growth of area", growth, Target(0.1, "at most")))
    return checks


_COLUMNS = (
    Column("series", "Tissue"),
    Column("gigapixels", "Gigapixels", "{:.2g}"),
    Column("file_mb", "File MB", "{:.0f}"),
    Column("tissue_mm2", "Tissue mm2", "{:.1f}"),
    Column("regions", "Regions", "{:d}"),
    Column("tissue_s", "Tissue s", "{:.2f}"),
    Column("reading_s", "Reading s", "{:.2f}"),
    Column("encoding_s", "Encoding s", "{:.2f}"),
    Column("mil_s", "MIL s", "{:.3f}"),
    Column("total_s", "Seconds", "{:.2f}"),
    Column("peak_mb", "Peak MB", "{:.0f}"),
)
