"""What a slide is and what this machine has, for people who want to know before they start."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import huggingface_hub
import numpy as np
import numpy.typing as npt
import torch

from lrmil.bags import software_versions
from lrmil.encoders import EncoderCard, encoder_cards
from lrmil.encoders.weights import load_weights
from lrmil.errors import LrmilError
from lrmil.geometry import GridSettings
from lrmil.inference.images import save_image
from lrmil.inference.prepare import PreparedSlide, TileSettings, survey_slide
from lrmil.slides import open_slide, reader_cards
from lrmil.tissue import TissueSettings, overlay

_MIN_SIDE_PX = 600


def describe_slide(
    path: str | Path,
    grid: GridSettings,
    tissue: TissueSettings,
    tiles: TileSettings,
    *,
    mpp: float | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Return facts about a slide and the patches it would give, ready for JSON; it may be without tissue.

    Args:
        path: the slide.
        grid: the scales to plan for.
        tissue: how tissue is found.
        tiles: how much of it a region needs.
        mpp: um per level-0 pixel, where the slide does not say it.
        picture: gets the tissue and the regions, drawn on the overview.

    Raises:
        SlideError: the slide cannot be opened, or its scale is not known or of no use.
        OutputError: the picture cannot be written.
    """
    with open_slide(path, mpp=mpp) as slide:
        survey = survey_slide(slide, grid, tissue, tiles)
        matched, scale, mask = survey.grid, survey.grid.scale, survey.tissue
        facts = slide.describe()
        facts["tissue"] = {
            "share": mask.tissue_share,
            "mm2": mask.tissue_mm2,
            "pen_share": mask.pen_share,
            "unreadable_blocks": survey.overview.unreadable,
            "seconds": survey.seconds,
        }
        facts["low_resolution"] = {
            "mpp": scale.lr_mpp,
            "patch_px": scale.patch_px,
            "region_side_l0": scale.region_side_l0,
            "regions": matched.num_regions,
            "level": slide.level_for(scale.lr_mpp).index,
        }
        # None: coarser than that. Such a slide cannot train; it can be predicted on.
        facts["high_resolution"] = {"mpp": scale.hr_mpp, "patches": matched.num_children} if scale.has_hr else None
        facts["snapped"] = scale.snapped
    if picture is not None:
        save_image(picture, _draw(survey))
    return facts


def _draw(survey: PreparedSlide) -> npt.NDArray[np.uint8]:
    """Tissue and regions on the overview; a small one is enlarged in whole steps, and its mask with it."""
    mask, rgb = survey.tissue, survey.overview.rgb
    step = -(-_MIN_SIDE_PX // max(mask.mask.shape))
    if step > 1:
        dx, dy = mask.downsample_l0
        larger = [part.repeat(step, axis=0).repeat(step, axis=1) for part in (mask.mask, mask.pen)]
        mask = replace(mask, mask=larger[0], pen=larger[1], downsample_l0=(dx / step, dy / step))
        rgb = np.asarray(cv2.resize(rgb, None, fx=step, fy=step, interpolation=cv2.INTER_CUBIC), np.uint8)
    return overlay(rgb, mask, boxes_l0=survey.grid.region_boxes_l0)


@dataclass(frozen=True)
class Check:
    """One line of `lrmil doctor`."""

    subject: str
    state: Literal["ok", "note", "bad"]
    finding: str


def check_machine() -> list[Check]:
    """Look at versions, devices, readers and encoder weights; ask no server."""
    import openslide

    checks = [Check(name, "ok", found) for name, found in software_versions().items()]
    checks.append(Check("openslide", "ok", f"{openslide.__library_version__} (Python {openslide.__version__})"))
    checks += _devices()
    free_gb = shutil.disk_usage(Path.cwd()).free / 2**30
    checks.append(Check("disk", "ok" if free_gb > 5 else "note", f"{free_gb:.0f} GiB free in this folder"))
    for card in reader_cards():
        checks.append(Check(f"reader {card.name}", "ok", f"{card.formats} ({card.licence})"))
    checks.append(_hub())
    for encoder in encoder_cards():
        found = _weights_here(encoder)
        if found is not None:
            checks.append(found)
    return checks


def _devices() -> list[Check]:
    found = [
        Check(
            f"cuda:{index}",
            "ok",
            f"{torch.cuda.get_device_name(index)}, "
            f"{torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB",
        )
        for index in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        found.append(Check("mps", "ok", "Apple GPU"))
    if not found:
        found.append(Check("GPU", "note", "none; the CPU encodes. A small encoder answers a slide in seconds there"))
    found.append(Check("cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"))
    return found


def _hub() -> Check:
    offline = "offline by HF_HUB_OFFLINE; " if huggingface_hub.constants.HF_HUB_OFFLINE else ""
    if huggingface_hub.get_token():
        return Check("model hub", "ok", f"{offline}a token is set")
    return Check("model hub", "note", f"{offline}no token: gated encoders need HF_TOKEN or a local file")


def _weights_here(card: EncoderCard) -> Check | None:
    """Say where the weights of an encoder lie on this machine, or return None if they do not."""
    subject = f"encoder {card.name}"
    named = os.environ.get(card.ckpt_variable)
    if named:
        there = Path(named).expanduser().exists()
        return Check(
            subject, "ok" if there else "bad", f"{card.ckpt_variable}={named}" + ("" if there else ": missing")
        )
    if card.package_file is not None:
        try:
            state, origin = load_weights(card)
        except LrmilError as error:
            return Check(subject, "bad", str(error))
        return Check(subject, "ok", f"{origin}, {sum(v.numel() for v in state.values()) / 1e6:.1f} million weights")
    source = card.source
    if source and any(isinstance(huggingface_hub.try_to_load_from_cache(source, name), str) for name in card.files):
        return Check(subject, "ok", f"downloaded from {source}")
    return None
