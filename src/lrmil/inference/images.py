"""Write pictures, atomically."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.errors import OutputError
from lrmil.files import atomic_path


def save_image(path: Path, rgb: npt.NDArray[np.uint8]) -> None:
    """Write (H, W, 3) uint8 RGB as .png or .jpg, by the suffix.

    Raises:
        OutputError: it cannot be written.
    """
    fine, data = cv2.imencode(path.suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    if not fine:
        raise OutputError(f"{path}: the picture cannot be encoded as {path.suffix}.", fix="Use .png or .jpg.")
    with atomic_path(path) as scratch:
        scratch.write_bytes(data.tobytes())
