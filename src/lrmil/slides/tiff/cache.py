"""Decoded tiles, kept for the neighbours of a request within a bound on memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from lrmil.slides.resample import UInt8Array


class TileCache:
    """The tiles used last, at most `max_bytes` of them; nobody may write to them. Safe from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._tiles: OrderedDict[Hashable, UInt8Array] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> UInt8Array | None:
        """Return the tile, or None where it is not held."""
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
            return tile

    def put(self, key: Hashable, tile: UInt8Array) -> None:
        """Hold a tile; let go of those used longest ago."""
        tile.flags.writeable = False
        if tile.nbytes > self.max_bytes:
            return
        with self._lock:
            old = self._tiles.pop(key, None)
            self.bytes += tile.nbytes - (0 if old is None else old.nbytes)
            self._tiles[key] = tile
            while self.bytes > self.max_bytes:
                self.bytes -= self._tiles.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Let go of all."""
        with self._lock:
            self._tiles.clear()
            self.bytes = 0
