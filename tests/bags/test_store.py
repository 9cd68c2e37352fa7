from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrmil.bags import bag_is_current, hdf5, map_rows, read_bag, write_bag
from lrmil.errors import BagError, CorruptBag, OutputError, ProvenanceMismatch

ARRAYS = ("features", "coords_l0", "region", "slot", "region_tissue")
SCALE = ("patch_side_l0", "mpp", "mpp_l0", "patch_px", "dimensions_l0", "slide")


@pytest.fixture
def written(tmp_path, make_bag):
    bag = make_bag()
    path = tmp_path / "features" / "slide-1.h5"
    write_bag(path, bag)
    return path, bag


def test_what_is_written_is_read(written):
    path, bag = written
    again = read_bag(path)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(bag, name))
        assert getattr(again, name).dtype == getattr(bag, name).dtype
    for name in SCALE:
        assert getattr(again, name) == getattr(bag, name)
    assert sorted(again.layer_cls) == [0, 1, 11]
    np.testing.assert_array_equal(again.layer_cls[11], bag.layer_cls[11])
    assert again.provenance["encoder"] == {"name": "vit", "weights_sha256": "ff"}
    assert again.provenance["software"]["h5py"] == h5py.__version__


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 30), width=st.integers(1, 9), layers=st.sets(st.integers(0, 40), max_size=3))
def test_round_trip_of_any_size(tmp_path, make_bag, n, width, layers):
    cls = {layer: np.full((n, 3), layer, np.float16) for layer in layers}
    bag = make_bag(n, width, layer_cls=cls)
    write_bag(tmp_path / "a.h5", bag)
    again = read_bag(tmp_path / "a.h5")
    np.testing.assert_array_equal(again.features, bag.features)
    np.testing.assert_array_equal(again.coords_l0, bag.coords_l0)
    assert set(again.layer_cls) == layers
    rows = np.arange(n)[::-1].copy()
    np.testing.assert_array_equal(read_bag(tmp_path / "a.h5", rows=rows).features, bag.features[rows])


def test_layout_on_disk_is_contiguous_half_precision(written):
    with h5py.File(written[0], "r") as handle:
        for name in ("features", "coords", "region", "slot", "region_tissue", "layer_cls/0", "layer_cls/11"):
            assert handle[name].chunks is None, name
            assert handle[name].compression is None
        assert handle["features"].dtype == np.float16
        assert handle["layer_cls/1"].dtype == np.float16
        assert handle["coords"].dtype == np.int64
        assert handle["coords"][1].tolist() == [512, 4096]  # (x, y)
        attributes = dict(handle["coords"].attrs)
        assert json.loads(handle.attrs["lrmil"])["provenance"]["config_hash"] == "0123456789ab"
        assert {"name", "savetodir", "encoder"} == set(handle["features"].attrs)
        assert handle["features"].attrs["encoder"] == "vit"
    assert attributes["patch_size"] == 256
    assert attributes["patch_size_level0"] == 512
    assert attributes["level0_magnification"] == 40
    assert attributes["target_magnification"] == 20
    assert attributes["overlap"] == 0
    assert (attributes["level0_width"], attributes["level0_height"]) == (40_000, 30_000)
    assert attributes["name"] == "slide-1"


def test_float32_features_are_stored_as_float16(tmp_path, make_bag):
    values = np.linspace(-3, 3, 96, dtype=np.float32).reshape(12, 8)
    write_bag(tmp_path / "a.h5", make_bag(features=values))
    np.testing.assert_array_equal(read_bag(tmp_path / "a.h5").features, values.astype(np.float16))


def test_values_beyond_float16_are_refused_not_turned_into_infinity(tmp_path, make_bag):
    values = np.zeros((12, 8), np.float32)
    values[4, 2] = -1e5
    with pytest.raises(CorruptBag, match=r"features row 4 holds 1e\+05; float16 ends at 65504"):
        write_bag(tmp_path / "a.h5", make_bag(features=values))
    assert sorted(p.name for p in tmp_path.iterdir()) == []


