"""Write pictures, atomically."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.errors import ConfigError
from lrmil.files import atomic_path


def save_image(path: Path, rgb: npt.NDArray[np.uint8]) -> None:
    """Write (H, W, 3) uint8 RGB as .png or .jpg, by the suffix.

    Raises:
        ConfigError: another suffix.
        OutputError: it cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"{path}: pictures are not written as {suffix or 'nameless'} files.", fix="Use .png or .jpg.")
    _, data = cv2.imencode(suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    with atomic_path(path) as scratch:
        scratch.write_bytes(data.tobytes())
