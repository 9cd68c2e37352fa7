"""Part `threads`: how near the stream comes to bare decoding on every core, and whether it feeds a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile

from lrmil.benchmarks.answering import answer
from lrmil.benchmarks.reading import PATCH_PX
from lrmil.benchmarks.results import Check, Column, Part, Row, Table, Target, spread
from lrmil.benchmarks.timing import take_turns
from lrmil.benchmarks.tools import region_grid, stream_seconds
from lrmil.benchmarks.workbench import Workbench, threads
from lrmil.benchmarks.written import TILE_PX, SlideSpec, full_cells
from lrmil.encoders import embed
from lrmil.geometry import MatchedGrid
from lrmil.inference.stream import ReadingLog, region_reads, stream_patches
from lrmil.slides import open_slide

EFFICIENCY = 0.85
"""share of bare decoding times threads that the stream should deliver"""
GPU_WAITS, GPU_SLIDE_S = 0.1, 0.5
_VIT_B_GFLOP = 2 * 86e6 * 257 / 1e9
"""of ViT-B/16 for one patch of 256 px: two operations a weight and token, attention left out"""
_BIG_GPU_GFLOPS = 400e3
"""what a large GPU of today does of a ViT in bfloat16, about: 40 % of an H100's nominal speed"""


def measure_scaling(bench: Workbench) -> Part:
    """Stream regions without an encoder on 1 to all cores; with one, where there is a GPU."""
    rows: list[Row] = []
    specs = _specs(bench)
    fastest: dict[str, float] = {}
    with threads(1), bench.reporter.task("threads", len(specs)) as progress:
        for name, spec in specs:
            with bench.written(spec) as path:
                found = _rows(bench, name, path)
            rows += found
            fastest[name] = max(row["stream"] for row in found)
            progress.advance(note=name)
    notes = [
        f"5x regions of {PATCH_PX} px a second. Bare: every compressed tile that the regions need is decoded "
        "once, from memory, at the size that suffices, on as many threads as stated; nothing else is done. Stream: "
        "opening the slide, reading, decoding, cutting out, batches. Efficiency: the stream over the bare speed of ONE "
        "thread times threads; the last column sets it against what the same number of threads decode bare, which "
        "shows how many cores the machine really has.",
    ]
    table = Table("threads", "The stream on more threads", _COLUMNS, rows, notes)
    checks = [
        Check(
            f"{row['slide']}, {row['threads']} threads: share of bare decoding times threads",
            row["efficiency"],
            Target(EFFICIENCY),
        )
        for row in rows
    ]
    part = Part("threads", "Threads and GPU", [table], checks)
    if bench.model.device.type == "cuda":
        _on_gpu(bench, part)
    else:
        rate = max(fastest.values())
        demand = _BIG_GPU_GFLOPS / _VIT_B_GFLOP
        most = max(row["threads"] for row in rows)
        per_thread = rate / most
        part.skipped.append(
            f"No GPU here. On {most} threads the stream delivers {rate:,.0f} regions a second "
            f"({min(fastest.values()):,.0f} where only 20x pixels exist); 600 regions are read in {600 / rate:.2f} s. "
            f"An estimate, not a measurement: ViT-B/16 takes {_VIT_B_GFLOP:.0f} GFLOP for a region, so a GPU that does "
            f"{_BIG_GPU_GFLOPS / 1e3:,.0f} TFLOP/s wants {demand:,.0f} a second: "
            f"{np.ceil(demand / per_thread):.0f} such threads."
        )
    return part


