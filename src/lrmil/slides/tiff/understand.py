"""Which directories of a TIFF are the levels of its pyramid, and whether OpenSlide sees the file in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import openslide

from lrmil.slides.openslide_facts import OpenSlideFacts, read_facts
from lrmil.slides.tiff.file import RandomAccessFile
from lrmil.slides.tiff.layout import TiledImage, is_reduced, is_tiled, tiled_image
from lrmil.slides.tiff.structure import SUB_IFDS, Directory, NotUnderstood, read_directories, sub_directories

_PYRAMID_TOLERANCE = 0.02
"""Largest relative difference between the downsamples of a level along x and y, for levels that OpenSlide ignores."""


def understand(file: RandomAccessFile, path: Path, mpp: float | None) -> tuple[tuple[TiledImage, ...], OpenSlideFacts]:
    """Return the images of the levels, and what OpenSlide says, once the two fit together.

    Raises:
        NotUnderstood: something about the file is not known, or damaged, or OpenSlide sees another slide in it.
        NotASlide, MissingMpp, ImplausibleMpp: see `read_facts`.
    """
    directories = read_directories(file)
    if not is_tiled(directories[0]):
        raise NotUnderstood("its first image is stored without tiles")
    tiled_image(file, directories[0])  # before OpenSlide is asked: most files that are left to it are told by this
    facts, handle = read_facts(path, mpp, openslide.OpenSlide)
    handle.close()
    if facts.bounds_l0 != (0, 0, *facts.dimensions):
        raise NotUnderstood("only a part of it was scanned")
    levels = _levels(directories, facts.vendor)
    images = tuple(tiled_image(file, directory) for directory in levels)
    if facts.vendor == "generic-tiff":
        images = tuple(sorted(images, key=lambda image: -image.width_px))
        if len({image.width_px for image in images}) < len(images):
            raise NotUnderstood("two of its levels are equally wide")
    if tuple((image.width_px, image.height_px) for image in images) != facts.level_dimensions:
        raise NotUnderstood("its levels are not those that OpenSlide finds")
    if facts.vendor == "aperio" and len(images) > 1 and any(image.sparse for image in images):
        # OpenSlide fills such holes from the finer level, and distrusts the coarser ones around them.
        raise NotUnderstood("some tiles of an Aperio pyramid are missing")
    coarser = sub_directories(directories[0]) if SUB_IFDS in directories[0] else ()
    return images + _sub_levels(file, coarser, facts), facts


def _levels(directories: Sequence[Directory], vendor: str) -> list[Directory]:
    """Return the directories that OpenSlide takes for levels."""
    if vendor == "aperio":
        return [directory for directory in directories if is_tiled(directory)]
    if vendor == "generic-tiff":
        return [d for d in directories if is_tiled(d) and (d is directories[0] or is_reduced(d))]
    raise NotUnderstood(f"it is of vendor {vendor}")


def _sub_levels(
    file: RandomAccessFile, directories: Sequence[Directory], facts: OpenSlideFacts
) -> tuple[TiledImage, ...]:
    """Return levels that OpenSlide does not see, since they hang below level 0."""
    if not directories:
        return ()
    if len(facts.level_dimensions) > 1 or facts.vendor != "generic-tiff":
        raise NotUnderstood("it has levels in two places")
    images = [tiled_image(file, directory) for directory in directories if is_reduced(directory)]
    for image in images:
        across, down = facts.dimensions[0] / image.width_px, facts.dimensions[1] / image.height_px
        if min(across, down) <= 1 or abs(across - down) > _PYRAMID_TOLERANCE * down:
            raise NotUnderstood(f"a sub-image of {image.width_px} x {image.height_px} px is no level of its pyramid")
    return tuple(sorted(images, key=lambda image: -image.width_px))
