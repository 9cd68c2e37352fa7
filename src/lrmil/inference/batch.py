"""Answer many slides with one bundle; a slide that fails does not stop the others."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmil.errors import EncoderError, HeadError, OutputError, SlideError
from lrmil.files import write_text
from lrmil.inference.bundle import BundleManifest
from lrmil.inference.predict import Prediction, load_bundle

ANSWERS_FILE, FAILURES_FILE = "predictions.csv", "failures.csv"
_PER_SLIDE = ("prediction.json", "attention.png", "attention_figure.png")


@dataclass(frozen=True)
class Failure:
    """A slide that could not be answered, and why."""

    path: str
    error: SlideError | EncoderError | HeadError

    def as_json(self) -> dict[str, Any]:
        """Return what `lrmil predict --json` prints for it."""
        return {"path": self.path, "error": type(self.error).__name__, "message": str(self.error)}


def predict_many(
    slides: Sequence[str | Path],
    model: str | Path,
    out: str | Path,
    *,
    mpp: float | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    threads: int = 2,
    heatmap: bool = True,
    on_result: Callable[[Prediction | Failure], None] | None = None,
) -> list[Failure]:
    """Answer `slides`; write `out`/<slide>/prediction.json and pictures, predictions.csv and failures.csv.

    What an earlier call left of these files is removed first, so that every answer found there is one of this call.
    Slides of the same file name get numbered folders, which do not depend on what fails.

    Args:
        slides: files.
        model: bundle folder.
        out: made where missing.
        mpp: um per level-0 pixel of all slides, where the files do not say it.
        device: see `load_bundle`.
        batch_size: see `Bundle.predict`.
        threads: reader threads.
        heatmap: write attention.png (lies exactly over the slide) and attention_figure.png (with slide and scales).
        on_result: called after each slide.

    Returns:
        the failures, in the order of `slides`.

    Raises:
        BundleError: the model cannot be loaded.
        OutputError: an answer cannot be written.
    """
    bundle = load_bundle(model, device=device)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{out}: cannot be used as a folder ({reason}).", fix="Choose another output folder."
        ) from error
    folders = [out / name for name in folder_names(slides)]
    for stale in [out / ANSWERS_FILE, out / FAILURES_FILE, *(f / name for f in folders for name in _PER_SLIDE)]:
        stale.unlink(missing_ok=True)

    rows = [["slide", *_answer_columns(bundle.manifest), "regions", "unreadable", "seconds", "folder", "path"]]
    failures: list[Failure] = []
    for path, folder in zip(slides, folders, strict=True):
        result: Prediction | Failure
        try:
            result = bundle.predict(path, mpp=mpp, batch_size=batch_size, threads=threads, picture=heatmap)
        except (SlideError, EncoderError, HeadError) as error:
            result = Failure(str(path), error)
            failures.append(result)
            _write_csv(
                out / FAILURES_FILE, [["path", "error", "message"], *(list(f.as_json().values()) for f in failures)]
            )
        else:
            result.write(folder / "prediction.json")
            if heatmap and result.attention is not None:
                _draw(result, folder)
            rows.append(_row(result, folder.name))
            _write_csv(out / ANSWERS_FILE, rows)
        if on_result:
            on_result(result)
    return failures


def folder_names(slides: Sequence[str | Path]) -> list[str]:
    """Return a folder name for each slide: its file's, numbered from the second of that name on (case ignored)."""
    names: list[str] = []
    taken: set[str] = set()
    for path in slides:
        stem = Path(path).stem
        name, number = stem, 2
        while name.casefold() in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def _draw(answer: Prediction, folder: Path) -> None:
    # matplotlib is imported when there is something to draw: a call with --no-heatmap starts without it.
    from lrmil.evaluation.plots import save_figure
    from lrmil.inference.heatmap import attention_figure, draw_attention
    from lrmil.inference.images import save_image

    save_image(folder / "attention.png", draw_attention(answer))
    save_figure(folder / "attention_figure.png", attention_figure(answer))


def _answer_columns(manifest: BundleManifest) -> list[str]:
    readout = manifest.readout
    if readout is None:
        return ["predicted", *(f"p_{name}" for name in manifest.classes)]
    if readout.meaning == "regression":
        return ["value"]
    return ["risk", "risk_group", *(f"survival_{time:g}" for time in readout.times)]


def _answer(answer: Prediction) -> list[str]:
    if answer.value is None:
        return [answer.predicted, *(f"{p:.6f}" for p in answer.probabilities.values())]
    if not answer.is_risk:
        return [f"{answer.value:.8g}"]
    curve = answer.survival or {}
    return [f"{answer.value:.8g}", answer.risk_group or "", *(f"{p:.6f}" for p in curve.values())]


def _row(answer: Prediction, folder: str) -> list[str]:
    counts = [str(answer.num_regions), str(answer.unreadable), f"{answer.seconds.total:.3f}"]
    return [answer.slide, *_answer(answer), *counts, folder, answer.path]


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())
