"""Batches on their way to a GPU: copied there while it works on the one before.

A batch is filled in page-locked memory, which the GPU fetches by itself. A thread starts the copy on a stream of its
own, waits for its end, gives the page-locked memory back to be filled again, and hands the copy on. The CPU thread that
feeds the GPU with work waits for nothing but that. On other devices batches pass through as they are.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lrmil.inference.stream.batches import Batch, ImageArray
from lrmil.inference.stream.feed import Feed

_AHEAD = 1
"""Batches on the device that nobody works on yet"""


@dataclass(frozen=True)
class Uploaded:
    """A batch, and its images where the encoder is."""

    batch: Batch
    images: ImageArray | torch.Tensor
    """(B, P, P, 3) uint8: an array, or a tensor on the device that may still be on its way"""
    copied: Any = None
    """the event after which it has arrived"""

    def ready(self) -> ImageArray | torch.Tensor:
        """Return the images; what the current stream of the device does from now on waits for their arrival."""
        if isinstance(self.images, torch.Tensor) and self.copied is not None:
            current = torch.cuda.current_stream(self.images.device)
            current.wait_event(self.copied)
            self.images.record_stream(current)  # so that its memory is not given away while the stream uses it
        return self.images


def page_locked(count: int, side_px: int) -> ImageArray:
    """Make the array (B, P, P, 3) of a batch in memory that a GPU can fetch from."""
    images: ImageArray = torch.empty((count, side_px, side_px, 3), dtype=torch.uint8, pin_memory=True).numpy()
    return images


def batches_for(device: torch.device) -> int:
    """Return how many batches a feed needs in memory: one being filled, one in use, and one between them on a GPU."""
    return 3 if device.type == "cuda" else 2


def uploaded(feed: Feed, device: torch.device) -> Iterator[Uploaded]:
    """Yield the batches of a feed, their images on the device where that is a GPU. Their memory is given back here."""
    if device.type == "cuda":
        yield from Ahead(feed, CudaCopies(device))
    else:
        for batch in feed:
            yield Uploaded(batch, batch.images)
            feed.free(batch)


class CudaCopies:
    """Copies batches to a GPU on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def __call__(self, batch: Batch) -> Uploaded:
        """Return a copy once it is there."""
        with torch.cuda.stream(self._stream):
            images = torch.from_numpy(np.ascontiguousarray(batch.images)).to(self._device, non_blocking=True)
            copied = self._stream.record_event()
        copied.synchronize()  # waits in this thread alone; then the memory may be filled again
        return Uploaded(batch, images, copied)


class Ahead:
    """Copies the batches of a feed in a thread of its own, while others are worked on.

    Args:
        feed: closed when the iteration ends, however it ends.
        copy: makes a copy of a batch that no longer needs the batch's memory.
    """

    def __init__(self, feed: Feed, copy: Callable[[Batch], Uploaded]) -> None:
        self._feed, self._copy = feed, copy
        self._ready: queue.Queue[Uploaded | BaseException | None] = queue.Queue(_AHEAD)
        self._stop = threading.Event()

    def __iter__(self) -> Iterator[Uploaded]:
        """Yield copies in the order of the batches; raise what the feed raises."""
        thread = threading.Thread(target=self._run, name="upload", daemon=True)
        thread.start()
        try:
            while (item := self._ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._stop.set()
            self._feed.close()
            thread.join()

    def _run(self) -> None:
        try:
            for batch in self._feed:
                uploaded = self._copy(batch)
                self._feed.free(batch)
                self._hand_over(uploaded)
                if self._stop.is_set():
                    return
            self._hand_over(None)
        except BaseException as error:
            self._hand_over(error)

    def _hand_over(self, item: Uploaded | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
