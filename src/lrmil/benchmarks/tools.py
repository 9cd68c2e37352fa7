"""Part `tools`: 5x patches as users get them today, against the stream that feeds our encoders."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lrmil.benchmarks.reading import PATCH_PX, best_level
from lrmil.benchmarks.results import Check, Column, Part, Row, Table, Target, spread
from lrmil.benchmarks.timing import take_turns
from lrmil.benchmarks.workbench import Workbench, threads
from lrmil.benchmarks.written import SlideSpec, full_cells
from lrmil.geometry import GridSettings, MatchedGrid, match_grids
from lrmil.inference.stream import ReadingLog, region_reads, stream_patches
from lrmil.slides import open_slide

TOOLS = {"openslide": "OpenSlide", "tiffslide": "tiffslide", "fastslide": "fastslide"}
"""modules and names; each is read patch by patch in a DataLoader of torch, and resized by Pillow"""
BATCH = 16
_LIMIT_S = 120.0
"""for one batch; a tool that takes longer is given up"""


class PatchDataset(Dataset[torch.Tensor]):
    """One patch an item, uint8 (3, P, P). A worker opens the slide when it reads its first."""

    def __init__(self, tool: str, path: Path, boxes: list[list[int]]) -> None:
        self.tool, self.path, self.boxes = tool, path, boxes
        self._handle: Any = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._handle is None:
            self._handle = _open(self.tool, self.path)
        pixels = _patch(self.tool, self._handle, self.boxes[index])
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _open(tool: str, path: Path) -> Any:
    if tool == "fastslide":
        return import_module(tool).FastSlide.from_file_path(str(path))
    if tool == "tiffslide":
        return import_module(tool).TiffSlide(str(path))
    return import_module(tool).OpenSlide(str(path))


def _patch(tool: str, handle: Any, box_l0: list[int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from PIL import Image

    x0, y0, x1, y1 = box_l0
    level, size = best_level(handle.level_downsamples, (x1 - x0, y1 - y0), PATCH_PX)
    if tool == "fastslide":
        # It takes positions in pixels of the level.
        step = handle.level_downsamples[level]
        pixels = handle.read_region((round(x0 / step), round(y0 / step)), level, size).numpy()
        picture = Image.fromarray(np.asarray(pixels)[..., :3])
    else:
        picture = handle.read_region((x0, y0), level, size).convert("RGB")
    if size != (PATCH_PX, PATCH_PX):
        picture = picture.resize((PATCH_PX, PATCH_PX))
    return np.asarray(picture, np.uint8)


def measure_tools(bench: Workbench) -> Part:
    """Read the same 5x patches of written slides with every tool that is installed."""
    rows: list[Row] = []
    skipped = [
        f"{name} is not installed; `pip install {module}` puts it into the table."
        for module, name in TOOLS.items()
        if find_spec(module) is None
    ]
    specs = _specs(bench)
    with threads(1), bench.reporter.task("tools", len(specs)) as progress:
        for name, spec in specs:
            with bench.written(spec) as path:
                rows += _rows(bench, name, path, skipped)
            progress.advance(note=name)
    workers = bench.settings.threads
    notes = [
        f"5x patches of {PATCH_PX} px from the file to batches of {BATCH} in memory, no encoder. The tools: the "
        f"coarsest level that is fine enough, Pillow's resize, a DataLoader with {workers} workers. lrmil: its stream "
        f"with {workers} threads. All take turns.",
        "First slide: with the start of workers, as tools do that make a DataLoader for every slide. Warm: workers "
        "stay and have the slide open. lrmil opens the slide in both.",
    ]
    table = Table("tools", "5x patches a second with the tools of today", _COLUMNS, rows, notes)
    checks = [
        Check(f"{row['slide']}: lrmil against {row['tool']}, warm", row["warm_ratio"], Target(1.0))
        for row in rows
        if row["warm_ratio"] is not None
    ]
    return Part("tools", "Against the tools of today", [table], checks, skipped)


def _specs(bench: Workbench) -> list[tuple[str, SlideSpec]]:
    block, found = bench.scope.block_px, []
    variants: tuple[tuple[str, float, tuple[int, ...]], ...] = (
        ("40x, 1-4-16", 0.25, (1, 4, 16)),
        ("20x, one level", 0.5, (1,)),
    )
    for name, mpp, downsamples in variants[1:] if bench.scope.few_variants else variants:
        regions_a_block = (block * mpp / 2.0 / PATCH_PX) ** 2
        across = max(1, round((bench.scope.tool_regions / regions_a_block) ** 0.5))
        size = across * block - 1, across * block - 1
        found.append((f"written {name}", SlideSpec(mpp, size, downsamples, "JPEG 4:4:4", full_cells(across, across))))
    return found


def region_grid(path: Path, patch_px: int = PATCH_PX) -> MatchedGrid:
    """Return all regions of a written slide, tissue or not."""
    with open_slide(path) as slide:
        return match_grids(GridSettings(patch_px=patch_px), slide.mpp, slide.dimensions)


def stream_seconds(path: Path, grid: MatchedGrid, count: int) -> float:
    """Stream the regions of a slide that is just being opened, with `count` reader threads."""
    began = time.perf_counter()
    log = ReadingLog()
    with open_slide(path) as slide:
        reads, patch_px = region_reads(grid), grid.scale.patch_px
        for _ in stream_patches(slide, reads, patch_px, batch_size=BATCH, threads=count, log=log):
            pass
    seconds = time.perf_counter() - began
    log.raise_if_too_many(path.name, 0.0)
    return seconds


def _rows(bench: Workbench, name: str, path: Path, skipped: list[str]) -> list[Row]:
    grid, count = region_grid(path), bench.settings.threads
    boxes = grid.region_boxes_l0.tolist()
    jobs: dict[str, Callable[[], float]] = {"lrmil": lambda: stream_seconds(path, grid, count)}
    loaders: dict[str, DataLoader[torch.Tensor]] = {}

    def cold(tool: str) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            for _ in DataLoader(PatchDataset(tool, path, boxes), BATCH, num_workers=count):
                pass
            return time.perf_counter() - began

        return run

    def warm(tool: str) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            for _ in loaders[tool]:
                pass
            return time.perf_counter() - began

        return run

    for tool in (module for module in TOOLS if find_spec(module) is not None):
        # Only workers open slides: some tools start threads of their own, which do not survive the fork.
        loaders[tool] = DataLoader(
            PatchDataset(tool, path, boxes), BATCH, num_workers=count, persistent_workers=True, timeout=_LIMIT_S
        )
        try:
            warm(tool)()
        except Exception as error:
            del loaders[tool]
            skipped.append(f"{TOOLS[tool]} cannot read {name}: {str(error).strip().splitlines()[-1]}")
            continue
        jobs[f"{tool} first"], jobs[f"{tool} warm"] = cold(tool), warm(tool)
    jobs["lrmil"]()
    seconds = take_turns(jobs, bench.scope.tool_rounds)
    ours = seconds["lrmil"]
    rows: list[Row] = [
        {"slide": name, "tool": "lrmil", "patches": len(boxes), "warm": len(boxes) / float(np.median(ours))}
    ]
    rows[0] |= {"first": rows[0]["warm"], "warm_ratio": None, "version": _version("lrmil")}
    for tool in loaders:
        first, later = seconds[f"{tool} first"], seconds[f"{tool} warm"]
        ratio = spread(later / ours)
        rows.append(
            {
                "slide": name,
                "tool": TOOLS[tool],
                "version": _version("openslide-python" if tool == "openslide" else tool),
                "patches": len(boxes),
                "first": len(boxes) / float(np.median(first)),
                "warm": len(boxes) / float(np.median(later)),
                "first_ratio": spread(first / ours).median,
                "warm_ratio": ratio.median,
                "spread": str(ratio),
            }
        )
    return rows


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


_COLUMNS = (
    Column("slide", "Slide"),
    Column("tool", "Tool"),
    Column("version", "Version"),
    Column("first", "Patches/s, first slide", "{:.0f}"),
    Column("warm", "Patches/s, warm", "{:.0f}"),
    Column("first_ratio", "lrmil faster, first", "{:.1f}"),
    Column("warm_ratio", "lrmil faster, warm", "{:.1f}"),
    Column("spread", "Spread"),
)
