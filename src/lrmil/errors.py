"""Every error that lrmil raises on purpose.

    LrmilError
    ├── ConfigError                 the call or the config is wrong (exit code 2)
    ├── CohortError                 the cohort table is wrong (exit code 2)
    ├── SlideError                  one slide cannot be used; the others go on (exit code 1)
    │   ├── NotASlide               the file is missing, or no reader understands it
    │   ├── MissingMpp              the file does not say how large its pixels are
    │   ├── ImplausibleMpp          it says so, and no microscope has such pixels
    │   ├── SlideTooCoarse          the scan has less detail than was asked for
    │   ├── SlideTooSmall           the scan is smaller than one patch
    │   ├── NoTissue                nothing, or too little, to look at
    │   └── UnreadableRegion        the pixels of one region cannot be decoded
    │       └── TooManyUnreadable   so many of them that the slide cannot be trusted
    ├── EncoderError                an encoder cannot be built
    │   ├── UnknownEncoder
    │   ├── WeightsUnavailable      gated, offline, or no such file
    │   └── GridMismatch            its token grid cannot be cut into the blocks of the children
    ├── BagError                    a feature file cannot be used
    │   ├── CorruptBag              truncated, wrong shapes, or not numbers
    │   └── ProvenanceMismatch      made by another encoder or with other settings
    ├── HeadError                   a MIL head cannot be built or fed
    ├── TrainingError               training cannot start, or has diverged
    ├── CheckpointError             a weight file does not fit, or is not safe to read
    ├── BundleError                 a deployed model cannot be loaded
    │   └── BundleAltered           its files are not the ones that were written
    └── OutputError                 a result cannot be written (disk full, no permission)

A message says what is wrong, with which slide, row or field, and what to do next; `fix` holds that last part.
"""

from __future__ import annotations


class LrmilError(Exception):
    """Base of all errors raised on purpose. `str()` is the message followed by what to do."""

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message if fix is None else f"{message} {fix}")
        self.message = message
        self.fix = fix


class ConfigError(LrmilError):
    """The call or the config is wrong."""


class CohortError(LrmilError):
    """The cohort table is wrong."""


class SlideError(LrmilError):
    """One slide cannot be used. `slide` names it; other slides go on."""

    def __init__(self, message: str, *, slide: str, fix: str | None = None) -> None:
        super().__init__(f"{slide}: {message}", fix=fix)
        self.slide = slide


class NotASlide(SlideError):
    """The file is missing, or no reader understands it."""


class MissingMpp(SlideError):
    """The file does not say how large its pixels are."""


class ImplausibleMpp(SlideError):
    """The stated pixel size is outside what a microscope produces, or differs between x and y."""


class SlideTooCoarse(SlideError):
    """The scan has less detail than was asked for."""


class SlideTooSmall(SlideError):
    """The scan is smaller than one patch."""


class NoTissue(SlideError):
    """Nothing, or too little, to look at."""


class UnreadableRegion(SlideError):
    """The pixels of one region cannot be decoded. They are never replaced by white ones."""


class TooManyUnreadable(UnreadableRegion):
    """So many regions cannot be decoded that the slide cannot be trusted."""


class EncoderError(LrmilError):
    """An encoder cannot be built."""


class UnknownEncoder(EncoderError):
    """No card, timm model or checkpoint has that name."""


class WeightsUnavailable(EncoderError):
    """The weights are gated, the machine is offline, or the file is missing."""


class GridMismatch(EncoderError):
    """The encoder's token grid cannot be cut into the blocks of the children."""


class BagError(LrmilError):
    """A feature file cannot be used."""


class CorruptBag(BagError):
    """A feature file is truncated, has wrong shapes, or holds values that are not finite."""


class ProvenanceMismatch(BagError):
    """A feature file was made by another encoder or with other settings."""


class HeadError(LrmilError):
    """A MIL head cannot be built, or was fed a bag that it cannot take."""


class TrainingError(LrmilError):
    """Training cannot start, or has diverged."""


class CheckpointError(LrmilError):
    """A weight file does not fit, or is not safe to read."""


class BundleError(LrmilError):
    """A deployed model cannot be loaded."""


class BundleAltered(BundleError):
    """The files of a bundle are not the ones that were written."""


class OutputError(LrmilError):
    """A result cannot be written."""
