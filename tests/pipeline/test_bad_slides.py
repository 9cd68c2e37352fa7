"""A slide that cannot be used is named with its stage and its reason, and costs nothing else."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile

from lrmil.bags import read_bag
from lrmil.errors import ConfigError, OutputError, UnreadableRegion
from lrmil.slides import Slide, open_slide, write_pyramid

Watch = Callable[[str, Callable[..., Any]], None]


def damage_level(path: Path, index: int) -> None:
    """Overwrite the compressed pixels of one level of a pyramidal TIFF."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[index]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    with path.open("r+b") as handle:
        for offset, count in places:
            handle.seek(offset)
            handle.write(b"\x00" * count)


def without_mpp(path: Path, image: np.ndarray[Any, Any]) -> None:
    tifffile.imwrite(path, image, tile=(256, 256), photometric="rgb", compression="jpeg")


@pytest.fixture(scope="module")
def bad_cohort(lab: Any, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twelve good slides, and one of every kind of bad one."""
    folder = tmp_path_factory.mktemp("bad")
    table = pd.read_csv(lab.table)
    table["path"] = [str(lab.table.parent / path) for path in table["path"]]
    good = Path(table["path"][0])
    with open_slide(good) as slide:
        image = slide.read(0, 0, 512, 512, 0.5)
    shutil.copy(shared_data / "bad" / "broken.svs", folder)
    shutil.copy(shared_data / "bad" / "unreadable.svs", folder)
    shutil.copy(shared_data / "bad" / "small.svs", folder)
    write_pyramid(folder / "glass.tif", np.full((512, 512, 3), 243, np.uint8), 0.5)
    without_mpp(folder / "no_mpp.tif", image)
    write_pyramid(folder / "coarse.tif", image, 1.0)
    shutil.copy(good, folder / "torn.tif")
    damage_level(folder / "torn.tif", 1)
    shutil.copy(good, folder / "torn_20x.tif")
    damage_level(folder / "torn_20x.tif", 0)
    rows = [
        {"slide_id": path.stem, "patient_id": f"B{i}", "label": "negative", "path": str(path), "mpp": None}
        for i, path in enumerate(sorted(folder.iterdir()))
    ]
    rows[[r["slide_id"] for r in rows].index("small")]["mpp"] = 0.5
    # What the other slides' files say is right; no_mpp has nothing to say.
    table["mpp"] = None
    pd.concat([table, pd.DataFrame(rows)]).to_csv(folder / "cohort.csv", index=False)
    return folder / "cohort.csv"


WANTED = {
    "broken": ("tile", "NotASlide"),
    "unreadable": ("tile", "SlideTooSmall"),
    "small": ("tile", "SlideTooSmall"),
    "glass": ("tile", "NoTissue"),
    "no_mpp": ("tile", "MissingMpp"),
    "coarse": ("encode", "SlideTooCoarse"),
    "torn": ("read", "TooManyUnreadable"),
    "torn_20x": ("encode", "TooManyUnreadable"),
}


@pytest.mark.usefixtures("no_report")
def test_bad_slides_are_listed_and_the_rest_is_evaluated(
    lab: Any, bad_cohort: Path, work: Counter[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    changes = {"cohort": {"table": str(bad_cohort)}, "evaluation": {"baselines": ["majority"]}, "deploy": False}
    outcome = lab.run(out, **changes)
    found = {f.slide_id: (f.stage, f.kind) for f in outcome.failures}
    assert found == WANTED
    with (out / "failures.csv").open() as handle:
        listed = {row["slide_id"]: row for row in csv.DictReader(handle)}
    assert {slide: (row["stage"], row["error"]) for slide, row in listed.items()} == WANTED
    for slide, row in listed.items():
        assert row["message"].startswith(slide), row
    assert "mpp" in listed["no_mpp"]["message"]
    good = {path.stem for path in (lab.table.parent / "slides").glob("*.tif")}
    assert set(pd.read_csv(out / "tables" / "predictions" / "lrmil.csv")["slide_id"]) == good
    assert {path.stem for path in out.glob("folds/1/features/*.h5")} == good

    # Once more: the bad ones are tried again, since a file may have been copied anew; nothing else is done.
    work.clear()
    weights = lab.times(out, "folds", "features")
    again = lab.run(out, **changes)
    assert {f.slide_id: (f.stage, f.kind) for f in again.failures} == WANTED
    assert lab.times(out, "folds", "features") == weights
    assert set(work) == {"tile", "encode 20x", "read 5x"}
    assert work["read 5x"] == 1


def test_a_slide_that_was_mended_joins(lab: Any, finished: Any, tmp_path: Path) -> None:
    """failures.csv is of the last run; a slide that failed before trains once its file is whole."""
    table = pd.read_csv(lab.table)
    table["path"] = [str(lab.table.parent / path) for path in table["path"]]
    slide_id, whole = str(table["slide_id"][3]), Path(table["path"][3])
    mended = tmp_path / f"{slide_id}.tif"
    mended.write_bytes(b"half a copy")
    table.loc[3, "path"] = str(mended)
    table.to_csv(tmp_path / "cohort.csv", index=False)
    out, changes = tmp_path / "run", {"cohort": {"table": str(tmp_path / "cohort.csv")}}
    assert [f.slide_id for f in lab.run_until("encode", out, **changes).failures] == [slide_id]
    shutil.copy(whole, mended)
    outcome = lab.run_until("encode", out, **changes)
    assert not outcome.failures
    assert not (out / "failures.csv").exists()
    assert (out / "features" / "tiny_0.5mpp" / f"{slide_id}.h5").is_file()


def test_all_slides_bad_is_one_clear_error(lab: Any, bad_cohort: Path, tmp_path: Path) -> None:
    table = pd.read_csv(bad_cohort)
    bad = table[table["slide_id"].isin([*WANTED])].reset_index(drop=True)
    bad["label"] = ["negative", "positive"] * (len(bad) // 2)
    bad.to_csv(tmp_path / "cohort.csv", index=False)
    with pytest.raises(ConfigError, match=r"none of the 8 slides can be used; the first: \S+: .*failures\.csv"):
        lab.run(tmp_path / "run", cohort={"table": str(tmp_path / "cohort.csv")})
    assert len((tmp_path / "run" / "failures.csv").read_text().splitlines()) >= 9


def test_a_full_disk_stops_the_run_and_blames_no_slide(
    lab: Any, finished: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(path: Path, bag: Any) -> None:
        raise OutputError(f"{path}: the disk is full.", fix="Free some space.")

    monkeypatch.setattr("lrmil.pipeline.encode.write_bag", full)
    with pytest.raises(OutputError, match="disk is full"):
        lab.run_until("encode", tmp_path / "run")
    assert not (tmp_path / "run" / "failures.csv").exists()


def test_a_region_that_cannot_be_decoded_is_left_out_and_said(
    lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Below `max_unreadable` the slide stays; its region is in no bag and in no training batch."""
    original = Slide.read_box

    def torn(self: Slide, box: Any, size: Any, out: Any = None) -> Any:
        if self.name == "S001" and size == (32, 32) and box[:2] == victim:
            raise UnreadableRegion("torn", slide=self.name)
        return original(self, box, size, out)

    run = lab.parts(tmp_path / "run")
    lab.run_until("tile", tmp_path / "run")
    with np.load(run.folder.tiles("S001")) as grid:
        victim = tuple(int(v) for v in grid["region_boxes_l0"][2, :2])
        regions = len(grid["region_boxes_l0"])
    monkeypatch.setattr(Slide, "read_box", torn)
    outcome = lab.run_until("distill", tmp_path / "run")
    assert not outcome.failures
    bag = read_bag(tmp_path / "run" / "folds" / "0" / "features" / "S001.h5")
    assert sorted(bag.region) == [row for row in range(regions) if row != 2]
