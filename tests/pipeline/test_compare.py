"""Comparing methods: the same slides, folds and seeds for all, resumable, one by one or several at a time."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.evaluation.conftest import answers

from lrmil.errors import ConfigError, HeadError
from lrmil.evaluation import bootstrap
from lrmil.evaluation.predictions import Predictions
from lrmil.pipeline.compare import _recovery_lines, compare
from lrmil.pipeline.config import PAPER_METHODS, RunSettings, load_config, save_config
from lrmil.pipeline.methods import METHODS, for_features, for_task, methods_named
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.said import recovery_table

FEW = ["majority", "abmil", "mean_pool", "zoommil", "hdmil", "lr_only", "lrmil"]


def quiet() -> Reporter:
    return Reporter(quiet=True, stream=io.StringIO())


def settings_for(lab: Any, out: Path, methods: list[str], **compared: Any) -> RunSettings:
    return lab.settings(out, compare={"methods": methods, "jobs": 1, **compared}, evaluation={"timed_slides": 1})


@pytest.fixture(scope="module")
def compared(lab: Any, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = finished.copy(tmp_path_factory.mktemp("compare") / "run")
    compare(settings_for(lab, out, FEW), quiet())
    return out


def predictions(out: Path, name: str) -> Predictions:
    return Predictions.read_csv(out / "compare" / "predictions" / f"{name}.csv")


def test_the_paper_s_methods_are_known_and_each_is_a_row() -> None:
    assert {m.name for m in METHODS if m.in_paper} == {*PAPER_METHODS, "lrmil"}
    assert len({m.title for m in METHODS}) == len({m.name for m in METHODS}) == len(METHODS)
    chosen = methods_named(["lrmil", "torchmil:SETMIL", "abmil"])
    assert [m.name for m in chosen] == ["abmil", "lrmil", "torchmil:SETMIL"]


def test_every_method_answers_every_slide_in_the_fold_that_tests_it(finished: Any, compared: Path) -> None:
    tests = {(fold, slide) for fold, parts in finished.splits.items() for slide in parts["test"]}
    for path in sorted((compared / "compare" / "predictions").glob("*.csv")):
        found = Predictions.read_csv(path)
        assert {(str(f), s) for f, s in zip(found.folds, found.slide_ids, strict=True)} == tests, path.name


def test_abmil_is_the_teacher_bit_for_bit(finished: Any, compared: Path) -> None:
    """Nothing is handicapped: with the same head, a baseline is trained exactly as the teacher is."""
    teacher = Predictions.read_csv(finished.out / "tables" / "predictions" / "hr_teacher.csv")
    abmil = predictions(compared, "abmil")
    order = np.argsort(teacher.slide_ids), np.argsort(abmil.slide_ids)
    assert np.array_equal(teacher.probabilities[order[0]], abmil.probabilities[order[1]])


def test_tables_have_groups_and_measured_costs(compared: Path) -> None:
    results = pd.read_csv(compared / "compare" / "results.csv").set_index("method")
    assert list(results["group"].unique()) == ["Reference", "Full HR", "SC", "LR only", "Ours"]
    patches = results["patches_per_slide"]
    assert patches["LRMIL"] == patches["LR without distillation"] < patches["ZOOMMIL"]
    assert patches["ABMIL"] == patches["Mean-P"] >= patches["HDMIL"]
    assert results.drop("Majority class")["seconds_per_slide"].notna().all()
    assert (compared / "compare" / "results.md").is_file()
    assert (compared / "compare" / "differences.csv").is_file()


def test_what_is_recovered_is_asked_of_every_20x_method(compared: Path) -> None:
    found = pd.read_csv(compared / "compare" / "recovery.csv").set_index("method")
    assert list(found.index) == ["Mean-P", "ABMIL"], "what chooses its patches is no 20x method"
    auc = pd.read_csv(compared / "compare" / "results.csv").set_index("method")["auc"]
    assert found["gap"].to_dict() == pytest.approx(
        {method: auc[method] - auc["LR without distillation"] for method in found.index}
    )


def test_what_is_recovered_is_the_share_of_a_gap_that_is_sure() -> None:
    said = {
        "ABMIL": answers(0.3, 1),
        "Mean-P": answers(20.0, 4),
        "LR without distillation": answers(20.0, 3),
        "LRMIL": answers(1.5, 2),
    }
    settings = RunSettings.model_validate({"cohort": {"table": "cohort.csv"}, "out": "run"})
    asked = [(title, "LRMIL", title) for title in ("Mean-P", "ABMIL", "CLAM-SB")]
    comparison: Any = SimpleNamespace(predictions=said)
    found = recovery_table(comparison, settings, asked).set_index("method")
    assert list(found.index) == ["Mean-P", "ABMIL"], "CLAM-SB has said nothing"
    auc = {name: bootstrap(one, "auc", seed=0, resamples=100).value for name, one in said.items()}
    sure, none = found.loc["ABMIL"], found.loc["Mean-P"]
    lower = auc["LR without distillation"]
    assert sure["gap"] == pytest.approx(auc["ABMIL"] - lower)
    assert sure["recovered"] == pytest.approx((auc["LRMIL"] - lower) / (auc["ABMIL"] - lower))
    assert 0 < sure["recovered_low"] < sure["recovered"] < sure["recovered_high"] < 1.2
    assert sure["patients"] == 120
    assert none["gap_low"] < 0 < none["gap_high"]
    assert none[["recovered", "recovered_low", "recovered_high"]].isna().all()
    (line,) = _recovery_lines(found.reset_index())
    assert line.startswith("Of what ABMIL has more")
    assert f"recovers {100 * sure['recovered']:.0f} % [" in line
    said.pop("LRMIL")
    assert recovery_table(comparison, settings, asked).empty


def test_a_second_comparison_trains_only_what_was_added(
    lab: Any, compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: Counter[str] = Counter()
    from lrmil.pipeline import jobs

    original = jobs.train_teacher

    def watched(*args: Any, **kwargs: Any) -> Any:
        trained[args[2].head.name] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(jobs, "train_teacher", watched)
    before = lab.times(compared, "folds", "features", "tiles")
    compare(settings_for(lab, compared, [*FEW, "max_pool"]), quiet())
    assert trained == {"max_pool": 3}
    after = lab.times(compared, "folds", "features", "tiles")
    assert {k: v for k, v in after.items() if k in before} == before


def test_seeds_are_averaged_and_share_folds(lab: Any, finished: Any, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "run")
    compare(settings_for(lab, out, ["mean_pool", "lrmil"], seeds=[0, 1]), quiet())
    found = predictions(out, "lrmil")
    first, second = (found.take(found.seeds == seed) for seed in (0, 1))
    assert list(first.slide_ids) == list(second.slide_ids)
    assert list(first.folds) == list(second.folds)
    assert not np.array_equal(first.probabilities, second.probabilities)
    ran = Predictions.read_csv(finished.out / "tables" / "predictions" / "lrmil.csv")
    assert np.array_equal(ran.probabilities, first.probabilities)


def test_seeds_need_not_hold_the_config_s_own(lab: Any, finished: Any, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "run")
    compared = {"methods": ["mean_pool", "lrmil"], "jobs": 1, "seeds": [1]}
    settings = lab.settings(out, compare=compared, evaluation={"timed_slides": 1}, seed=7)
    compare(settings, quiet())
    results = pd.read_csv(out / "compare" / "results.csv").set_index("method")
    assert (results.loc[["Mean-P", "LRMIL"], "seconds_per_slide"] > 0).all()
    assert not (out / "folds" / "0" / "heads" / "mean_pool").exists(), "nothing is trained with the config's seed"


def test_several_processes_give_the_same_heads(lab: Any, compared: Path, finished: Any, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "run")
    compare(settings_for(lab, out, ["abmil", "mean_pool", "lrmil"], jobs=2), quiet())
    for name in ("abmil", "mean-p"):
        assert predictions(out, name).probabilities.tolist() == predictions(compared, name).probabilities.tolist()


@pytest.mark.parametrize(
    ("methods", "compared_as", "error", "words"),
    [
        (["abmill", "lrmil"], {}, ConfigError, "no method 'abmill'"),
        (["abmil", "dsmil"], {}, ConfigError, "lrmil is missing"),
        (["dtfd", "lrmil"], {"options": {"dtfd": {"group": 3}}}, HeadError, "group"),
        (["dtfd", "lrmil"], {"options": {"dsmil": {}}}, HeadError, "compare.options speaks of dsmil"),
    ],
)
def test_a_wrong_comparison_is_refused_before_anything_is_made(
    lab: Any, tmp_path: Path, methods: list[str], compared_as: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        compare(settings_for(lab, tmp_path / "run", methods, **compared_as), quiet())
    assert not (tmp_path / "run" / "tiles").exists()


def test_the_default_list_loses_what_cannot_learn_the_task(lab: Any, tmp_path: Path) -> None:
    def chosen(kind: str, **changes: Any) -> tuple[list[str], str]:
        told = io.StringIO()
        found = for_task(lab.settings(tmp_path, cohort={"kind": kind}, **changes), Reporter(stream=told))
        return found.compare.methods, told.getvalue()

    default, nothing = chosen("classification")
    assert "hdmil" in default
    assert nothing == ""
    for kind, meaning in (("regression", "regression"), ("survival", "hazards")):
        kept, line = chosen(kind)
        assert kept == [name for name in default if name != "hdmil"]
        assert line == f"Left out of the methods: hdmil, which cannot learn {meaning}.\n"
    # What was asked for by name stays, and is refused by its name later on.
    assert chosen("regression", compare={"methods": ["abmil", "hdmil"]}) == (["abmil", "hdmil"], "")


@pytest.mark.parametrize("named", [None, ["abmil", "hdmil"]])
def test_a_saved_config_names_no_methods_but_those_that_were_named(
    lab: Any, tmp_path: Path, named: list[str] | None
) -> None:
    changes = {} if named is None else {"compare": {"methods": named}}
    settings = lab.settings(tmp_path / "run", cohort={"kind": "regression"}, **changes)
    save_config(settings, tmp_path / "saved.yaml")
    saved = load_config(tmp_path / "saved.yaml")
    assert saved == settings
    found = for_task(saved, quiet()).compare.methods
    assert ("hdmil" in found) == (named is not None)


def test_features_alone_and_a_task_shorten_the_same_list(lab: Any, tmp_path: Path) -> None:
    found = for_features(for_task(lab.settings(tmp_path, cohort={"kind": "regression"}), quiet()), quiet())
    assert "abmil" in found.compare.methods
    assert not {"hdmil", "zoommil", "lrmil"} & set(found.compare.methods)