def test_a_layer_beyond_float16_is_kept_in_float32_and_the_others_are_not(tmp_path, make_bag):
    """Class tokens of some networks have channels of such sizes; clipped, they would teach something else."""
    large = np.linspace(-2e5, 3, 72, dtype=np.float32).reshape(12, 6)
    write_bag(tmp_path / "a.h5", make_bag(layer_cls={3: large, 4: np.ones((12, 6), np.float32)}))
    again = read_bag(tmp_path / "a.h5").layer_cls
    np.testing.assert_array_equal(again[3], large)
    assert (again[3].dtype, again[4].dtype) == (np.float32, np.float16)
    mapped = map_rows(tmp_path / "a.h5", ["layer_cls/3"])["layer_cls/3"]
    np.testing.assert_array_equal(mapped[np.array([7, 0])], large[[7, 0]])


def test_only_what_is_asked_for_is_read(written):
    path, bag = written
    places = read_bag(path, features=False, layers=())
    assert places.features.shape == (12, 0)
    assert places.layer_cls == {}
    np.testing.assert_array_equal(places.coords_l0, bag.coords_l0)
    one = read_bag(path, layers=[11], rows=slice(2, 5))
    assert list(one.layer_cls) == [11]
    np.testing.assert_array_equal(one.layer_cls[11], bag.layer_cls[11][2:5])
    np.testing.assert_array_equal(one.slot, bag.slot[2:5])


def test_scattered_rows_come_in_the_order_asked_for(written):
    path, bag = written
    rows = np.array([9, 0, 9, 4])
    part = read_bag(path, rows=rows)
    np.testing.assert_array_equal(part.features, bag.features[rows])
    np.testing.assert_array_equal(part.coords_l0, bag.coords_l0[rows])
    assert type(part.features) is np.ndarray


def test_unread_features_are_not_touched(tmp_path, make_bag):
    path = tmp_path / "a.h5"
    write_bag(path, make_bag())
    with h5py.File(path, "r+") as handle:
        handle["features"][3, 0] = np.nan
    assert read_bag(path, features=False).num_patches == 12
    with pytest.raises(CorruptBag, match=r"a\.h5: .*features holds NaN or infinity, first in row 3"):
        read_bag(path)


def test_a_layer_that_was_not_kept(written):
    with pytest.raises(ProvenanceMismatch, match=r"layer 10 were not kept \(kept: \[0, 1, 11\]\)"):
        read_bag(written[0], layers=[0, 10])


def test_a_bag_without_coordinates_cannot_be_stored(tmp_path, make_bag):
    with pytest.raises(BagError, match="no coordinates"):
        write_bag(tmp_path / "a.h5", make_bag(coords_l0=None))


# What it was made from


def test_current_means_same_provenance_whatever_the_software(written):
    path, bag = written
    assert bag_is_current(path, bag.provenance)
    assert bag_is_current(path, {"encoder": {"name": "vit"}})
    assert bag_is_current(path, {**bag.provenance, "software": {"torch": "0.1"}})
    assert not bag_is_current(path, {**bag.provenance, "config_hash": "ba9876543210"})
    assert not bag_is_current(path, {**bag.provenance, "precision": "float32"})
    assert not bag_is_current(path.with_name("other.h5"), bag.provenance)


def test_tuples_and_numpy_numbers_compare_like_what_json_makes_of_them(tmp_path, make_bag):
    provenance = {"cls_layers": (0, 1), "mpp": np.float64(0.5), "origin": np.array([3, 4]), 7: "seven"}
    write_bag(tmp_path / "a.h5", make_bag(provenance=provenance))
    assert bag_is_current(tmp_path / "a.h5", provenance)


def test_another_encoder_is_named(written):
    path, bag = written
    wanted = {**bag.provenance, "encoder": {"name": "vit", "weights_sha256": "aa"}}
    with pytest.raises(ProvenanceMismatch) as caught:
        read_bag(path, expected=wanted)
    message = str(caught.value)
    assert "encoder.weights_sha256 is 'ff' in the file and 'aa' here" in message
    assert "encoder.name" not in message
    assert str(path) in message
    assert "encode again" in message


def test_another_config_is_named(written):
    with pytest.raises(
        ProvenanceMismatch, match=r"config_hash is '0123456789ab' in the file and 'x' here; seed is missin"
    ):
        read_bag(written[0], expected={"config_hash": "x", "seed": 3})


# Damage


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_truncated_files_are_refused_and_not_current(written, share):
    path, bag = written
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CorruptBag, match=r"slide-1\.h5"):
        read_bag(path)
    assert not bag_is_current(path, bag.provenance)


