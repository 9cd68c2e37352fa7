"""What cannot work is refused at the start, in one line, before a folder is made or a slide is opened."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lrmil.errors import CohortError, LrmilError
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.run import run_until


def table_with(lab: Any, folder: Path, **columns: Any) -> str:
    table = pd.read_csv(lab.table)
    table["path"] = [str(lab.table.parent / path) for path in table["path"]]
    for name, values in columns.items():
        table[name] = values
    table.to_csv(folder / "cohort.csv", index=False)
    return str(folder / "cohort.csv")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grid": {"patch_px": 40}}, "GridMismatch", "token grid is 5 x 5, which cannot be cut into 4 x 4"),
        ({"grid": {"patch_px": 36}}, "GridMismatch", "8"),
        ({"encoder": {"name": "lrmil-smal"}}, "UnknownEncoder", "lrmil-small"),
        ({"encoder": {"name": "conch-v1", "weights": "/none/w.bin"}}, "WeightsUnavailable", "/none/w.bin"),
        (
            {"stage1": {"loss": {"layers": [0, 7]}}},
            "ConfigError",
            r"\[7\] cannot be distilled, the encoder has 3 blocks",
        ),
        ({"teacher": {"head": {"name": "abml"}}}, "HeadError", "abmil"),
        ({"student": {"head": {"options": {"gate": True}}}}, "HeadError", "gated"),
        (
            {"student": {"head": {"options": {"instance_classifier": "none"}}, "loss": {"hard_mode": "hidden"}}},
            "ConfigError",
            "needs the head's instance_classifier: hidden",
        ),
        ({"encoder": {"precision": "float16"}}, "ConfigError", "CPU does not compute in float16"),
        (
            {"encoder": {"student_embedding": "cls+token_mean"}},
            "ConfigError",
            r"a saved encoder has .* its embedding \(cls\)",
        ),
        (
            {
                "encoder": {"name": "lrmil-small", "student_embedding": "token_mean", "embedding": "cls+token_mean"},
                "stage1": {"loss": {"lambda_attention_feature": 1.0}},
            },
            "ConfigError",
            "student's embedding of 128 numbers with the teacher's of 256",
        ),
        (
            {"evaluation": {"baselines": ["random_encoder"]}},
            "ConfigError",
            "saved encoder, which cannot .*Leave random_encoder out",
        ),
        ({"cohort": {"task": "grade"}}, "CohortError", "no label column 'grade'"),
        ({"cohort": {"classes": ["a", "b"]}}, "CohortError", "is not among the classes"),
        ({"folds": {"num_folds": 6}}, "CohortError", "fewer patients than the 6 folds"),
        ({"device": "cuda:99"}, "ConfigError", "cuda:99"),
        (
            {"stage1": {"student": {"name": "dinov2-smal"}}},
            "UnknownEncoder",
            "stage1.student: there is no encoder 'dinov2-smal'.*dinov2-small",
        ),
        (
            {"stage1": {"student": {"name": "lrmil-small", "input_px": 40}}},
            "GridMismatch",
            "stage1.student, lrmil-small: .* 5 x 5, which cannot be cut into 4 x 4.*Choose another stage1.student.inp",
        ),
        (
            {"stage1": {"student": {"name": "lrmil-small", "input_px": 36}}},
            "GridMismatch",
            "stage1.student: .* 36 px cannot be cut into tokens of 8 px",
        ),
        (
            {"stage1": {"student": {"name": "lrmil-small", "depth": 2, "layer_pairs": [[1, 2]]}}},
            "ConfigError",
            r"layer_pairs: \[1, 2\] pairs no distilled block",
        ),
        (
            {"stage1": {"student": {"name": "lrmil-small", "random_seed": 0}, "loss": {"layers": [0, 1]}}},
            "ConfigError",
            "above 6 would stay random",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    lab: Any, tmp_path: Path, changes: dict[str, Any], error: str, message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(LrmilError, match=message) as caught:
        lab.run(out, **changes)
    assert type(caught.value).__name__ == error
    assert not out.exists()


@pytest.mark.parametrize("slide_id", ["../../up", "a/b", "..", "/root"])
def test_a_slide_id_that_cannot_name_a_file_is_refused(lab: Any, tmp_path: Path, slide_id: str) -> None:
    ids = list(pd.read_csv(lab.table)["slide_id"])
    table = table_with(lab, tmp_path, slide_id=[slide_id, *ids[1:]])
    with pytest.raises(LrmilError, match="cannot be the name of a file"):
        lab.run(tmp_path / "run", cohort={"table": table})
    assert not (tmp_path / "run").exists()


def test_a_cohort_of_features_alone_is_refused(lab: Any, tmp_path: Path) -> None:
    table = pd.read_csv(lab.table)[["slide_id", "patient_id", "label"]]
    table["features"] = [f"{slide}.h5" for slide in table["slide_id"]]
    for name in table["features"]:
        (tmp_path / name).write_bytes(b"features")
    table.to_csv(tmp_path / "cohort.csv", index=False)
    with pytest.raises(LrmilError, match=r"12 slides have no path.*distillation needs pixels"):
        lab.run(tmp_path / "run", cohort={"table": str(tmp_path / "cohort.csv")})


def test_a_fold_without_validation_slides_is_refused_before_training(
    lab: Any, finished: Any, work: Any, tmp_path: Path
) -> None:
    patients = pd.read_csv(lab.table)["patient_id"]
    parts = ["train" if int(patient[1:]) % 2 else "test" for patient in patients]
    table = table_with(lab, tmp_path, fold_1=parts)
    with pytest.raises(LrmilError, match="fold 1 of 1 has no validation slide"):
        lab.run(finished.copy_features(tmp_path / "run"), cohort={"table": table})
    assert not work


def test_folds_without_any_test_slide_are_refused_before_training(
    lab: Any, finished: Any, work: Any, tmp_path: Path
) -> None:
    patients = pd.read_csv(lab.table)["patient_id"]
    table = table_with(lab, tmp_path, fold_1=["train" if int(patient[1:]) % 3 else "val" for patient in patients])
    with pytest.raises(LrmilError, match="no fold has a slide to test"):
        lab.run(finished.copy_features(tmp_path / "run"), cohort={"table": table})
    assert not work


def test_a_deployed_model_without_a_part_is_refused_before_training(
    lab: Any, finished: Any, work: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Slides that fail may be all of those that were to choose its epoch."""

    def fail(run: Any, usable: Any) -> None:
        raise CohortError("final model has no validation slide.")

    monkeypatch.setattr("lrmil.pipeline.run.deployment_split", fail)
    with pytest.raises(CohortError, match="final model"):
        lab.run(finished.copy_features(tmp_path / "run"))
    assert not work


