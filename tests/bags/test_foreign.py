from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from lrmil.bags import read_bag, read_foreign_bag, write_bag, write_trident_bag
from lrmil.bags.foreign import detect_format
from lrmil.errors import BagError, CorruptBag

COORDS = np.array([[0, 4096], [512, 4096], [1024, 4608]], np.int64)
FEATURES = np.arange(12, dtype=np.float32).reshape(3, 4) / 8
TRIDENT = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "name": "slide-1",
    "savetodir": "/job/20x_256px_0px_overlap",
    "level0_width": 40_000,
    "level0_height": 30_000,
}


def trident_file(path, *, features=True, **changes):
    with h5py.File(path, "w") as handle:
        coords = handle.create_dataset("coords", data=COORDS, chunks=(1, 2), maxshape=(None, 2))
        coords.attrs.update(TRIDENT | changes)
        if features:
            dataset = handle.create_dataset("features", data=FEATURES, chunks=(1, 4), maxshape=(None, 4))
            dataset.attrs.update({"name": "slide-1", "savetodir": "/job", "encoder": "uni_v1"})
    return path


def clam_files(folder, *, downsample=(1.0, 1.0), patch_size=512, coords=COORDS, **extra):
    for name in ("h5_files", "pt_files", "patches"):
        (folder / name).mkdir()
    with h5py.File(folder / "h5_files/s.h5", "w") as handle:
        handle.create_dataset("features", data=FEATURES, chunks=(1, 4), maxshape=(None, 4))
        handle.create_dataset("coords", data=COORDS.astype(np.int32), chunks=(1, 2), maxshape=(None, 2))
    torch.save(torch.from_numpy(FEATURES), folder / "pt_files/s.pt")
    with h5py.File(folder / "patches/s.h5", "w") as handle:
        dataset = handle.create_dataset("coords", data=coords, chunks=(1, 2), maxshape=(None, 2))
        dataset.attrs["patch_size"] = patch_size
        dataset.attrs["patch_level"] = 1
        dataset.attrs["downsample"] = downsample
        dataset.attrs["level_dim"] = (100, 200)
        dataset.attrs["downsampled_level_dim"] = (100, 200)
        dataset.attrs["name"] = "s"
        dataset.attrs["save_path"] = "patches"
        dataset.attrs.update(extra)
    return folder


def stamp_file(path, coords_um, **attributes):
    with h5py.File(path, "w") as handle:
        handle["coords"] = coords_um
        handle["feats"] = FEATURES.astype(np.float16)
        handle.attrs.update(attributes)
    return path


# TRIDENT


def test_trident_features(tmp_path):
    bag = read_foreign_bag(trident_file(tmp_path / "slide-1.h5"))
    np.testing.assert_array_equal(bag.features, FEATURES)
    np.testing.assert_array_equal(bag.coords_l0, COORDS)
    assert (bag.patch_side_l0, bag.patch_px, bag.dimensions_l0) == (512, 256, (40_000, 30_000))
    assert bag.slide == "slide-1"
    assert bag.provenance["encoder"] == "uni_v1"
    assert bag.mpp is None  # 20x is a name, not a scale
    assert bag.mpp_l0 is None


def test_a_name_with_folders_in_it_stays_a_name(tmp_path):
    assert read_foreign_bag(trident_file(tmp_path / "a.h5", name="../../elsewhere")).slide == "elsewhere"
    assert read_foreign_bag(trident_file(tmp_path / "a.h5", name="None")).slide == "a"


def test_trident_mpp_follows_from_that_of_level_0(tmp_path):
    bag = read_foreign_bag(trident_file(tmp_path / "slide-1.h5"), mpp_l0=0.2525)
    assert bag.mpp == pytest.approx(0.505)


def test_trident_coordinates_alone_and_none_as_text(tmp_path):
    path = trident_file(tmp_path / "slide-1_patches.h5", features=False, level0_width="None")
    bag = read_foreign_bag(path)
    assert bag.features.shape == (3, 0)
    assert bag.dimensions_l0 is None


def test_trident_empty_slide(tmp_path):
    path = tmp_path / "e.h5"
    with h5py.File(path, "w") as handle:
        handle.create_dataset("coords", data=np.empty((0, 2), np.int64)).attrs.update(TRIDENT)
        handle.create_dataset("features", data=np.empty((0, 4), np.float32))
    assert read_foreign_bag(path).num_patches == 0


def test_trident_slide_embedding_is_no_bag(tmp_path):
    path = trident_file(tmp_path / "s.h5", features=False)
    with h5py.File(path, "r+") as handle:
        handle["features"] = np.zeros(768, np.float32)
    with pytest.raises(BagError, match="embedding of the whole slide"):
        read_foreign_bag(path)


