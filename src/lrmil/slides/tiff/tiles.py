"""Decoded tiles of one slide: each is decoded once, by the thread that comes first, and kept while it is needed.

Who is going to read many boxes announces them. The tiles of announced boxes are kept until the last of these boxes has
been read, and dropped then; other tiles stay until room is needed. `max_bytes` bounds both: where more is announced
than fits, tiles used longest ago go first, and are decoded again.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lrmil.slides.blocks import DecodeError
from lrmil.slides.resample import UInt8Array
from lrmil.slides.stats import ReadStats
from lrmil.slides.tiff.file import RandomAccessFile
from lrmil.slides.tiff.layout import TiledImage, TileRect

MAX_READ_BYTES = 4 * 2**20
"""Tiles that lie side by side in the file are read at once, up to so many bytes."""


@dataclass(frozen=True, order=True)
class TileRef:
    """A compressed tile that a request needs. Sorted, they lie in file order."""

    offset: int
    """where its bytes begin in the file"""
    length: int
    """how many they are; 0 where nothing was scanned"""
    level: int
    column: int
    row: int
    reduction: int
    """1, 2, 4 or 8: at which part of its size it is decoded"""


_Key = tuple[int, int, int]
"""level, index of the tile in it, reduction"""
_Place = tuple[int, int, int]
"""offset and length of a tile in the file, and its place in a request"""


class TileStore:
    """Fetches, decodes and keeps the tiles of `images`, the levels of `file`. Safe from several threads.

    Args:
        file: where the compressed tiles are.
        images: by level.
        stats: where tiles are counted as they are decoded.
        max_bytes: bound on the decoded tiles that are kept. Tiles that are being used at the moment come on top.
    """

    def __init__(self, file: RandomAccessFile, images: Sequence[TiledImage], stats: ReadStats, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        """of decoded tiles that are kept"""
        self._file, self._images, self._stats = file, images, stats
        self._tiles: OrderedDict[_Key, UInt8Array] = OrderedDict()
        self._expected: dict[tuple[int, int], array[int]] = {}
        """by level and reduction, then by index: how many announced requests still need each tile"""
        self._decoding: set[_Key] = set()
        self._waiting = 0
        self._lock = threading.Lock()
        self._decoded = threading.Condition(self._lock)

    def announce(self, rects: Sequence[TileRect]) -> None:
        """Say that `fetch` will be called for these, once each."""
        with self._lock:
            for rect in rects:
                image = self._images[rect.level]
                key = rect.level, rect.reduction
                expected = self._expected.get(key)
                if expected is None:
                    expected = self._expected[key] = array("L", [0]) * (image.down * image.across)
                for row in range(rect.first_row, rect.last_row):
                    for index in range(row * image.across + rect.first_column, row * image.across + rect.last_column):
                        expected[index] += 1
            # What was decoded before, to find the tissue, say, stays where it is going to be read, and nowhere else.
            for kept in [tile for tile in self._tiles if not self._is_expected(tile)]:
                self.bytes -= self._tiles.pop(kept).nbytes

    def _is_expected(self, key: _Key) -> bool:
        level, index, reduction = key
        image = self._images[level]
        row, column = divmod(index, image.across)
        # Tiles with padding are decoded fully for requests of any reduction.
        asked = (
            r for own, r in self._expected if own == level and self.reduction_of(level, column, row, r) == reduction
        )
        return any(self._expected[level, r][index] for r in asked)

    def withdraw(self) -> None:
        """Forget what was announced and has not been fetched."""
        with self._lock:
            self._expected.clear()

    def clear(self) -> None:
        """Let go of all tiles."""
        with self._lock:
            self._tiles.clear()
            self.bytes = 0

    def reduction_of(self, level: int, column: int, row: int, reduction: int) -> int:
        """Return at which part of its size a tile is decoded: fully where it ends in a part of an average."""
        image = self._images[level]
        cut_x = column == image.across - 1 and image.width_px % reduction
        cut_y = row == image.down - 1 and image.height_px % reduction
        return 1 if cut_x or cut_y else reduction

    def ref(self, level: int, column: int, row: int, reduction: int) -> TileRef:
        """Return where a tile lies in the file, and how it is decoded."""
        image = self._images[level]
        index = row * image.across + column
        offset, length = int(image.offsets[index]), int(image.lengths[index])
        return TileRef(offset, length, level, column, row, self.reduction_of(level, column, row, reduction))

    def fetch(self, rect: TileRect) -> list[UInt8Array | None]:
        """Return the tiles of a rectangle, row by row; None where nothing was scanned.

        A tile is (h, w, 3) at 1/`reduction_of` and not to be written to. Beyond the edges of its level lies padding.

        Raises:
            DecodeError: one of them is damaged, or lies beyond the end of the file.
        """
        image, level = self._images[rect.level], rect.level
        edge = rect.last_column == image.across or rect.last_row == image.down
        keys: list[_Key] = []
        for row in range(rect.first_row, rect.last_row):
            for column in range(rect.first_column, rect.last_column):
                reduction = self.reduction_of(level, column, row, rect.reduction) if edge else rect.reduction
                keys.append((level, row * image.across + column, reduction))
        found: list[UInt8Array | None] = [None] * len(keys)
        mine: list[int] = []
        theirs: list[int] = []
        try:
            with self._lock:
                for i, key in enumerate(keys):
                    tile = self._tiles.get(key)
                    if tile is not None:
                        self._tiles.move_to_end(key)
                        found[i] = tile
                    elif not image.lengths[key[1]]:
                        continue
                    elif key in self._decoding:
                        theirs.append(i)
                    else:
                        self._decoding.add(key)
                        mine.append(i)
            if mine:
                self._decode_claimed(keys, mine, found)
            for i in theirs:
                found[i] = self._wait_for(keys[i])
        finally:
            if self._expected:
                self._settle(rect, keys)
        return found

    def _decode_claimed(self, keys: Sequence[_Key], mine: Sequence[int], found: list[UInt8Array | None]) -> None:
        """Decode the tiles at the places `mine`, in file order, and give them to those who wait for them."""
        image = self._images[keys[mine[0]][0]]
        bytes_read, fresh, done = 0, [], 0
        key = keys[mine[0]]
        try:
            for places in self._neighbours(image, keys, mine):
                key = keys[places[0][2]]
                for data, (_, length, i) in zip(self._compressed(places), places, strict=True):
                    key = keys[i]
                    tile = image.decoder.decode(data, key[2])
                    tile.flags.writeable = False
                    found[i] = tile
                    fresh.append((key, tile))
                    bytes_read, done = bytes_read + length, done + 1
                    if self._waiting:
                        self._keep(fresh)
                        fresh.clear()
        except DecodeError as error:
            row, column = divmod(key[1], image.across)
            raise DecodeError(f"tile {column}, {row}: {error}") from error
        finally:
            self._stats.add_tiles(done, bytes_read)
            self._keep(fresh, [keys[i] for i in mine])

    @staticmethod
    def _neighbours(image: TiledImage, keys: Sequence[_Key], mine: Sequence[int]) -> Iterator[list[_Place]]:
        """Yield tiles that lie side by side in the file, in file order."""
        where = sorted((int(image.offsets[keys[i][1]]), int(image.lengths[keys[i][1]]), i) for i in mine)
        first = end = 0
        for n, (offset, length, _) in enumerate(where):
            if n and (offset != end or end + length - where[first][0] > MAX_READ_BYTES):
                yield where[first:n]
                first = n
            end = offset + length
        yield where[first:]

    def _compressed(self, places: Sequence[_Place]) -> Iterator[bytes]:
        """Yield the bytes of tiles that lie side by side, read at once."""
        start, end = places[0][0], places[-1][0] + places[-1][1]
        if len(places) == 1 or end > self._file.size:
            for offset, length, _ in places:
                yield self._file.read_at(offset, length)
            return
        data = self._file.read_at(start, end - start)
        for offset, length, _ in places:
            yield data[offset - start : offset - start + length]

    def _keep(self, fresh: Sequence[tuple[_Key, UInt8Array]], finished: Sequence[_Key] = ()) -> None:
        """Hold decoded tiles; nobody need wait any longer for these, nor for those `finished`."""
        with self._lock:
            for key, tile in fresh:
                self._decoding.discard(key)
                if tile.nbytes <= self.max_bytes and key not in self._tiles:
                    self._tiles[key] = tile
                    self.bytes += tile.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._tiles.popitem(last=False)[1].nbytes
            self._decoding.difference_update(finished)
            if self._waiting:
                self._decoded.notify_all()

    def _wait_for(self, key: _Key) -> UInt8Array:
        """Return a tile that another thread is decoding.

        Nobody waits before it has decoded all that it took upon itself, so there is no circle.
        """
        with self._lock:
            self._waiting += 1
            try:
                while key in self._decoding:
                    self._decoded.wait()
                tile = self._tiles.get(key)
                if tile is not None:
                    return tile
                self._decoding.add(key)  # it could not be decoded, or not be kept
            finally:
                self._waiting -= 1
        found: list[UInt8Array | None] = [None]
        self._decode_claimed([key], [0], found)
        assert found[0] is not None
        return found[0]

    def _settle(self, rect: TileRect, keys: Sequence[_Key]) -> None:
        """Count an announced request as done, and drop the tiles that no other one needs."""
        with self._lock:
            expected = self._expected.get((rect.level, rect.reduction))
            if expected is None:
                return
            for key in keys:
                times = expected[key[1]]
                if times:
                    expected[key[1]] = times - 1
                tile = self._tiles.pop(key, None) if times == 1 else None
                if tile is not None:
                    self.bytes -= tile.nbytes
