"""What a feature file was made from, and whether that is what is wanted now."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lrmil.bags.hdf5 import plain_json
from lrmil.errors import ProvenanceMismatch

SOFTWARE = "software"
"""Versions are noted, never compared: another release of a library alone does not make features stale."""
_PACKAGES = (
    *("lrmil", "torch", "timm", "numpy", "h5py", "openslide-python", "openslide-bin"),
    *("tifffile", "imagecodecs", "simplejpeg", "pillow", "opencv-python-headless"),
)
_SHOWN = 60


def software_versions() -> dict[str, str]:
    """Return the versions of what features depend on, without importing any of it."""
    found = {package: _version(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | {package: v for package, v in found.items() if v is not None}


@cache
def _version(package: str) -> str | None:
    """Looking it up takes milliseconds, and every feature file notes it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (field, found, expected) wherever `found` lacks or contradicts `expected`.

    Fields of nested mappings are named with dots. `found` may hold more than is expected; software is not compared.
    """
    wanted = plain_json({k: v for k, v in expected.items() if k != SOFTWARE})
    return list(_differences(plain_json(dict(found)), wanted, ""))


def check_provenance(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise `ProvenanceMismatch`, naming every field that differs, unless `found` is what is expected."""
    wrong = differences(found, expected)
    if not wrong:
        return
    listed = "; ".join(
        f"{name} is {_show(there)} in the file and {_show(wanted)} here" for name, there, wanted in wrong
    )
    raise ProvenanceMismatch(
        f"{where}: made in another way: {listed}.",
        fix="Delete the file, or choose another output folder, and encode again; or go back to the settings it has.",
    )


def _differences(found: Any, expected: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key, wanted in expected.items():
            yield from _differences(found.get(key), wanted, f"{name}.{key}" if name else key)
    elif found != expected:
        yield name, found, expected


def _show(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
