"""The directories (IFDs) of a TIFF or BigTIFF and their tags. TIFF 6.0, section 2, and the BigTIFF design.

tifffile knows far more, and takes milliseconds and a Python integer for each tile of a large slide; here offsets stay
arrays. Every number of the file is checked before it is used: the file may be damaged or malicious.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lrmil.slides.blocks import DecodeError
from lrmil.slides.tiff.file import RandomAccessFile

MAX_DIRECTORIES = 256
MAX_ENTRIES = 1024
SUB_IFDS = 330

_NUMBERS = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
"""unsigned types: BYTE, SHORT, LONG, IFD, LONG8, IFD8"""
_BYTES = {1, 2, 7}
"""BYTE, ASCII, UNDEFINED"""


class NotUnderstood(Exception):
    """The file, or a part that matters, is not of a kind that is read directly. The message says what it is."""


@dataclass(frozen=True)
class _Tag:
    kind: int
    count: int
    raw: bytes
    """the value, or its offset where it does not fit"""


class Directory:
    """One directory: tags by number."""

    def __init__(self, file: RandomAccessFile, order: str, big: bool, tags: Mapping[int, _Tag]) -> None:
        self._file = file
        self._order = order
        self._big = big
        self._tags = tags

    def __contains__(self, tag: int) -> bool:
        return tag in self._tags

    def numbers(self, tag: int) -> npt.NDArray[np.int64]:
        """Return the unsigned numbers of a tag, (n,); empty where it is absent.

        Raises:
            NotUnderstood: it holds no whole numbers, or ones beyond 2^63.
        """
        entry = self._tags.get(tag)
        if entry is None:
            return np.empty(0, np.int64)
        if entry.kind not in _NUMBERS:
            raise NotUnderstood(f"tag {tag} is of type {entry.kind}")
        dtype = np.dtype(self._order + _NUMBERS[entry.kind])
        values = np.frombuffer(self._value(tag, entry, dtype.itemsize), dtype)
        if dtype.itemsize == 8 and len(values) and values.max() > np.iinfo(np.int64).max:
            raise NotUnderstood(f"tag {tag} holds numbers beyond 2^63")
        return values.astype(np.int64)

    def number(self, tag: int, default: int | None = None) -> int:
        """Return the one number of a tag.

        Raises:
            NotUnderstood: it is absent and there is no default, or it holds several that differ.
        """
        values = self.numbers(tag)
        if not len(values):
            if default is None:
                raise NotUnderstood(f"tag {tag} is missing")
            return default
        if (values != values[0]).any():
            raise NotUnderstood(f"tag {tag} holds several numbers")
        return int(values[0])

    def data(self, tag: int) -> bytes:
        """Return the bytes of a tag, none where it is absent."""
        entry = self._tags.get(tag)
        if entry is None:
            return b""
        if entry.kind not in _BYTES:
            raise NotUnderstood(f"tag {tag} is of type {entry.kind}")
        return self._value(tag, entry, 1)

    def _value(self, tag: int, entry: _Tag, item_bytes: int) -> bytes:
        length = entry.count * item_bytes
        if length <= len(entry.raw):
            return entry.raw[:length]
        (offset,) = struct.unpack(self._order + ("Q" if self._big else "I"), entry.raw)
        try:
            return self._file.read_at(offset, length)
        except DecodeError as error:
            raise NotUnderstood(f"the value of tag {tag} is not there: {error}") from error


def read_directories(file: RandomAccessFile) -> tuple[Directory, ...]:
    """Return the directories of the main chain, in file order.

    Raises:
        NotUnderstood: it is no TIFF, or its chain is damaged, circular or longer than `MAX_DIRECTORIES`.
    """
    order, big, offset = _header(file)
    directories: list[Directory] = []
    seen: set[int] = set()
    while offset:
        if offset in seen or len(directories) >= MAX_DIRECTORIES:
            raise NotUnderstood("its directories form a circle, or are too many")
        seen.add(offset)
        directory, offset = _directory(file, order, big, offset)
        directories.append(directory)
    if not directories:
        raise NotUnderstood("it holds no image")
    return tuple(directories)


def sub_directories(directory: Directory) -> tuple[Directory, ...]:
    """Return what a directory's SubIFDs tag points to; OME-TIFF keeps the coarser levels there."""
    offsets = directory.numbers(SUB_IFDS)
    if len(offsets) > MAX_DIRECTORIES:
        raise NotUnderstood("its sub-directories are too many")
    return tuple(_directory(directory._file, directory._order, directory._big, int(at))[0] for at in offsets)


def _header(file: RandomAccessFile) -> tuple[str, bool, int]:
    start = _read(file, 0, 8)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    if order is None:
        raise NotUnderstood("it is no TIFF")
    version, offset = struct.unpack(order + "HI", start[2:])
    if version == 42:
        return order, False, offset
    if version == 43 and struct.unpack(order + "HH", start[4:]) == (8, 0):
        return order, True, struct.unpack(order + "Q", _read(file, 8, 8))[0]
    raise NotUnderstood("it is no TIFF")


def _directory(file: RandomAccessFile, order: str, big: bool, offset: int) -> tuple[Directory, int]:
    """Return the directory at `offset` and the offset of the next one, 0 after the last."""
    count_format, entry_format, link_format = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    count_bytes = struct.calcsize(order + count_format)
    (count,) = struct.unpack(order + count_format, _read(file, offset, count_bytes))
    if not 0 < count <= MAX_ENTRIES:
        raise NotUnderstood(f"a directory has {count} entries")
    entry = struct.Struct(order + entry_format)
    body = _read(file, offset + count_bytes, count * entry.size + struct.calcsize(order + link_format))
    tags = {
        number: _Tag(kind, items, raw) for number, kind, items, raw in entry.iter_unpack(body[: count * entry.size])
    }
    (following,) = struct.unpack(order + link_format, body[count * entry.size :])
    return Directory(file, order, big, tags), following


def _read(file: RandomAccessFile, offset: int, length: int) -> bytes:
    try:
        return file.read_at(offset, length)
    except DecodeError as error:
        raise NotUnderstood(f"its structure is damaged: {error}") from error
