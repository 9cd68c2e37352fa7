"""The whole command on little: every part measures, reports and draws."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lrmil.benchmarks.settings import PARTS
from lrmil.cli import main
from lrmil.slides import write_pyramid


def call(*words: Any) -> tuple[int, str, str]:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(["bench", *map(str, words)])
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)
    coarse = (rng.random((96, 96, 1)) * np.array([60, 90, 60]) + np.array([150, 60, 110])).astype(np.uint8)
    image = np.asarray(cv2.resize(coarse, (1536, 1536)), np.uint8)
    return write_pyramid(tmp_path_factory.mktemp("slide") / "own.svs", image, 0.5, (1,), vendor="aperio")


@pytest.fixture(scope="module")
def bench(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    out = tmp_path_factory.mktemp("bench")
    words = ["--quick", "--threads", 1, "--patch-px", 32, "--heads", "max_pool", "--sizes", 8, "--slides", slide]
    code, printed, told = call(*PARTS, *words, "--out", out)
    assert code == 0, told
    return out, printed, told


def test_every_part_fills_its_tables(bench: tuple[Path, str, str]) -> None:
    facts = json.loads((bench[0] / "results.json").read_text())
    assert [part["name"] for part in facts["parts"]] == list(PARTS)
    tables = {table["name"]: table["rows"] for part in facts["parts"] for table in part["tables"]}
    assert all(tables.values()), {name: len(rows) for name, rows in tables.items()}
    assert facts["machine"]["processor"]
    assert facts["machine"]["versions"]["openslide"]
    assert facts["settings"]["seed"] == 0

    reading = tables["reading"]
    assert {row["slide"] for row in reading} > {"own"}
    assert {row["codec"] for row in reading} == {"JPEG 4:4:4", "JPEG 4:2:0", "JPEG 2000"}
    for row in reading:
        assert row["ratio"] > 0
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["reader"] == "tiff"
        assert row["within_bounds"] is True, row
        assert row["met"] is (row["ratio"] >= row["target"])

    for row in tables["answer"]:
        assert row["quotient"] == pytest.approx(row["ratio"] / row["patch_ratio"])
        for path in ("lr", "hr"):
            parts = [row[f"{path}_{part}"] for part in ("tissue_s", "reading_s", "encoding_s", "mil_s")]
            assert sum(parts) == pytest.approx(row[f"{path}_total_s"], rel=0.05)
    every = next(row for row in tables["answer"] if row["children"] == "all")
    assert every["n_hr"] == 16 * every["n_lr"]
    kept = next(row for row in tables["answer"] if row["children"] == "with tissue")
    assert kept["n_hr"] < every["n_hr"]

    assert {"lrmil", "OpenSlide"} <= {row["tool"] for row in tables["tools"]}
    assert tables["size"][0]["regions"] > 0
    assert tables["size"][0]["peak_mb"] > 0
    assert tables["threads"][0]["efficiency"] > 0
    assert {case["work"] for row in tables["heads"] for case in row["cases"]} == {"train", "predict"}
    assert not any("failed" in case for row in tables["heads"] for case in row["cases"])


def test_what_is_missing_is_said(bench: tuple[Path, str, str]) -> None:
    facts = json.loads((bench[0] / "results.json").read_text())
    skipped = " ".join(what for part in facts["parts"] for what in part["skipped"])
    try:
        import tiffslide  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        assert "tiffslide is not installed" in skipped
    import torch

    if not torch.cuda.is_available():
        assert "No GPU here" in skipped
        assert "An estimate, not a measurement" in skipped


def test_the_report_has_tables_figures_and_the_machine(bench: tuple[Path, str, str]) -> None:
    out, printed, _ = bench
    text = (out / "results.md").read_text()
    assert "numbers mean nothing" in text
    for name in PARTS:
        picture = cv2.imread(str(out / f"{name}.png"))
        assert picture is not None, name
        assert picture.std() > 5
        assert f"({name}.png)" in text
    assert "targets met" in text
    assert "targets met" in printed
    assert "OpenSlide" in printed
    assert not list(out.glob("*.svs"))


def test_json_is_all_that_is_printed(tmp_path: Path, slide: Path) -> None:
    words = ["--quick", "--json", "--threads", 1, "--slides", slide, "--out", tmp_path / "out"]
    code, printed, _ = call("threads", *words)
    assert code == 0
    assert [part["name"] for part in json.loads(printed)["parts"]] == ["threads"]


def test_wrong_calls_are_refused_before_anything_is_measured(tmp_path: Path, slide: Path) -> None:
    out = tmp_path / "out"
    for words, word in (
        (["readings"], "reading"),
        (["reading", "--slides", tmp_path / "none.svs"], "none.svs"),
        (["reading", "--slides", f"{slide}=abc"], "PATH=MPP"),
        (["reading", "--encoder", "nothing-like-it"], "nothing-like-it"),
        (["heads", "--heads", "abmill"], "abmil"),
        (["heads", "--sizes", "a,b"], "sizes"),
        (["answer", "--device", "cuda:99"], "cuda:99"),
    ):
        code, _, told = call(*words, "--out", out)
        assert code == 2, words
        assert word in told.splitlines()[-1], (words, told)
        assert "Traceback" not in told
    assert not out.exists()
