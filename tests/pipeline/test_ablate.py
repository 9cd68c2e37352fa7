"""Ablation and sensitivity: one thing changed at a time, on the same folds and seeds, nothing trained twice."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest

from lrmil.errors import ConfigError
from lrmil.evaluation.predictions import Predictions
from lrmil.pipeline.ablate import ablate, sensitivity
from lrmil.pipeline.config import RunSettings, parse_config
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.study import Study
from lrmil.pipeline.variants import TABLE_3, ablation_plan, sensitivity_plan

EVALUATION = {"timed_slides": 1, "heatmap_slides": 2, "baselines": ["majority", "colour_histogram", "lr_only"]}
BASE = {"cohort": {"table": "cohort.csv"}, "out": "run"}


def quiet() -> Reporter:
    return Reporter(quiet=True, stream=io.StringIO())


def config(**loss: Any) -> RunSettings:
    return parse_config({**BASE, "student": {"loss": loss}})


def on(settings: RunSettings) -> dict[str, bool]:
    loss = settings.student.loss
    return {"bag": loss.lambda_bag > 0, "soft": loss.lambda_soft > 0, "hard": loss.lambda_hard > 0}


def predictions(folder: Path, name: str) -> Predictions:
    return Predictions.read_csv(folder / "predictions" / f"{name}.csv")


def same_answers(first: Predictions, second: Predictions) -> bool:
    order = np.argsort(first.slide_ids), np.argsort(second.slide_ids)
    return np.array_equal(first.probabilities[order[0]], second.probabilities[order[1]])


# Plans


def test_the_ablation_has_the_rows_of_table_3() -> None:
    settings = config(lambda_bag=0.5, lambda_soft=2.0, lambda_hard=0.1)
    plan = ablation_plan(settings)
    assert [v.terms for v in plan.variants] == list(TABLE_3)
    for variant in plan.variants:
        changed = variant.applied(settings)
        assert on(changed) == {term: term in variant.terms for term in ("bag", "soft", "hard")}
        assert changed.student.loss.lambda_ce == 1
        assert changed.stage1 == settings.stage1
    # A term that stays on keeps its weight.
    assert plan.variants[3].applied(settings).student.loss.lambda_soft == 2.0
    assert plan.reference.applied(settings) is settings


def test_a_term_that_the_config_switches_off_tells_no_rows_apart() -> None:
    settings = config(lambda_soft=0.0)
    plan = ablation_plan(settings)
    assert [v.terms for v in plan.variants] == [(), ("patch",), ("patch", "bag"), ("patch", "bag", "hard")]
    assert plan.reference.applied(settings) is settings
    assert "lambda_soft is 0" in plan.notes[0]


@pytest.mark.parametrize("of", ["k", "temperature", "layers", "aggregation", "magnification"])
def test_every_sensitivity_changes_one_thing_and_holds_the_config_once(of: Any) -> None:
    settings = config(hard_k=3, bag_temperature=1.5, region_aggregation="max")
    plan = sensitivity_plan(of, settings, 12)
    applied = [v.applied(settings) for v in plan.variants]
    assert len({v.title for v in plan.variants}) == len({v.name for v in plan.variants}) == len(plan.variants) > 2
    assert len({a.model_dump_json() for a in applied}) == len(applied)
    assert [a is settings for a in applied].count(True) == 1
    assert plan.reference.applied(settings) is settings
    tree = settings.model_dump()
    for changed in applied:
        differs = [path for path in leaves(tree) if leaves(changed.model_dump())[path] != leaves(tree)[path]]
        assert len(differs) <= (2 if of in ("aggregation", "magnification") else 1), differs


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_k_and_temperatures_are_those_asked_for_and_the_config_s() -> None:
    settings = config(hard_k=3, attention_temperature=5.0)
    ks = [v.applied(settings).student.loss.hard_k for v in sensitivity_plan("k", settings, 12).variants]
    assert ks == [1, 2, 3, 4, 8, 16, 32]
    plan = sensitivity_plan("temperature", settings, 12, [1, 3])
    pairs = [
        (loss.bag_temperature, loss.attention_temperature)
        for loss in (v.applied(settings).student.loss for v in plan.variants)
    ]
    assert sorted(pairs) == [(1.0, 1.0), (1.0, 3.0), (1.0, 5.0), (3.0, 5.0)]
    assert {line: [x for x, _ in points] for line, points in plan.lines.items()} == {
        "L_bag": [1.0, 3.0],
        "L_soft": [1.0, 3.0, 5.0],
    }


def test_layers_are_told_apart_by_the_blocks_they_mean() -> None:
    settings = config()
    plan = sensitivity_plan("layers", settings, 12, [[0, 1, 11], [-1], [11], [5]])
    assert [v.title for v in plan.variants] == ["blocks 0, 1, 11", "blocks 11", "blocks 5"]
    assert plan.reference is plan.variants[0]


@pytest.mark.parametrize(
    ("of", "loss", "values", "words"),
    [
        ("k", {"lambda_hard": 0.0}, None, "lambda_hard is 0"),
        ("temperature", {"lambda_bag": 0.0, "lambda_soft": 0.0}, None, "are 0"),
        ("aggregation", {}, ["median"], "no region aggregation 'median'"),
        ("k", {}, [1.5], "1.5 is no whole number"),
        ("temperature", {}, [0], "0 is no number above 0"),
        ("layers", {}, [3], "lists of block numbers"),
        ("layers", {}, [[12]], "12 blocks"),
        ("magnification", {}, [[0.5]], "pairs"),
        ("colour", {}, None, "not known"),
    ],
)
def test_what_cannot_be_varied_is_refused(of: Any, loss: dict[str, Any], values: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sensitivity_plan(of, config(**loss), 12, values)


def test_pairs_of_no_whole_ratio_are_left_out_and_it_is_said() -> None:
    plan = sensitivity_plan("magnification", config(), 12, [[0.5, 1.25], [1.0, 4.0]])
    assert [v.name for v in plan.variants] == ["magnification_0.5_2", "magnification_1_4"]
    assert "whole number" in plan.notes[0]


# Runs


@pytest.fixture(scope="module")
def ablated(lab: Any, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = finished.copy(tmp_path_factory.mktemp("ablate") / "run")
    ablate(settings_for(lab, out), quiet())
    return out


def settings_for(lab: Any, out: Path, **changes: Any) -> RunSettings:
    """The finished run's config, unless changed."""
    return lab.settings(out, **lab.merged({"evaluation": EVALUATION}, changes))


