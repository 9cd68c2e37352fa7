from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.slides.blocks import Block, block_sides


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 25), st.integers(1, 25))
def test_parts_cover_a_block_once(width, height, across, down):
    seen = np.zeros((100, 100), int)
    for part in Block(7, 5, width, height).cut(across, down):
        assert part.width_px <= across
        assert part.height_px <= down
        seen[part.place] += 1
    assert (seen[5 : 5 + height, 7 : 7 + width] == 1).all()
    assert seen.sum() == width * height


def test_what_a_block_covers():
    assert Block(2, 3, 4, 5).box_l0((100.0, 200.0), (8.0, 16.0)) == (116.0, 248.0, 148.0, 328.0)
    assert (Block(2, 3, 4, 5).size_px, Block(2, 3, 4, 5).area_px) == ((4, 5), 20)


@pytest.mark.parametrize(
    ("step", "sides"), [((4.0, 8.0), (512, 256)), ((5000.0, 1.0), (1, 2048)), ((3.0, 3.0), (682,) * 2)]
)
def test_blocks_keep_within_their_memory(step, sides):
    assert block_sides(step) == sides
