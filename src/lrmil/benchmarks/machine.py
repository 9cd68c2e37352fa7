"""What was measured on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from lrmil.benchmarks.settings import available_cores


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory, GPU and the versions of what reads, decodes and encodes."""
    import cv2
    import imagecodecs
    import openslide
    import simplejpeg
    import tifffile
    import torch

    from lrmil._version import __version__

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    codecs = imagecodecs.version()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores_available": available_cores(),
        "memory_gb": _memory_gb(),
        "gpu": gpu,
        "platform": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {
            "lrmil": __version__,
            "python": platform.python_version(),
            "openslide": openslide.__library_version__,
            "openslide-python": openslide.__version__,
            "simplejpeg (libjpeg-turbo inside)": simplejpeg.__version__,
            "libjpeg-turbo of imagecodecs": _found(r"libjpeg_turbo-([^/,\s]+)", codecs),
            "openjpeg of imagecodecs": _found(r"openjpeg-([^,\s]+)", codecs),
            "tifffile": tifffile.__version__,
            "opencv": cv2.__version__,
            "torch": torch.__version__,
        },
    }


def in_one_line(machine: dict[str, Any]) -> str:
    """Return the machine in a sentence."""
    parts = [machine["processor"], f"{machine['cores_available']} of {machine['cores']} cores"]
    if machine["memory_gb"]:
        parts.append(f"{machine['memory_gb']:.0f} GB memory")
    parts.append(machine["gpu"] or "no GPU")
    return ", ".join(parts)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    return _found(r"model name\s*:\s*(.+)", text) or platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return None


def _found(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match.group(1).strip() if match else None
