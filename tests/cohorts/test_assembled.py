"""Slides assembled from labelled fields: groups, labels, mosaics, resuming, refusals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy.io import savemat

from lrmil.cohorts.assembled import (
    AssembledSettings,
    assemble_cohort,
    deal_groups,
    is_positive,
    plan_slides,
)
from lrmil.cohorts.crchisto import CLASSES, read_crchisto
from lrmil.cohorts.mosaic import compose
from lrmil.cohorts.truth import area_mask, read_areas, read_nuclei
from lrmil.errors import CohortError
from lrmil.files import read_json
from lrmil.slides import open_slide

SMALL = AssembledSettings(groups=2, slides_per_group=2, fields=(4, 5))
DOTS = {"epithelial": (255, 0, 0), "fibroblast": (0, 160, 0), "inflammatory": (0, 0, 255), "others": (0, 0, 0)}


def _nuclei(rng: np.random.Generator, inflamed: bool, epithelium: bool) -> pd.DataFrame:
    counts = {"epithelial": 12 * epithelium, "fibroblast": 15, "inflammatory": 60 if inflamed else 12, "others": 4}
    rows = []
    for name, count in counts.items():
        points = rng.uniform(8, 492, (count, 2))
        rows.append(pd.DataFrame({"x": points[:, 0], "y": points[:, 1], "cls": name}))
    return pd.concat(rows, ignore_index=True)


def _picture(rng: np.random.Generator, nuclei: pd.DataFrame) -> np.ndarray:
    """A pink field with a coloured dot at every nucleus."""
    image = np.full((500, 500, 3), (230, 170, 200), np.uint8)
    image[..., 1] = np.clip(image[..., 1] + rng.integers(-15, 15, (500, 500)), 0, 255)
    for row in nuclei.itertuples():
        cv2.circle(image, (int(row.x), int(row.y)), 5, DOTS[str(row.cls)], -1)
    return image


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight fields in the prepared layout; half hold a focus."""
    folder = tmp_path_factory.mktemp("crchisto")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    tables, rows = [], []
    for number in range(1, 9):
        name = f"img{number}"
        nuclei = _nuclei(rng, inflamed=number % 2 == 0, epithelium=number > 4)
        cv2.imwrite(str(folder / "images" / f"{name}.png"), _picture(rng, nuclei)[..., ::-1])
        tables.append(nuclei.assign(image=name)[["image", "x", "y", "cls"]])
        rows.append({"image": name} | {f"n_{c}": int((nuclei["cls"] == c).sum()) for c in CLASSES})
    pd.concat(tables).to_csv(folder / "nuclei.csv.gz", index=False)
    pd.DataFrame(rows).to_csv(folder / "images.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def original(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same fields as they were released: one folder each, coordinates in .mat files."""
    folder = tmp_path_factory.mktemp("CRCHistoPhenotypes_2016_04_28")
    nuclei = pd.read_csv(prepared / "nuclei.csv.gz")
    for name, own in nuclei.groupby("image"):
        home = folder / "Classification" / str(name)
        home.mkdir(parents=True)
        image = cv2.imread(str(prepared / "images" / f"{name}.png"))
        cv2.imwrite(str(home / f"{name}.bmp"), image)
        for cls in CLASSES:
            points = own.loc[own["cls"] == cls, ["x", "y"]].to_numpy()
            savemat(home / f"{name}_{cls}.mat", {"detection": points})
    return folder


@pytest.fixture(scope="module")
def cohort(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble_cohort(prepared, tmp_path_factory.mktemp("assembled"), SMALL)


def test_groups_never_share_fields(shared_data: Path) -> None:
    images = read_crchisto(shared_data / "crchisto")
    settings = AssembledSettings(groups=12)
    groups = deal_groups(images, settings)
    names = [image.name for group in groups for image in group]
    assert sorted(names) == sorted(image.name for image in images)
    home = {image.name: f"G{g + 1:02d}" for g, group in enumerate(groups) for image in group}
    for slide in plan_slides(groups, settings):
        assert {home[piece.image] for piece in slide.pieces} == {slide.group}


@pytest.mark.parametrize("task", ["inflammatory", "epithelium"])
def test_groups_are_balanced_for_the_label(shared_data: Path, task: str) -> None:
    settings = AssembledSettings.model_validate({"task": task, "groups": 14})
    groups = deal_groups(read_crchisto(shared_data / "crchisto"), settings)
    positives = [sum(is_positive(i, task, settings) for i in group) for group in groups]
    sizes = [len(group) for group in groups]
    assert max(positives) - min(positives) <= 1
    assert max(sizes) - min(sizes) <= 1
    assert min(positives) >= 1
    assert all(s > p for s, p in zip(sizes, positives, strict=True))


def test_half_of_the_slides_of_each_group_are_positive(shared_data: Path) -> None:
    images = read_crchisto(shared_data / "crchisto")
    settings = AssembledSettings(groups=10, slides_per_group=6)
    slides = plan_slides(deal_groups(images, settings), settings)
    assert len(slides) == 60
    assert Counter((s.group, s.positive) for s in slides) == {
        (f"G{g:02d}", flag): 3 for g in range(1, 11) for flag in (True, False)
    }
    by_name = {image.name: image for image in images}
    for slide in slides:
        assert 4 <= len(slide.pieces) <= 12
        flags = [by_name[p.image].count("inflammatory") >= 30 for p in slide.pieces]
        assert flags == [p.positive for p in slide.pieces]
        assert any(flags) == slide.positive
        assert np.mean(flags) <= 0.5
    assert len({(p.quarter_turns, p.mirrored) for s in slides for p in s.pieces}) == 8


def test_label_rules() -> None:
    settings = AssembledSettings()
    assert (settings.min_inflammatory, settings.min_epithelial) == (30, 1)


def test_table_has_both_tasks_and_the_groups_as_patients(cohort: Path) -> None:
    table = pd.read_csv(cohort)
    assert len(table) == 4
    assert set(table["patient_id"]) == {"G01", "G02"}
    assert (table.groupby("patient_id")["label"].nunique() == 2).all()
    assert ((table["label"] == "positive") == (table["inflammatory"] == 1)).all()
    record = read_json(cohort.parent / "assembled.json")
    assert record["groups"] == 2
    for row in table.itertuples():
        pieces = record["slides"][row.slide_id]
        assert {p["image"] for p in pieces} <= set(record["group_images"][row.patient_id])
        late = [int(p["image"][3:]) > 4 for p in pieces]
        assert row.epithelium == int(any(late))
        nuclei = read_nuclei(cohort.parent / "truth" / f"{row.slide_id}.nuclei.npz")
        assert row.nuclei_per_mm2 == pytest.approx(len(nuclei) / (len(pieces) * 0.224**2), rel=1e-5)
        assert row.fibroblast_share == pytest.approx((nuclei.kind == CLASSES.index("fibroblast")).mean(), abs=1e-4)


def test_slides_open_at_20x(cohort: Path) -> None:
    for path in pd.read_csv(cohort)["path"]:
        with open_slide(cohort.parent / path) as slide:
            assert slide.mpp == pytest.approx(0.5, rel=1e-3)
            assert len(slide.levels) == 3


@pytest.mark.parametrize("window_px", [448, 256])
def test_truth_follows_every_turn_and_mirror(prepared: Path, window_px: int) -> None:
    """The dot of each nucleus lies, in its colour, where the table says."""
    settings = AssembledSettings(groups=2, slides_per_group=4, fields=(12, 12), window_px=window_px)
    images = read_crchisto(prepared)
    source = {image.name: image for image in images}
    pixels = {image.name: image.pixels() for image in images}
    turns = set()
    for slide in plan_slides(deal_groups(images, settings), settings):
        turns |= {(p.quarter_turns, p.mirrored) for p in slide.pieces}
        canvas, nuclei, corners = compose(slide, source, pixels)
        x, y = np.floor(nuclei.x_l0).astype(int), np.floor(nuclei.y_l0).astype(int)
        want = np.array([DOTS[name] for name in nuclei.kinds])[nuclei.kind]
        same = (np.abs(canvas[y, x].astype(int) - want) < 3).all(1)
        assert same.mean() > 0.9  # a few dots are covered by others
        assert nuclei.x_l0.min() >= corners[0][0]
    assert len(turns) == 8


def test_cells_lie_on_the_grids_of_regions(cohort: Path) -> None:
    for slide_id in pd.read_csv(cohort)["slide_id"]:
        for area in read_areas(cohort.parent / "truth" / f"{slide_id}.geojson", "field"):
            x0, y0 = area[0].min(0)
            assert x0 % 448 == 0
            assert y0 % 448 == 0
            assert (area[0].max(0) - area[0].min(0) == 448).all()
        first = np.min([a[0].min(0) for a in read_areas(cohort.parent / "truth" / f"{slide_id}.geojson", "field")], 0)
        assert (first % (2 * 448) == 0).all()


def test_positive_windows_are_positive_themselves(cohort: Path) -> None:
    for slide_id, label in pd.read_csv(cohort)[["slide_id", "label"]].itertuples(index=False):
        truth = cohort.parent / "truth"
        areas = read_areas(truth / f"{slide_id}.geojson")
        assert bool(areas) == (label == "positive")
        nuclei = read_nuclei(truth / f"{slide_id}.nuclei.npz")
        inflamed = nuclei.kind == CLASSES.index("inflammatory")
        for area in areas:
            mask = area_mask([area], (6000, 6000), 1.0)
            inside = mask[nuclei.y_l0.astype(int), nuclei.x_l0.astype(int)]
            assert (inside & inflamed).sum() >= 30


def test_resume_makes_only_what_is_missing(prepared: Path, tmp_path: Path) -> None:
    assemble_cohort(prepared, tmp_path, SMALL)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "slides").iterdir()}
    (tmp_path / "truth" / "A002.json").unlink()
    assemble_cohort(prepared, tmp_path, SMALL)
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "slides").iterdir()}
    assert {n: b for n, (_, b) in after.items()} == {n: b for n, (_, b) in before.items()}
    assert [n for n in after if after[n][0] != before[n][0]] == ["A002.tif"]


