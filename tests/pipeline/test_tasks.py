"""Numbers and survival through the whole of a run, a comparison and a deployed model."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lrmil.bags import Bag, write_bag
from lrmil.errors import ConfigError
from lrmil.evaluation.values import Values
from lrmil.inference import load_bundle
from lrmil.inference.batch import predict_many
from lrmil.inference.bundle import read_manifest
from lrmil.pipeline.cohort import settings_cohort
from lrmil.pipeline.compare import compare
from lrmil.pipeline.config import parse_config
from lrmil.pipeline.context import Run
from lrmil.pipeline.evaluate import median_of_patients
from lrmil.pipeline.folder import RunFolder
from lrmil.pipeline.heads import load_outputs, stored_readout
from lrmil.pipeline.keys import label_head_key
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.run import Outcome, run_all
from lrmil.pipeline.splits import make_splits

METHODS = ["majority", "mean_pool", "abmil", "zoommil", "lr_only", "lrmil"]
TASKS = ("regression", "hazards", "cox")
CONSTANT = {"regression": "Training mean", "hazards": "Constant risk", "cox": "Constant risk"}


def quiet() -> Reporter:
    return Reporter(quiet=True, stream=io.StringIO())


def config_of(task: str, table: Path) -> dict[str, Any]:
    if task == "regression":
        return {"cohort": {"table": str(table), "task": "share", "kind": "regression"}}
    objective = {"survival": task, "intervals": 2, "cox_bags": 4}
    return {"cohort": {"table": str(table), "task": "death", "kind": "survival"}, "objective": objective}


@pytest.fixture(scope="module")
def table(lab: Any, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's slides and folds with a number and survival; the finished run's features and stage 1 fit them."""
    rows = pd.read_csv(lab.table)
    rows["path"] = [str((lab.table.parent / p).resolve()) for p in rows["path"]]
    truths = [json.loads((lab.table.parent / "truth" / f"{s}.json").read_text()) for s in rows["slide_id"]]
    rows["share"] = [round(t["positive_share"] + 0.01 * i, 4) for i, t in enumerate(truths)]
    number = rows["patient_id"].astype("category").cat.codes
    rows["time"] = 40.0 - 3.1 * number
    rows["event"] = np.where(number % 4 == 3, "alive", "dead")
    fold_of = {s: int(f) for f, parts in finished.splits.items() for s in parts["test"]}
    rows["fold"] = rows["slide_id"].map(fold_of)
    path = tmp_path_factory.mktemp("tasks") / "cohort.csv"
    rows.drop(columns="label").to_csv(path, index=False)
    return path


@dataclass(frozen=True)
class Done:
    task: str
    out: Path
    changes: dict[str, Any]
    outcome: Outcome


