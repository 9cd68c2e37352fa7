"""What the columns of a cohort table are called, by us and by the other programs of the field."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

ALIASES: dict[str, tuple[str, ...]] = {
    # CLAM: slide_id, case_id, label · slideflow: slide, patient · slide2vec: sample_id
    "slide_id": ("slide", "sample_id"),
    # STAMP: PATIENT · LRMIL authors: P_ID
    "patient_id": ("case_id", "patient", "p_id", "case"),
    # slide2vec: image_path
    "path": ("image_path", "slide_path", "wsi_path"),
    "features": ("features_path", "feature_path"),
    # slide2vec: spacing_at_level_0
    "mpp": ("spacing_at_level_0",),
    "site": ("center", "centre"),
    "fold": (),
    "time": (),
    "event": (),
}
"""Canonical name: other names, in order of preference. Case, blanks and hyphens do not matter."""

FILE = "file"
FILE_ALIASES = ("wsi", "filename")
"""TRIDENT's `wsi` and STAMP's `FILENAME`: the name of a slide file or of a feature file; its suffix tells which"""

IGNORED = ("mask_path",)
"""Columns of other programs that are known, and not needed"""

_FOLD_PART = re.compile(r"fold_\d+")


@dataclass(frozen=True)
class Columns:
    """How the columns of one table are understood."""

    source: dict[str, str]
    """Canonical name, or task, or `fold_<i>`, or "file": name in the table"""
    unknown: tuple[str, ...]
    """Names that mean nothing to us"""


def understand(names: Sequence[str], tasks: Sequence[str]) -> Columns:
    """Match column names with tasks (exactly, else whatever the case), canonical names, and aliases, in this order."""
    source: dict[str, str] = {}
    free = {name: _plain(name) for name in names}

    def take(meaning: str, wanted: Sequence[str]) -> None:
        for plain in wanted:
            found = next((name for name, own in free.items() if own == plain), None)
            if found is not None and meaning not in source:
                source[meaning] = found
                del free[found]

    for task in tasks:
        if task in free:
            source[task] = task
            del free[task]
    for task in tasks:
        take(task, [_plain(task)])
    for meaning in ALIASES:
        take(meaning, [meaning])
    for meaning, others in ALIASES.items():
        take(meaning, others)
    take(FILE, FILE_ALIASES)
    for name, plain in list(free.items()):
        if _FOLD_PART.fullmatch(plain) and plain not in source:
            source[plain] = name
            del free[name]
    return Columns(source, tuple(name for name, plain in free.items() if plain not in IGNORED))


def near(name: str, tasks: Sequence[str]) -> str | None:
    """Return the known column name that `name` may be a misspelling of."""
    known = [*tasks, *ALIASES, *(a for others in ALIASES.values() for a in others), *FILE_ALIASES]
    return next(iter(difflib.get_close_matches(_plain(name), known, n=1, cutoff=0.75)), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())