def test_a_missing_file_and_a_foreign_file(tmp_path):
    with pytest.raises(BagError, match="no such feature file"):
        read_bag(tmp_path / "none.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as handle:
        handle["features"] = np.zeros((2, 2))
    with pytest.raises(BagError, match="not a feature file of lrmil"):
        read_bag(tmp_path / "foreign.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(CorruptBag, match="not a readable HDF5 file"):
        read_bag(tmp_path / "text.h5")


def test_rows_that_do_not_correspond(written):
    path, bag = written
    with h5py.File(path, "r+") as handle:
        del handle["coords"]
        handle["coords"] = np.zeros((5, 2), np.int64)
    with pytest.raises(CorruptBag, match=r"rows do not correspond: features \(12, 8\), coords \(5, 2\)"):
        read_bag(path, layers=())
    assert not bag_is_current(path, bag.provenance)


def test_a_lost_dataset(written):
    with h5py.File(written[0], "r+") as handle:
        del handle["features"]
    with pytest.raises(CorruptBag, match="there is no dataset `features`"):
        read_bag(written[0])


def test_a_format_of_the_future(written):
    with h5py.File(written[0], "r+") as handle:
        about = json.loads(handle.attrs["lrmil"])
        handle.attrs["lrmil"] = json.dumps(about | {"format": 99})
    with pytest.raises(BagError, match="format 99"):
        read_bag(written[0])


def test_a_locked_file_is_read(written):
    """In a process of its own, since HDF5 looks at its environment once: another test may have switched locks off."""
    script = textwrap.dedent("""
        import fcntl, sys
        import h5py
        from lrmil.bags import read_bag
        with open(sys.argv[1], "r+b") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                h5py.File(sys.argv[1], "r", locking=True)
            except OSError:
                print("a plain reader is locked out;", read_bag(sys.argv[1]).num_patches, "patches read")
    """)
    environment = {k: v for k, v in os.environ.items() if k != "HDF5_USE_FILE_LOCKING"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(written[0])], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "a plain reader is locked out; 12 patches read\n"


# Writing fails


class _FullDisk(io.FileIO):
    """A file on a disk with 2,000 bytes left."""

    def write(self, data):
        if self.tell() + len(data) > 2000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_leaves_the_old_file_or_none(written, make_bag, monkeypatch):
    path, bag = written
    with monkeypatch.context() as patch:
        patch.setattr(hdf5, "_raw_file", lambda scratch: _FullDisk(str(scratch), "w+"))
        for target in (path, path.with_name("new.h5")):
            with pytest.raises(OutputError, match="the disk is full"):
                write_bag(target, make_bag(200, 32, seed=1, layer_cls={}))
    assert sorted(p.name for p in path.parent.iterdir()) == ["slide-1.h5"]
    np.testing.assert_array_equal(read_bag(path).features, bag.features)
    write_bag(path.with_name("new.h5"), make_bag(200, 32, layer_cls={}))
    assert read_bag(path.with_name("new.h5")).num_patches == 200


def test_a_real_limit_on_file_size(tmp_path):
    """The kernel refuses the write half-way: one clear error, no file left, nothing still open."""
    script = textwrap.dedent("""
        import os, resource, signal, sys
        import numpy as np
        from lrmil.bags import Bag, write_bag
        from lrmil.errors import OutputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        bag = Bag(features=np.ones((2000, 64), np.float16), coords_l0=np.zeros((2000, 2), np.int64))
        try:
            write_bag(sys.argv[1] + "/a.h5", bag)
        except OutputError as error:
            print("OutputError", error)
        open_files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")] \
            if os.path.isdir("/proc/self/fd") else []
        print("left:", os.listdir(sys.argv[1]), [f for f in open_files if ".h5" in f])
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "OutputError" in done.stdout
    assert "File too large" in done.stdout
    assert "left: [] []" in done.stdout


def test_a_failure_of_ours_half_way_leaves_nothing(tmp_path, make_bag):
    with pytest.raises(BagError, match="attributes up to"):
        write_bag(tmp_path / "a.h5", make_bag(provenance={"long": "x" * 70_000}))
    assert sorted(p.name for p in tmp_path.iterdir()) == []
