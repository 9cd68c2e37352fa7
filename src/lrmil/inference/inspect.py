"""What a slide is and what this machine has, for people who want to know before they start."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lrmil.bags import software_versions
from lrmil.encoders import encoder_cards
from lrmil.errors import LrmilError
from lrmil.geometry import GridSettings
from lrmil.inference.images import save_image
from lrmil.inference.prepare import TileSettings, prepare_slide
from lrmil.slides import open_slide, reader_cards
from lrmil.tissue import TissueSettings, overlay


def describe_slide(
    path: Path, *, mpp: float | None, lr_mpp: float, hr_mpp: float, patch_px: int, picture: Path | None = None
) -> dict[str, Any]:
    """Return facts about a slide and the patches it would give; `picture` gets the tissue and the regions drawn.

    Raises:
        SlideError: the slide cannot be opened, or its scale is not known.
    """
    grid_settings = GridSettings(patch_px=patch_px, lr_mpp=lr_mpp, hr_mpp=hr_mpp)
    with open_slide(path, mpp=mpp) as slide:
        prepared = prepare_slide(slide, grid_settings, TissueSettings(), TileSettings())
        grid, scale = prepared.grid, prepared.grid.scale
        facts: dict[str, Any] = {
            "slide": slide.name,
            "reader": f"{slide.reader} ({slide.vendor})",
            "level 0": f"{slide.dimensions[0]} x {slide.dimensions[1]} px",
            "mpp": f"{slide.mpp:.4f} um/px (from {slide.mpp_source})",
            "levels": [
                f"{v.index}: {v.width_px} x {v.height_px} px, {slide.mpp * v.downsample:.3f} um/px"
                for v in slide.levels
            ],
            "tissue": f"{prepared.tissue.tissue_share:.1%} of the slide",
            "low resolution": f"{grid.num_regions} regions of {patch_px} px at {scale.lr_mpp:.4g} um/px, "
            f"read from level {slide.level_for(scale.lr_mpp).index}",
            "high resolution": f"{grid.num_children} patches at {scale.hr_mpp:.4g} um/px"
            if scale.has_hr
            else "not available: the slide is too coarse to train with, it can be predicted on",
            "grid": "whole level-0 pixels, box averages"
            if scale.snapped
            else f"resampled: {slide.mpp:.4g} um/px is no power of two away from {hr_mpp:g} um/px",
        }
    if picture is not None:
        drawn = overlay(prepared.overview.rgb, prepared.tissue, boxes_l0=grid.region_boxes_l0)
        save_image(picture, drawn)
        facts["picture"] = str(picture)
    return facts


@dataclass(frozen=True)
class Check:
    """One line of `lrmil doctor`."""

    subject: str
    state: Literal["ok", "note", "bad"]
    finding: str


def check_machine() -> list[Check]:
    """Look at versions, devices, readers and encoder weights; load nothing large."""
    checks = [Check(name, "ok", found) for name, found in software_versions().items()]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory_gb = torch.cuda.get_device_properties(index).total_memory / 2**30
            checks.append(Check(f"cuda:{index}", "ok", f"{torch.cuda.get_device_name(index)}, {memory_gb:.0f} GiB"))
    else:
        checks.append(
            Check("GPU", "note", "none; encoders run on the CPU, a small one answers a slide in seconds there")
        )
    checks.append(Check("CPU", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"))
    free_gb = shutil.disk_usage(Path.cwd()).free / 2**30
    checks.append(Check("disk", "ok" if free_gb > 5 else "note", f"{free_gb:.0f} GiB free here"))
    for card in reader_cards():
        checks.append(Check(f"reader {card.name}", "ok", f"{card.formats} ({card.licence})"))
    token = bool(os.environ.get("HF_TOKEN") or (Path.home() / ".cache" / "huggingface" / "token").is_file())
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    checks.append(
        Check(
            "model hub",
            "ok" if token else "note",
            ("offline by HF_HUB_OFFLINE; " if offline else "")
            + ("a token is set" if token else "no token: gated encoders need HF_TOKEN or a local file"),
        )
    )
    for encoder in encoder_cards():
        if encoder.package_file:
            try:
                checks.append(
                    Check(f"encoder {encoder.name}", "ok", f"shipped, {_package_weight(encoder.package_file)}")
                )
            except (LrmilError, FileNotFoundError) as error:
                checks.append(Check(f"encoder {encoder.name}", "bad", str(error)))
    return checks


def _package_weight(name: str) -> str:
    from importlib.resources import files

    resource = files("lrmil.encoders").joinpath(name)
    with resource.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
    return f"{size / 1e6:.1f} MB"
