"""Clocks and memory: jobs that take turns, and the peak of a phase."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Job = Callable[[], float]
"""Does a piece of work and returns its seconds; what it need not be timed for, it does outside its clock."""


def take_turns(jobs: Mapping[str, Job], rounds: int) -> dict[str, npt.NDArray[np.float64]]:
    """Return the seconds of each job in each round, (rounds,). Jobs take turns; every other round is in reverse order.

    What disturbs a machine then disturbs all of them, so that their ratio within a round is to be trusted where their
    seconds are not.
    """
    names = list(jobs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            seconds[name].append(jobs[name]())
    return {name: np.asarray(values) for name, values in seconds.items()}


class PeakMemory:
    """Peak memory from when this is made: on a GPU as torch counts it, else as the kernel does (Linux)."""

    def __init__(self, device: Any | None = None) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        if self._cuda is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._cuda)
            self.before_mb: float | None = torch.cuda.memory_allocated(self._cuda) / 1e6
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            # Where the peak cannot be reset, the process must not have had a higher one before.
            self.before_mb = _peak_mb_of_life()
        else:
            self.before_mb = _status_mb("VmRSS")

    def added_mb(self) -> float | None:
        """Return what was taken at most since then, in 10^6 bytes; None where the system does not tell."""
        if self._cuda is not None:
            import torch

            peak: float | None = torch.cuda.max_memory_allocated(self._cuda) / 1e6
        else:
            peak = _status_mb("VmHWM") or _peak_mb_of_life()
        return None if peak is None or self.before_mb is None else peak - self.before_mb


def _status_mb(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return None


def _peak_mb_of_life() -> float | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
