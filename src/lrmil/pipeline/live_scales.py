"""A slide file as heads that choose their patches are shown it, with the settings of a run."""

from __future__ import annotations

from collections.abc import Sequence

from lrmil.encoders import Encoder
from lrmil.geometry import MatchedGrid
from lrmil.inference.scales import SlideScales
from lrmil.pipeline.context import Run
from lrmil.slides import Slide


def live_scales(run: Run, slide: Slide, grid: MatchedGrid, encoder: Encoder, scales: Sequence[str]) -> SlideScales:
    """Return the patches of an open slide, which are read and encoded as they are asked for; see `SlideScales`."""
    s = run.settings
    return SlideScales(
        slide,
        grid,
        encoder,
        scales,
        batch_size=s.encoder.stream_batch,
        forward_batch=s.encoder.batch_size,
        threads=s.threads,
        precision=s.encoder.precision,
        max_unreadable=s.tiles.max_unreadable,
    )
