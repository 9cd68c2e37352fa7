"""Feature files are used only if they are whole and of exactly this encoder, these settings and this slide."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from lrmil.bags import read_bag
from lrmil.encoders import create_encoder, save_encoder
from lrmil.errors import CorruptBag, EncoderError


@pytest.fixture
def encoded(finished: Any, tmp_path: Path) -> Path:
    return finished.copy_features(tmp_path / "run")


def features(out: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted((out / "features" / "tiny_0.5mpp").glob("*.h5"))}


def test_features_of_other_weights_are_made_again(lab: Any, encoded: Path, work: Counter[str], tmp_path: Path) -> None:
    """Same name, same width, same folder; other numbers."""
    other = create_encoder(lab.encoder)
    with torch.no_grad():
        other.trunk.blocks[2].mlp.fc2.bias.add_(0.1)
    save_encoder(other, tmp_path / "other")
    before = read_bag(features(encoded)["S001"]).features
    lab.run_until("encode", encoded, encoder={"name": str(tmp_path / "other")})
    assert work["encode 20x"] == 12
    after = read_bag(features(encoded)["S001"])
    assert after.provenance["encoder"]["weights_sha256"] == create_encoder(tmp_path / "other").weights_sha256
    assert not np.array_equal(after.features, before)


def test_features_of_another_tiling_are_made_again(lab: Any, encoded: Path, work: Counter[str]) -> None:
    lab.run_until("encode", encoded, tiles={"min_child_tissue": 0.9})
    assert work["encode 20x"] == 12
    assert sum(read_bag(path).num_patches for path in features(encoded).values()) < 1900


def test_a_layer_that_is_distilled_now_must_be_there_and_others_do_no_harm(
    lab: Any, finished: Any, work: Counter[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    fewer, more = ({"stage1": {"loss": {"layers": layers}}} for layers in ([0], [0, 2]))
    lab.run_until("encode", out, **fewer)
    assert work["encode 20x"] == 12
    lab.run_until("encode", out, **more)
    assert work["encode 20x"] == 24
    lab.run_until("encode", out, **fewer)
    lab.run_until("encode", out, targets="on_the_fly")
    assert work["encode 20x"] == 24


@pytest.mark.parametrize("how", ["truncated", "noise", "empty", "of another program"])
def test_a_damaged_file_is_made_again_and_no_other(lab: Any, encoded: Path, work: Counter[str], how: str) -> None:
    path = features(encoded)["S004"]
    whole = path.read_bytes()
    if how == "of another program":
        path.unlink()
        with h5py.File(path, "w") as handle:
            handle["features"] = np.zeros((3, 32), np.float32)
            handle["coords"] = np.zeros((3, 2), np.int64)
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "noise": b"noise" * 200, "empty": b""}[how])
    lab.run_until("encode", encoded)
    assert work["encode 20x"] == 1
    with h5py.File(path) as handle:
        assert len(handle["features"]) > 16


def test_a_changed_slide_redoes_that_slide_and_the_folds_that_learn_from_it(
    lab: Any, finished: Any, work: Counter[str], tmp_path: Path
) -> None:
    """Its own features and answers in every fold; training only where it trains or validates."""
    slide_id = sorted(finished.splits["0"]["test"])[0]
    table = pd.read_csv(lab.table)
    table["path"] = [str(lab.table.parent / path) for path in table["path"]]
    row = table.index[table["slide_id"] == slide_id][0]
    twin = table.loc[table["slide_id"] != slide_id, "path"].iloc[0]
    table.loc[row, "path"] = str(shutil.copy(twin, tmp_path / f"{slide_id}.tif"))
    table.to_csv(tmp_path / "cohort.csv", index=False)
    out = finished.copy(tmp_path / "run")
    lab.run_until("student", out, cohort={"table": str(tmp_path / "cohort.csv")})
    assert work["tile"] == work["encode 20x"] == 1
    assert work["stage 1"] == work["label head"] == work["student head"] == 2

    def same(name: str) -> bool:
        return (out / "folds" / name).read_bytes() == (finished.out / "folds" / name).read_bytes()

    assert all(same(f"0/{step}.safetensors") for step in ("stage1/encoder", "teacher/head", "student/head"))
    assert not any(same(f"1/{step}.safetensors") for step in ("stage1/encoder", "teacher/head", "student/head"))
    assert [p.stem for p in sorted((out / "folds/0/features").glob("*.h5")) if not same(f"0/features/{p.name}")] == [
        slide_id
    ]
    assert not same("0/student/outputs.npz"), "fold 0 says something else about the new slide"


def test_nan_in_a_feature_file_names_the_slide(lab: Any, encoded: Path) -> None:
    with h5py.File(features(encoded)["S007"], "r+") as handle:
        handle["features"][3, 5] = np.nan
    with pytest.raises(CorruptBag, match=r"S007\.h5.*NaN.*row 3"):
        lab.run_until("teacher", encoded)


def test_an_encoder_that_overflows_names_the_slide(lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def overflow(*args: Any, **kwargs: Any) -> Any:
        raise EncoderError("tiny: features computed in float16 are not finite.", fix="Use precision=float32.")

    monkeypatch.setattr("lrmil.inference.stream.encoding.embed", overflow)
    with pytest.raises(EncoderError, match=r"^S001: tiny: .*not finite\. Use precision=float32"):
        lab.run_until("encode", tmp_path / "run")
