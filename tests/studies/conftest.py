"""A tiny encoder, and a folder in the layout of CRCHistoPhenotypes, painted so that nuclei show in the pixels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from lrmil.cohorts.crchisto import CLASSES
from lrmil.encoders import EncoderCard, register_encoder

TINY = "studies-tiny"
PATCH_PX, RATIO = 32, 4
SIDE_PX = PATCH_PX * RATIO


@pytest.fixture(scope="session", autouse=True)
def tiny_card() -> EncoderCard:
    """Two blocks, 8 x 8 tokens of 4 px: 2 x 2 under each of 16 children."""
    card = EncoderCard(
        name=TINY,
        title="tiny",
        architecture="vit_tiny_patch16_224",
        arch_args={"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
        width=32,
        depth=2,
        token_px=4,
        table_px=PATCH_PX,
        input_px=PATCH_PX,
        licence="none",
    )
    return register_encoder(card)


def paint(rng: np.random.Generator, side_px: int, dark: float) -> np.ndarray:
    """Smooth random colours, (side, side, 3) uint8."""
    coarse = rng.uniform(0, 255 - 120 * dark, (9, 9, 3)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (side_px, side_px), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of 140 px with 40 nuclei each; the darker an image, the more of them are inflammatory."""
    folder = tmp_path_factory.mktemp("crchisto")
    (folder / "images").mkdir()
    rng = np.random.default_rng(5)
    nuclei, images = [], []
    for number in range(1, 13):
        share = number / 12
        name = f"img{number}"
        cv2.imwrite(str(folder / "images" / f"{name}.png"), paint(rng, SIDE_PX + 12, share))
        kinds = rng.choice(4, 40, p=[(1 - share) / 2, (1 - share) / 4, share, (1 - share) / 4])
        xy = rng.uniform(0, SIDE_PX + 12, (40, 2))
        nuclei += [(name, x, y, CLASSES[kind]) for (x, y), kind in zip(xy, kinds, strict=True)]
        images.append({"image": name, **{f"n_{c}": int((kinds == i).sum()) for i, c in enumerate(CLASSES)}})
    pd.DataFrame(nuclei, columns=["image", "x", "y", "cls"]).to_csv(folder / "nuclei.csv.gz", index=False)
    pd.DataFrame(images).to_csv(folder / "images.csv", index=False)
    return folder
