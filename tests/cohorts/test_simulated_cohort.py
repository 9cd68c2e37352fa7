"""Whole simulated cohorts: files, truth, plan, resuming."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from lrmil.cohorts.simulated import SimulatedSettings, preset, simulate_cohort
from lrmil.cohorts.simulated.cohort import draw_slide
from lrmil.cohorts.simulated.nuclei import KINDS
from lrmil.cohorts.simulated.painter import paint, paint_window
from lrmil.cohorts.simulated.plan import plan_cohort
from lrmil.cohorts.simulated.settings import NucleusSettings, ScannerSettings
from lrmil.cohorts.truth import area_mask, read_areas, read_nuclei
from lrmil.files import read_json
from lrmil.slides import open_slide

SMALL = preset("test", slides=3, patients=2, slide_px=768, nuclei=NucleusSettings(shapes=24))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_cohort(tmp_path_factory.mktemp("cohort"), SMALL)


def test_table_and_slides_fit_together(cohort: Path) -> None:
    table = pd.read_csv(cohort)
    assert list(table.columns) == ["slide_id", "patient_id", "label", "path", "mpp", "site"]
    assert len(table) == 3
    assert table["slide_id"].is_unique
    assert set(table["label"]) == {"positive", "negative"}
    for row in table.itertuples():
        with open_slide(cohort.parent / str(row.path)) as slide:
            assert slide.mpp == pytest.approx(0.5, rel=1e-3)
            assert slide.dimensions == (768, 768)
            assert len(slide.levels) == 3


def test_truth_matches_the_written_pixels(cohort: Path) -> None:
    for row in pd.read_csv(cohort).itertuples():
        nuclei = read_nuclei(cohort.parent / "truth" / f"{row.slide_id}.nuclei.npz")
        assert nuclei.kinds == KINDS
        with open_slide(cohort.parent / str(row.path)) as slide:
            image = slide.read(0, 0, 768, 768, 0.5)
        red = cv2.GaussianBlur(image[..., 0].astype(np.float32), (0, 0), 1.5)
        at = red[nuclei.y_l0.astype(int), nuclei.x_l0.astype(int)]
        tissue = area_mask(read_areas(cohort.parent / "truth" / f"{row.slide_id}.geojson", "tissue"), (768, 768), 1.0)
        assert np.median(at) < np.median(red[tissue]) - 20
        assert red[~tissue].mean() > 225
        assert tissue[nuclei.y_l0.astype(int), nuclei.x_l0.astype(int)].mean() > 0.98


def test_positive_areas_hold_the_positive_nuclei(cohort: Path) -> None:
    for row in pd.read_csv(cohort).itertuples():
        truth = cohort.parent / "truth"
        summary = read_json(truth / f"{row.slide_id}.json")
        nuclei = read_nuclei(truth / f"{row.slide_id}.nuclei.npz")
        areas = read_areas(truth / f"{row.slide_id}.geojson")
        mask = area_mask(areas, (768, 768), 1.0)
        if row.label == "negative":
            assert not areas
            assert summary["positive_share"] == 0
            assert not nuclei.in_positive_area.any()
            assert (nuclei.pattern > 0).mean() < 0.15  # reactive nuclei are in every slide
        else:
            inside = mask[nuclei.y_l0.astype(int), nuclei.x_l0.astype(int)]
            epithelial = nuclei.kind == 0
            assert (inside == nuclei.in_positive_area)[epithelial].mean() > 0.97
            assert (nuclei.pattern[epithelial & inside] > 0).mean() > 0.6
            assert 0.3 < summary["positive_share"] / summary["plan"]["positive_share"] < 2.0


def test_slides_do_not_depend_on_order_or_number() -> None:
    plans = plan_cohort(SMALL)
    alone = paint(draw_slide(SMALL, plans[2]), 300, 300, 0.5)
    draw_slide(SMALL, plans[0])
    again = paint(draw_slide(SMALL, plans[2]), 300, 300, 0.5)
    assert np.array_equal(alone, again)


def test_resume_keeps_finished_slides_and_redraws_missing_ones(tmp_path: Path) -> None:
    settings = SMALL.model_copy(update={"slide_px": 512})
    seen: list[str] = []
    table = simulate_cohort(tmp_path, settings, on_progress=lambda done, total, slide: seen.append(slide))
    assert sorted(seen) == ["S001", "S002", "S003"]
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "slides").iterdir()}
    (tmp_path / "truth" / "S002.json").unlink()  # killed while writing the second slide
    (tmp_path / "slides" / "S003.tif").unlink()
    seen.clear()
    simulate_cohort(tmp_path, settings, on_progress=lambda done, total, slide: seen.append(slide))
    assert sorted(seen) == ["", "S002", "S003"]
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "slides").iterdir()}
    assert {n: b for n, (_, b) in after.items()} == {n: b for n, (_, b) in before.items()}
    assert after["S001.tif"][0] == before["S001.tif"][0]
    assert table.is_file()


def test_other_settings_are_not_mistaken_for_done(tmp_path: Path) -> None:
    settings = preset("test", slides=2, patients=2, slide_px=512, nuclei=NucleusSettings(shapes=8))
    simulate_cohort(tmp_path, settings)
    before = (tmp_path / "slides" / "S001.tif").read_bytes()
    simulate_cohort(tmp_path, settings.model_copy(update={"seed": 2}))
    assert (tmp_path / "slides" / "S001.tif").read_bytes() != before


def test_pixels_of_an_interrupted_rewrite_do_not_stay_under_the_old_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = preset("test", slides=2, patients=2, slide_px=512, nuclei=NucleusSettings(shapes=8))
    other = first.model_copy(update={"seed": 2})
    simulate_cohort(tmp_path, first)
    before = (tmp_path / "slides" / "S001.tif").read_bytes()

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lrmil.cohorts.simulated.cohort.write_truth", interrupted)
        with pytest.raises(KeyboardInterrupt):
            simulate_cohort(tmp_path, other)
    assert (tmp_path / "slides" / "S001.tif").read_bytes() != before, "the pixels of the other are there"
    simulate_cohort(tmp_path, first)
    assert (tmp_path / "slides" / "S001.tif").read_bytes() == before


def test_processes_give_the_same_slides(tmp_path: Path) -> None:
    settings = preset("test", slides=2, patients=2, slide_px=512, nuclei=NucleusSettings(shapes=8))
    for name, processes in (("one", 1), ("two", 2)):
        simulate_cohort(tmp_path / name, settings, processes=processes)
    for slide in ("S001", "S002"):
        one, two = ((tmp_path / name / "slides" / f"{slide}.tif").read_bytes() for name in ("one", "two"))
        assert one == two
    assert (tmp_path / "one" / "cohort.csv").read_text() == (tmp_path / "two" / "cohort.csv").read_text()


def test_windows_join_without_a_seam() -> None:
    settings = SMALL.model_copy(update={"scanner": ScannerSettings(noise=0)})
    scene = draw_slide(settings, plan_cohort(settings)[0])
    whole = paint_window(scene, 200, 200, 400, 300, 0.5)
    left, right = (paint_window(scene, x, 200, 200, 300, 0.5) for x in (200, 400))
    assert np.abs(np.concatenate([left, right], axis=1).astype(int) - whole).max() <= 1


@pytest.mark.parametrize("name", ["test", "demo", "study"])
def test_labels_are_balanced_over_patients_and_sites(name: str) -> None:
    settings = preset(name)
    plans = pd.DataFrame([p.as_dict() for p in plan_cohort(settings)])
    assert len(plans) == settings.slides
    assert plans["patient_id"].nunique() == settings.patients
    by_patient = plans.groupby("patient_id")
    assert (by_patient["label"].nunique() == 1).all()
    assert (by_patient["site"].nunique() == 1).all()
    assert by_patient.size().max() > 1
    assert abs(plans["label"].mean() - 0.5) < 0.11
    shares = by_patient.first().groupby("site")["label"].mean()
    assert len(shares) == settings.sites
    assert ((shares > 0.39) & (shares < 0.61)).all()
    assert (plans["positive_share"] > 0).equals(plans["label"] == 1)


def test_neither_order_nor_names_tell_the_label() -> None:
    plans = pd.DataFrame([p.as_dict() for p in plan_cohort(preset("study"))])
    number = plans["slide_id"].str[1:].astype(int)
    patient = plans["patient_id"].str[1:].astype(int)
    assert abs(np.corrcoef(number, plans["label"])[0, 1]) < 0.2
    assert abs(np.corrcoef(patient, plans["label"])[0, 1]) < 0.25


def test_many_classes_get_their_own_label() -> None:
    settings = preset("test", slides=14, patients=14, classes=7)
    assert sorted({p.label for p in plan_cohort(settings)}) == list(range(7))
    with pytest.raises(ValueError, match="less than or equal to 7"):
        preset("test", classes=8)


def test_survival_follows_the_positive_share() -> None:
    settings = preset("study", slides=400, patients=400, target="survival")
    plans = pd.DataFrame([p.as_dict() for p in plan_cohort(settings)])
    assert 0.1 < 1 - plans["event"].mean() < 0.6
    assert (plans["time"] > 0).all()
    rank = plans[["positive_share", "time"]].rank().corr().iloc[0, 1]
    assert rank < -0.25


def test_share_target_writes_the_realised_share(tmp_path: Path) -> None:
    settings = preset("test", slides=2, patients=2, slide_px=512, target="share", nuclei=NucleusSettings(shapes=8))
    table = pd.read_csv(simulate_cohort(tmp_path, settings))
    truth = [read_json(tmp_path / "truth" / f"{s}.json")["positive_share"] for s in table["slide_id"]]
    assert table["label"].to_list() == pytest.approx(truth, abs=1e-4)


def test_40x_slides_have_their_mpp(tmp_path: Path) -> None:
    settings = SimulatedSettings(slides=2, patients=2, slide_px=512, mpp=0.25, nuclei=NucleusSettings(shapes=8))
    table = pd.read_csv(simulate_cohort(tmp_path, settings))
    with open_slide(tmp_path / table["path"][0]) as slide:
        assert slide.mpp == pytest.approx(0.25, rel=1e-3)
