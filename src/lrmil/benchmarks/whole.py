"""Part `answer`: a whole answer at 5x against the same at 20x, by part."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lrmil.benchmarks.answering import LR_MPP, PARTS, Answer, answer
from lrmil.benchmarks.results import Check, Column, Part, Row, Table, Target, spread
from lrmil.benchmarks.timing import take_turns
from lrmil.benchmarks.workbench import Workbench, threads
from lrmil.benchmarks.written import SlideSpec, cells_with_tissue
from lrmil.errors import NoTissue, SlideTooCoarse, SlideTooSmall
from lrmil.inference.timed import Resolution

PAPER_RATIO = 1 / 12
LIMIT = 1.15
"""largest ratio of times over ratio of patches"""
CHILDREN = {"with tissue": False, "all": True}


def measure_answers(bench: Workbench) -> Part:
    """Answer slides at both resolutions with one encoder, device, precision and number of threads."""
    rows: list[Row] = []
    skipped: list[str] = []
    specs = _specs(bench)
    # What is only assumed to be at 40x has no tissue at 20x worth the name.
    real = [known for known in bench.real if not known.note and not bench.scope.few_variants]
    with threads(bench.settings.threads), bench.reporter.task("answer", len(specs) + len(real)) as progress:
        model = bench.model
        model.warm_up()
        for name, spec in specs:
            with bench.written(spec) as path:
                rows += _rows(bench, name, path, None)
            progress.advance(note=name)
        for known in real:
            try:
                rows += _rows(bench, known.path.stem, known.path, known.mpp)
            except (NoTissue, SlideTooCoarse, SlideTooSmall) as error:
                skipped.append(str(error))
            progress.advance(note=known.path.name)
    notes = [
        f"Encoder {model.encoder.card.name}, patches of {model.encoder.input_px} px, {model.precision} precision, "
        f"{model.device}, {bench.settings.threads} threads; a plain attention head. Warm: starting the process, "
        "loading weights and a first batch are outside the clock. Both resolutions take turns; each answer begins at "
        "the file.",
        "Seconds of both, then their ratio, and the ratio of patches N_LR / N_HR. Quotient: the one over the other, "
        f"at most {LIMIT}. The paper prints a ratio of times of 1/12 = {PAPER_RATIO:.3f}; with all children 1/16 = "
        f"{1 / 16:.4f} is the limit of arithmetic.",
    ]
    table = Table("answer", "A whole answer at 5x and at 20x", _COLUMNS, rows, notes)
    checks = [
        Check(
            f"{row['slide']}, children {row['children']}: ratio of times over N_LR / N_HR",
            row["quotient"],
            Target(LIMIT, "at most"),
        )
        for row in rows
    ]
    return Part("answer", "Whole answers", [table], checks, skipped)


def _specs(bench: Workbench) -> list[tuple[str, SlideSpec]]:
    found = []
    block = bench.scope.block_px
    for name, mpp, downsamples in (("40x, 1-4-16", 0.25, (1, 4, 16)), ("20x, one level", 0.5, (1,))):
        side_l0 = bench.model.encoder.input_px * LR_MPP / mpp
        # Ragged blocks are about half tissue.
        tissue = max(1, round(bench.scope.answer_regions / (0.75 * (block / side_l0) ** 2)))
        across = max(2, math.ceil(math.sqrt(tissue / 0.4)))
        cells = cells_with_tissue(across, across, tissue)
        kept = tuple(d for d in downsamples if block // d >= 256)
        size = across * block, across * block
        found.append((f"written {name}", SlideSpec(mpp, size, kept, "JPEG 4:4:4", cells)))
    return found[:1] if bench.scope.few_variants else found


def _rows(bench: Workbench, name: str, path: Path, mpp: float | None) -> list[Row]:
    rows = []
    for children, all_children in CHILDREN.items():
        found: dict[Resolution, list[Answer]] = {"lr": [], "hr": []}

        def job(resolution: Resolution, every: bool, into: list[Answer]) -> Callable[[], float]:
            def run() -> float:
                into.append(
                    answer(path, mpp, bench.model, resolution, threads=bench.settings.threads, all_children=every)
                )
                return into[-1].total_s

            return run

        job("lr", all_children, [])()
        seconds = take_turns(
            {r: job(r, all_children, answers) for r, answers in found.items()}, bench.scope.answer_rounds
        )
        ratio = spread(seconds["lr"] / seconds["hr"])
        patches = found["lr"][0].patches_encoded / found["hr"][0].patches_encoded
        row: Row = {"slide": name, "children": children, "n_lr": found["lr"][0].patches_encoded}
        row |= {"n_hr": found["hr"][0].patches_encoded}
        for resolution, answers in found.items():
            row |= {
                f"{resolution}_{part}": float(np.median([asdict(a)[part] for a in answers]))
                for part in (*PARTS, "total_s")
            }
            row[f"{resolution}_mb"] = None if answers[0].bytes_read is None else answers[0].bytes_read / 1e6
        row |= {
            "ratio": ratio.median,
            "spread": str(ratio),
            "patch_ratio": patches,
            "quotient": ratio.median / patches,
            "met": ratio.median / patches <= LIMIT,
            "times_cheaper": 1 / ratio.median,
        }
        rows.append(row)
    return rows


def _part_columns(resolution: str, word: str) -> tuple[Column, ...]:
    parts = (("tissue_s", "tissue"), ("reading_s", "reading"), ("encoding_s", "encoding"), ("mil_s", "MIL"))
    timed = (Column(f"{resolution}_{key}", f"{word} {name}", "{:.3f}") for key, name in parts)
    return (*timed, Column(f"{resolution}_total_s", f"{word} s", "{:.3f}"))


_COLUMNS = (
    Column("slide", "Slide"),
    Column("children", "Children"),
    Column("n_lr", "N_LR", "{:d}"),
    Column("n_hr", "N_HR", "{:d}"),
    *_part_columns("lr", "5x"),
    *_part_columns("hr", "20x"),
    Column("ratio", "Ratio", "{:.4f}"),
    Column("spread", "Spread"),
    Column("patch_ratio", "N_LR / N_HR", "{:.4f}"),
    Column("quotient", "Quotient", "{:.2f}"),
    Column("met", "Met"),
)