def test_the_ends_of_the_ablation_are_the_full_method_and_lr_without_distillation(finished: Any, ablated: Path) -> None:
    """Nothing on is the 5x head on frozen features, bit for bit; everything on is what `lrmil run` trained."""
    ran, folder = finished.out / "tables" / "predictions", ablated / "ablation"
    assert same_answers(predictions(folder, "none"), Predictions.read_csv(ran / "lr_without_distillation.csv"))
    assert same_answers(predictions(folder, "patch_bag_soft_hard"), Predictions.read_csv(ran / "lrmil.csv"))
    assert not same_answers(predictions(folder, "none"), predictions(folder, "patch"))
    rows = ["patch", "patch_bag", "patch_bag_soft", "patch_bag_hard", "patch_bag_soft_hard"]
    answers = {predictions(folder, row).probabilities.tobytes() for row in rows}
    assert len(answers) == len(rows)


def test_variants_answer_the_slides_that_each_fold_tests(finished: Any, ablated: Path) -> None:
    tests = {(fold, slide) for fold, parts in finished.splits.items() for slide in parts["test"]}
    paths = sorted((ablated / "ablation" / "predictions").glob("*.csv"))
    assert len(paths) == len(TABLE_3)
    for path in paths:
        found = Predictions.read_csv(path)
        assert {(str(f), s) for f, s in zip(found.folds, found.slide_ids, strict=True)} == tests, path.name


