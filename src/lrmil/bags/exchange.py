"""Whole folders of feature files: other tools' into ours, ours into TRIDENT's layout. A bad file stops nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lrmil.bags.bag import Bag
from lrmil.bags.foreign import read_foreign_bag
from lrmil.bags.stamp import CoordsUnit
from lrmil.bags.store import read_bag, write_bag
from lrmil.bags.trident import write_trident_bag
from lrmil.errors import BagError

Outcome = tuple[list[Path], list[BagError]]
"""files written, and why others could not be used"""
_SUFFIXES = (".h5", ".hdf5", ".pt")


def import_folder(
    source: Path,
    out: Path,
    *,
    patches: Path | None = None,
    mpp_l0: float | None = None,
    coords_unit: CoordsUnit | None = None,
) -> Outcome:
    """Read feature files of TRIDENT, CLAM, STAMP or mopadi and write each as `out`/<slide>.h5.

    Args:
        source: a file, or a folder whose .h5 and .pt files are all taken.
        out: folder, made if missing.
        patches: CLAM's patches/, for features without coordinates.
        mpp_l0: um per level-0 pixel of these slides, where the files do not say it.
        coords_unit: what coordinates are, where the files do not say it.

    Raises:
        BagError: `source` holds no feature file.
    """

    def read(path: Path) -> Bag:
        bag = read_foreign_bag(path, mpp_l0=mpp_l0, patches=patches, coords_unit=coords_unit)
        if bag.width == 0:
            raise BagError(f"{path}: coordinates alone, no features.", fix="Give the feature file of that slide.")
        if bag.coords_l0 is None:
            raise BagError(
                f"{path}: no coordinates ({bag.provenance.get('coords', 'the file holds none')}).",
                fix="Give their unit (coords_unit), or the folder of the coordinate files (patches).",
            )
        return replace(bag, provenance={"imported_from": path.name, **bag.provenance})

    return _convert(source, out, read, write_bag)


def export_folder(source: Path, out: Path) -> Outcome:
    """Read lrmil's feature files and write each as TRIDENT does, as `out`/<slide>.h5.

    Raises:
        BagError: `source` holds no feature file.
    """
    return _convert(source, out, lambda path: read_bag(path, layers=()), write_trident_bag)


def _convert(source: Path, out: Path, read: Callable[[Path], Bag], write: Callable[[Path, Bag], None]) -> Outcome:
    taken: dict[Path, Path] = {}
    failures: list[BagError] = []
    for path in _files(source):
        try:
            bag = read(path)
            target = out / f"{Path(bag.slide or path.stem).name}.h5"
            if target.exists() and target.samefile(path):
                raise BagError(f"{path}: would be replaced by its own copy.", fix="Choose another output folder.")
            if target in taken:
                raise BagError(
                    f"{path}: is of the same slide as {taken[target].name}.",
                    fix="Keep one feature file for each slide.",
                )
            write(target, bag)
            taken[target] = path
        except BagError as error:
            failures.append(error)
    return list(taken), failures


def _files(source: Path) -> list[Path]:
    found = [source] if source.is_file() else sorted(p for p in source.glob("[!.]*") if p.suffix in _SUFFIXES)
    if not found:
        raise BagError(
            f"{source}: no .h5 or .pt file there.", fix="Give a feature file, or the folder that holds them."
        )
    return found
