"""The curve over visibilities shows what the studies found, in their order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lrmil.errors import ConfigError
from lrmil.studies.curve import read_curve, write_curve


def publish(folder: Path, name: str, visibility: float | None, gap: bool = True) -> Path:
    simulated = None if visibility is None else {"nuclei": {"visibility": visibility}}
    settings = {"fields": {"simulated": simulated}, "recipes": [{"name": "paper", "title": "as the paper"}]}
    path = folder / f"{name}_summary.json"
    path.write_text(json.dumps({"settings": settings}), encoding="utf-8")
    rows = []
    for arm, embedding, r2 in (
        ("hr", "cls", 0.8),
        ("lr", "cls", 0.2),
        ("paper", "cls", 0.5),
        ("ceiling", "direct", 0.6),
    ):
        row = {"target": "positive_share", "arm": arm, "embedding": embedding}
        row |= {"r2": r2, "r2_low": r2 - 0.1, "r2_high": r2 + 0.1}
        found = 0.5 if gap and arm == "paper" else np.nan
        rows.append(row | {"recovery": found, "recovery_low": found - 0.2, "recovery_high": found + 0.2})
    pd.DataFrame(rows).to_csv(folder / f"{name}_results.csv", index=False)
    return path


def test_studies_stand_in_the_order_of_visibility(tmp_path: Path) -> None:
    paths = [publish(tmp_path, "b", 1.0), publish(tmp_path, "a", 0.0, gap=False)]
    curve = read_curve(paths)
    assert list(dict.fromkeys(curve["visibility"])) == [0.0, 1.0]
    assert set(curve["title"]) == {"20x: 16 children", "5x, not distilled", "as the paper", "5x, trained on truth"}
    table, picture = write_curve(paths, "paper", "cls", tmp_path / "curve")
    shown = pd.read_csv(table).set_index(["visibility", "arm"])
    assert np.isnan(shown.loc[(0.0, "paper"), "recovery"]), "nothing is recovered of a gap that is not there"
    assert shown.loc[(1.0, "paper"), "recovery"] == 0.5
    assert picture.stat().st_size > 5000


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    good, real = publish(tmp_path, "good", 0.5), publish(tmp_path, "real", None)
    with pytest.raises(ConfigError, match="simulated tissue"):
        read_curve([good, real])
    with pytest.raises(ConfigError, match=r"missing_summary\.json"):
        read_curve([tmp_path / "missing_summary.json"])
    with pytest.raises(ConfigError, match="no study has a recipe 'other'"):
        write_curve([good], "other", "cls", tmp_path / "curve")