def test_table_3_has_the_marks_of_the_paper_and_the_scores_of_the_results(ablated: Path) -> None:
    folder = ablated / "ablation"
    table, results = pd.read_csv(folder / "table3.csv"), pd.read_csv(folder / "results.csv")
    marks = table[["L_patch", "L_bag", "L_soft", "L_hard"]].to_numpy().tolist()
    expected = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1], [1, 1, 1, 1]]
    assert marks == expected
    assert table["auc"].tolist() == results["auc"].tolist()
    assert results["method"].tolist()[0] == "none"
    for name in ("table3.md", "table3.tex", "results.md", "results.tex", "differences.csv", "figure_ablation.png"):
        assert (folder / name).stat().st_size > 0, name
    differences = pd.read_csv(folder / "differences.csv")
    assert set(differences["method"]) == set(results["method"]) - {"patch + bag + soft + hard"}
    assert differences.loc[differences["difference"].notna(), "p_holm"].notna().all()


def test_variants_share_stage_1_and_the_teacher_and_a_second_call_trains_nothing(
    lab: Any, finished: Any, ablated: Path, work: Counter[str]
) -> None:
    assert not list((ablated / "variants").rglob("stage1"))
    assert not list((ablated / "variants").rglob("teacher"))
    kept = lab.times(ablated, "folds", "features", "tiles", "tables", "model")
    assert kept == lab.times(finished.out, "folds", "features", "tiles", "tables", "model")
    before = lab.times(ablated, "variants")
    ablate(settings_for(lab, ablated), quiet())
    assert work == Counter()
    assert lab.times(ablated, "variants") == before


def test_a_variant_that_was_stopped_is_trained_again_alone(
    lab: Any, ablated: Path, tmp_path: Path, work: Counter[str]
) -> None:
    import shutil

    out = Path(shutil.copytree(ablated, tmp_path / "run"))
    (out / "variants" / "ablation_patch_bag" / "1" / "student" / "done.json").unlink()
    ablate(settings_for(lab, out), quiet())
    assert work == Counter({"student head": 1})
    assert same_answers(predictions(out / "ablation", "patch_bag"), predictions(ablated / "ablation", "patch_bag"))


def test_k_is_varied_with_the_seeds_of_a_comparison(lab: Any, finished: Any, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "run")
    settings = settings_for(lab, out, compare={"seeds": [0, 1]})
    sensitivity(settings, quiet(), "k", [1, 4])
    folder = out / "sensitivity" / "k"
    one, four = predictions(folder, "k_1"), predictions(folder, "k_4")
    assert sorted(set(one.seeds.tolist())) == [0, 1]
    ran = Predictions.read_csv(finished.out / "tables" / "predictions" / "lrmil.csv")
    assert same_answers(four.take(four.seeds == 0), ran)
    assert not same_answers(four.take(four.seeds == 1), ran)
    # Each variant is taught by the teacher of its own seed, and sees with its student encoder.
    assert (out / "variants" / "seed_1" / "0" / "stage1").is_dir()
    assert [p.name for p in (out / "variants" / "k_1_seed_1" / "0").iterdir()] == ["student"]
    assert not (out / "variants" / "k_4").exists()
    assert (folder / "figure_k.png").stat().st_size > 0