def test_pixels_of_an_interrupted_rewrite_do_not_stay_under_the_old_truth(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble_cohort(prepared, tmp_path, SMALL)
    before = {p.name: p.read_bytes() for p in (tmp_path / "slides").iterdir()}

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lrmil.cohorts.assembled.write_truth", interrupted)
        with pytest.raises(KeyboardInterrupt):
            assemble_cohort(prepared, tmp_path, SMALL.model_copy(update={"seed": 5}))
    assert {p.name: p.read_bytes() for p in (tmp_path / "slides").iterdir()} != before
    assemble_cohort(prepared, tmp_path, SMALL)
    assert {p.name: p.read_bytes() for p in (tmp_path / "slides").iterdir()} == before


def test_the_rule_of_the_other_task_counts(prepared: Path, tmp_path: Path) -> None:
    columns = {}
    for least in (1, 500, 1):
        table = assemble_cohort(prepared, tmp_path, SMALL.model_copy(update={"min_epithelial": least}))
        columns.setdefault(least, []).append(pd.read_csv(table)["epithelium"].tolist())
    assert sum(columns[1][0]) > 0
    assert columns[500] == [[0] * 4], "no field has so many"
    assert columns[1][0] == columns[1][1]


def test_another_seed_deals_other_groups(prepared: Path) -> None:
    images = read_crchisto(prepared)
    deals = [deal_groups(images, SMALL.model_copy(update={"seed": s})) for s in (1, 1, 2)]
    first, again, other = ([[i.name for i in g] for g in groups] for groups in deals)
    assert first == again
    assert first != other


def test_original_layout_gives_the_same_fields(prepared: Path, original: Path) -> None:
    for folder in (original, original / "Classification"):
        for a, b in zip(read_crchisto(prepared), read_crchisto(folder), strict=True):
            assert a.name == b.name
            assert [a.count(c) for c in CLASSES] == [b.count(c) for c in CLASSES]
            assert np.array_equal(a.pixels(), b.pixels())


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="does not hold CRCHistoPhenotypes"):
        assemble_cohort(tmp_path, tmp_path / "out", SMALL)
    with pytest.raises(CohortError, match="is not a folder"):
        assemble_cohort(tmp_path / "nowhere", tmp_path / "out", SMALL)
    (tmp_path / "images.csv").write_text("image,count\nimg1,3\n")
    with pytest.raises(CohortError, match="no column 'n_epithelial'"):
        assemble_cohort(tmp_path, tmp_path / "out", SMALL)


def test_a_missing_picture_and_a_wrong_count_are_named(prepared: Path, tmp_path: Path) -> None:
    for name in ("images.csv", "nuclei.csv.gz"):
        (tmp_path / name).write_bytes((prepared / name).read_bytes())
    with pytest.raises(CohortError, match=r"img1\.png is missing"):
        read_crchisto(tmp_path)
    (tmp_path / "images").symlink_to(prepared / "images")
    table = pd.read_csv(tmp_path / "images.csv")
    table.loc[2, "n_fibroblast"] += 1
    table.to_csv(tmp_path / "images.csv", index=False)
    with pytest.raises(CohortError, match="img3 has 15 fibroblast"):
        read_crchisto(tmp_path)


def test_too_many_groups_are_refused(prepared: Path) -> None:
    with pytest.raises(CohortError, match="Ask for at most 4 groups"):
        deal_groups(read_crchisto(prepared), AssembledSettings(groups=5))


def test_odd_numbers_of_slides_are_refused() -> None:
    with pytest.raises(ValueError, match="must be even"):
        AssembledSettings(slides_per_group=3)
