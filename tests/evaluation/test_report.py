from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lrmil.errors import ConfigError
from lrmil.evaluation import Cost, Interval, Predictions, TextTable, result_row, results_frame, text_table
from lrmil.evaluation.plots import TrainingCurve, to_image, training_curves
from lrmil.evaluation.report import Failure, KeyNumber, Picture, ReportData, SlideTime, render_report, write_report
from lrmil.evaluation.summary import headline, standard_limits

Simulate = Callable[..., Predictions]
EVIL = "<script>alert('x')</script> & \"q\" http://example.org/a.png"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class _Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def results(simulate: Simulate) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    spec = [
        ("HR teacher", "Full HR", 2.0, Cost(500, 5.0)),
        ("LR without distillation", "LR only", 0.5, Cost(31.25, 0.4)),
        ("LRMIL", "Ours", 1.8, Cost(31.25, 0.4)),
    ]
    rows = [
        result_row(
            simulate(rng, 60, separation=s), dataset="d", task="t", method=m, group=g, seed=0, cost=c, resamples=100
        )
        for m, g, s, c in spec
    ]
    return results_frame(rows)


@pytest.fixture(scope="module")
def data(results: pd.DataFrame) -> ReportData:
    picture = to_image(training_curves([TrainingCurve("fold 0", (1.0, 0.5))]), dpi=40)
    return ReportData(
        title=f"Title {EVIL}",
        headline=f"Line one {EVIL}\nLine two",
        results=text_table(results),
        limits=(f"Limit {EVIL}",),
        created="today",
        command=f"lrmil demo {EVIL}",
        key_numbers=(KeyNumber("91 %", f"AUC {EVIL}", EVIL),),
        more_tables=(TextTable.of(f"More {EVIL}", [EVIL, "n"], [[EVIL, "1.5 ± 0.5 [1, 2]"]]),),
        heatmaps=(Picture(picture, f"slide {EVIL}", EVIL, wide=True),),
        heatmap_note=EVIL,
        curves=(Picture(to_image(training_curves([TrainingCurve("a", (1.0,))]), "jpeg", dpi=40), "Curve"),),
        times=(
            SlideTime(f"HR {EVIL}", (("tissue", 0.5), (f"reading {EVIL}", 1.5)), 500),
            SlideTime("LRMIL", (("tissue", 0.5),), 31.25),
        ),
        time_note=EVIL,
        cohort=(("Slides", f"60 {EVIL}"),),
        splits=TextTable.of("Folds", ["Fold", "Test"], [[0, 12]]),
        leakage_proof=f"fold 0: nobody twice {EVIL}",
        settings=f"lr_mpp: 2.0 # {EVIL}",
        seeds=(0, 1, 2),
        software=(("torch", f"2.9 {EVIL}"),),
        failures=(Failure(f"broken.svs {EVIL}", "tile", EVIL),),
    )


def test_every_text_is_escaped_and_shown(data: ReportData) -> None:
    page = _Page(render_report(data))
    assert "script" not in {tag for tag, _ in page.tags}
    shown = " ".join(page.text)
    for text in (
        *("Title", "Line two", "Limit", "91 %", "AUC", "More", "slide", "lrmil demo", "reading", "60", "Folds"),
        *(
            "nobody twice",
            "lr_mpp: 2.0",
            "0, 1, 2",
            "2.9",
            "broken.svs",
            "1 could not be used",
            "LR without distillation",
        ),
    ):
        assert text in shown, text
    assert shown.count("<script>alert('x')</script>") >= 15


