"""The ceiling with as many truths as one likes: other slides, once each, and drawn in the curve."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.studies.conftest import PATCH_PX, RATIO, TINY

from lrmil.errors import ConfigError
from lrmil.pipeline.reporting import Reporter
from lrmil.studies import ceiling_study
from lrmil.studies.ceiling_study import WAYS, CeilingStudySettings, load_ceiling_study, run_ceiling_study
from lrmil.studies.curve import read_curve

PROBE = f"""
fields:
  simulated: {{seed: 7, slides: 4, patients: 4, slide_px: 640, target: share, nuclei: {{visibility: 1.0, shapes: 8}}}}
  fields_per_slide: 2
encoder: {{name: {TINY}, random_seed: 1}}
patch_px: {PATCH_PX}
ratio: {RATIO}
targets: [epithelial_share, log_count]
min_nuclei: 1
"""
CONFIG = """
studies: [seen.yaml]
seed: 8
slides: 5
fields_per_slide: 3
val_share: 0.2
regions: [4, 12]
recipe: {epochs: 2, learning_rate: 0.01}
resamples: 100
"""


def quiet() -> Reporter:
    return Reporter(quiet=True, stream=io.StringIO())


@pytest.fixture
def settings(tmp_path: Path) -> CeilingStudySettings:
    (tmp_path / "seen.yaml").write_text(PROBE)
    (tmp_path / "small.yaml").write_text(CONFIG)
    return load_ceiling_study(tmp_path / "small.yaml")


def test_it_learns_from_other_slides_and_is_asked_about_the_studys(settings: CeilingStudySettings) -> None:
    written = run_ceiling_study(settings, quiet())
    assert [path.name for path in written] == ["small.csv", "small.md"]
    found = pd.read_csv(written[0])
    asked = [(way, count, target) for count in (4, 12) for way in WAYS for target in ("epithelial_share", "log_count")]
    assert list(zip(found["way"], found["regions"], found["target"], strict=True)) == asked
    assert (found["visibility"] == 1.0).all()
    assert ((found["r2_low"] <= found["r2"]) & (found["r2"] <= found["r2_high"])).all()
    assert "visibility 1" in written[1].read_text()

    assert settings.out is not None
    stored = json.loads((Path(settings.out) / "seen" / "network_12.json").read_text())
    truth, said = np.array(stored["truth"])[:, 1], np.array(stored["predicted"])[:, 1]
    r2 = 1 - ((truth - said) ** 2).mean() / truth.var()
    row = found[(found["target"] == "log_count") & (found["regions"] == 12)].iloc[-1]
    assert row["r2"] == pytest.approx(r2, abs=1e-4), "the mean over all regions, by hand"
    assert len(truth) == 4 * 2 * 4, "the four corners of each field"


def test_no_slide_both_teaches_and_chooses_the_epoch(
    settings: CeilingStudySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[set[str], int]] = []
    real = ceiling_study._looked_at

    def watch(fields, views, probe):  # type: ignore[no-untyped-def]
        asked.append(({own.group for own in fields}, sum(map(len, views))))
        return real(fields, views, probe)

    monkeypatch.setattr(ceiling_study, "_looked_at", watch)
    run_ceiling_study(settings.model_copy(update={"regions": (12,)}), quiet())
    assert len(asked) == 3, "once for both ways"
    (test, _), (train, taught), (val, chosen) = asked
    assert not train & val
    assert (len(test), len(train), len(val)) == (4, 4, 1)
    assert (taught, chosen) == (12, 3)
    asked.clear()
    run_ceiling_study(settings.model_copy(update={"regions": (12,)}), quiet())
    assert not asked, "nothing is done twice"


@pytest.mark.parametrize(
    ("changed", "anew"),
    [
        # The weights are the same.
        (PROBE.replace("random_seed: 1", "random_seed: 1, position_embedding: legacy_slice"), {"ridge", "network"}),
        # A network is trained and asked in float32 either way.
        (PROBE + "precision: bfloat16\n", {"ridge"}),
    ],
)
def test_what_changes_the_answers_is_learned_from_anew(
    settings: CeilingStudySettings, monkeypatch: pytest.MonkeyPatch, changed: str, anew: set[str]
) -> None:
    one = settings.model_copy(update={"regions": (12,)})
    run_ceiling_study(one, quiet())
    done: set[str] = set()

    def watch(way: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            done.add(way)
            return real(*args)

        return watched

    for way in WAYS:
        monkeypatch.setattr(ceiling_study, f"_by_{way}", watch(way, getattr(ceiling_study, f"_by_{way}")))
    Path(settings.studies[0]).write_text(changed)
    run_ceiling_study(one, quiet())
    assert done == anew


def test_what_cannot_be_is_refused(settings: CeilingStudySettings) -> None:
    with pytest.raises(ConfigError, match="13 regions are asked for, 12 are there"):
        run_ceiling_study(settings.model_copy(update={"regions": (13,)}), quiet())
    with pytest.raises(ConfigError, match="Choose another seed"):
        run_ceiling_study(settings.model_copy(update={"seed": 7}), quiet())


def test_the_curve_shows_it_in_place_of_the_studys_own() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs" / "evidence"
    summaries = sorted(docs.glob("visibility-*_summary.json"))
    ceiling = docs / "ceiling.csv"
    told = pd.read_csv(ceiling)
    shown = read_curve(summaries, ceiling)
    own = shown[shown["arm"] == "ceiling"]
    assert own["title"].unique().tolist() == [f"5x, trained on {told['regions'].max()} true regions"]
    assert not own.duplicated(["study", "target"]).any()
    assert len(own) == len(told[["study", "target"]].drop_duplicates())
    with pytest.raises(ConfigError, match="no such table"):
        read_curve(summaries, docs / "nowhere.csv")
    others = read_curve(summaries)
    for row in own.to_dict("records"):
        same = told[(told["study"] == row["study"]) & (told["target"] == row["target"])]
        assert row["r2"] == same.loc[same["regions"] == same["regions"].max(), "r2"].max()
    assert len(shown[shown["arm"] != "ceiling"]) == len(others[others["arm"] != "ceiling"])


def test_the_committed_config_has_slides_of_its_own() -> None:
    folder = Path(__file__).resolve().parents[2] / "evidence"
    settings = load_ceiling_study(folder / "ceiling.yaml")
    assert all(Path(path).is_file() for path in settings.studies)
    others = [path for path in folder.glob("*.yaml") if path.name != "ceiling.yaml"]
    assert not [path.name for path in others if f"seed: {settings.seed}" in path.read_text()]
