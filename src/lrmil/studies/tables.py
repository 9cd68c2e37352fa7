"""Tables that studies publish."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lrmil.files import atomic_path


def write_table(path: Path, frame: pd.DataFrame) -> Path:
    """Write a small CSV, six digits a number, whole or not at all."""
    with atomic_path(path) as scratch:
        frame.to_csv(scratch, index=False, float_format="%.6g")
    return path