@pytest.fixture(scope="module")
def done(lab: Any, finished: Any, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """Runs and compares each task once, on features and stage 1 of the finished run."""
    known: dict[str, Done] = {}

    def get(task: str) -> Done:
        if task not in known:
            out = finished.copy(tmp_path_factory.mktemp(task) / "run")
            baselines = ["majority", "lr_only", *(["colour_histogram"] if task == "regression" else [])]
            changes = config_of(task, table) | {
                "evaluation": {"baselines": baselines, "heatmap_slides": 1, "timed_slides": 1},
                "compare": {"methods": METHODS, "jobs": 1},
                "deploy": task != "cox",
            }
            settings = lab.settings(out, **changes)
            outcome = run_all(settings, quiet())
            compare(settings, quiet())
            known[task] = Done(task, out, changes, outcome)
        return known[task]

    return get


def times_of(out: Path) -> tuple[float, ...]:
    return stored_readout(out / "folds" / "0" / "student").times


@pytest.mark.parametrize("task", TASKS)
def test_a_run_ends_with_tables_of_its_task(task: str, done: Callable[[str], Done], table: Path) -> None:
    found = done(task)
    results = pd.read_csv(found.out / "tables" / "results.csv").set_index("method")
    assert {"HR teacher", "LRMIL", "LR without distillation", CONSTANT[task]} <= set(results.index)
    assert "auc" not in results
    shown = ["mae", "r2", "spearman"] if task == "regression" else ["c_index"]
    assert np.isfinite(results.loc["LRMIL", shown[0]])
    assert set(shown) <= set(results)
    assert ("uno_c" in results) == ("ibs" in results) == (task != "regression")
    if task != "regression":
        assert np.isfinite(results.loc["LRMIL", "uno_c"])
        # Only hazards give curves, and the answer for all gives neither.
        assert np.isfinite(results["ibs"]).any() == (task == "hazards" and len(times_of(found.out)) > 1)
        assert np.isnan(results.loc[CONSTANT[task], ["uno_c", "ibs"]]).all()
    truth = pd.read_csv(table).set_index("slide_id")
    values = Values.read_csv(found.out / "tables" / "predictions" / "lrmil.csv")
    assert sorted(values.slide_ids) == sorted(truth.index)
    wanted = truth.loc[list(values.slide_ids)]
    if task == "regression":
        assert np.allclose(values.targets, wanted["share"])
    else:
        assert np.allclose(values.time, wanted["time"])
        assert list(values.event) == [float(e == "dead") for e in wanted["event"]]
    assert len(np.unique(values.predicted)) > 3
    assert found.outcome.summary


@pytest.mark.parametrize("task", TASKS)
def test_heads_keep_how_they_are_read(task: str, done: Callable[[str], Done]) -> None:
    for step in ("teacher", "student", "lr_only"):
        folder = done(task).out / "folds" / "1" / step
        readout = stored_readout(folder)
        assert readout.meaning == task
        facts = json.loads((folder / "done.json").read_text())
        assert ("val_r2" if task == "regression" else "val_c_index") in facts
    if task == "hazards":
        assert len(readout.edges) == 1


@pytest.mark.parametrize("task", TASKS)
def test_the_report_shows_what_the_task_has(task: str, done: Callable[[str], Done]) -> None:
    names = {p.stem for p in (done(task).out / "figures").glob("*.png")}
    wanted = "predicted_against_true" if task == "regression" else "survival_of_risk_groups"
    assert {f"{wanted}_lrmil", f"{wanted}_hr_teacher"} <= names
    assert not any("roc" in name for name in names)
    report = (done(task).out / "report.html").read_text()
    assert ("mean absolute error" in report.lower() or "MAE" in report) if task == "regression" else "C-index" in report


@pytest.mark.parametrize("task", TASKS)
def test_a_comparison_ends_with_tables_of_its_task(task: str, done: Callable[[str], Done]) -> None:
    folder = done(task).out / "compare"
    results = pd.read_csv(folder / "results.csv").set_index("method")
    assert next(iter(results.index)) == CONSTANT[task]
    assert {"Mean-P", "ABMIL", "ZOOMMIL", "LR without distillation", "LRMIL"} <= set(results.index)
    assert (folder / "differences.md").is_file()
    teacher = Values.read_csv(done(task).out / "tables" / "predictions" / "hr_teacher.csv")
    abmil = Values.read_csv(folder / "predictions" / "abmil.csv")
    order = np.argsort(teacher.slide_ids), np.argsort(abmil.slide_ids)
    assert np.array_equal(teacher.predicted[order[0]], abmil.predicted[order[1]]), "trained exactly as the teacher is"
    if task == "regression":
        assert (folder / "figure_predicted_against_true.png").is_file()
    else:
        risk = pd.read_csv(folder / "risk.csv").set_index("method")
        assert set(risk.index) == set(results.index) - {CONSTANT[task]}
        assert (risk["high_patients"] + risk["low_patients"] == 10).all()
        constant = results.loc[CONSTANT[task]]
        assert np.isnan(constant["c_index"])
        assert "one risk for all orders nobody" in constant["note"]
        assert (folder / "figure_survival_lrmil.png").is_file()


def test_the_constant_number_is_the_mean_of_the_training_split(
    finished: Any, table: Path, done: Callable[[str], Done]
) -> None:
    said = Values.read_csv(done("regression").out / "tables" / "predictions" / "training_mean.csv")
    truth = pd.read_csv(table).set_index("slide_id")["share"]
    for fold, parts in finished.splits.items():
        answers = said.predicted[said.folds == int(fold)]
        assert answers == pytest.approx(truth[sorted(parts["train"])].mean())


def test_risk_groups_are_divided_at_the_training_patients_median(finished: Any, done: Callable[[str], Done]) -> None:
    """High risk is what lies above the median of those who trained, each patient once."""
    out = done("cox").out
    scores = done("cox").outcome.scores
    assert scores is not None
    with np.load(out / "folds" / "0" / "student" / "outputs.npz") as stored:
        outputs = load_outputs(out / "folds" / "0" / "student", str(stored["key"]))
    assert outputs is not None
    cohort = pd.read_csv(out / "cohort.csv").set_index("slide_id")["patient_id"]
    trained = sorted(finished.splits["0"]["train"])
    risks = pd.Series({s: outputs[s].value for s in trained}).groupby(cohort[trained]).mean()
    limits: Any = scores.thresholds["LRMIL"]
    assert limits[(0, 0)] == pytest.approx(float(np.median(risks)))


def test_a_second_run_does_nothing(lab: Any, done: Callable[[str], Done], work: Counter[str], no_report: None) -> None:
    for task in ("regression", "hazards"):
        found = done(task)
        work.clear()
        before = lab.times(found.out, "folds", "model")
        run_all(lab.settings(found.out, **found.changes), quiet())
        assert not work, task
        assert lab.times(found.out, "folds", "model") == before


def test_a_model_of_a_number_tells_it(done: Callable[[str], Done], table: Path, tmp_path: Path) -> None:
    found = done("regression")
    slide = pd.read_csv(table).iloc[0]
    answer = load_bundle(found.out / "model", device="cpu").predict(slide["path"], threads=1)
    with np.load(found.out / "folds" / "final" / "student" / "outputs.npz") as stored:
        place = list(stored["slides"]).index(slide["slide_id"])
        assert answer.value == pytest.approx(float(stored["values"][place]), abs=1e-3)
    assert (answer.probabilities, answer.predicted) == ({}, "")
    assert answer.in_words().startswith("share ")
    assert predict_many([slide["path"]], found.out / "model", tmp_path, device="cpu", threads=1) == []
    written = json.loads((tmp_path / Path(slide["path"]).stem / "prediction.json").read_text())
    assert written["value"] == pytest.approx(answer.value)
    assert "probabilities" not in written
    assert list(pd.read_csv(tmp_path / "predictions.csv"))[:2] == ["slide", "value"]
    assert "share" in (found.out / "model" / "README.md").read_text()


def test_a_model_of_survival_tells_risk_and_curve(done: Callable[[str], Done], table: Path, tmp_path: Path) -> None:
    found = done("hazards")
    manifest = read_manifest(found.out / "model")
    assert manifest.readout is not None
    assert manifest.median_risk is not None
    slide = pd.read_csv(table).iloc[0]
    assert predict_many([slide["path"]], found.out / "model", tmp_path, device="cpu", threads=1) == []
    written = json.loads((tmp_path / Path(slide["path"]).stem / "prediction.json").read_text())
    assert [point["time"] for point in written["survival"]] == list(manifest.readout.times)
    assert all(0 < point["probability"] < 1 for point in written["survival"])
    assert written["risk_group"] == ("high" if written["risk"] > manifest.median_risk else "low")
    row = pd.read_csv(tmp_path / "predictions.csv").iloc[0]
    assert row["risk"] == pytest.approx(written["risk"], abs=1e-6)
    assert row[f"survival_{manifest.readout.times[0]:g}"] == pytest.approx(written["survival"][0]["probability"], 1e-3)


def test_a_model_of_classes_says_nothing_of_other_tasks(finished: Any) -> None:
    content = json.loads((finished.out / "model" / "bundle.json").read_text())
    assert not {"readout", "median_risk"} & set(content)
    assert "objective" not in content["recipe"]
    assert not list((finished.out / "folds").rglob("readout.json"))


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        (
            "regression",
            {"compare": {"methods": ["hdmil", "lrmil"]}},
            "compare.methods, hdmil: .*cannot learn regression",
        ),
        ("cox", {"compare": {"methods": ["hdmil", "lrmil"]}}, "compare.methods, hdmil: .*cannot learn cox"),
        ("hazards", {"teacher": {"head": {"name": "abmil_original"}}}, "abmil_original.* cannot learn hazards"),
        ("cox", {"student": {"loss": {"bag_temperature": 2.0}}}, "bag_temperature"),
        ("cox", {"evaluation": {"baselines": ["colour_histogram"]}}, "colour_histogram knows no survival"),
    ],
)
def test_what_cannot_do_the_task_is_refused_by_name_before_anything_is_made(
    lab: Any, table: Path, tmp_path: Path, task: str, changes: dict[str, Any], words: str
) -> None:
    settings = lab.settings(tmp_path / "run", **lab.merged(config_of(task, table), changes))
    with pytest.raises(ConfigError, match=words):
        compare(settings, quiet())
    assert not (tmp_path / "run" / "tiles").exists()


