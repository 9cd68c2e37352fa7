"""Whole folders of feature files, in and out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from lrmil.bags import Bag, read_bag, read_foreign_bag, write_bag
from lrmil.bags.exchange import export_folder, import_folder
from lrmil.errors import BagError

FEATURES = np.arange(12, dtype=np.float32).reshape(3, 4) / 8
COORDS = np.array([[0, 4096], [512, 4096], [1024, 4608]], np.int64)


@pytest.fixture
def own(make_bag: Callable[..., Bag], tmp_path: Path) -> Path:
    """A folder of two of our files, and what a killed process left."""
    folder = tmp_path / "own"
    for seed, name in enumerate(("slide-1", "slide-2")):
        write_bag(folder / f"{name}.h5", make_bag(seed=seed, slide=name))
    (folder / ".slide-3.0123abcd.tmp.h5").write_bytes(b"half")
    return folder


def clam(folder: Path) -> Path:
    (folder / "patches").mkdir(parents=True)
    torch.save(torch.from_numpy(FEATURES), folder / "s.pt")
    with h5py.File(folder / "patches" / "s.h5", "w") as handle:
        dataset = handle.create_dataset("coords", data=COORDS)
        attributes = {"patch_size": 512, "patch_level": 0, "downsample": (1.0, 1.0), "level_dim": (9, 9), "name": "s"}
        dataset.attrs.update(attributes | {"downsampled_level_dim": (9, 9), "save_path": "patches"})
    return folder


def test_out_and_in_again_keeps_features_and_places(own: Path, tmp_path: Path) -> None:
    done, failures = export_folder(own, tmp_path / "trident")
    assert [path.name for path in done] == ["slide-1.h5", "slide-2.h5"]
    assert not failures
    with h5py.File(done[0]) as handle:
        assert "lrmil" not in handle.attrs, "TRIDENT's layout, not ours"
    back, failures = import_folder(tmp_path / "trident", tmp_path / "back", mpp_l0=0.25)
    assert not failures
    for path in back:
        before, after = read_bag(own / path.name), read_bag(path)
        assert np.array_equal(before.features, after.features)
        assert np.array_equal(before.coords_l0, after.coords_l0)
        assert (after.patch_side_l0, after.mpp_l0, after.slide) == (512.0, 0.25, before.slide)
        assert after.provenance["imported_from"] == path.name


def test_one_file_may_be_given(own: Path, tmp_path: Path) -> None:
    done, _ = export_folder(own / "slide-2.h5", tmp_path / "out")
    assert [path.name for path in done] == ["slide-2.h5"]


def test_clam_features_find_their_coordinates(tmp_path: Path) -> None:
    source = clam(tmp_path / "clam")
    done, failures = import_folder(source, tmp_path / "out", patches=source / "patches", mpp_l0=0.25)
    assert not failures
    bag = read_bag(done[0])
    assert np.array_equal(bag.coords_l0, COORDS)
    assert np.array_equal(bag.features, FEATURES.astype(np.float16))
    assert bag.patch_side_l0 == 512


def test_without_coordinates_a_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    done, failures = import_folder(clam(tmp_path / "clam"), tmp_path / "out")
    assert not done
    assert "the file holds none" in str(failures[0])
    assert "patches" in str(failures[0])
    assert not (tmp_path / "out").exists()


def test_a_real_mopadi_file_needs_to_be_told_its_unit(shared_data: Path, tmp_path: Path) -> None:
    source = next((shared_data / "features").glob("*/features.h5"))
    done, failures = import_folder(source, tmp_path / "out")
    assert not done
    assert "does not say what unit" in str(failures[0])
    done, failures = import_folder(source, tmp_path / "out", coords_unit="px_l0")
    assert not failures
    bag = read_bag(done[0])
    assert (bag.num_patches, bag.width) == (777, 512)
    assert bag.coords_l0 is not None
    assert bag.coords_l0[0].tolist() == [10240, 21504]
    with h5py.File(source) as handle:
        np.testing.assert_allclose(bag.features, handle["feats"][()], rtol=1e-3, atol=1e-6)
    in_um, _ = import_folder(source, tmp_path / "um", coords_unit="um", mpp_l0=0.5)
    assert read_bag(in_um[0]).coords_l0[0].tolist() == [20480, 43008]  # type: ignore[index]


def test_a_bad_file_stops_no_other(own: Path, tmp_path: Path) -> None:
    (own / "slide-1.h5").write_bytes((own / "slide-1.h5").read_bytes()[:3000])
    done, failures = export_folder(own, tmp_path / "out")
    assert [path.name for path in done] == ["slide-2.h5"]
    assert len(failures) == 1
    assert "slide-1.h5" in str(failures[0])


def test_a_file_is_not_replaced_by_its_own_copy(own: Path) -> None:
    before = (own / "slide-1.h5").read_bytes()
    done, failures = export_folder(own, own)
    assert not done
    assert all("would be replaced by its own copy" in str(error) for error in failures)
    assert (own / "slide-1.h5").read_bytes() == before


def test_two_files_of_one_slide_are_not_merged_silently(make_bag: Callable[..., Bag], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_bag(tmp_path / "own" / f"{name}.h5", make_bag(slide="slide-1"))
    done, failures = export_folder(tmp_path / "own", tmp_path / "out")
    assert len(done) == 1
    assert "is of the same slide as a.h5" in str(failures[0])


def test_coordinates_alone_are_no_features(tmp_path: Path) -> None:
    done, failures = import_folder(clam(tmp_path / "clam") / "patches", tmp_path / "out", mpp_l0=0.25)
    assert not done
    assert "no features" in str(failures[0])


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BagError, match=r"no \.h5 or \.pt file there"):
        import_folder(tmp_path, tmp_path / "out")


def test_what_was_exported_is_read_by_everyone(own: Path, tmp_path: Path) -> None:
    done, _ = export_folder(own, tmp_path / "out")
    assert read_foreign_bag(done[0]).provenance["source"] == "TRIDENT"
