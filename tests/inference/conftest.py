"""A tiny bundle, and slides of stained tissue on glass, small enough to answer in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch

from lrmil.encoders import create_encoder
from lrmil.geometry import GridSettings
from lrmil.inference.bundle import BundleManifest, HeadSpec, TrainedOn, save_bundle
from lrmil.inference.predict import Bundle, load_bundle
from lrmil.inference.prepare import TileSettings
from lrmil.mil import create_head
from lrmil.slides import write_pyramid
from lrmil.tissue import TissueSettings

Image = npt.NDArray[np.uint8]


@pytest.fixture(scope="session")
def tissue_picture() -> Callable[..., Image]:
    """`tissue_picture(width, height)` at 40x: a stained ellipse with dark dots on glass; no two places alike."""

    def make(width: int, height: int, seed: int = 0, fill: float = 0.46) -> Image:
        rng = np.random.default_rng(seed)
        coarse = rng.normal(0, 14, (height // 64 + 2, width // 64 + 2, 3)).astype(np.float32)
        image = np.array([222, 160, 196], np.float32) + cv2.resize(coarse, (width, height))
        dots = np.stack([rng.integers(0, width, 3 * width), rng.integers(0, height, 3 * width)], axis=1)
        for x, y in dots.tolist():
            cv2.circle(image, (x, y), int(rng.integers(8, 20)), (110.0, 70.0, 150.0), -1)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        glass = ((x / width - 0.5) / fill) ** 2 + ((y / height - 0.5) / fill) ** 2 > 1
        image[glass] = 243
        return np.clip(image + rng.normal(0, 3, (height, width, 1)), 0, 255).astype(np.uint8)

    return make


@pytest.fixture(scope="session")
def slide_40x(tissue_picture: Callable[..., Image]) -> Image:
    """1536 x 1024 px at 0.25 um/px: 6 x 4 regions of 32 px at 2 um/px, of which those in the corners are glass."""
    return tissue_picture(1536, 1024)


@pytest.fixture(scope="session")
def write_slide(tmp_path_factory: pytest.TempPathFactory, slide_40x: Image) -> Callable[..., Path]:
    """`write_slide(mpp, downsamples)` writes the picture, averaged to that scale; each kind is written once."""
    written: dict[tuple[object, ...], Path] = {}

    def write(mpp: float = 0.25, downsamples: tuple[int, ...] = (1, 4, 16), shrink: int = 1) -> Path:
        key = (mpp, downsamples, shrink)
        if key not in written:
            height, width = slide_40x.shape[:2]
            image = cv2.resize(slide_40x, (width // shrink, height // shrink), interpolation=cv2.INTER_AREA)
            folder = tmp_path_factory.mktemp("slide")
            written[key] = write_pyramid(folder / "case.tif", image, mpp, downsamples, 128, "deflate")
        return written[key]

    return write


@pytest.fixture(scope="session")
def damage() -> Callable[..., None]:
    """`damage(path, level, tiles)` overwrites tiles (column, row) of a level; they cannot be decoded any more."""

    def spoil(path: Path, level: int, tiles: list[tuple[int, int]] | None = None) -> None:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.series[0].levels[level].keyframe
            across = -(-page.imagewidth // page.tilewidth)
            chosen = range(len(page.dataoffsets)) if tiles is None else [row * across + col for col, row in tiles]
            places = [(page.dataoffsets[i], page.databytecounts[i]) for i in chosen]
        with path.open("r+b") as handle:
            for offset, length in places:
                handle.seek(offset)
                handle.write(b"\x00" * length)

    return spoil


@pytest.fixture(scope="session")
def parts() -> tuple[Any, Any]:
    """An encoder and a head that has opinions: its answers differ from slide to slide and from region to region."""
    encoder = create_encoder("lrmil-small", input_px=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = create_head("abmil", encoder.embed_dim, 3).eval()
    with torch.no_grad():
        head.attention_w.weight.mul_(5)
        head.classifier.weight.mul_(2)
    return encoder, head


@pytest.fixture(scope="session")
def manifest(parts: tuple[Any, Any]) -> BundleManifest:
    encoder, _ = parts
    return BundleManifest(
        created="2025-01-01T00:00:00+00:00",
        task="diagnosis",
        classes=["benign", "in situ", "invasive"],
        grid=GridSettings(patch_px=32, lr_mpp=2.0, hr_mpp=0.5),
        tissue=TissueSettings(),
        tiles=TileSettings(),
        head=HeadSpec(name="abmil", in_dim=encoder.embed_dim, num_classes=3),
        encoder_origin={"name": "a-large-encoder", "licence": "MIT"},
        licence_note="free",
        trained_on=TrainedOn(
            cohort="cases",
            slides=12,
            patients=9,
            slides_per_class={"benign": 6, "in situ": 2, "invasive": 4},
            regions_per_slide=(5.0, 20.0, 60.0),
        ),
        cross_validation={"LRMIL, AUC": "0.9"},
        recipe={"seed": 0, "broken": float("nan"), "sides": (1, 2)},
        software={"lrmil": "0"},
    )


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory, parts: tuple[Any, Any], manifest: BundleManifest) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "model"
    save_bundle(folder, manifest, *parts)
    return folder


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    return load_bundle(bundle_folder, device="cpu")
