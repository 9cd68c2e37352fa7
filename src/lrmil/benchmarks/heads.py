"""Part `heads`: how fast every head is and how much memory it takes, beside torchmil's own where it has one.

A training step is forward, loss, backward and Adam on one bag; a prediction is a forward pass in inference mode. Before
the clock runs, each is done once. Peak memory is what steps take beyond the process with its bag and its weights,
gradients and Adam's moments among it. Bags and weights are drawn at random. torchmil's classes are called directly,
with their own defaults; their widths therefore differ, see the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from lrmil.benchmarks.child import in_own_process
from lrmil.benchmarks.results import Column, Part, Row, Table
from lrmil.benchmarks.workbench import Workbench
from lrmil.inference.predict import pick_device
from lrmil.mil import head_card, head_cards

WIDTH = 768
TORCHMIL = {"abmil": "ABMIL", "clam_sb": "CLAM_SB", "dsmil": "DSMIL", "transmil": "TransMIL", "dtfd": "DTFDMIL"}
"""Heads that torchmil has, too"""


def measure_heads(bench: Workbench) -> Part:
    """Time every head on bags of every size, each case in a process of its own."""
    settings, scope = bench.settings, bench.scope
    sizes = sorted(settings.sizes or scope.head_sizes)
    training = sorted({*sizes, *(size for size in scope.more_training if size <= max(sizes))})
    shared = {
        "width": WIDTH,
        "device": str(pick_device(settings.device)),
        "threads": settings.threads,
        "seconds": scope.head_seconds,
        "seed": settings.seed,
    }
    cases = [
        {"head": head, "work": work, "size": size, **shared}
        for head in head_rows(settings.heads)
        for work, own in (("train", training), ("predict", sizes))
        for size in own
        if work == "train" or head != "hdmil:lipn"
    ]
    results: list[dict[str, Any]] = []
    with bench.reporter.task("heads", len(cases)) as progress:
        for case in cases:
            results.append(in_own_process("head", case, scope.head_limit_s))
            progress.advance(note=f"{case['head']}, {case['work']}, {case['size']:,}")
    skipped = [f"{r['head']}, {r['work']}, {r['size']:,}: {r['failed']}." for r in results if "failed" in r]
    if find_spec("torchmil") is None:
        skipped.append("torchmil is not installed: its heads are left out.")
    notes = [
        f"Steps a second (peak memory beyond bag and weights), one bag a step, features {WIDTH} wide, "
        f"{settings.threads} threads, {shared['device']}. train: forward, loss, backward and Adam; predict: forward.",
    ]
    table = Table("heads", "Heads on bags of many sizes", _columns(results), _rows(results), notes)
    return Part("heads", "Heads", [table], [], skipped)


def head_rows(wanted: Sequence[str] | None) -> list[str]:
    """Return the names of all rows: every head, HDMIL's two steps of training apart, torchmil's behind its namesake.

    Raises:
        HeadError: there is no such head.
    """
    names = [card.name for card in head_cards()] if wanted is None else list(wanted)
    found: list[str] = []
    for name in names:
        head_card(name.partition(":")[0])
        found += ["hdmil", "hdmil:lipn"] if name == "hdmil" else [name]
        if name in TORCHMIL and find_spec("torchmil") is not None:
            found.append(f"torchmil's {TORCHMIL[name]}")
    return found


def _columns(results: list[dict[str, Any]]) -> tuple[Column, ...]:
    cells = sorted({(r["work"] != "train", r["size"], r["work"]) for r in results})
    return (
        Column("head", "Head"),
        Column("parameters", "Parameters", "{:,}"),
        *(Column(f"{work} {size}", f"{work} {size:,}", "{:>1}") for _, size, work in cells),
    )


def _rows(results: list[dict[str, Any]]) -> list[Row]:
    rows: dict[str, Row] = {}
    for result in results:
        row = rows.setdefault(result["head"], {"head": result["head"], "parameters": None, "cases": []})
        row["cases"].append(result)
        row["parameters"] = result.get("parameters", row["parameters"])
        row[f"{result['work']} {result['size']}"] = _cell(result)
    return list(rows.values())


def _cell(result: dict[str, Any]) -> str:
    if "failed" in result:
        return "failed"
    peak = result["peak_mb"]
    return f"{result['steps_per_second']:.3g}" + ("" if peak is None else f" ({max(0.0, peak):,.0f} MB)")
