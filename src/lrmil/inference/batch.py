"""Answer many slides with one bundle; a slide that fails does not stop the others."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from lrmil.errors import SlideError
from lrmil.files import write_text
from lrmil.inference.heatmap import draw_attention
from lrmil.inference.images import save_image
from lrmil.inference.predict import Prediction, load_bundle


def predict_many(
    slides: Sequence[str | Path],
    model: str | Path,
    out: str | Path,
    *,
    mpp: float | None = None,
    device: str = "auto",
    batch_size: int = 64,
    threads: int = 2,
    heatmap: bool = True,
    on_result: Callable[[Prediction | SlideError], None] | None = None,
) -> list[SlideError]:
    """Answer `slides` and write `out`/<slide>/prediction.json, attention.png, and predictions.csv; return the failures.

    Slides of the same file name get numbered folders, so that no answer overwrites another. `on_result` is called after
    each slide.
    """
    bundle = load_bundle(model, device=device)
    out = Path(out)
    answers: list[Prediction] = []
    failures: list[tuple[str, SlideError]] = []
    taken: set[str] = set()
    for path in slides:
        try:
            answer = bundle.predict(path, mpp=mpp, batch_size=batch_size, threads=threads)
        except SlideError as error:
            failures.append((str(path), error))
            _write_failures(out, failures)
            if on_result:
                on_result(error)
            continue
        name, number = answer.slide, 2
        while name in taken:
            name, number = f"{answer.slide}-{number}", number + 1
        taken.add(name)
        answer.write(out / name / "prediction.json")
        if heatmap and answer.attention is not None:
            save_image(out / name / "attention.png", draw_attention(answer))
        answers.append(answer)
        _write_answers(out, answers)
        if on_result:
            on_result(answer)
    if not failures:
        (out / "failures.csv").unlink(missing_ok=True)
    return [error for _, error in failures]


def _write_answers(out: Path, answers: Sequence[Prediction]) -> None:
    classes = list(answers[0].probabilities)
    rows = [["slide", "predicted", *(f"p_{c}" for c in classes), "regions", "unreadable", "seconds", "path"]]
    rows += [
        [
            a.slide,
            a.predicted,
            *(f"{p:.6f}" for p in a.probabilities.values()),
            str(a.patches_encoded),
            str(a.unreadable),
            f"{a.seconds.total:.3f}",
            a.path,
        ]
        for a in answers
    ]
    _write_csv(out / "predictions.csv", rows)


def _write_failures(out: Path, failures: Sequence[tuple[str, SlideError]]) -> None:
    rows = [["path", "error", "message"]]
    _write_csv(out / "failures.csv", rows + [[path, type(error).__name__, str(error)] for path, error in failures])


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())