def test_layers_of_variants_are_kept_and_each_variant_learns_its_own(lab: Any, finished: Any, tmp_path: Path) -> None:
    """The main run of the config keeps one layer only: features are made again with all that variants need."""
    out = finished.copy_features(tmp_path / "run")
    settings = settings_for(lab, out, folds={"num_folds": 3}, stage1={"loss": {"layers": [1]}})
    sensitivity(settings, quiet(), "layers", [[0, -1], [1]])
    folder = out / "sensitivity" / "layers"
    results = pd.read_csv(folder / "results.csv")
    assert results["method"].tolist() == ["blocks 1", "blocks 0, 2"]
    for path in (out / "features").glob("*/*.h5"):
        with h5py.File(path) as handle:
            if "layer_cls" in handle:
                assert sorted(handle["layer_cls"]) == ["0", "1", "2"]
    for place, layers in (("folds", {"1"}), ("variants/layers_0-2", {"0", "2"})):
        history = json.loads((out / place / "0" / "stage1" / "history.json").read_text())
        learnt = {k.removeprefix("val_layer") for k in history["epochs"][0] if k.startswith("val_layer")}
        assert learnt == layers
    assert not same_answers(predictions(folder, "blocks_1"), predictions(folder, "blocks_0_2"))
    # A run that needs fewer layers takes the features as they are.
    features = lab.times(out, "features")
    lab.run_until("encode", out, stage1={"loss": {"layers": [1]}})
    assert lab.times(out, "features") == features


def test_layers_that_variants_distil_equal_a_run_with_these_layers(lab: Any, finished: Any, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "run")
    sensitivity(settings_for(lab, out), quiet(), "layers", [[-1]])
    alone = finished.copy_features(tmp_path / "alone")
    lab.run_until("distill", alone, stage1={"loss": {"layers": [-1]}})
    found, expected = (p / "0" / "stage1" / "history.json" for p in (out / "variants/layers_2", alone / "folds"))
    losses = [[e["val_loss"] for e in json.loads(p.read_text())["epochs"]] for p in (found, expected)]
    assert losses[0] == losses[1]


def test_magnifications_are_runs_of_their_own_on_the_same_folds(lab: Any, finished: Any, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "run")
    outcome = sensitivity(settings_for(lab, out), quiet(), "magnification", [[0.5, 1.0], [0.5, 8.0], [0.125, 0.5]])
    folder = out / "sensitivity" / "magnification"
    results = pd.read_csv(folder / "results.csv").set_index("method")
    assert list(results.index) == ["20x and 10x (0.5 and 1 um/px)", "20x and 5x (0.5 and 2 um/px)"]
    # Four times the regions, each a quarter as large.
    patches = results["patches_per_slide"]
    assert patches.iloc[0] > 2 * patches.iloc[1]
    said = "\n".join(outcome.summary)
    assert "0.125 and 0.5 um/px) is left out: 12 slides are coarser than that" in said
    assert "0.5 and 8 um/px) is left out" in said
    own = out / "variants" / "magnification_0.5_1"
    assert (own / "splits.csv").read_bytes() == (out / "splits.csv").read_bytes()
    ran = Predictions.read_csv(finished.out / "tables" / "predictions" / "lrmil.csv")
    assert same_answers(predictions(folder, "20x_and_5x_0_5_and_2_um_px"), ran)
    assert (folder / "figure_magnification.png").stat().st_size > 0


@pytest.mark.parametrize("of", ["temperature", "aggregation"])
def test_losses_are_varied_and_drawn(lab: Any, finished: Any, tmp_path: Path, of: Any) -> None:
    out = finished.copy(tmp_path / "run")
    values = {"temperature": [1, 4], "aggregation": ["mean", "max", "share"]}[of]
    sensitivity(settings_for(lab, out), quiet(), of, values)
    folder = out / "sensitivity" / of
    rows = json.loads((folder / "variants.json").read_text())["variants"]
    assert len(rows) == 3
    answers = {path.read_bytes() for path in (folder / "predictions").glob("*.csv")}
    assert len(answers) == 3
    assert (folder / f"figure_{of}.png").stat().st_size > 0


