"""20x against 5x on assembled slides, from config to what is published."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from lrmil.cohorts.crchisto import CLASSES
from lrmil.encoders import Encoder, EncoderCard, save_encoder
from lrmil.encoders.vit import build_trunk
from lrmil.errors import ConfigError
from lrmil.pipeline.reporting import Reporter
from lrmil.studies.gaps import figure, load_gaps, run_gaps, to_markdown
from lrmil.studies.on_slides import OnSlides

EVIDENCE = Path(__file__).resolve().parents[2] / "evidence"

CONFIG = """
title: tiny gaps
crchisto: {crchisto}
cohorts:
  a few: {{groups: 4, slides_per_group: 2, fields: [4, 5], window_px: 128}}
  more: {{groups: 4, slides_per_group: 4, fields: [4, 5], window_px: 128}}
tasks: {{label: classification, inflammatory_share: regression}}
run:
  grid: {{patch_px: 32}}
  encoder: {{name: {encoder}}}
  folds: {{num_folds: 3}}
  teacher: {{epochs: 2}}
  student: {{epochs: 2}}
  evaluation: {{bootstrap: 100, timed_slides: 0}}
  compare: {{jobs: 1}}
  device: cpu
  threads: 1
"""


@pytest.fixture(scope="module")
def fields_of_500_px(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight fields of dots; half hold a focus."""
    folder = tmp_path_factory.mktemp("crchisto500")
    (folder / "images").mkdir()
    rng = np.random.default_rng(3)
    nuclei, images = [], []
    for number in range(1, 9):
        image = np.full((500, 500, 3), (200, 150, 225), np.uint8)
        kinds = np.repeat([0, 1, 2, 3], [20, 40, 120 if number % 2 else 10, 5])
        xy = rng.uniform(8, 492, (len(kinds), 2))
        for (x, y), kind in zip(xy, kinds, strict=True):
            cv2.circle(image, (int(x), int(y)), 4 + int(kind), (110 - 20 * int(kind), 40, 90), -1)
        cv2.imwrite(str(folder / "images" / f"img{number}.png"), image)
        nuclei += [(f"img{number}", x, y, CLASSES[k]) for (x, y), k in zip(xy, kinds, strict=True)]
        images.append({"image": f"img{number}", **{f"n_{c}": int((kinds == i).sum()) for i, c in enumerate(CLASSES)}})
    pd.DataFrame(nuclei, columns=["image", "x", "y", "cls"]).to_csv(folder / "nuclei.csv.gz", index=False)
    pd.DataFrame(images).to_csv(folder / "images.csv", index=False)
    return folder


def test_every_cohort_is_asked_every_task_and_nothing_is_distilled(
    tmp_path: Path, fields_of_500_px: Path, tiny_card: EncoderCard
) -> None:
    torch.manual_seed(0)
    encoder = Encoder(tiny_card, build_trunk(tiny_card), input_px=32, embedding="cls", weights_source="drawn at random")
    config = tmp_path / "tiny.yaml"
    config.write_text(
        CONFIG.format(crchisto=fields_of_500_px, encoder=save_encoder(encoder, tmp_path / "encoder")), encoding="utf-8"
    )
    settings = load_gaps(config)
    written = run_gaps(settings, Reporter(quiet=True, stream=io.StringIO()), publish=tmp_path / "docs")
    assert [path.name for path in written] == ["tiny.csv", "tiny.md", "tiny.png", "tiny_settings.json"]
    assert str(fields_of_500_px) not in written[3].read_text(), "no path of this machine is published"

    found = pd.read_csv(written[0])
    asked = [(c, t) for c in ("a few", "more") for t in ("label", "inflammatory_share")]
    assert list(zip(found["cohort"], found["task"], strict=True)) == asked
    assert found["metric"].tolist() == ["auc", "pearson"] * 2
    assert found["slides"].tolist() == [8, 8, 16, 16]
    assert (found["groups"] == 4).all()
    assert found["gap"].to_numpy() == pytest.approx((found["hr"] - found["lr"]).to_numpy(), abs=1e-4)
    own = pd.read_csv(tmp_path / "out/tiny/more/run/tasks/label/compare/results.csv").set_index("method")
    assert found["hr"].iloc[2] == pytest.approx(own.loc["ABMIL", "auc"], abs=1e-5)
    assert found["lr_low"].iloc[2] == pytest.approx(own.loc["LR without distillation", "auc_low"], abs=1e-5)

    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert models
    assert not [path for path in models if "stage1" in path.parts or "student" in path.parts]
    run_gaps(settings, Reporter(quiet=True, stream=io.StringIO()), publish=tmp_path / "docs")
    assert {path: path.stat().st_mtime_ns for path in models} == models, "nothing is trained twice"


