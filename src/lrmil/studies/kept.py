"""Finished pieces of a study, each a JSON file with the key of all that it depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrmil.files import read_json


def kept(path: Path, key: str) -> dict[str, Any] | None:
    """Return what a piece found; None where it is not done, or was done with other settings."""
    found: dict[str, Any] | None = read_json(path) if path.is_file() else None
    return found if found is not None and found.get("key") == key else None
