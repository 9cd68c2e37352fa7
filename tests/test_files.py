"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lrmil.errors import OutputError
from lrmil.files import atomic_path, read_json, remove_leftovers, sha256, write_json, write_tensors, write_text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*"))


def write_half(final: Path, error: BaseException) -> None:
    with atomic_path(final) as scratch:
        scratch.write_bytes(b"half of the n")
        raise error


def test_makes_missing_folders_and_keeps_the_suffix(tmp_path: Path) -> None:
    final = tmp_path / "a" / "b" / "bag.h5"
    with atomic_path(final) as scratch:
        assert scratch.parent == final.parent
        assert scratch.suffix == ".h5"
        assert scratch != final
        scratch.write_bytes(b"whole")
        assert not final.exists()
    assert final.read_bytes() == b"whole"
    assert names(final.parent) == ["bag.h5"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError(errno.EIO, "io")])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    final = tmp_path / "table.csv"
    final.write_text("old")
    with pytest.raises(type(error)):
        write_half(final, error)
    assert names(tmp_path) == ["table.csv"]
    assert final.read_text() == "old"


def test_failure_of_a_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"):
        write_half(tmp_path / "x.json", ValueError("bad"))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
    ],
)
def test_the_system_says_no(tmp_path: Path, code: int, words: str) -> None:
    final = tmp_path / "bag.h5"
    final.write_bytes(b"old")
    with pytest.raises(OutputError, match=words) as caught:
        write_half(final, OSError(code, os.strerror(code)))
    assert str(final) in str(caught.value)
    assert caught.value.fix is not None
    assert final.read_bytes() == b"old"
    assert names(tmp_path) == ["bag.h5"]


def test_disk_that_fills_up_on_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_text(tmp_path / "x.txt", "text")
    assert names(tmp_path) == []


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("I am a file")
    for final in (tmp_path / "out" / "x.json", tmp_path / "out" / "deeper" / "x.json"):
        with pytest.raises(OutputError, match="is no folder"):
            write_json(final, {})
    assert names(tmp_path) == ["out"]


def test_two_writers_do_not_share_a_scratch_file(tmp_path: Path) -> None:
    final = tmp_path / "x.txt"
    with atomic_path(final) as first, atomic_path(final) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert final.read_text() == "first"  # the outer one is renamed last
    assert names(tmp_path) == ["x.txt"]


def test_json_writes_null_for_what_it_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {
        "nan": float("nan"),
        "inf": [float("inf"), -float("inf"), 1.5],
        "numpy": (np.float32("nan"), np.int64(3), np.bool_(True)),
        "array": np.array([[1.0, np.nan]]),
        3: "Ä µm",
    }
    write_json(path, value)
    text = path.read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_json(path) == {
        "nan": None,
        "inf": [None, None, 1.5],
        "numpy": [None, 3, True],
        "array": [[1.0, None]],
        "3": "Ä µm",
    }
    assert json.loads(text) == read_json(path)


def test_sha256_is_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"\x00\r\n" * 100_000)
    assert sha256(path) == hashlib.sha256(b"\x00\r\n" * 100_000).hexdigest()


def test_leftovers_of_killed_processes_are_removed_unless_young(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    with atomic_path(inner / "x.h5") as scratch:
        scratch.write_text("whole")
    old, young = inner / scratch.name, tmp_path / scratch.name
    others = [inner / ".tmp.h5", inner / "x.0123abcd.tmp.h5"]
    for path in (old, young, *others):
        path.write_text("half")
    for path in (old, *others):
        os.utime(path, (0, 0))
    assert remove_leftovers(tmp_path) == 1
    assert not old.exists()
    assert young.exists()
    assert all(path.exists() for path in (inner / "x.h5", *others))
    assert remove_leftovers(tmp_path / "missing") == 0


def test_tensors_come_back_and_may_be_read_by_whoever_may_read_the_other_files(tmp_path: Path) -> None:
    values = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, requires_grad=True)}
    write_tensors(tmp_path / "w.safetensors", values)
    stored = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in values.items())
    write_text(tmp_path / "w.txt", "text")
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "w.txt").stat().st_mode
    assert names(tmp_path) == ["w.safetensors", "w.txt"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", OutputError),
        ("Error while serializing: I/O error: Input/output error (os error 5)", OSError),
        ("Error while serializing: unknown", SafetensorError),
    ],
)
def test_tensors_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, error: type[Exception]
) -> None:
    """safetensors reports what the system says in an error of its own."""

    def fail(*_: object) -> NoReturn:
        raise SafetensorError(words)

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(error):
        write_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(2)})
    assert names(tmp_path) == []
