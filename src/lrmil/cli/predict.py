"""`lrmil predict`: slides in, answers out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lrmil.inference.predict import Prediction


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="predict")(predict)


def predict(
    slides: Annotated[list[str], typer.Argument(help="Slide files.")],
    model: Annotated[Path, typer.Option(help="Bundle folder: model/ of a run.")],
    out: Annotated[Path, typer.Option(help="Folder for the answers, one subfolder a slide.")] = Path("predictions"),
    mpp: Annotated[float | None, typer.Option(help="um per level-0 pixel, where the slides do not say it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Regions a forward pass; default: what suits the device.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Reader threads.")] = 2,
    heatmap: Annotated[bool, typer.Option(help="Write the two pictures of each slide.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON per slide; of a failed one, its error.")
    ] = False,
) -> None:
    """Answer slides from low-resolution pixels alone.

    For each slide: `OUT/<slide>/prediction.json` (probabilities, or a number, or a risk and its survival curve;
    regions with attention, seconds, bytes), `attention.png` (lies exactly over the slide) and `attention_figure.png`
    (beside the slide, with scales). All answers together are in `OUT/predictions.csv`. The reader is never asked for
    pixels finer than the model's low resolution.

    Exit code 1 means that some slides could not be answered; they are listed in `OUT/failures.csv`.
    """
    from lrmil.inference.batch import Failure, predict_many
    from lrmil.pipeline.reporting import Reporter

    def tell(result: Prediction | Failure) -> None:
        if as_json:
            print(json.dumps(result.as_json()), flush=True)
        if isinstance(result, Failure):
            print(f"lrmil: {result.message}", file=sys.stderr)
        elif not as_json:
            print(_in_words(result), flush=True)
        progress.advance()

    with Reporter(quiet=as_json).task("predict", len(slides)) as progress:
        failures = predict_many(
            slides,
            model,
            out,
            mpp=mpp,
            device=device,
            batch_size=batch_size,
            threads=threads,
            heatmap=heatmap,
            on_result=tell,
        )
    if not as_json:
        print(f"{len(slides) - len(failures)} of {len(slides)} slides answered; see {out}")
    if failures:
        print(f"lrmil: what failed is listed in {out / 'failures.csv'}", file=sys.stderr)
        raise typer.Exit(1)


def _answer(answer: Prediction) -> str:
    if answer.value is None:
        chances = "  ".join(f"{name} {p:.1%}" for name, p in answer.probabilities.items())
        return f"{answer.predicted}   ({chances})"
    curve = "  ".join(f"{p:.0%} at {time:g}" for time, p in (answer.survival or {}).items())
    return answer.in_words() + (f"   (no event: {curve})" if curve else "")


def _in_words(answer: Prediction) -> str:
    seconds, scale = answer.seconds, answer.scale
    levels = ", ".join(f"level {v['level']} ({v['mpp']:.3g} um/px)" for v in scale["levels_opened"])
    read = "" if answer.bytes_read is None else f", {answer.bytes_read / 1e6:.1f} MB"
    lines = [
        f"{answer.slide}: {_answer(answer)}",
        f"  {answer.num_regions} regions at {scale['working_mpp']:.3g} um/px, read from {levels}{read}",
        f"  {seconds.total:.2f} s: tissue {seconds.tissue:.2f}, reading {seconds.reading:.2f}, "
        f"encoding {seconds.encoding:.2f}, MIL {seconds.mil:.3f}",
    ]
    return "\n".join(lines + [f"  note: {note}" for note in answer.warnings])