def test_a_table_of_another_config_is_removed_before_the_next_is_made(
    lab: Any, ablated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    out = Path(shutil.copytree(ablated, tmp_path / "run"))

    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lrmil.pipeline.said.compare_report", stopped)
    with pytest.raises(KeyboardInterrupt):
        ablate(settings_for(lab, out, student={"loss": {"hard_k": 2}}), quiet())
    assert not (out / "ablation").exists()


# Numbers and survival


@pytest.fixture(scope="module")
def measured(lab: Any, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's slides and folds with a number and survival; the finished run's features and stage 1 fit them."""
    rows = pd.read_csv(lab.table)
    rows["path"] = [str((lab.table.parent / p).resolve()) for p in rows["path"]]
    number = rows["patient_id"].astype("category").cat.codes
    rows["share"], rows["time"] = 0.1 * number, 40.0 - 3.1 * number
    rows["event"] = np.where(number % 4 == 3, "alive", "dead")
    rows["fold"] = rows["slide_id"].map({s: int(f) for f, parts in finished.splits.items() for s in parts["test"]})
    path = tmp_path_factory.mktemp("measured") / "cohort.csv"
    rows.drop(columns="label").to_csv(path, index=False)
    return path


def test_the_losses_of_survival_are_ablated(
    lab: Any, finished: Any, measured: Path, tmp_path: Path, work: Counter[str]
) -> None:
    out = finished.copy(tmp_path / "run")
    cohort = {"table": str(measured), "task": "death", "kind": "survival"}
    settings = lab.settings(out, cohort=cohort, objective={"intervals": 2})
    ablate(settings, quiet())
    folder = out / "ablation"
    assert work["stage 1"] == 0
    # Six rows and their teacher, on three folds.
    assert (work["student head"], work["label head"]) == (18, 3)
    table = pd.read_csv(folder / "table3.csv")
    assert table.columns.tolist()[-1] == "c_index"
    assert len(pd.read_csv(folder / "risk.csv")) == len(table) == 6


def test_temperatures_that_a_task_does_not_have_are_left_out(
    lab: Any, finished: Any, measured: Path, tmp_path: Path
) -> None:
    """L_bag of a number is a squared error, which has no temperature; L_soft has one."""
    out = finished.copy(tmp_path / "run")
    settings = lab.settings(out, cohort={"table": str(measured), "task": "share", "kind": "regression"})
    outcome = sensitivity(settings, quiet(), "temperature", [1, 4])
    results = pd.read_csv(out / "sensitivity" / "temperature" / "results.csv")
    assert results["method"].tolist() == ["bag 1, attention 1", "bag 1, attention 4"]
    assert "bag 4, attention 1 is left out" in "\n".join(outcome.summary)
    assert not (out / "variants" / "bag_temperature_4").exists()


@pytest.mark.parametrize(("weight", "shared"), [(0.0, True), (1.0, False)])
def test_stage_1_is_shared_unless_it_depends_on_another_teacher(
    lab: Any, tmp_path: Path, weight: float, shared: bool
) -> None:
    settings = lab.settings(tmp_path / "run", stage1={"loss": {"lambda_attention_feature": weight}})
    study = Study.begin(settings, quiet())
    teacher = settings.teacher.model_copy(update={"epochs": 9})
    other = study.variant("other teacher", settings.model_copy(update={"teacher": teacher}))
    assert (other.run.stage1_folder is not None) == shared
    assert study.variant("same", settings).run.stage1_folder == study.run.folder


@pytest.mark.parametrize(("targets", "kept"), [("cached", (0, 1)), ("on_the_fly", ())])
def test_layers_of_variants_are_kept_where_targets_are(
    lab: Any, tmp_path: Path, targets: str, kept: tuple[int, ...]
) -> None:
    study = Study.begin(lab.settings(tmp_path / "run", targets=targets), quiet())
    study.keep_layers_of(lab.settings(tmp_path / "run", stage1={"loss": {"layers": own}}) for own in ([0], [1]))
    assert study.layers == kept