def test_the_objective_is_in_the_keys_of_those_tasks_alone(lab: Any, table: Path, tmp_path: Path) -> None:
    def key(task: str | None, **objective: Any) -> str:
        changes = {} if task is None else config_of(task, table)
        settings = parse_config(lab.tree(tmp_path, **lab.merged(changes, {"objective": objective})))
        run = Run(settings, RunFolder(tmp_path), settings_cohort(settings), quiet())
        split = make_splits(run, list(run.cohort.table["slide_id"]))[0][0]
        return label_head_key(run, split, run.build_encoder(), "teacher")

    assert key(None) == key(None, intervals=3)
    assert len({key("hazards"), key("hazards", intervals=3), key("cox"), key("regression"), key(None)}) == 5


@pytest.mark.parametrize("task", ["regression", "cox"])
def test_folds_without_classes_are_dealt_evenly(lab: Any, table: Path, tmp_path: Path, task: str) -> None:
    rows = pd.read_csv(table).drop(columns="fold")
    rows.to_csv(tmp_path / "cohort.csv", index=False)
    settings = lab.settings(tmp_path / "run", **config_of(task, tmp_path / "cohort.csv"))
    run = Run(settings, RunFolder(tmp_path / "run"), settings_cohort(settings), quiet())
    splits, proof = make_splits(run, list(rows["slide_id"]))
    patients = [{run.cohort.patient_of(s) for s in split.test} for split in splits]
    assert sorted(map(len, patients)) == [3, 3, 4]
    assert "No patient and no slide is in two parts of a fold." in proof
    if task == "cox":
        events = rows.drop_duplicates("patient_id").set_index("patient_id")["event"]
        assert all((events[sorted(own)] == "dead").sum() >= 2 for own in patients)


