"""Answer many slides with one bundle; a slide that fails does not stop the others."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmil.errors import ConfigError, LrmilError, OutputError
from lrmil.files import write_text
from lrmil.inference.bundle import BundleManifest
from lrmil.inference.predict import Prediction, load_bundle

ANSWERS_FILE, FAILURES_FILE = "predictions.csv", "failures.csv"
_PER_SLIDE = ("prediction.json", "attention.png", "attention_figure.png")


@dataclass(frozen=True)
class Failure:
    """A slide that could not be answered, and why."""

    path: str
    error: Exception

    @property
    def message(self) -> str:
        """What went wrong, in words that name the slide."""
        if isinstance(self.error, LrmilError):
            return str(self.error)
        said = str(self.error)
        return f"{Path(self.path).name}: {type(self.error).__name__}{f': {said}' if said else ''}"

    def as_json(self) -> dict[str, Any]:
        """Return what `lrmil predict --json` prints for it."""
        return {"path": self.path, "error": type(self.error).__name__, "message": self.message}


class _Table:
    """A CSV file that grows row by row: every row is on the disk before the next slide begins."""

    def __init__(self, path: Path, header: Sequence[str]) -> None:
        self._path, self._header, self._begun = path, header, False

    def add(self, row: Sequence[str]) -> None:
        """Append a row; the first comes with the header, in a file that appears with both."""
        if not self._begun:
            write_text(self._path, _as_csv([self._header, row]))
            self._begun = True
            return
        try:
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(_as_csv([row]))
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise OutputError(
                f"{self._path}: cannot be written ({error.strerror or error}).", fix="Look whether the disk is full."
            ) from error


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

    Whatever goes wrong with one slide (the machine's memory, say) is its failure, and the next one's turn comes.
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
        ConfigError: a setting is wrong, for every slide.
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

    columns = ["slide", *_answer_columns(bundle.manifest), "regions", "unreadable", "seconds", "folder", "path"]
    answers, failed = _Table(out / ANSWERS_FILE, columns), _Table(out / FAILURES_FILE, ["path", "error", "message"])
    failures: list[Failure] = []
    # Closed whatever happens: an error that is kept, with its traceback, would keep threads and slides, too.
    answering = bundle.predict_slides(slides, mpp=mpp, batch_size=batch_size, threads=threads, picture=heatmap)
    with closing(answering) as predictions:
        for path, folder, prediction in zip(slides, folders, predictions, strict=True):
            result: Prediction | Failure
            try:
                if not isinstance(prediction, Prediction):
                    raise prediction
                result = prediction
                result.write(folder / "prediction.json")
                if heatmap and result.attention is not None:
                    _draw(result, folder)
                answers.add(_row(result, folder.name))
            except (ConfigError, OutputError):
                raise  # it would be the same for every slide
            except Exception as error:
                for name in _PER_SLIDE:
                    (folder / name).unlink(missing_ok=True)
                result = Failure(str(path), error)
                failures.append(result)
                failed.add(list(result.as_json().values()))
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


def _as_csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