def test_trident_round_trip_is_exactly_its_layout(tmp_path):
    bag = read_foreign_bag(trident_file(tmp_path / "in.h5", overlap=32))
    out = tmp_path / "out" / "slide-1.h5"
    write_trident_bag(out, bag)
    with h5py.File(out, "r") as handle:
        assert set(handle) == {"coords", "features"}
        assert not handle.attrs
        features, coords = handle["features"], handle["coords"]
        assert (features.dtype, features.chunks, features.maxshape) == (np.float32, (1, 4), (None, 4))
        assert (coords.dtype, coords.chunks, coords.maxshape) == (np.int64, (1, 2), (None, 2))
        np.testing.assert_array_equal(features[:], FEATURES)
        np.testing.assert_array_equal(coords[:], COORDS)
        assert dict(coords.attrs) == TRIDENT | {"overlap": 32, "savetodir": str(out.parent)}
        assert dict(features.attrs) == {"name": "slide-1", "savetodir": str(out.parent), "encoder": "uni_v1"}
    assert read_foreign_bag(out).patch_side_l0 == 512


def test_our_bag_for_trident_says_none_where_unknown(tmp_path, make_bag):
    write_trident_bag(tmp_path / "a.h5", make_bag(mpp_l0=None, dimensions_l0=None, mpp=2.0, patch_side_l0=2047.6))
    with h5py.File(tmp_path / "a.h5", "r") as handle:
        attributes = dict(handle["coords"].attrs)
    assert attributes["level0_width"] == "None"
    assert attributes["level0_magnification"] == "None"
    assert attributes["target_magnification"] == 5
    assert attributes["patch_size_level0"] == 2048


def test_trident_layout_needs_features_and_places(tmp_path, make_bag):
    with pytest.raises(BagError, match="lacks one of them"):
        write_trident_bag(tmp_path / "a.h5", make_bag(coords_l0=None))
    assert not (tmp_path / "a.h5").exists()


# Ours


def test_our_own_file_is_recognised_and_reads_as_trident_would(tmp_path, make_bag):
    bag = make_bag()
    write_bag(tmp_path / "slide-1.h5", bag)
    np.testing.assert_array_equal(read_foreign_bag(tmp_path / "slide-1.h5").slot, bag.slot)
    with h5py.File(tmp_path / "slide-1.h5", "r+") as handle:
        del handle.attrs["lrmil"]  # what a tool sees that does not know ours
        assert detect_format(handle) == "trident"
    seen = read_foreign_bag(tmp_path / "slide-1.h5", mpp_l0=0.25)
    np.testing.assert_array_equal(seen.features, bag.features)
    assert seen.mpp == bag.mpp
    assert seen.dimensions_l0 == bag.dimensions_l0


# CLAM


def test_clam_features_alone_do_not_know_their_size(tmp_path):
    bag = read_foreign_bag(clam_files(tmp_path) / "h5_files/s.h5")
    np.testing.assert_array_equal(bag.coords_l0, COORDS)
    assert bag.coords_l0.dtype == np.int64
    assert bag.patch_side_l0 is None
    assert bag.mpp is None


@pytest.mark.parametrize("as_folder", [True, False])
def test_clam_joined_with_its_patches(tmp_path, as_folder):
    folder = clam_files(tmp_path, downsample=(4.0, 4.0), patch_size=256)
    patches = folder / "patches" if as_folder else folder / "patches/s.h5"
    bag = read_foreign_bag(folder / "h5_files/s.h5", patches=patches, mpp_l0=0.25)
    assert bag.patch_side_l0 == 1024  # patch_size counts pixels of patch_level, not of level 0
    assert bag.mpp == pytest.approx(1.0)
    np.testing.assert_array_equal(bag.features, FEATURES)


def test_clam_downsample_is_not_truncated_and_custom_downsample_counts(tmp_path):
    folder = clam_files(tmp_path, downsample=(3.9997, 4.0003), patch_size=256, custom_downsample=2)
    assert read_foreign_bag(folder / "patches/s.h5").patch_side_l0 == pytest.approx(2048.0)


def test_clam_patches_of_other_features(tmp_path):
    shifted = COORDS.copy()
    shifted[1, 0] += 1
    folder = clam_files(tmp_path, coords=shifted)
    with pytest.raises(CorruptBag, match=r"row 1 lies at \[512, 4096\], in the coordinate file at \[513, 4096\]"):
        read_foreign_bag(folder / "h5_files/s.h5", patches=folder / "patches")


