"""A study from nothing to an answer, by verbs alone: simulate, init, run, the stages, predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from lrmil.pipeline.cohort import settings_cohort
from lrmil.pipeline.config import load_config, parse_config
from lrmil.pipeline.demo import CONFIG
from lrmil.pipeline.folder import RunFolder
from lrmil.pipeline.run import Outcome


def test_simulate_writes_a_cohort(study: Any) -> None:
    assert study.simulated.code == 0
    assert study.simulated.out == f"wrote {study.cohort}\n"
    table = pd.read_csv(study.cohort)
    assert len(table) == 9
    assert table["patient_id"].nunique() == 8
    said = json.loads((study.cohort.parent / "simulated.json").read_text())["settings"]
    assert (said["seed"], said["nuclei"]["shapes"], said["slide_px"]) == (3, 8, 512)
    assert said["sites"] == 2, "what --set leaves alone is that of --size"


def test_simulate_again_makes_nothing_again(call: Any, study: Any) -> None:
    slides = {path: path.stat().st_mtime_ns for path in (study.cohort.parent / "slides").iterdir()}
    said = json.loads((study.cohort.parent / "simulated.json").read_text())["settings"]
    overrides = [word for name, value in said.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    assert call("simulate", study.cohort.parent, "--processes", 1, *overrides).code == 0
    assert {path: path.stat().st_mtime_ns for path in slides} == slides


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "huge"], "no simulated cohort of size 'huge'. Choose one of test, demo, study."),
        (["--set", "slide=3"], "slide is no setting (did you mean slides?)"),
        (["--set", "nuclei.visibilty=0"], "did you mean nuclei.visibility?"),
        (["--set", "visibility=0"], "there is nuclei.visibility"),
        (["--set", "slides=0"], "slides: Input should be greater than or equal to 1 (got 0)"),
        (["--set", "slides"], "is not of the form section.field=value"),
        (["--size", "test", "--set", "patients=70"], "patients=70 is more than slides=6"),
    ],
)
def test_simulate_refuses_what_it_does_not_know(call: Any, tmp_path: Path, words: list[str], message: str) -> None:
    assert message in call("simulate", tmp_path / "c", *words).refused()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("kind", ["regression", "survival"])
def test_init_writes_a_config_for_a_number_and_for_survival(call: Any, study: Any, tmp_path: Path, kind: str) -> None:
    rows = pd.read_csv(study.cohort).drop(columns="label")
    rows["path"] = [str((study.cohort.parent / path).resolve()) for path in rows["path"]]
    patient = rows["patient_id"].astype("category").cat.codes
    rows["ki67"], rows["months"], rows["dead: seen"] = 0.1 * patient, 3.0 + patient, np.ones(len(rows), int)
    rows.to_csv(tmp_path / "cohort.csv", index=False)
    asked = {"regression": ("--task", "ki67"), "survival": ("--time", "months", "--event", "dead: seen")}[kind]
    config = tmp_path / "config.yaml"
    made = ("init", tmp_path / "cohort.csv", "--config", config, "--encoder", "lrmil-small", "--kind", kind, *asked)
    assert call(*made).code == 0
    settings = load_config(config)
    assert (settings.cohort.kind, settings.cohort.classes) == (kind, None)
    cohort = settings_cohort(settings)
    target = cohort.target_of(str(rows["slide_id"][0]))
    if kind == "regression":
        assert settings.cohort.task == "ki67"
        assert target == pytest.approx(0.1 * patient[0])
    else:
        assert settings.cohort.task == "survival"
        assert list(np.asarray(target)) == [3.0 + patient[0], 1.0]
    # The table has no labels, and says so before anything is written.
    wrong = call("init", tmp_path / "cohort.csv", "--config", tmp_path / "other.yaml", "--encoder", "lrmil-small")
    assert "label" in wrong.refused()
    assert not (tmp_path / "other.yaml").exists()


def test_init_writes_a_config_that_loads(study: Any) -> None:
    assert study.initiated.code == 0
    assert "9 slides of 8 patients" in study.initiated.out
    assert "encoder lrmil-small: licence Apache-2.0" in study.initiated.out
    assert f"next: lrmil run {study.config}" in study.initiated.out
    settings = load_config(study.config)
    assert settings.cohort.table == str(study.cohort)
    assert settings.out == str(study.out)
    assert settings.cohort.classes == ["negative", "positive"]
    assert settings.grid.patch_px == 64, "what the shipped encoder was trained on"


def test_init_refuses(call: Any, study: Any, tmp_path: Path) -> None:
    assert "exists" in call("init", study.cohort, "--config", study.config).refused()
    new = tmp_path / "new.yaml"
    wrong = call("init", study.cohort, "--config", new, "--encoder", "lrmil-smal").refused()
    assert "lrmil-small" in wrong
    assert "no label column 'grade'" in call("init", study.cohort, "--config", new, "--task", "grade").refused()
    assert call("init", tmp_path / "none.csv", "--config", new).refused()
    assert not new.exists()


def test_run_ends_with_a_table_a_report_and_a_model(study: Any) -> None:
    assert study.ran.code == 0, study.ran.err
    for method in ("LRMIL", "HR teacher", "LR without distillation", "Majority class"):
        assert method in study.ran.out
    assert f"report: {study.out / 'report.html'}" in study.ran.out
    assert f"lrmil predict SLIDE --model {study.out / 'model'}" in study.ran.out
    assert "No patient and no slide is in two parts of a fold." in study.ran.err
    assert "Tiling 9 slides" in study.ran.err
    assert "Traceback" not in study.ran.err
    assert (study.out / "report.html").is_file()
    assert not (study.out / "failures.csv").exists()


def test_the_config_that_was_written_repeats_the_run(call: Any, study: Any) -> None:
    """Stage by stage, from out/config.yaml alone: nothing is left to do."""
    log = (study.out / "log.jsonl").read_text().splitlines()
    for stage in ("tile", "encode", "distill", "teacher", "student"):
        answer = call(stage, study.out / "config.yaml", "--quiet")
        assert answer.code == 0, answer.err
        assert answer.out == f"{stage}: done, in {study.out}\n"
        assert answer.err == ""
    new = [json.loads(line)["event"] for line in (study.out / "log.jsonl").read_text().splitlines()[len(log) :]]
    assert set(new) == {"run started", "stage started", "stage finished"}, "no head and no encoder was trained"


def test_predict_answers_from_the_model(call: Any, study: Any, tmp_path: Path) -> None:
    slides = sorted((study.cohort.parent / "slides").glob("*.tif"))[:2]
    answer = call("predict", *slides, "--model", study.out / "model", "--out", tmp_path / "answers", "--json")
    assert answer.code == 0, answer.err
    lines = [json.loads(line) for line in answer.out.splitlines()]
    assert [line["slide"] for line in lines] == [slide.stem for slide in slides]
    for slide, line in zip(slides, lines, strict=True):
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        written = json.loads((tmp_path / "answers" / slide.stem / "prediction.json").read_text())
        assert written["probabilities"] == line["probabilities"]
    assert "no bundle.json" in call("predict", slides[0], "--model", tmp_path).refused()


def test_a_bad_slide_is_told_and_exit_code_1(call: Any, study: Any, tiny: Any, tmp_path: Path) -> None:
    table = pd.read_csv(study.cohort)
    table["path"] = [str(study.cohort.parent / path) for path in table["path"]]
    (tmp_path / "noise.svs").write_bytes(b"noise" * 100)
    extra = {"slide_id": "noise", "patient_id": "X", "label": "negative", "path": str(tmp_path / "noise.svs")}
    pd.concat([table, pd.DataFrame([extra])]).to_csv(tmp_path / "cohort.csv", index=False)
    words = ("--set", f"cohort.table={tmp_path / 'cohort.csv'}", "--set", f"out={tmp_path / 'run'}")
    answer = call("tile", study.config, *tiny, *words, "--quiet")
    assert answer.code == 1
    assert f"1 slides failed, see {tmp_path / 'run' / 'failures.csv'}" in answer.err
    assert "  noise (tile): noise.svs: " in answer.err
    assert answer.out.startswith("tile: done")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("studnt.epochs=3", "studnt is no setting (did you mean student?)"),
        ("stage1.epochs=0", "stage1.epochs: Input should be greater than or equal to 1 (got 0)"),
        ("grid.patch_px=40", "cannot be cut into 4 x 4 equal blocks"),
        ("encoder.weights=/none/w.safetensors", "/none/w.safetensors"),
        ("encoder.name=lrmil-smal", "lrmil-small"),
        ("cohort.table=/none/cohort.csv", "/none/cohort.csv"),
        ("cohort.task=grade", "no label column 'grade'"),
        ("folds.num_folds=8", "fewer patients than the 8 folds"),
        ("nonsense", "is not of the form section.field=value"),
    ],
)
def test_run_refuses_in_one_line_and_leaves_nothing(
    call: Any, study: Any, tiny: Any, tmp_path: Path, override: str, message: str
) -> None:
    answer = call("run", study.config, *tiny, "--set", f"out={tmp_path / 'run'}", "--set", override, "--quiet")
    assert message in answer.refused()
    assert not (tmp_path / "run").exists()


def test_a_missing_config_is_refused(call: Any, tmp_path: Path) -> None:
    assert "lrmil init" in call("run", tmp_path / "none.yaml").refused()


def test_ctrl_c_says_that_the_run_resumes(
    call: Any, study: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lrmil.pipeline.study.tile_cohort", interrupt)
    answer = call("run", study.config, *tiny, "--set", f"out={tmp_path / 'run'}", "--quiet")
    assert answer.code == 130
    assert "lrmil: stopped; the same command resumes where it was." in answer.err


def test_demo_runs_what_it_says_into_its_folder(call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fake(out: Path, reporter: Any) -> Outcome:
        asked.append((out, reporter.quiet))
        return Outcome(RunFolder(out), [], ["a table", "report: here"])

    monkeypatch.setattr("lrmil.pipeline.demo.run_demo", fake)
    answer = call("demo", "--out", tmp_path / "d", "--quiet")
    assert answer.code == 0
    assert answer.out == "a table\nreport: here\n"
    assert asked == [(tmp_path / "d", True)]


def test_the_demos_settings_are_settings() -> None:
    config = {**CONFIG, "cohort": {**CONFIG["cohort"], "table": "c.csv"}, "out": "demo"}
    settings = parse_config(yaml.safe_load(yaml.safe_dump(config)))
    assert settings.encoder.name == "lrmil-small"
    assert {"majority", "colour_histogram", "random_encoder", "lr_only"} == set(settings.evaluation.baselines)
