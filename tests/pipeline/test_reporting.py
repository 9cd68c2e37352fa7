"""What a run tells on the terminal and in its log."""

from __future__ import annotations

import json
import warnings
from io import StringIO
from pathlib import Path

import pytest

from lrmil.pipeline import reporting
from lrmil.pipeline.reporting import Reporter, without_python_warnings


def lines(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_nothing_is_written_before_something_happens(tmp_path: Path) -> None:
    log = tmp_path / "run" / "log.jsonl"
    reporter = Reporter(log, stream=StringIO())
    reporter.line("hello")
    assert not log.parent.exists()
    reporter.event("run started", out=tmp_path)
    assert lines(log)[0]["event"] == "run started"
    assert lines(log)[0]["out"] == str(tmp_path)


def test_quiet_keeps_warnings(tmp_path: Path) -> None:
    shown = StringIO()
    reporter = Reporter(tmp_path / "log.jsonl", quiet=True, stream=shown)
    reporter.line("nobody reads this")
    reporter.warn("[S001] is torn")
    assert shown.getvalue() == "warning: [S001] is torn\n"
    assert lines(tmp_path / "log.jsonl")[0]["text"] == "[S001] is torn"


def test_a_stage_says_how_long_it_took_and_an_unfinished_one_does_not(tmp_path: Path) -> None:
    shown = StringIO()
    reporter = Reporter(tmp_path / "log.jsonl", stream=shown)
    with reporter.stage("tile", "Tiling 3 slides"):
        pass
    with pytest.raises(RuntimeError), reporter.stage("encode", "Encoding"):
        raise RuntimeError
    assert [(e["event"], e["stage"]) for e in lines(tmp_path / "log.jsonl")] == [
        ("stage started", "tile"),
        ("stage finished", "tile"),
        ("stage started", "encode"),
    ]
    assert "Tiling 3 slides\n  done in 0.0 s\n" in shown.getvalue()


def test_without_a_terminal_progress_is_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: clock[0])
    shown = StringIO()
    with Reporter(stream=shown).task("encode", 10) as task:
        for done in range(1, 11):
            clock[0] += 4
            task.advance(note=f"S{done}")
    assert shown.getvalue() == "  encode: 4/10 S4\n  encode: 8/10 S8\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3725, "62 min 05 s")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert reporting._duration(seconds) == text


def test_only_our_own_python_warnings_are_silenced() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with without_python_warnings():
            warnings.warn_explicit("ours", UserWarning, "stage2.py", 1, module="lrmil.training.stage2")
            warnings.warn_explicit("torch's", UserWarning, "x.py", 1, module="torch.nn")
    assert [str(w.message) for w in seen] == ["torch's"]
