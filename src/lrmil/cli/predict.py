"""`lrmil predict`: slides in, answers out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lrmil.errors import SlideError


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="predict")(predict)


def predict(
    slides: Annotated[list[str], typer.Argument(help="Slide files.")],
    model: Annotated[Path, typer.Option(help="Bundle folder: model/ of a run.")],
    out: Annotated[Path, typer.Option(help="Folder for the answers, one subfolder a slide.")] = Path("predictions"),
    mpp: Annotated[float | None, typer.Option(help="um per level-0 pixel, where the slides do not say it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Regions a forward pass.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Reader threads.")] = 2,
    heatmap: Annotated[bool, typer.Option(help="Write attention.png.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per slide.")] = False,
) -> None:
    """Answer slides from low-resolution pixels alone.

    For each slide: `OUT/<slide>/prediction.json` (probabilities, regions with attention, seconds, bytes) and
    `attention.png`. All answers together are in `OUT/predictions.csv`. The reader is never asked for pixels finer than
    the model's low resolution.

    Exit code 1 means that some slides could not be answered; they are listed in `OUT/failures.csv`.
    """
    from lrmil.inference.batch import predict_many
    from lrmil.inference.bundle import read_manifest
    from lrmil.inference.predict import Prediction
    from lrmil.pipeline.reporting import Reporter

    read_manifest(model)  # a wrong --model should not cost a minute
    reporter = Reporter(quiet=as_json)

    def answered(result: Prediction | SlideError) -> None:
        if isinstance(result, SlideError):
            print(f"lrmil: {result}", file=sys.stderr)
        elif as_json:
            print(json.dumps(result.as_json()), flush=True)
        else:
            chances = "  ".join(f"{name} {p:.1%}" for name, p in result.probabilities.items())
            seconds = result.seconds
            print(
                f"{result.slide}: {result.predicted}   ({chances})\n"
                f"  {result.patches_encoded} regions in {seconds.total:.2f} s "
                f"(tissue {seconds.tissue:.2f}, reading {seconds.reading:.2f}, encoding {seconds.encoding:.2f}, "
                f"MIL {seconds.mil:.3f})",
                flush=True,
            )
            for note in result.warnings:
                print(f"  note: {note}", flush=True)

    with reporter.task("predict", len(slides)) as progress:

        def step(result: Prediction | SlideError) -> None:
            answered(result)
            progress.advance()

        failed = predict_many(
            slides,
            model,
            out,
            mpp=mpp,
            device=device,
            batch_size=batch_size,
            threads=threads,
            heatmap=heatmap,
            on_result=step,
        )
    if failed:
        raise typer.Exit(1)
    if not as_json:
        print(f"answers are in {out}")
