"""Comparing on features of other programs, without a slide."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from lrmil.bags import Bag, write_bag
from lrmil.errors import BagError, CohortError, ConfigError
from lrmil.evaluation.predictions import Predictions
from lrmil.pipeline.compare import compare
from lrmil.pipeline.config import load_config, parse_config, save_config
from lrmil.pipeline.methods import for_features
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.run import Outcome, run_all

WIDTH, SLIDES = 8, 12


def quiet() -> Reporter:
    return Reporter(quiet=True, stream=io.StringIO())


def features_of(number: int) -> np.ndarray[Any, Any]:
    """Twelve patches that tell the class; slides of even number are of class b."""
    rng = np.random.default_rng(number)
    values = rng.normal(size=(12, WIDTH)).astype(np.float32)
    values[:, 0] += 6 * (number % 2 == 0) - 3
    return values


def write_clam_h5(path: Path, values: np.ndarray[Any, Any]) -> None:
    with h5py.File(path, "w") as handle:
        handle["features"] = values
        handle["coords"] = np.stack([np.arange(len(values)) * 256, np.zeros(len(values), np.int64)], axis=1)


def write_trident(path: Path, values: np.ndarray[Any, Any]) -> None:
    write_clam_h5(path, values)
    with h5py.File(path, "a") as handle:
        handle["coords"].attrs.update({"patch_size_level0": 256, "patch_size": 256})


def write_pt(path: Path, values: np.ndarray[Any, Any]) -> None:
    torch.save(torch.from_numpy(values), path)


def write_own(path: Path, values: np.ndarray[Any, Any]) -> None:
    write_bag(path, Bag(features=values, coords_l0=np.arange(2 * len(values)).reshape(-1, 2), slide=path.stem))


WRITERS = {"clam.h5": write_clam_h5, "trident.h5": write_trident, "clam.pt": write_pt, "own.h5": write_own}


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """A table of features of four programs, which all hold the same kind of rows."""
    rows = []
    for number in range(SLIDES):
        kind = list(WRITERS)[number % len(WRITERS)]
        path = tmp_path / "features" / f"s{number}.{kind.split('.')[1]}"
        path.parent.mkdir(exist_ok=True)
        WRITERS[kind](path, features_of(number))
        label = "b" if number % 2 == 0 else "a"
        rows.append({"slide_id": f"s{number}", "patient_id": f"p{number}", "label": label, "features": str(path)})
    table = tmp_path / "cohort.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    return table


def tree(table: Path, **changes: Any) -> dict[str, Any]:
    return {
        "cohort": {"table": str(table)},
        "out": str(table.parent / "run"),
        "folds": {"num_folds": 3},
        "teacher": {"epochs": 4, "learning_rate": 1e-2},
        "evaluation": {"bootstrap": 100},
        "compare": {"methods": ["majority", "max_pool", "mean_pool", "abmil"], "jobs": 1},
        "device": "cpu",
    } | changes


def compared(table: Path, **changes: Any) -> tuple[Path, Outcome]:
    outcome = compare(parse_config(tree(table, **changes)), quiet())
    return outcome.folder.root, outcome


def predictions(out: Path, name: str) -> Predictions:
    return Predictions.read_csv(out / "compare" / "predictions" / f"{name}.csv")


def test_features_of_every_program_are_compared_without_a_slide(cohort: Path) -> None:
    out, outcome = compared(cohort, teacher={"epochs": 15, "learning_rate": 1e-2})
    assert not outcome.failures
    found = predictions(out, "abmil")
    assert sorted(found.slide_ids) == sorted(f"s{i}" for i in range(SLIDES))
    of_b = np.array([int(s[1:]) % 2 == 0 for s in found.slide_ids])
    for fold in range(3):
        likely, tested = found.probabilities[:, 1], found.folds == fold
        assert likely[tested & of_b].min() > likely[tested & ~of_b].max()
    differences = pd.read_csv(out / "compare" / "differences.csv")
    assert set(differences["method"]) == {"Max-P", "Mean-P", "Majority class"}
    assert not (out / "tiles").exists()
    assert not (out / "features").exists()


def test_costs_are_unknown_and_the_tables_say_so(cohort: Path) -> None:
    out, _ = compared(cohort)
    results = pd.read_csv(out / "compare" / "results.csv")
    assert results[["seconds_per_slide", "patches_per_slide", "time_s"]].isna().all(axis=None)
    for name in ("results", "paper"):
        assert "seconds per slide are unknown" in (out / "compare" / f"{name}.md").read_text()
    assert not (out / "compare" / "times.csv").exists()


def test_a_second_comparison_trains_nothing_until_a_file_changes(cohort: Path) -> None:
    out, _ = compared(cohort)
    heads = {p: p.stat().st_mtime_ns for p in out.rglob("head.safetensors")}
    assert len(heads) == 9
    compared(cohort)
    assert {p: p.stat().st_mtime_ns for p in heads} == heads
    write_pt(cohort.parent / "features" / "s2.pt", features_of(2)[:9])
    compared(cohort)
    changed = {p for p, old in heads.items() if p.stat().st_mtime_ns != old}
    tested = Predictions.read_csv(out / "compare" / "predictions" / "abmil.csv")
    fold = int(tested.folds[list(tested.slide_ids).index("s2")])
    # It trains or validates in every fold but the one that tests it.
    assert {p.parts[-4] for p in changed} == {str(k) for k in range(3) if k != fold}


def test_methods_that_need_slides_are_refused_by_name(cohort: Path) -> None:
    for name in ("lrmil", "lr_only", "zoommil", "hdmil"):
        with pytest.raises(ConfigError, match=f"{name} need slides"):
            compared(cohort, compare={"methods": ["abmil", "max_pool", name]})
    assert not (cohort.parent / "run").exists()
    with pytest.raises(CohortError, match="no path"):
        run_all(parse_config(tree(cohort)), quiet())


def test_the_default_list_loses_what_needs_slides(cohort: Path) -> None:
    chosen = for_features(parse_config(tree(cohort, compare={})), quiet())
    kept = ["max_pool", "mean_pool", "abmil", "clam_mb", "clam_sb", "dsmil", "transmil", "dtfd"]
    assert chosen.compare.methods == ["majority", *kept]
    # What a folder then says of itself can be run again.
    save_config(chosen, cohort.parent / "saved.yaml")
    assert for_features(load_config(cohort.parent / "saved.yaml"), quiet()).compare == chosen.compare


def test_dsmil_with_a_sigmoid_a_class_is_compared_like_the_others(cohort: Path) -> None:
    asked = {"methods": ["mean_pool", "dsmil"], "reference": "mean_pool", "options": {"dsmil": {"loss": "bce"}}}
    out, _ = compared(cohort, compare={**asked, "jobs": 1})
    found = predictions(out, "dsmil").probabilities
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    # What was stored as sigmoids, when that ended in a refusal, is asked of the head again.
    (first, *others) = sorted(out.glob("folds/*/heads/dsmil/outputs.npz"))
    with np.load(first) as stored:
        arrays = dict(stored)
    np.savez(first, **arrays | {"probabilities": arrays["probabilities"] * 0.7})
    compared(cohort, compare={**asked, "jobs": 1})
    assert others
    np.testing.assert_array_equal(predictions(out, "dsmil").probabilities, found)


def test_the_reference_is_abmil_or_what_the_config_says(cohort: Path) -> None:
    with pytest.raises(ConfigError, match="abmil is missing"):
        compared(cohort, compare={"methods": ["max_pool", "mean_pool"]})
    out, _ = compared(cohort, compare={"methods": ["max_pool", "mean_pool"], "reference": "mean_pool", "jobs": 1})
    assert set(pd.read_csv(out / "compare" / "differences.csv")["method"]) == {"Max-P"}
    with pytest.raises(ConfigError, match="dsmil is missing"):
        compared(cohort, compare={"methods": ["abmil", "max_pool"], "reference": "dsmil"})


def clam_splits(folder: Path) -> list[dict[str, list[str]]]:
    """Two folds in CLAM's files; s11 is in none of the second."""
    names = [f"s{i}" for i in range(SLIDES)]
    folds = [
        {"train": names[4:], "val": names[:2], "test": names[2:4]},
        {"train": names[:7], "val": names[7:9], "test": names[9:11]},
    ]
    folder.mkdir()
    for number, parts in enumerate(folds):
        columns = {part: pd.Series(own, dtype=object) for part, own in parts.items()}
        pd.DataFrame(columns).to_csv(folder / f"splits_{number}.csv")
    return folds