def test_clam_patches_with_another_number_of_rows(tmp_path):
    folder = clam_files(tmp_path, coords=COORDS[:2])
    with pytest.raises(CorruptBag, match="3 rows of features, but the coordinate file has 2"):
        read_foreign_bag(folder / "pt_files/s.pt", patches=folder / "patches")


def test_clam_patches_missing_from_the_folder(tmp_path):
    folder = clam_files(tmp_path)
    with pytest.raises(BagError, match=r"no coordinates of s there \(looked for s.h5 and s_patches.h5\)"):
        read_foreign_bag(folder / "h5_files/s.h5", patches=folder / "pt_files")


def test_clam_old_files_with_images(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as handle:
        images = handle.create_dataset("imgs", data=np.zeros((3, 16, 16, 3), np.uint8))
        images.attrs.update({"patch_level": 1, "wsi_name": "old", "downsample": (4.0, 4.0)})
        handle["coords"] = COORDS.astype(np.int32)
    bag = read_foreign_bag(tmp_path / "s.h5")
    assert (bag.slide, bag.patch_px, bag.patch_side_l0) == ("old", 16, 64)


def test_clam_patches_of_unknown_side(tmp_path):
    folder = clam_files(tmp_path)
    with h5py.File(folder / "patches/s.h5", "r+") as handle:
        del handle["coords"].attrs["patch_size"]
    with pytest.raises(CorruptBag, match="no `patch_size` beside `patch_level`"):
        read_foreign_bag(folder / "patches/s.h5")


def test_clam_level_squeezed_in_one_direction(tmp_path):
    folder = clam_files(tmp_path, downsample=(4.0, 2.0))
    with pytest.raises(CorruptBag, match="4 times smaller in x and 2 times in y"):
        read_foreign_bag(folder / "patches/s.h5")


# Tensor files


def test_tensor_file_has_no_places(tmp_path):
    folder = clam_files(tmp_path)
    bag = read_foreign_bag(folder / "pt_files/s.pt")
    np.testing.assert_array_equal(bag.features, FEATURES)
    assert bag.coords_l0 is None
    assert bag.mpp is None
    joined = read_foreign_bag(folder / "pt_files/s.pt", patches=folder / "patches")
    np.testing.assert_array_equal(joined.coords_l0, COORDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_tensor_file_of_other_precision(tmp_path, dtype):
    torch.save(torch.from_numpy(FEATURES).to(dtype), tmp_path / "s.pt")
    bag = read_foreign_bag(tmp_path / "s.pt")
    assert bag.features.dtype == (np.float16 if dtype == torch.float16 else np.float32)
    np.testing.assert_allclose(bag.features, FEATURES, rtol=1e-2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_tensor_file_holding_a_numpy_array(tmp_path, dtype):
    torch.save(FEATURES.astype(dtype), tmp_path / "s.pt")  # as TRIDENT saves
    np.testing.assert_array_equal(read_foreign_bag(tmp_path / "s.pt").features, FEATURES)


class _Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"features": _Payload()}, tmp_path / "s.pt")
    with pytest.raises(CorruptBag, match="objects other than plain arrays"):
        read_foreign_bag(tmp_path / "s.pt")
    assert "must not run" not in capsys.readouterr().out


def test_tensor_file_truncated_dict_or_integers(tmp_path):
    torch.save(torch.from_numpy(FEATURES), tmp_path / "s.pt")
    (tmp_path / "t.pt").write_bytes((tmp_path / "s.pt").read_bytes()[:200])
    with pytest.raises(CorruptBag, match="unreadable"):
        read_foreign_bag(tmp_path / "t.pt")
    torch.save({"feats_5x": torch.zeros(1)}, tmp_path / "d.pt")
    with pytest.raises(BagError, match="a dict of feats_5x"):
        read_foreign_bag(tmp_path / "d.pt")
    torch.save(torch.zeros(3, 4, dtype=torch.int64), tmp_path / "i.pt")
    with pytest.raises(CorruptBag, match="dtype int64"):
        read_foreign_bag(tmp_path / "i.pt")
    with pytest.raises(BagError, match="no such feature file"):
        read_foreign_bag(tmp_path / "none.pt")


# STAMP and mopadi

UM = np.array([[0.0, 1024.0], [128.0, 1024.0], [256.0, 1152.0]])


@pytest.mark.parametrize(
    "attributes",
    [
        {"tile_size_um": 128.0, "tile_size_px": 256, "unit": "um", "extractor": "ctranspath", "stamp_version": "2.3"},
        {"tile_size": 128.0, "unit": "um", "extractor": "ctranspath"},
    ],
)
def test_stamp_micrometres_become_level_0_pixels(tmp_path, attributes):
    path = stamp_file(tmp_path / "s.h5", UM, **attributes)
    bag = read_foreign_bag(path, mpp_l0=0.25)
    np.testing.assert_array_equal(bag.coords_l0, [[0, 4096], [512, 4096], [1024, 4608]])
    assert bag.patch_side_l0 == 512
    assert bag.mpp == (0.5 if "tile_size_px" in attributes else None)
    assert bag.provenance["encoder"] == "ctranspath"


def test_stamp_rounds_to_the_nearest_pixel(tmp_path):
    path = stamp_file(tmp_path / "s.h5", np.array([[0, 0], [256, 512], [512, 256]]), tile_size_um=256.0)
    bag = read_foreign_bag(path, mpp_l0=0.4991)
    np.testing.assert_array_equal(bag.coords_l0, [[0, 0], [513, 1026], [1026, 513]])


def test_stamp_without_mpp_is_refused_unless_places_are_not_wanted(tmp_path):
    path = stamp_file(tmp_path / "s.h5", UM, tile_size_um=128.0, tile_size_px=256, unit="um")
    with pytest.raises(BagError, match=r"coordinates are micrometres.*cohort column mpp"):
        read_foreign_bag(path)
    bag = read_foreign_bag(path, coordinates=False)
    assert bag.coords_l0 is None
    assert bag.num_patches == 3


def test_stamp_unstated_unit_is_never_guessed(tmp_path):
    path = stamp_file(tmp_path / "s.h5", COORDS)
    bag = read_foreign_bag(path, mpp_l0=0.25)
    assert bag.coords_l0 is None
    assert "does not say what unit" in bag.provenance["coords"]
    np.testing.assert_array_equal(read_foreign_bag(path, coords_unit="px_l0").coords_l0, COORDS)
    np.testing.assert_array_equal(read_foreign_bag(path, coords_unit="um", mpp_l0=0.5).coords_l0, COORDS * 2)


def test_micrometres_declared_to_be_pixels(tmp_path):
    path = stamp_file(tmp_path / "s.h5", UM + 0.25)
    with pytest.raises(CorruptBag, match=r"row 0 are \[0.25, 1024.25\], not whole level-0 pixels"):
        read_foreign_bag(path, coords_unit="px_l0")


def test_a_real_bag_of_mopadi(shared_data):
    path = shared_data / "features" / "TCGA-AD-6964-01Z-00-DX1" / "features.h5"
    bag = read_foreign_bag(path)
    assert (bag.num_patches, bag.width) == (777, 512)
    assert bag.coords_l0 is None
    assert bag.mpp is None
    bag = read_foreign_bag(path, coords_unit="px_l0")
    # The tiles beside the file are named by their (x, y): each must be a row of the coordinates.
    tiles = [p.stem.removeprefix("Tile_").strip("()").split(",") for p in path.parent.glob("Tile_*.jpg")]
    assert len(tiles) == 3
    places = {tuple(row) for row in bag.coords_l0.tolist()}
    assert {(int(x), int(y)) for x, y in tiles} <= places


def test_a_real_bag_survives_our_own_store(shared_data, tmp_path):
    path = shared_data / "features" / "TCGA-AD-6964-01Z-00-DX1" / "features.h5"
    bag = read_foreign_bag(path, coords_unit="px_l0")
    write_bag(tmp_path / "a.h5", bag)
    again = read_bag(tmp_path / "a.h5")
    np.testing.assert_array_equal(again.coords_l0, bag.coords_l0)
    np.testing.assert_array_equal(again.features, bag.features.astype(np.float16))
    assert (tmp_path / "a.h5").stat().st_size < 0.6 * path.stat().st_size


# Neither


def test_nan_in_a_foreign_file_names_file_and_row(tmp_path):
    path = trident_file(tmp_path / "slide-1.h5")
    with h5py.File(path, "r+") as handle:
        handle["features"][2, 1] = np.inf
    with pytest.raises(CorruptBag, match=r"slide-1\.h5: .* first in row 2"):
        read_foreign_bag(path)


def test_unknown_layout_and_truncated_file(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as handle:
        handle["embeddings"] = np.zeros((2, 2))
    with pytest.raises(BagError, match=r"unknown layout \(it holds embeddings\)"):
        read_foreign_bag(tmp_path / "s.h5")
    path = trident_file(tmp_path / "t.h5")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CorruptBag, match="it is truncated"):
        read_foreign_bag(path)
