"""Every verb explains itself, and the command line starts quickly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from lrmil import __version__
from lrmil.cli.app import app

# What `--help` of a verb must teach: its main argument, its main option, what it leaves behind.
TAUGHT = {
    "demo": ("simulated cohort", "report.html", "--out"),
    "init": ("COHORT", "slide_id", "--encoder", "--task"),
    "run": ("CONFIG", "--set", "Resumes", "failures.csv", "model/"),
    "tile": ("CONFIG", "tissue", "--set"),
    "encode": ("CONFIG", "20x", "frozen encoder"),
    "distill": ("CONFIG", "Stage 1"),
    "teacher": ("CONFIG", "Stage 2.1", "labels"),
    "student": ("CONFIG", "Stage 2.2", "attention"),
    "compare": ("CONFIG", "--methods", "paper", "Resumes", "tables"),
    "ablate": ("CONFIG", "Table 3", "L_patch", "Resumes", "ablation/"),
    "sensitivity": ("CONFIG", "--of", "--values", "temperature", "magnification", "Resumes", "sensitivity/"),
    "heatmaps": ("CONFIG", "SLIDE_ID", "--methods", "teacher", "never", "heatmaps/"),
    "predict": ("SLIDES", "--model", "--mpp", "--out", "prediction.json", "failures.csv"),
    "simulate": ("OUT", "--size", "--set", "--seed", "test", "demo", "study"),
    "assemble": ("SOURCE", "--task", "--groups", "inflammatory", "--set"),
    "info": ("SLIDE", "--mpp", "--json", "patches"),
    "encoders": ("--json", "licence"),
    "doctor": ("bug report",),
    "bench": ("PARTS", "--slides", "--quick", "--json", "OpenSlide", "reading", "heads", "results.md"),
    "import": ("SOURCE", "TRIDENT", "--patches", "--mpp", "--coords-unit"),
    "export": ("SOURCE", "TRIDENT"),
}


def plain(text: str) -> str:
    """Help without the frames and line breaks of the terminal."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def test_no_verb_is_without_a_test_of_its_help() -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert verbs == set(TAUGHT)


@pytest.mark.parametrize("verb", TAUGHT)
def test_help_teaches(call: Any, verb: str) -> None:
    answer = call(verb, "--help")
    assert answer.code == 0
    assert not answer.err
    shown = plain(answer.out).lower()
    for word in TAUGHT[verb]:
        assert word.lower() in shown, word
    assert call(verb, "-h").out == answer.out


def test_the_first_page_says_where_to_start(call: Any) -> None:
    shown = plain(call("--help").out)
    assert "lrmil demo" in shown
    assert "lrmil run config.yaml" in shown
    assert all(verb in shown for verb in TAUGHT)
    assert "20x" in shown


def test_a_wrong_verb_option_or_value_is_refused(call: Any) -> None:
    for words in (["runn"], ["run"], ["run", "x", "--sett", "a=1"], ["assemble", "a", "b", "--task", "x"]):
        answer = call(*words)
        assert answer.code == 2, words
        assert answer.err
        assert "Traceback" not in answer.err


def test_underscores_do_for_hyphens(call: Any, study: Any) -> None:
    slide = next((study.cohort.parent / "slides").glob("*.tif"))
    found = []
    for words in (("--patch-px", 32, "--lr-mpp", 4.0), ("--patch_px", 32, "--lr_mpp", 4.0)):
        facts = json.loads(call("info", slide, *words, "--json").out)
        found.append((facts["low_resolution"], facts["high_resolution"]))
    assert found[0] == found[1]
    assert found[0][0]["patch_px"] == 32
    assert found[0][0]["mpp"] == 4.0


def test_the_version_is_printed_by_the_module_too() -> None:
    call = [sys.executable, "-m", "lrmil", "--version"]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout == f"lrmil {__version__}\n"


def test_starting_imports_nothing_heavy() -> None:
    """`lrmil --help` must answer at once; so must `import lrmil` in somebody's script."""
    heavy = ["torch", "timm", "pandas", "matplotlib", "openslide", "cv2", "sklearn", "scipy", "h5py"]
    code = f"import sys, lrmil, lrmil.cli; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
