"""What a benchmark measures, and how much of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, field_validator

from lrmil.errors import ConfigError
from lrmil.settings import Settings

PartName = Literal["reading", "answer", "tools", "size", "threads", "heads"]
PARTS: tuple[PartName, ...] = get_args(PartName)
DEFAULT_PARTS: tuple[PartName, ...] = ("reading", "answer", "tools", "size", "threads")
"""All but the heads, which take as long as the rest together."""


class BenchSettings(Settings):
    """The words of one call of `lrmil bench`."""

    parts: tuple[PartName, ...] = Field(DEFAULT_PARTS, description="what is measured")
    slides: tuple[str, ...] | None = Field(
        None, description="slide files, each PATH or PATH=MPP; null: those of the test data, where it is there"
    )
    encoder: str = Field("lrmil-small", description="card, timm ViT, or folder of a saved encoder")
    weights: str | None = Field(None, description="weight file of the encoder")
    random_weights: bool = Field(False, description="random weights, which take as long as trained ones")
    patch_px: int | None = Field(None, ge=8, le=4096, description="side of encoded patches; null: the encoder's own")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="see `lrmil run`")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int = Field(default_factory=lambda: available_cores(), ge=1, description="reader and torch threads")
    heads: tuple[str, ...] | None = Field(None, description="heads to measure; null: all, beside torchmil's")
    sizes: tuple[int, ...] | None = Field(None, description="instances of a bag; null: 1,000, 10,000 and 100,000")
    seed: int = Field(0, ge=0, description="of tissue, its place on slides, bags and random weights")
    quick: bool = Field(False, description="little of everything, to see whether it works; its numbers mean nothing")

    @field_validator("parts")
    @classmethod
    def _in_order(cls, parts: tuple[PartName, ...]) -> tuple[PartName, ...]:
        return tuple(part for part in PARTS if part in parts)


def available_cores() -> int:
    """Return how many cores this process may use, which a job's limits may make fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@dataclass(frozen=True)
class Scope:
    """How much is measured."""

    block_px: int = 4096
    """side of the blocks of tissue that written slides consist of"""
    min_rounds: int = 5
    row_s: float = 2.0
    """seconds for one row of the reading table, about; at least `min_rounds` rounds whatever they take"""
    round_s: float = 0.25
    """seconds of OpenSlide's part of one round, about"""
    max_patches: int = 48
    """in one round of reading"""
    few_variants: bool = False
    """only a few of the written slides"""
    answer_regions: int = 64
    """on a slide that is answered at both resolutions, about"""
    answer_rounds: int = 3
    stream_blocks: int = 6
    """side in blocks of the slide that threads read from"""
    stream_rounds: int = 7
    tool_regions: int = 64
    tool_rounds: int = 2
    gigapixels: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 8.0, 10.0)
    """8.0 stands for 100,000 x 80,000 px"""
    gpu_regions: int = 600
    head_sizes: tuple[int, ...] = (1_000, 10_000, 100_000)
    more_training: tuple[int, ...] = (50_000,)
    head_seconds: float = 2.0
    head_limit_s: float = 600.0


FULL = Scope()
QUICK = Scope(
    block_px=1024,
    min_rounds=2,
    row_s=0.0,
    round_s=0.0,
    max_patches=2,
    few_variants=True,
    answer_regions=6,
    answer_rounds=1,
    stream_blocks=2,
    stream_rounds=1,
    tool_regions=4,
    tool_rounds=1,
    gigapixels=(0.004,),
    gpu_regions=4,
    head_sizes=(100,),
    more_training=(),
    head_seconds=0.0,
)


@dataclass(frozen=True)
class RealSlide:
    """A slide that is not the benchmark's own."""

    path: Path
    mpp: float | None
    """um per level-0 pixel, where the file is not to be asked"""
    note: str = field(default="")


def given_slides(words: tuple[str, ...]) -> list[RealSlide]:
    """Read PATH or PATH=MPP.

    Raises:
        ConfigError: there is no such file, or what stands behind = is no positive number.
    """
    found = []
    for word in words:
        path, mpp = Path(word), None
        if not path.exists() and "=" in word:
            name, _, number = word.rpartition("=")
            path = Path(name)
            try:
                mpp = float(number)
            except ValueError:
                mpp = -1.0
            if not mpp > 0:
                raise ConfigError(
                    f"--slides {word}: {number!r} is no number of um per pixel.",
                    fix="Write PATH=MPP, as in a.svs=0.25.",
                )
        if not path.is_file():
            raise ConfigError(f"--slides {word}: there is no file {path}.", fix="Check the path.")
        found.append(RealSlide(path, mpp))
    return found
