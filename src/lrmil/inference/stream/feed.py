"""Reader threads that fill batch after batch with the patches of slide after slide.

One pool of threads serves a whole call. Each thread takes the next few reads, in the order of the slide's grid, which
is the order of the tiles in its file; the slide has been told before of all its reads, so that each of its tiles is
decoded once and dropped after the last patch that it serves (see `Slide.announce`). The next slides are opened, looked
at for tissue and announced by other threads meanwhile, and a batch may hold patches of several slides, so nothing waits
where one slide ends and the next begins.

In memory are, at most: `batches` batches; for each thread the picture that patches are cut from; and for each open
slide (two are opened ahead) its overview and the decoded tiles that its reader keeps, which it bounds itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from lrmil.errors import ConfigError
from lrmil.inference.stream.batches import Batch, ImageArray, ReadingLog, SlideEnd, SlideReads, Source
from lrmil.inference.stream.reads import PatchReader, Read

SLIDES_AHEAD = 2
"""Slides that are opened while another one is read."""
_PATCHES_AT_ONCE = 8
"""After so many patches a thread asks for more, or after one read where that holds more."""


@dataclass
class _Job:
    """One slide on its way through the feed."""

    index: int
    opened: SlideReads | None = None
    error: Exception | None = None
    next_read: int = 0
    log: ReadingLog = field(default_factory=ReadingLog)


@dataclass(eq=False)
class _Tray:
    """A batch being filled."""

    images: ImageArray
    jobs: list[_Job] = field(default_factory=list)
    """of each patch"""
    rows: list[int] = field(default_factory=list)
    missing: int = 0
    """patches that have a place, but are not there yet"""
    failed: dict[int, str] = field(default_factory=dict)
    """{place: why} of those that cannot be decoded"""
    ends: list[_Job] = field(default_factory=list)
    closed: bool = False
    """whether no more patches are added"""


@dataclass(frozen=True)
class _Task:
    """A read, and where its patches go."""

    job: _Job
    read: Read
    places: list[tuple[_Tray, int]]


class Feed:
    """Iterate to get `Batch` after `Batch`, and give back each with `free`, each slide with `finish`.

    `close` (or leaving the `with`) ends the threads.

    Args:
        sources: one for each slide; called in this order.
        patch_px: side of a patch.
        batch_size: patches in a batch; all but the last one, and those with undecodable patches, are of this size.
        threads: reader threads.
        batches: in memory at once, until they are given back.
        new_images: makes the array of a batch, (B, P, P, 3) uint8, of B and P; may be called by any thread.
        reuse: whether the array of a batch is filled again once it was given back.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        patch_px: int,
        *,
        batch_size: int,
        threads: int,
        batches: int = 2,
        new_images: Callable[[int, int], ImageArray] | None = None,
        reuse: bool = False,
    ) -> None:
        self._patch_px, self._batch_size, self._batches = patch_px, batch_size, batches
        self._new_images, self._reuse = new_images or _empty, reuse
        threads = max(1, threads)
        self._at_once = max(1, min(_PATCHES_AT_ONCE, batch_size // (2 * threads)))
        self._changed = threading.Condition()
        self._trays: deque[_Tray] = deque()
        """not handed out yet, in order"""
        self._spare: list[ImageArray] = []
        self._out = 0
        """batches handed out and not given back"""
        self._stop = self._all_read = False
        self._broken: BaseException | None = None
        self._patches = PatchReader(patch_px)
        self._openers = ThreadPoolExecutor(min(2, threads), thread_name_prefix="open")
        self._sources = enumerate(sources)
        self._opening: deque[Future[_Job]] = deque()
        self._current: _Job | None = None
        self._live: list[_Job] = []
        self._readers = [threading.Thread(target=self._work, name=f"read-{i}", daemon=True) for i in range(threads)]
        with self._changed:
            self._open_more()
        for reader in self._readers:
            reader.start()

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches in the order of the sources and of their reads, until all are there or the feed is closed.

        Raises:
            Exception: whatever broke a reader, other than a slide's own failure.
        """
        while True:
            with self._changed:
                while not (self._stop or self._broken or self._is_ready()):
                    self._changed.wait()
                if self._broken:
                    raise self._broken
                if self._stop or not self._trays:
                    return
                tray = self._trays.popleft()
                self._out += 1
                self._changed.notify_all()
            yield self._batch(tray)

    def free(self, batch: Batch) -> None:
        """Give back the memory of a batch, so that another one can be read."""
        with self._changed:
            self._out -= 1
            if batch.memory is not None:
                self._spare.append(batch.memory)
            self._changed.notify_all()

    def finish(self, end: SlideEnd) -> None:
        """Give back a slide that has ended."""
        if end.opened is not None:
            _release(end.opened)
        with self._changed:
            self._live = [job for job in self._live if job.index != end.index]

    def close(self) -> None:
        """End the threads and close the slides that are open. May be called twice."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._openers.shutdown(wait=True, cancel_futures=True)
        for reader in self._readers:
            if reader.is_alive():
                reader.join()
        opened = [future.result() for future in self._opening if not future.cancelled() and not future.exception()]
        for job in [*self._live, *opened]:
            if job.opened is not None:
                _release(job.opened)
        self._live, self._opening = [], deque()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_ready(self) -> bool:
        """Whether the first batch is full and all there, or nothing is left to come."""
        if not self._trays:
            return self._all_read
        tray = self._trays[0]
        return tray.closed and not tray.missing

    def _batch(self, tray: _Tray) -> Batch:
        good = [place for place in range(len(tray.rows)) if place not in tray.failed]
        for place, reason in sorted(tray.failed.items()):
            log = tray.jobs[place].log
            log.unreadable.append(tray.rows[place])
            log.first_error = log.first_error or reason
        for place in good:
            tray.jobs[place].log.patches += 1
        count = len(tray.rows)
        images = tray.images[:count] if len(good) == count else tray.images[good]
        slides = np.array([tray.jobs[place].index for place in good], dtype=np.int64)
        rows = np.array([tray.rows[place] for place in good], dtype=np.int64)
        ends = [SlideEnd(job.index, job.opened, job.log, job.error) for job in tray.ends]
        return Batch(images, slides, rows, ends, tray.images if self._reuse else None)

    def _work(self) -> None:
        """Read until there is nothing left: the life of a thread."""
        try:
            while tasks := self._next_tasks():
                for task in tasks:
                    self._perform(task)
        except BaseException as error:
            with self._changed:
                self._broken = self._broken or error
                self._changed.notify_all()

    def _next_tasks(self) -> list[_Task]:
        """Wait for work; return some, or nothing once all is done."""
        with self._changed:
            while not (self._stop or self._all_read or self._broken):
                if self._current is None:
                    if not self._begin_slide() and not self._all_read:
                        self._changed.wait()
                    continue
                if self._has_room():
                    return self._take()
                self._changed.wait()
            return []

    def _begin_slide(self) -> bool:
        """Go on to the next slide, if it is open by now."""
        if not self._opening:
            if self._trays:
                self._trays[-1].closed = True
            self._all_read = True
            self._changed.notify_all()
            return False
        if not self._opening[0].done():
            return False
        job = self._opening.popleft().result()
        self._live.append(job)
        self._open_more()
        if job.opened is None or not len(job.opened.reads):
            self._end_slide(job)
        else:
            self._current = job
        return True

    def _open_more(self) -> None:
        while len(self._opening) < SLIDES_AHEAD:
            following = next(self._sources, None)
            if following is None:
                return
            future = self._openers.submit(_open, *following)
            future.add_done_callback(self._wake)
            self._opening.append(future)

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()

    def _has_room(self) -> bool:
        if self._current is None:
            return False
        open_tray = bool(self._trays) and not self._trays[-1].closed
        return open_tray or len(self._trays) + self._out < self._batches

    def _take(self) -> list[_Task]:
        """Give places to the patches of the next few reads."""
        tasks: list[_Task] = []
        patches = 0
        while (job := self._current) is not None and patches < self._at_once and (not tasks or self._has_room()):
            assert job.opened is not None
            read = job.opened.reads[job.next_read]
            job.next_read += 1
            places = []
            for row in read.rows.tolist():
                tray = self._open_tray()
                places.append((tray, len(tray.rows)))
                tray.jobs.append(job)
                tray.rows.append(row)
                tray.missing += 1
                tray.closed = len(tray.rows) == self._batch_size
            tasks.append(_Task(job, read, places))
            patches += len(places)
            if job.next_read == len(job.opened.reads):
                self._end_slide(job)
                self._current = None
                self._changed.notify_all()
        return tasks

    def _open_tray(self) -> _Tray:
        if not self._trays or self._trays[-1].closed:
            images = self._spare.pop() if self._spare else self._new_images(self._batch_size, self._patch_px)
            self._trays.append(_Tray(images))
        return self._trays[-1]

    def _end_slide(self, job: _Job) -> None:
        """Let a slide end with the batch that its last patch is in, or with the next one where it has none there."""
        (self._trays[-1] if self._trays else self._open_tray()).ends.append(job)

    def _perform(self, task: _Task) -> None:
        """Read, and put the patches where they belong."""
        failed: dict[int, str] = {}
        if task.job.error is None and not self._stop:
            assert task.job.opened is not None
            try:
                failed = self._patches.read(task.job.opened.slide, task.read, [t.images[p] for t, p in task.places])
            except Exception as error:
                task.job.error = error
        with self._changed:
            for i, (tray, place) in enumerate(task.places):
                tray.missing -= 1
                if i in failed:
                    tray.failed[place] = failed[i]
                elif task.job.error is not None:
                    tray.failed[place] = str(task.job.error)
            if self._is_ready():
                self._changed.notify_all()


def _open(index: int, source: Source) -> _Job:
    """Open a slide, and tell its reader what will be asked."""
    opened = None
    try:
        opened = source()
        opened.slide.announce([(read.box_l0, read.size_px) for read in opened.reads])
    except ConfigError:
        raise
    except Exception as error:
        if opened is not None:
            _release(opened)
        return _Job(index, error=error)
    return _Job(index, opened)


def _release(opened: SlideReads) -> None:
    if opened.close:
        opened.slide.close()
    else:
        opened.slide.withdraw()


def _empty(count: int, side_px: int) -> ImageArray:
    return np.empty((count, side_px, side_px, 3), np.uint8)