@pytest.mark.parametrize(
    "name", ["config.yaml", "cohort.csv", "failures.csv", "figures/mine.png", "model/mine.bin", "tables/mine.csv"]
)
def test_what_no_run_wrote_is_not_replaced(lab: Any, tmp_path: Path, name: str) -> None:
    """`out: .` in a project's folder must not cost its figures, nor the table that the run reads."""
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("grid: {patch_px: 32}  # mine")
    with pytest.raises(LrmilError, match=f"holds {name.split('/')[0]}, which no run wrote"):
        lab.run_until("tile", tmp_path)
    assert mine.read_text() == "grid: {patch_px: 32}  # mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def test_a_patient_with_two_labels_is_legal_and_said(lab: Any, tmp_path: Path) -> None:
    table = pd.read_csv(lab.table)
    twice = table["patient_id"][table["patient_id"].duplicated()].iloc[0]
    row = table.index[table["patient_id"] == twice][0]
    labels = list(table["label"])
    labels[row] = {"positive": "negative", "negative": "positive"}[labels[row]]
    path = table_with(lab, tmp_path, label=labels)
    shown = StringIO()
    settings = lab.settings(tmp_path / "run", cohort={"table": path})
    run_until("tile", settings, Reporter(stream=shown))
    assert "1 patients have slides of more than one label" in shown.getvalue()
    with pytest.raises(LrmilError, match="more than one label"):
        lab.run(tmp_path / "other", cohort={"table": path, "label_level": "patient"})
