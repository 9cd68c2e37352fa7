"""Whole folders of feature files: other tools' into ours, ours into TRIDENT's layout. A bad file stops nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lrmil.bags.bag import Bag
from lrmil.bags.foreign import read_foreign_bag
from lrmil.bags.store import read_bag, write_bag
from lrmil.bags.trident import write_trident_bag
from lrmil.errors import BagError

Outcome = tuple[list[Path], list[tuple[Path, BagError]]]
"""files written, and files that could not be used with the reason"""
_SUFFIXES = (".h5", ".hdf5", ".pt")


def import_folder(source: Path, out: Path, *, patches_dir: Path | None = None, mpp_l0: float | None = None) -> Outcome:
    """Read feature files of TRIDENT, CLAM or STAMP and write each as `out`/<slide>.h5.

    Args:
        source: a file, or a folder whose .h5 and .pt files are all taken.
        out: folder, made if missing.
        patches_dir: CLAM's patches/, for features without coordinates.
        mpp_l0: um per level-0 pixel of these slides, where the files do not say it.

    Raises:
        BagError: `source` holds no feature file.
    """

    def convert(path: Path) -> Path:
        bag = read_foreign_bag(path, mpp_l0=mpp_l0, patches=patches_dir)
        target = out / f"{bag.slide or path.stem}.h5"
        write_bag(target, replace(bag, provenance={"imported_from": path.name, **bag.provenance}))
        return target

    return _each(_files(source), convert)


def export_folder(source: Path, out: Path) -> Outcome:
    """Read lrmil's feature files and write each as TRIDENT does, as `out`/<slide>.h5.

    Raises:
        BagError: `source` holds no feature file.
    """

    def convert(path: Path) -> Path:
        bag: Bag = read_bag(path, layers=())
        target = out / f"{bag.slide or path.stem}.h5"
        write_trident_bag(target, bag)
        return target

    return _each(_files(source), convert)


def _files(source: Path) -> list[Path]:
    found = [source] if source.is_file() else sorted(p for p in source.glob("*") if p.suffix in _SUFFIXES)
    if not found:
        raise BagError(
            f"{source}: no .h5 or .pt file there.", fix="Give a feature file, or the folder that holds them."
        )
    return found


def _each(paths: list[Path], convert: Callable[[Path], Path]) -> Outcome:
    done: list[Path] = []
    failures: list[tuple[Path, BagError]] = []
    for path in paths:
        try:
            done.append(convert(path))
        except BagError as error:
            failures.append((path, error))
    return done, failures