def test_clam_s_split_files_are_the_folds(cohort: Path) -> None:
    folds = clam_splits(cohort.parent / "splits")
    path = cohort.parent / "config.yaml"
    import yaml

    path.write_text(yaml.safe_dump(tree(cohort, folds={"clam_splits": "splits"})))
    out = compare(load_config(path), quiet()).folder.root
    found = predictions(out, "abmil")
    tests = {(int(f), s) for f, s in zip(found.folds, found.slide_ids, strict=True)}
    assert tests == {(k, s) for k, parts in enumerate(folds) for s in parts["test"]}


def test_fold_columns_are_the_folds(cohort: Path) -> None:
    table = pd.read_csv(cohort)
    table["fold"] = [i // 2 % 3 for i in range(SLIDES)]
    table.to_csv(cohort, index=False)
    out, _ = compared(cohort)
    found = predictions(out, "abmil")
    assert all(int(f) == int(s[1:]) // 2 % 3 for f, s in zip(found.folds, found.slide_ids, strict=True))


def test_files_are_found_by_the_name_of_the_slide(cohort: Path) -> None:
    table = pd.read_csv(cohort).drop(columns="features")
    table.to_csv(cohort, index=False)
    out, _ = compared(cohort, cohort={"table": str(cohort), "features_dir": str(cohort.parent / "features")})
    assert len(predictions(out, "abmil").slide_ids) == SLIDES


def test_a_damaged_file_is_a_failure_and_the_rest_go_on(cohort: Path) -> None:
    (cohort.parent / "features" / "s4.h5").write_bytes(b"no features")
    (cohort.parent / "features" / "s6.pt").unlink()
    write_pt(cohort.parent / "features" / "s6.pt", np.full((3, WIDTH), np.nan, np.float32))
    out, outcome = compared(cohort)
    assert [f.slide_id for f in outcome.failures] == ["s4", "s6"]
    assert "NaN" in outcome.failures[1].message
    assert not {"s4", "s6"} & set(predictions(out, "abmil").slide_ids)


def test_features_of_two_encoders_are_refused(cohort: Path) -> None:
    write_pt(cohort.parent / "features" / "s2.pt", np.zeros((4, WIDTH + 1), np.float32))
    with pytest.raises(BagError, match="width 9, those of s0 have width 8"):
        compared(cohort)


def test_seeds_share_folds_and_features(cohort: Path) -> None:
    compare_as = {"methods": ["abmil", "mean_pool"], "seeds": [0, 1], "jobs": 1}
    out, _ = compared(cohort, compare=compare_as)
    found = predictions(out, "abmil")
    first, second = (found.take(found.seeds == seed) for seed in (0, 1))
    assert list(first.slide_ids) == list(second.slide_ids)
    assert not np.array_equal(first.probabilities, second.probabilities)


def test_heads_that_look_at_places_get_them(cohort: Path) -> None:
    pytest.importorskip("torchmil")
    table = pd.read_csv(cohort)
    for number in range(SLIDES):
        path = cohort.parent / "features" / f"s{number}.h5"
        write_clam_h5(path, features_of(number))
        table.loc[number, "features"] = str(path)
    table.to_csv(cohort, index=False)
    out, _ = compared(cohort, compare={"methods": ["abmil", "torchmil:SmABMIL"], "jobs": 1}, teacher={"epochs": 1})
    assert len(predictions(out, "smabmil").slide_ids) == SLIDES
