"""Bytes of a file at an offset, from several threads at once and without a shared position."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from lrmil.slides.blocks import DecodeError


class _Descriptor:
    """A file descriptor that closes when nobody uses it any more: never under a thread that still reads."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class RandomAccessFile:
    """A file open for reading.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: _Descriptor | None = _Descriptor(path)
        self.size = os.fstat(self._descriptor.number).st_size
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._descriptor is None

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`.

        Raises:
            DecodeError: they are not all there, or the system cannot read them.
        """
        descriptor = self._descriptor
        if descriptor is None:
            raise DecodeError("the file has been closed")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise DecodeError(f"bytes {offset} to {offset + length} lie beyond the end of the file, {self.size}")
        try:
            data = self._read(descriptor.number, offset, length)
        except OSError as error:
            raise DecodeError(f"the file cannot be read ({error.strerror or error})") from error
        if len(data) != length:
            raise DecodeError(f"the file ended {length - len(data)} bytes early: it has been cut since it was opened")
        return data

    def _read(self, number: int, offset: int, length: int) -> bytes:
        if not hasattr(os, "pread"):  # Windows
            with self._lock:
                os.lseek(number, offset, os.SEEK_SET)
                return os.read(number, length)
        data = os.pread(number, length, offset)
        while 0 < len(data) < length:  # interrupted, or more than the system hands out at once
            more = os.pread(number, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        """Release the file once no other thread reads from it."""
        self._descriptor = None
