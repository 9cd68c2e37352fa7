"""Readers, and the one door to all of them: `open_slide`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lrmil.errors import ConfigError, NotASlide
from lrmil.slides.base import Slide


@dataclass(frozen=True)
class ReaderCard:
    """What is known about a reader before it is used."""

    name: str
    formats: str
    licence: str
    priority: int
    """Readers are asked in this order, the smallest number first."""
    open: Callable[[Path, float | None], Slide]
    """Takes the path and the user's level-0 mpp. Raises `NotASlide` to leave the file to the next reader; any other
    error is final."""
    automatic: bool = True
    """Whether `open_slide` asks it without being told to; otherwise it is asked by name only."""


_CARDS: dict[str, ReaderCard] = {}


def register_reader(card: ReaderCard) -> ReaderCard:
    """Add a reader under its name.

    Raises:
        ConfigError: the name is taken.
    """
    if card.name in _CARDS:
        raise ConfigError(f"a reader named {card.name!r} is registered already.", fix="Choose another name.")
    _CARDS[card.name] = card
    return card


def reader_cards() -> tuple[ReaderCard, ...]:
    """Return all readers in the order in which they are asked."""
    return tuple(sorted(_CARDS.values(), key=lambda card: (card.priority, card.name)))


def open_slide(path: str | os.PathLike[str], mpp: float | None = None, *, reader: str | None = None) -> Slide:
    """Open a whole-slide image with the first reader that understands it.

    Args:
        path: the file; of a slide that consists of many files, the one that OpenSlide's documentation names.
        mpp: the true level-0 um/px, where the file does not tell or is wrong; overrides the file.
        reader: ask this reader only, one of the names of `reader_cards()`.

    Raises:
        NotASlide: the file is missing, or no reader understands it.
        MissingMpp: neither the file nor `mpp` says how large its pixels are.
        ImplausibleMpp: what is said is outside 0.05-20 um/px, or differs between x and y by more than 2 %.
        ConfigError: there is no such reader.
    """
    path = Path(path)
    _check_file(path)
    if reader is None:
        cards = tuple(card for card in reader_cards() if card.automatic)
    else:
        cards = tuple(card for card in reader_cards() if card.name == reader)
        if not cards:
            raise ConfigError(f"there is no reader {reader!r}.", fix=f"Choose one of {', '.join(sorted(_CARDS))}.")
    refusals: list[NotASlide] = []
    for card in cards:
        try:
            return card.open(path, mpp)
        except NotASlide as refusal:
            refusals.append(refusal)
    # Readers are registered from special to general: the last one, which knows most formats, says best what is wrong.
    raise refusals[-1]


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise NotASlide(
            "it is a folder.", slide=path.name, fix="Name one file; of a DICOM slide, any one of its .dcm files."
        )
    if not path.exists():
        raise NotASlide(f"there is no file {path}.", slide=path.name, fix="Check the path.")
    try:
        with path.open("rb") as handle:
            empty = not handle.read(1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise NotASlide(f"it cannot be read ({reason}).", slide=path.name, fix="Check its permissions.") from error
    if empty:
        raise NotASlide("the file is empty.", slide=path.name, fix="Copy it again.")


def _open_directly(path: Path, mpp: float | None) -> Slide:
    from lrmil.slides.tiff.reader import TiffSlide

    return TiffSlide(path, mpp)


def _open_with_openslide(path: Path, mpp: float | None) -> Slide:
    from lrmil.slides.openslide_reader import OpenSlideSlide

    return OpenSlideSlide(path, mpp)


register_reader(
    ReaderCard(
        name="tiff",
        formats="Aperio and tiled TIFF, 8-bit RGB (JPEG, Aperio's JPEG 2000, LZW, deflate, none), OME-TIFF pyramids",
        licence="Apache-2.0",
        priority=10,
        open=_open_directly,
    )
)
register_reader(
    ReaderCard(
        name="openslide",
        formats="Aperio, Hamamatsu, Leica, MIRAX, Philips, Sakura, Trestle, Ventana, Zeiss, DICOM, tiled TIFF",
        licence="LGPL-2.1",
        priority=100,
        open=_open_with_openslide,
    )
)