def test_only_a_gap_whose_interval_lies_above_0_is_bold() -> None:
    row = {"cohort": "c", "slides": 9, "task": "t", "metric": "pearson"}
    row |= {f"{m}{e}": 0.5 for m in ("hr", "lr") for e in ("", "_low", "_high")}
    sure, unsure = ({"gap": 0.2, "gap_low": low, "gap_high": 0.4} for low in (0.01, -0.01))
    frame = pd.DataFrame([row | sure, row | unsure])
    lines = to_markdown(frame).splitlines()[2:]
    assert ["**" in line for line in lines] == [True, False]
    ax = figure(frame, "title").axes[0]
    assert len(ax.get_yticklabels()) == 2
    assert ax.yaxis_inverted(), "the first row is on top"


def test_an_interval_without_its_value_is_marked() -> None:
    sound = {"cohort": "c", "slides": 9, "task": "t", "metric": "pearson"}
    sound |= {f"{m}{e}": 0.5 for m in ("hr", "lr", "gap") for e in ("", "_low", "_high")}
    astray = sound | {"hr": 0.16, "hr_low": 0.02, "hr_high": 0.12}
    assert "†" not in to_markdown(pd.DataFrame([sound]))
    lines = to_markdown(pd.DataFrame([sound, astray])).splitlines()
    assert ["†" in line for line in lines[2:]] == [False, True, False, True]
    assert "0.16 [0.02, 0.12] † |" in lines[3]


def test_an_interval_that_is_undefined_is_no_interval_astray() -> None:
    row = {"cohort": "c", "slides": 9, "task": "t", "metric": "pearson"}
    row |= {f"{m}{e}": 0.5 for m in ("hr", "lr", "gap") for e in ("", "_low", "_high")}
    row |= {"hr_low": np.nan, "hr_high": np.nan}
    row |= {f"gap{e}": np.nan for e in ("", "_low", "_high")}
    frame = pd.DataFrame([row])
    text = to_markdown(frame)
    assert "†" not in text
    assert "nan" not in text
    assert "| 0.50, no interval | 0.50 [0.50, 0.50] | undefined |" in text
    assert len(figure(frame, "title").axes[0].get_yticklabels()) == 1


def test_the_committed_config_is_valid(tmp_path: Path) -> None:
    settings = load_gaps(EVIDENCE / "tissue-gaps.yaml", [f"crchisto={tmp_path}"])
    assert settings.crchisto == str(tmp_path)
    assert len(settings.cohorts) == 3
    with pytest.raises(ConfigError, match="cohorts, x"):
        run_gaps(
            settings.model_copy(update={"cohorts": {"x": {"groups": 1}}, "out": str(tmp_path)}),
            Reporter(quiet=True, stream=io.StringIO()),
        )
    with pytest.raises(ConfigError, match="punctuation"):
        load_gaps(EVIDENCE / "tissue-gaps.yaml", ["cohorts={a b: {}, a-b: {}}"])


def test_a_study_has_one_cohort() -> None:
    with pytest.raises(ValueError, match="either simulated or assembled"):
        OnSlides()
    with pytest.raises(ValueError, match="either simulated or assembled"):
        OnSlides.model_validate({"simulated": {}, "assembled": {}, "crchisto": "x"})
    with pytest.raises(ValueError, match="needs crchisto"):
        OnSlides.model_validate({"assembled": {}})
