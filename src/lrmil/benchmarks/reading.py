"""Part `reading`: our reader against OpenSlide and an area resize, patch by patch, on one thread."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import tifffile

from lrmil.benchmarks.results import Check, Column, Part, Row, Table, Target, spread
from lrmil.benchmarks.timing import take_turns
from lrmil.benchmarks.workbench import Workbench, threads
from lrmil.benchmarks.written import Codec, SlideSpec, full_cells
from lrmil.encoders import embed
from lrmil.geometry import GridSettings, IntArray, match_grids
from lrmil.slides import Slide, open_slide
from lrmil.slides.resample import area_resample
from lrmil.tissue import find_tissue

PATCH_PX = 256
SCALES = {"5x": 2.0, "20x": 0.5}
PYRAMIDS: dict[str, tuple[int, ...]] = {"one level": (1,), "1-4-16": (1, 4, 16), "1-2-4-8": (1, 2, 4, 8)}
CODECS: tuple[Codec, ...] = ("JPEG 4:4:4", "JPEG 4:2:0", "JPEG 2000")
_LEVEL_TOLERANCE = 1.005
_WHOLE_LEVEL_PX = 64_000_000
"""largest level that is read as a whole, to know its pixels as they are"""
_MEAN_DIFFERENCE = {"JPEG 4:4:4": 0.5, "JPEG 4:2:2": 2.5, "JPEG 4:2:0": 1.5}
"""grey levels by which a patch decoded at reduced size may differ from the average over its area"""
_MIN_COSINE = 0.999
_COMPARED_PATCHES = 8


@dataclass(frozen=True)
class Case:
    """A slide to read."""

    name: str
    path: Path
    mpp: float | None
    codec: str
    pyramid: str
    places: str
    """where patches begin on coarser levels, as OpenSlide counts: "whole" or "fractional" """


def measure_reading(bench: Workbench) -> Part:
    """Read the real slides and the written ones at 5x and at 20x."""
    rows: list[Row] = []
    specs = list(_specs(bench))
    real = bench.real[:1] if bench.scope.few_variants else bench.real
    with threads(1), bench.reporter.task("reading", len(specs) + len(real)) as progress:
        for known in real:
            rows += _rows(bench, _real_case(known.path, known.mpp), known.note)
            progress.advance(note=known.path.name)
        for name, spec in specs:
            with bench.written(spec) as path:
                fractional = any(side % factor for side in spec.size_px for factor in spec.downsamples)
                pyramid = "-".join(map(str, spec.downsamples)) if len(spec.downsamples) > 1 else "one level"
                case = Case(name, path, None, spec.codec, pyramid, "fractional" if fractional else "whole")
                rows += _rows(bench, case, "written")
            progress.advance(note=name)
    sources = sorted({f"{mpp:g} um/px: {bench.stock(mpp).material.source}" for mpp in (0.25, 0.5)})
    notes = [
        "One thread. Both readers take turns in small rounds on the same patches of 256 px, each round through a slide "
        "that was just opened; opening is outside the clock. The ratio is the median over rounds, the spread its "
        "quartiles.",
        "OpenSlide: the coarsest level that is fine enough, then cv2.INTER_AREA. Fractional: its levels are not whole "
        "numbers of times smaller (3.9995 for 4), so that it interpolates.",
        f"Tissue of written slides, {'; '.join(sources)}.",
        "Difference: mean grey levels between our patch and the area average of the level's pixels. Bounds where tiles "
        "are decoded at reduced size: JPEG 4:4:4 and RGB 0.5, 4:2:2 2.5, 4:2:0 1.5; JPEG 2000: cosine of the "
        "features at least 0.999. Elsewhere the pixels must be equal.",
    ]
    notes += sorted({f"{row['slide']} {row['note']}." for row in rows if row["note"] not in ("", "written")})
    table = Table("reading", "Reading a patch: ours against OpenSlide + area resize", _COLUMNS, rows, notes)
    checks = [
        Check(f"{row['slide']}, {row['codec']}, at {row['scale']}: ratio", row["ratio"], _target(row)) for row in rows
    ]
    compared = [row for row in rows if row["within_bounds"] is not None]
    if compared:
        share = sum(row["within_bounds"] for row in compared) / len(compared)
        checks.append(Check("reading: share of rows whose pixels are within bounds", share, Target(1.0)))
    return Part("reading", "Reading", [table], checks)


def _specs(bench: Workbench) -> list[tuple[str, SlideSpec]]:
    found = []
    side = 2 * bench.scope.block_px
    for mpp, nominal in ((0.5, "20x"), (0.25, "40x")):
        for pyramid, downsamples in PYRAMIDS.items():
            for whole in (True, False) if pyramid == "1-4-16" else (True,):
                for codec in CODECS:
                    name = f"written {nominal}, {pyramid}" + ("" if whole else ", fractional")
                    length = side if whole else side - 1
                    # A block of the quick run is too small for tiles at 1/16.
                    kept = tuple(d for d in downsamples if bench.scope.block_px // d >= 256)
                    found.append((name, SlideSpec(mpp, (length, length), kept, codec, full_cells(2, 2))))
    if bench.scope.few_variants:
        return [found[i] for i in (1, 6, 11)]
    return found


def _real_case(path: Path, mpp: float | None) -> Case:
    handle = openslide.OpenSlide(str(path))
    steps = [round(d, 4) for d in handle.level_downsamples]
    fractional = any(not math.isclose(step, round(step), abs_tol=1e-9) for step in handle.level_downsamples)
    handle.close()
    pyramid = "-".join(f"{round(step)}" for step in steps) if len(steps) > 1 else "one level"
    return Case(path.stem, path, mpp, _codec(path), pyramid, "fractional" if fractional else "whole")


def _codec(path: Path) -> str:
    try:
        with tifffile.TiffFile(path) as tiff:
            page: Any = tiff.pages[0]
            if page.compression in (33003, 33005, 34712):
                return "JPEG 2000"
            if page.compression != 7:
                return str(page.compression.name).lower()
            if page.photometric == 2:
                return "JPEG 4:4:4"
            chroma = {(1, 1): "4:4:4", (2, 1): "4:2:2", (2, 2): "4:2:0"}.get(tuple(page.subsampling or ()), "")
            return f"JPEG {chroma}".strip()
    except tifffile.TiffFileError:
        return "other"


def _rows(bench: Workbench, case: Case, note: str) -> list[Row]:
    rows = []
    for scale, mpp in SCALES.items():
        with open_slide(case.path, mpp=case.mpp) as slide:
            boxes = _patches(slide, mpp, bench.scope.max_patches)
            if not len(boxes):
                continue
            reader = slide.reader
        rows.append(_row(bench, case, scale, mpp, boxes, reader, note))
    return rows


def _patches(slide: Slide, mpp: float, limit: int) -> IntArray:
    """Return boxes (N, 4) of neighbouring patches of tissue that lie within the slide altogether."""
    if slide.mpp > mpp * 1.05:
        return np.empty((0, 4), np.int64)
    settings = GridSettings(lr_mpp=max(mpp, 2.0), hr_mpp=0.5, patch_px=PATCH_PX)
    mask, _ = find_tissue(slide)
    grid = match_grids(
        settings, slide.mpp, slide.dimensions, mask.coverage, min_region_tissue=0.25, min_child_tissue=0.25
    )
    boxes = grid.child_boxes_l0 if mpp < 1 else grid.region_boxes_l0
    return boxes[(boxes[:, 2] <= slide.dimensions[0]) & (boxes[:, 3] <= slide.dimensions[1])][:limit]


def _row(bench: Workbench, case: Case, scale: str, mpp: float, boxes: IntArray, reader: str, note: str) -> Row:
    scope = bench.scope
    trial = boxes[:1]
    trial_s = _read_with_openslide(case, trial) / len(trial)
    _read_with_ours(case, trial)
    boxes = boxes[: max(1, min(len(boxes), round(scope.round_s / max(trial_s, 1e-6))))]
    rounds = max(scope.min_rounds, min(25, round(scope.row_s / max(1e-6, 1.2 * trial_s * len(boxes)))))
    seconds = take_turns(
        {"openslide": lambda: _read_with_openslide(case, boxes), "ours": lambda: _read_with_ours(case, boxes)}, rounds
    )
    ratio = spread(seconds["openslide"] / seconds["ours"])
    with open_slide(case.path, mpp=case.mpp) as slide:
        level = slide.level_for(mpp)
        factor = (boxes[0, 2] - boxes[0, 0]) / PATCH_PX / level.downsample
    row: Row = {
        "slide": case.name,
        "codec": case.codec,
        "pyramid": case.pyramid,
        "places": case.places if level.downsample > 1 else "whole",
        "scale": scale,
        "from": f"{level.downsample:g}x smaller level" if level.downsample > 1 else "level 0",
        "factor": float(factor),
        "reader": reader,
        "openslide_ms": 1e3 * float(np.median(seconds["openslide"])) / len(boxes),
        "ours_ms": 1e3 * float(np.median(seconds["ours"])) / len(boxes),
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "spread": str(ratio),
        "patches": len(boxes),
        "rounds": rounds,
        "note": note,
    }
    target = _target(row)
    row |= {"target": target.limit, "met": target.met(ratio.median)}
    return row | _difference(bench, case, boxes, factor, reader)


def _target(row: Row) -> Target:
    """Return by how much our reader should be faster."""
    if row["reader"] != "tiff":
        return Target(0.9)  # it is OpenSlide itself
    if row["codec"] == "JPEG 2000" or row["scale"] == "20x":
        return Target(3.0)
    if row["factor"] == 1:
        return Target(4.0)
    if row["from"] == "level 0":
        return Target(8.0)
    return Target(15.0 if row["places"] == "fractional" else 5.0)


def _read_with_ours(case: Case, boxes: IntArray) -> float:
    with open_slide(case.path, mpp=case.mpp) as slide:
        began = time.perf_counter()
        for x0, y0, x1, y1 in boxes.tolist():
            slide.read_box((x0, y0, x1, y1), (PATCH_PX, PATCH_PX))
        return time.perf_counter() - began


def _read_with_openslide(case: Case, boxes: IntArray) -> float:
    handle = openslide.OpenSlide(str(case.path))
    try:
        began = time.perf_counter()
        for box in boxes.tolist():
            openslide_patch(handle, box, PATCH_PX)
        return time.perf_counter() - began
    finally:
        handle.close()


def openslide_patch(handle: Any, box_l0: Sequence[int], patch_px: int) -> npt.NDArray[np.uint8]:
    """Read a box as users of OpenSlide do: the coarsest level that is fine enough, then an area average; RGB."""
    x0, y0, x1, y1 = box_l0
    level, size = best_level(handle.level_downsamples, ((x1 - x0), (y1 - y0)), patch_px)
    pixels = cv2.cvtColor(np.asarray(handle.read_region((x0, y0), level, size)), cv2.COLOR_RGBA2RGB)
    if size != (patch_px, patch_px):
        pixels = cv2.resize(pixels, (patch_px, patch_px), interpolation=cv2.INTER_AREA)
    return np.asarray(pixels, np.uint8)


def best_level(downsamples: Sequence[float], side_l0: tuple[int, int], patch_px: int) -> tuple[int, tuple[int, int]]:
    """Return the coarsest level that is fine enough for a patch, and how many of its pixels the patch covers."""
    wanted = side_l0[0] / patch_px
    level = max(i for i, d in enumerate(downsamples) if i == 0 or d <= wanted * _LEVEL_TOLERANCE)
    return level, (round(side_l0[0] / downsamples[level]), round(side_l0[1] / downsamples[level]))


def _difference(bench: Workbench, case: Case, boxes: IntArray, factor: float, reader: str) -> Row:
    """Compare our patches with area averages of the level's own pixels."""
    ours, wanted = [], []
    handle = openslide.OpenSlide(str(case.path))
    try:
        with open_slide(case.path, mpp=case.mpp) as slide:
            level = slide.level_for(slide.mpp * (boxes[0, 2] - boxes[0, 0]) / PATCH_PX)
            if level.index >= handle.level_count:
                return {"difference": None, "within_bounds": None}
            own = handle.level_downsamples[level.index]
            whole_level = None
            if own != level.downsample:
                # OpenSlide interpolates anywhere but at its origin.
                if level.width_px * level.height_px > _WHOLE_LEVEL_PX:
                    return {"difference": None, "within_bounds": None}
                whole_level = _rgb(handle.read_region((0, 0), level.index, (level.width_px, level.height_px)))
            for box in boxes[:: max(1, len(boxes) // _COMPARED_PATCHES)][:_COMPARED_PATCHES].tolist():
                ours.append(slide.read_box(tuple(box), (PATCH_PX, PATCH_PX)))
                x0, y0, x1, y1 = (edge / level.downsample for edge in box)
                size = math.ceil(x1 - x0), math.ceil(y1 - y0)
                if whole_level is None:
                    pixels = _rgb(handle.read_region((box[0], box[1]), level.index, size))
                    place: tuple[float, float, float, float] = (0.0, 0.0, x1 - x0, y1 - y0)
                else:
                    pixels, place = whole_level, (x0, y0, x1, y1)
                wanted.append(area_resample(pixels, place, (PATCH_PX, PATCH_PX)))
    finally:
        handle.close()
    difference = float(np.abs(np.stack(ours).astype(np.int16) - np.stack(wanted)).mean())
    row: Row = {"difference": difference, "cosine": None, "within_bounds": difference == 0}
    if factor > 1 and reader == "tiff" and difference > 0:
        row["cosine"] = _min_cosine(bench, np.stack(ours), np.stack(wanted))
        if case.codec in _MEAN_DIFFERENCE:
            row["within_bounds"] = difference <= _MEAN_DIFFERENCE[case.codec]
        else:
            row["within_bounds"] = row["cosine"] >= _MIN_COSINE
    return row


def _min_cosine(bench: Workbench, ours: npt.NDArray[np.uint8], wanted: npt.NDArray[np.uint8]) -> float:
    """Return the smallest cosine between features of the middles of patches."""
    encoder = bench.model.encoder
    side = min(encoder.input_px, PATCH_PX)
    start = (PATCH_PX - side) // 2
    middle = slice(start, start + side)
    a, b = (embed(encoder, np.ascontiguousarray(x[:, middle, middle])).embedding for x in (ours, wanted))
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(cosine.min())


def _rgb(image: Any) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(image)[..., :3])


_COLUMNS = (
    Column("slide", "Slide"),
    Column("codec", "Tiles"),
    Column("scale", "At"),
    Column("from", "Read from"),
    Column("factor", "Averaged", "{:g} x"),
    Column("openslide_ms", "OpenSlide ms", "{:.2f}"),
    Column("ours_ms", "lrmil ms", "{:.2f}"),
    Column("ratio", "Ratio", "{:.1f}"),
    Column("spread", "Spread"),
    Column("target", "Target", "{:g}"),
    Column("met", "Met"),
    Column("difference", "Difference", "{:.2f}"),
    Column("within_bounds", "Within bounds"),
)
