"""`lrmil bench`: how fast slides are read and answered here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(bench)


def bench(
    parts: Annotated[
        list[str] | None, typer.Argument(help="reading, answer, tools, size, threads, heads. Default: all but heads.")
    ] = None,
    slides: Annotated[
        list[str] | None,
        typer.Option(
            help="A slide file, PATH or PATH=MPP; may be repeated. Default: those of the test data, if there."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.md and figures.")] = Path("bench"),
    encoder: Annotated[str, typer.Option(help="Encoder: a card, timm ViT, or folder.")] = "lrmil-small",
    weights: Annotated[Path | None, typer.Option(help="Its weight file.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Random weights for the encoder, which take as long.")
    ] = False,
    patch_px: Annotated[int | None, typer.Option(help="Side of encoded patches; default: the encoder's.")] = None,
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Reader and torch threads; default: all cores.")] = None,
    heads: Annotated[str | None, typer.Option(help="Part heads: names, separated by commas.")] = None,
    sizes: Annotated[str | None, typer.Option(help="Part heads: instances of bags, separated by commas.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is drawn.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A little of everything, to see whether it works; numbers mean nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure reading and answering on this machine, as ratios taken in one run, beside what users run today.

    **reading**: our reader against OpenSlide + area resize, at 5x and 20x, one thread. **answer**: a whole answer at 5x
    against 20x, by part. **tools**: against OpenSlide in a DataLoader, tiffslide and fastslide, where installed.
    **size**: seconds and peak memory from 0.1 to 10 gigapixels. **threads**: the stream on all cores, and a GPU where
    there is one. **heads**: steps per second and memory of each MIL head, beside torchmil's (more than half an
    hour on two cores).

    Beside real slides it writes its own into a temporary folder (up to 1 GB at a time). Ten minutes on two quiet cores.
    Targets that are missed are listed at the end; they do not change the exit code.
    """
    from rich.console import Console

    from lrmil.benchmarks.report import WIDE, print_report
    from lrmil.benchmarks.run import run_benchmark
    from lrmil.benchmarks.settings import DEFAULT_PARTS, BenchSettings
    from lrmil.pipeline.overrides import validated
    from lrmil.pipeline.reporting import Reporter

    raw: dict[str, Any] = {
        "parts": parts or DEFAULT_PARTS,
        "slides": slides,
        "encoder": encoder,
        "weights": None if weights is None else str(weights),
        "random_weights": random_weights,
        "patch_px": patch_px,
        "precision": precision,
        "device": device,
        "heads": None if heads is None else heads.split(","),
        "sizes": None if sizes is None else sizes.split(","),
        "seed": seed,
        "quick": quick,
    }
    if threads is not None:
        raw["threads"] = threads
    settings = validated(BenchSettings, raw, "lrmil bench")
    facts, found = run_benchmark(settings, out, Reporter(quiet=as_json))
    if as_json:
        print(json.dumps(json.loads((out / "results.json").read_text(encoding="utf-8")), indent=2))
        return
    console = Console()
    print_report(console if console.is_terminal else Console(width=WIDE), facts, found)
    print(f"wrote {out / 'results.md'}")
