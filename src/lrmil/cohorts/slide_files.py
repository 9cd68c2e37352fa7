"""Where the files of a cohort are: paths made absolute, folders searched, what is missing listed."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from lrmil.errors import CohortError

_OPENSLIDE = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".czi", ".dcm")
SLIDE_SUFFIXES = frozenset((*_OPENSLIDE, ".isyntax", ".vsi", ".qptiff"))
FEATURE_SUFFIXES = frozenset((".h5", ".hdf5", ".pt"))
_SHOWN = 10


def stem(name: str) -> str:
    """Return the name of a slide: that of its file without folder and without the suffix, if it is a known one."""
    base = Path(name)
    return base.stem if base.suffix.lower() in SLIDE_SUFFIXES | FEATURE_SUFFIXES else base.name


def is_feature_file(name: str) -> bool:
    """Say whether a file name is that of a feature file."""
    return Path(name).suffix.lower() in FEATURE_SUFFIXES


def locate(value: str, table_folder: Path, files_dir: Path | None) -> Path:
    """Make a path of the table absolute: from `files_dir` if the file is there, else from the table's own folder."""
    path = Path(value).expanduser()
    if path.is_absolute():
        return path
    if files_dir is not None and (files_dir / path).exists():
        return absolute(files_dir / path)
    return absolute(table_folder / path)


def absolute(path: Path) -> Path:
    """Make a path absolute without following links, whose targets may have meaningless names."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve() follows links


class FolderIndex:
    """Slide or feature files under a folder and its subfolders, found by name."""

    def __init__(self, folder: str | Path, suffixes: frozenset[str], what: str) -> None:
        self.folder = absolute(Path(folder).expanduser())
        if not self.folder.is_dir():
            raise CohortError(f"{self.folder}: no such folder of {what}.", fix="Check the path.")
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(self.folder.rglob("*")):
            if path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith("."):
                self._by_stem[path.stem].append(path)

    def find(self, slide_id: str) -> Path | None:
        """Return the file of a slide, given with or without suffix; None if there is none.

        Raises:
            CohortError: several files have that name.
        """
        found = self._by_stem.get(slide_id) or [p for p in self._by_stem.get(stem(slide_id), []) if p.name == slide_id]
        if len(found) > 1:
            raise CohortError(
                f"slide {slide_id}: {len(found)} files have that name: {', '.join(map(str, found[:3]))}.",
                fix="Add a path column that says which.",
            )
        return found[0] if found else None

    def of_patients(self, patients: Iterable[str]) -> tuple[dict[str, list[Path]], list[Path]]:
        """Sort all files by the patient with whose id their name begins; return them, and those of nobody.

        After the id the name must end or go on with something else than a letter or a digit, so that P1 does not get
        the slides of P12. Of several ids that fit, the longest counts.
        """
        known = set(patients)
        owned: dict[str, list[Path]] = {p: [] for p in known}
        strangers: list[Path] = []
        for name, paths in self._by_stem.items():
            ends = [i for i in range(len(name), 0, -1) if i == len(name) or not name[i].isalnum()]
            owner = next((name[:i] for i in ends if name[:i] in known), None)
            (strangers if owner is None else owned[owner]).extend(paths)
        return owned, strangers


def require_files(table: Path, missing: list[tuple[int, str, str, Path]], total: int) -> None:
    """Raise `CohortError` with up to ten of the `missing` files: (row, slide, column, path)."""
    if not missing:
        return
    listed = "".join(f"\n  row {row}, {slide}: {column} {path}" for row, slide, column, path in missing[:_SHOWN])
    more = f"\n  and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    raise CohortError(
        f"{table}: {len(missing)} files of {total} slides are missing:{listed}{more}\n",
        fix='Correct the paths (relative ones start at the table\'s folder or slides_dir), or say missing="drop".',
    )