def _specs(bench: Workbench) -> list[tuple[str, SlideSpec]]:
    block, across = bench.scope.block_px, bench.scope.stream_blocks
    cells, size = full_cells(across, across), (across * block, across * block)
    kept = tuple(d for d in (1, 4, 16) if block // d >= TILE_PX)
    found = [("written 40x, 1-4-16", SlideSpec(0.25, size, kept, "JPEG 4:4:4", cells))]
    half = max(1, across // 2)
    single = SlideSpec(0.5, (half * block, half * block), (1,), "JPEG 4:4:4", full_cells(half, half))
    return found if bench.scope.few_variants else [*found, ("written 20x, one level", single)]


def _rows(bench: Workbench, name: str, path: Path) -> list[Row]:
    grid, counts = region_grid(path), range(1, bench.settings.threads + 1)
    tiles, side_px = _needed_tiles(path, grid)
    jobs: dict[str, Callable[[], float]] = {}
    for count in counts:
        jobs[f"bare {count}"] = partial(_bare_seconds, tiles, side_px, count)
        jobs[f"stream {count}"] = partial(stream_seconds, path, grid, count)
    for job in jobs.values():
        job()
    seconds = take_turns(jobs, bench.scope.stream_rounds)
    rows = []
    for count in counts:
        efficiency = spread(seconds["bare 1"] / (count * seconds[f"stream {count}"]))
        rows.append(
            {
                "slide": name,
                "threads": count,
                "regions": grid.num_regions,
                "tiles": len(tiles),
                "bare": grid.num_regions / float(np.median(seconds[f"bare {count}"])),
                "stream": grid.num_regions / float(np.median(seconds[f"stream {count}"])),
                "efficiency": efficiency.median,
                "spread": str(efficiency),
                "met": efficiency.median >= EFFICIENCY,
                "of_same_threads": spread(seconds[f"bare {count}"] / seconds[f"stream {count}"]).median,
            }
        )
    return rows


def _needed_tiles(path: Path, grid: MatchedGrid) -> tuple[list[bytes], int]:
    """Return the compressed tiles under the regions of a written slide, and the side at which they are decoded."""
    with open_slide(path) as slide:
        level = slide.level_for(grid.scale.lr_mpp)
        factor = round(grid.scale.lr_mpp / slide.mpp / level.downsample)
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[level.index]
        across = -(-page.imagewidth // TILE_PX)
        wanted = set()
        for box in grid.region_boxes_l0:
            x0, y0, x1, y1 = (box / level.downsample).astype(int)
            columns = range(x0 // TILE_PX, min(across, -(-x1 // TILE_PX)))
            rows = range(y0 // TILE_PX, min(-(-page.imagelength // TILE_PX), -(-y1 // TILE_PX)))
            wanted |= {row * across + column for row in rows for column in columns}
        found = []
        for index in sorted(wanted):
            tiff.filehandle.seek(page.dataoffsets[index])
            found.append(tiff.filehandle.read(page.databytecounts[index]))
    return found, TILE_PX // factor


def _bare_seconds(tiles: list[bytes], side_px: int, count: int) -> float:
    def work(some: list[bytes]) -> None:
        for data in some:
            simplejpeg.decode_jpeg(data, min_width=side_px, min_height=side_px)

    began = time.perf_counter()
    if count == 1:
        work(tiles)
    else:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(work, [tiles[i::count] for i in range(count)]))
    return time.perf_counter() - began


def _on_gpu(bench: Workbench, part: Part) -> None:
    """Add what the encoder on the GPU makes of the stream: images a second, how long it waits, a slide's answer."""
    model, count = bench.model, bench.settings.threads
    block = bench.scope.block_px
    side_l0 = model.encoder.input_px * 8
    across = max(1, round((bench.scope.gpu_regions * (side_l0 / block) ** 2) ** 0.5))
    size = across * block, across * block
    kept = tuple(d for d in (1, 4, 16) if block // d >= TILE_PX)
    with bench.written(SlideSpec(0.25, size, kept, "JPEG 4:4:4", full_cells(across, across))) as path:
        grid = region_grid(path, model.encoder.input_px)
        log = ReadingLog()
        with open_slide(path) as slide:
            reads = region_reads(grid)
            batches = stream_patches(slide, reads, model.encoder.input_px, batch_size=64, threads=count, log=log)
            images = np.concatenate([batch.images for batch in batches])

        def busy() -> float:
            began = time.perf_counter()
            embed(model.encoder, images, precision=model.precision)
            return time.perf_counter() - began

        def whole() -> float:
            return answer(path, None, model, "lr", threads=count).total_s

        model.warm_up()
        busy(), whole()
        seconds = take_turns({"busy": busy, "whole": whole}, bench.scope.stream_rounds)
    waits = spread(np.clip(1 - seconds["busy"] / seconds["whole"], 0, 1))
    whole_s = float(np.median(seconds["whole"]))
    row: Row = {
        "encoder": model.encoder.card.name,
        "regions": grid.num_regions,
        "alone": len(images) / float(np.median(seconds["busy"])),
        "fed": grid.num_regions / whole_s,
        "waits": waits.median,
        "spread": str(waits),
        "seconds": whole_s,
    }
    part.tables.append(
        Table(
            "gpu",
            "The GPU and the stream",
            _GPU_COLUMNS,
            [row],
            [
                "Alone: patches that lie in memory. Fed: a whole answer from the file. Waits: share of the "
                "answer in which the GPU has nothing to do, tissue and head included."
            ],
        )
    )
    part.checks += [
        Check("GPU: share of the time that it waits", waits.median, Target(GPU_WAITS, "at most")),
        Check(f"GPU: seconds of a slide of {grid.num_regions} regions", whole_s, Target(GPU_SLIDE_S, "at most")),
    ]


_COLUMNS = (
    Column("slide", "Slide"),
    Column("threads", "Threads", "{:d}"),
    Column("bare", "Bare, regions/s", "{:,.0f}"),
    Column("stream", "Stream, regions/s", "{:,.0f}"),
    Column("efficiency", "Efficiency", "{:.0%}"),
    Column("spread", "Spread"),
    Column("met", "Met"),
    Column("of_same_threads", "Of bare on as many", "{:.0%}"),
)
_GPU_COLUMNS = (
    Column("encoder", "Encoder"),
    Column("regions", "Regions", "{:d}"),
    Column("alone", "Alone, images/s", "{:,.0f}"),
    Column("fed", "Fed, images/s", "{:,.0f}"),
    Column("waits", "Waits", "{:.0%}"),
    Column("spread", "Spread"),
    Column("seconds", "Seconds a slide", "{:.2f}"),
)
