"""Files that are either whole or absent: written beside their place, flushed, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrmil.errors import OutputError

_SCRATCH = r"\..*\.[0-9a-f]{8}\.tmp(\..*)?"
"""names that `atomic_path` gives"""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` on success, delete it on failure.

    The temporary name keeps the suffix, so that libraries which choose a format by suffix work. Readers see the old
    file or the new one, never half of either.

    Raises:
        OutputError: the disk is full, there is no permission, or a file lies where a folder is needed.
    """
    final = Path(path)
    scratch = final.with_name(f".{final.stem}.{uuid.uuid4().hex[:8]}.tmp{final.suffix}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        with scratch.open("rb") as handle:
            os.fsync(handle.fileno())
        scratch.replace(final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{final}: the disk is full.", fix="Free some space and run the same command again; it resumes."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OutputError(f"{final}: no permission to write there.", fix="Choose another output folder.") from error
        if not final.parent.is_dir():
            raise OutputError(f"{final.parent}: is no folder.", fix="Choose another output folder.") from error
        raise
    finally:
        if final.parent.is_dir():
            scratch.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike[str], *, older_than_s: float = 600.0) -> int:
    """Delete the temporary files that killed processes left under `folder`; return how many.

    Younger ones are left alone: another process may be writing them.
    """
    removed = 0
    for path in Path(folder).rglob(".*.tmp*"):
        try:
            old = time.time() - path.stat().st_mtime > older_than_s
            if old and re.fullmatch(_SCRATCH, path.name) and path.is_file():
                path.unlink()
                removed += 1
        except FileNotFoundError:
            continue
    return removed


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 `text` atomically."""
    with atomic_path(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity become null, since JSON has neither."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> None:
    """Write named tensors, which may be on any device, as safetensors, atomically.

    Raises:
        OutputError: see `atomic_path`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # imports torch, which files of text do without

    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as scratch:
        # The library puts a file of its own there, which nobody else may read: give it the usual permissions.
        scratch.touch()
        mode = scratch.stat().st_mode
        try:
            save_file(ready, scratch)
        except SafetensorError as error:
            # What the system says arrives in words only: "No space left on device (os error 28)".
            found = re.search(r"\(os error (\d+)\)", str(error))
            if found is None:
                raise
            raise OSError(int(found.group(1)), os.strerror(int(found.group(1)))) from error
        scratch.chmod(mode)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    elif hasattr(value, "tolist"):
        return _finite(value.tolist())
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value
