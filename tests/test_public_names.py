"""`import lrmil` offers the names that others rely on, and loads them when they are first used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lrmil


def test_every_name_is_offered_and_is_that_of_its_room() -> None:
    from lrmil.encoders import create_encoder
    from lrmil.geometry import GridSettings, match_grids
    from lrmil.inference import load_bundle
    from lrmil.mil import create_head, load_original
    from lrmil.slides import open_slide

    assert lrmil.open_slide is open_slide
    assert lrmil.match_grids is match_grids
    assert lrmil.GridSettings is GridSettings
    assert lrmil.create_encoder is create_encoder
    assert lrmil.create_head is create_head
    assert lrmil.load_original is load_original
    assert lrmil.load_bundle is load_bundle
    assert set(lrmil.__all__) <= set(dir(lrmil))
    assert all(hasattr(lrmil, name) for name in lrmil.__all__)


def test_the_names_work(tmp_path: Path) -> None:
    from lrmil.slides import write_pyramid

    write_pyramid(tmp_path / "s.tif", np.full((512, 512, 3), 200, np.uint8), 0.5)
    with lrmil.open_slide(tmp_path / "s.tif") as slide:
        assert slide.read(0, 0, 32, 32, 2.0).shape == (32, 32, 3)
        grid = lrmil.match_grids(lrmil.GridSettings(patch_px=64), slide.mpp, slide.dimensions)
    assert (grid.num_regions, grid.num_children) == (4, 64)
    encoder = lrmil.create_encoder("lrmil-small", random_seed=0)
    head = lrmil.create_head("abmil", encoder.embed_dim, 2)
    answer = head(torch.zeros(3, encoder.embed_dim))
    assert answer.logits.shape == (2,)
    assert answer.attention is not None


def test_a_name_that_does_not_exist_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="module 'lrmil' has no attribute 'open_slides'"):
        lrmil.open_slides  # noqa: B018
    with pytest.raises(ImportError):
        from lrmil import nothing  # noqa: F401


def test_import_loads_no_torch_until_it_is_needed() -> None:
    code = (
        "import sys, lrmil; before = 'torch' in sys.modules or 'numpy' in sys.modules; "
        "lrmil.match_grids; between = 'torch' in sys.modules; lrmil.create_head; "
        "print(before, between, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False False True\n"