def test_nothing_is_loaded_from_elsewhere(data: ReportData) -> None:
    source = render_report(data)
    page = _Page(source)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes)
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/")
        if "href" in attributes:
            assert attributes["href"].startswith("#")
    style = re.search(r"<style>(.*?)</style>", source, re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    policy = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    without_texts = render_report(replace(data, **_plain(data)))
    assert "http" not in re.sub(r'http-equiv|src="data:[^"]+"', "", without_texts)


def _plain(data: ReportData) -> dict[str, object]:
    """Every text that carries the address, without it."""
    return {
        "title": "t",
        "headline": "h",
        "limits": ("l",),
        "command": "c",
        "key_numbers": (),
        "more_tables": (),
        "heatmaps": tuple(replace(p, title="s", caption="") for p in data.heatmaps),
        "heatmap_note": "",
        "times": (),
        "time_note": "",
        "cohort": (),
        "leakage_proof": "",
        "settings": "",
        "software": (),
        "failures": (),
    }


def test_links_lead_to_sections_and_pictures_have_a_description(data: ReportData) -> None:
    page = _Page(render_report(data))
    targets = {a["id"] for _, a in page.tags if "id" in a}
    links = [a["href"][1:] for t, a in page.tags if t == "a"]
    assert links == ["results", "heatmaps", "curves", "time", "cohort", "failures", "limits", "settings"]
    assert set(links) <= targets
    pictures = [a for t, a in page.tags if t == "img"]
    assert [a["src"].split(";")[0] for a in pictures] == ["data:image/png", "data:image/jpeg"]
    assert all(a["alt"] for a in pictures)


def test_bars_are_in_proportion_to_seconds(data: ReportData) -> None:
    page = _Page(render_report(data))
    widths = [float(a["style"][6:-1]) for t, a in page.tags if t == "span" and a.get("style", "").startswith("width:")]
    assert widths == pytest.approx([25, 75, 25])


def test_best_and_own_lines_are_marked(data: ReportData) -> None:
    source = render_report(data)
    assert '<tr class="ours"><th scope="row">LRMIL</th>' in source
    assert source.count('<td class="best">') == 2
    assert '<span class="spread"> ± ' in source


def test_empty_sections_are_left_out_but_failures_and_limits_are_not(results: pd.DataFrame) -> None:
    page = _Page(
        render_report(
            ReportData("T", "H", text_table(results), standard_limits(patients=5, folds=2, seeds=1, simulated=True))
        )
    )
    assert [a["href"] for t, a in page.tags if t == "a"] == ["#results", "#failures", "#limits"]
    assert "None." in page.text


def test_pictures_must_be_pictures(data: ReportData) -> None:
    with pytest.raises(ConfigError, match="neither PNG nor JPEG"):
        render_report(replace(data, curves=(Picture(b"<svg>", "x"),)))


def test_report_is_written_whole(data: ReportData, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", data)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_report(data)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def _interval(value: float, low: float, high: float) -> Interval:
    return Interval(value, low, high, 0.95, 1000, 60)


def test_headline_states_numbers_gain_and_pace(results: pd.DataFrame) -> None:
    values = results.set_index("method")["auc"]
    text = headline(results, gain=_interval(0.2, 0.1, 0.3), gap=_interval(-0.02, -0.05, 0.01))
    first, second, third = text.splitlines()
    assert first.startswith(f"LRMIL reaches AUC {100 * values['LRMIL']:.1f} % (95 % interval ")
    assert f"HR teacher {100 * values['HR teacher']:.1f} %" in first
    assert (
        "20.0 points better than LR without distillation (95 % interval of the difference +10.0 to +30.0 points)"
        in second
    )
    assert "not distinguishable from HR teacher" in second
    assert "12.5 times faster" in third
    assert "31.2 patches instead of 500" in third


def test_headline_does_not_hide_a_loss(results: pd.DataFrame) -> None:
    text = headline(results, gain=_interval(-0.1, -0.2, -0.05))
    assert "10.0 points worse than LR without distillation" in text
    slower = results.copy()
    slower.loc[slower["method"] == "LRMIL", "seconds_per_slide"] = 10.0
    assert "2.00 times slower" in headline(slower)
    slower.loc[slower["method"] == "LRMIL", "auc"] = float("nan")
    assert "has no AUC" in headline(slower)


def test_limits_speak_of_simulation_size_and_failures() -> None:
    small = " ".join(standard_limits(patients=20, folds=5, seeds=3, simulated=True, failed=2))
    assert "simulated" in small
    assert "20 patients" in small
    assert "2 slides failed" in small
    large = " ".join(standard_limits(patients=1000, folds=5, seeds=1, simulated=False))
    assert "simulated" not in large
    assert "cannot be told from chance" not in large