def test_every_patient_counts_once_in_a_median_risk(lab: Any, table: Path, tmp_path: Path) -> None:
    settings = lab.settings(tmp_path, **config_of("cox", table))
    run = Run(settings, RunFolder(tmp_path), settings_cohort(settings), quiet())
    slides = run.cohort.table.groupby("patient_id")["slide_id"].apply(list)
    two = next(own for own in slides if len(own) == 2)
    one = next(own for own in slides if len(own) == 1)
    assert median_of_patients(run, {two[0]: 1.0, two[1]: 3.0, one[0]: 8.0}) == 5.0


@pytest.mark.parametrize(
    ("task", "heads", "seeds"),
    [
        ("regression", ["abmil", "dtfd"], [0]),
        ("hazards", ["abmil", "clam_sb"], [0]),
        ("cox", ["mean_pool", "abmil"], [0, 1]),
    ],
)
def test_features_alone_are_compared_for_each_task(
    task: str, heads: list[str], seeds: list[int], tmp_path: Path
) -> None:
    """On features that tell the number, and the risk, as their first column."""
    rows = []
    for number in range(18):
        rng = np.random.default_rng(number)
        features = rng.normal(size=(9, 4)).astype(np.float32) * 0.1
        strength = (number * 7 % 18) / 9 - 1
        features[:, 0] += 2 * strength
        path = tmp_path / f"s{number}.h5"
        write_bag(path, Bag(features=features, coords_l0=np.arange(18).reshape(-1, 2), slide=path.stem))
        row = {"slide_id": f"s{number}", "patient_id": f"p{number}", "features": str(path)}
        rows.append(row | {"share": strength, "time": 10.0 - 4 * strength, "event": int(number % 6 != 0)})
    pd.DataFrame(rows).to_csv(tmp_path / "cohort.csv", index=False)
    tree = config_of(task, tmp_path / "cohort.csv") | {
        "out": str(tmp_path / "run"),
        "folds": {"num_folds": 3},
        "teacher": {"epochs": 25, "learning_rate": 1e-2},
        "evaluation": {"bootstrap": 100},
        "compare": {
            "methods": ["majority", *heads],
            "jobs": 1,
            "seeds": seeds,
            "options": {"dtfd": {"groups": 2, "distillation": "afs"}} if "dtfd" in heads else {},
        },
        "device": "cpu",
    }
    compare(parse_config(tree), quiet())
    folder = tmp_path / "run" / "compare"
    results = pd.read_csv(folder / "results.csv").set_index("method")
    assert len(results) == 1 + len(heads)
    assert (results["seeds"] == len(seeds)).all()
    main, good = ("spearman", 0.8) if task == "regression" else ("c_index", 0.8)
    assert results.loc["ABMIL", main] > good, results[main]
    if task != "regression":
        risk = pd.read_csv(folder / "risk.csv").set_index("method")
        assert risk.loc["ABMIL", "p_value"] < 0.05
