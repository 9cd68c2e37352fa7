"""Precomputed patches for training the heads that choose theirs: all that they might ask for.

    ZoomMIL   all patches of all regions at three scales, see `zoom_features`
    HDMIL     the teacher's own 20x features, encoded here if they are missing, and `thumbnails` of the same patches

Files are made again where their slide, tiling, encoder or precision is another. Predictions on slide files need none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lrmil.bags import Bag, read_bag
from lrmil.encoders import Encoder
from lrmil.errors import ConfigError
from lrmil.geometry import MatchedGrid
from lrmil.inference.layouts import CHILD_SCALES
from lrmil.mil import MultiScaleHead, PatchSource, create_head
from lrmil.pipeline.context import Run
from lrmil.pipeline.encode import encode_children, features_name
from lrmil.pipeline.keys import bag_provenance, features_of
from lrmil.pipeline.thumbnails import store_thumbnails, with_thumbnails
from lrmil.pipeline.zoom_features import encode_zoom, zoom_sources


def encode_scales(run: Run, grids: Mapping[str, MatchedGrid], encoder: Encoder, head: str) -> None:
    """Make what `head` trains on, for every slide that has not failed, unless it is there.

    A slide that cannot be encoded at one of the scales is noted as a failure. Call this before folds are made, so that
    all methods see the same slides, and after `encode_children`, whose features are used again.

    Raises:
        ConfigError: it is a head of one scale, or the magnifications leave it no middle one.
    """
    if selective_head(head).scales == CHILD_SCALES:
        encode_children(run, grids, encoder, ())
        store_thumbnails(run, grids)
    else:
        encode_zoom(run, grids, encoder)


def scale_sources(
    run: Run,
    grids: Mapping[str, MatchedGrid],
    slides: Sequence[str],
    encoder: Encoder,
    head: str,
    *,
    child_bags: Mapping[str, Bag] | None = None,
) -> dict[str, PatchSource]:
    """Return the patches of `slides`, by id, as `head` trains on them; `encode_scales` comes first.

    Args:
        run: the run.
        grids: of these slides.
        slides: ids.
        encoder: what made the features.
        head: its name.
        child_bags: the teacher's bags, where they are in memory already; they are shared, not copied.

    Raises:
        ConfigError: it is a head of one scale.
        BagError: a file is missing, or made in another way.
    """
    if selective_head(head).scales != CHILD_SCALES:
        return zoom_sources(run, grids, slides, encoder)
    features = features_of(run, encoder)
    name = features_name(encoder, run.settings.grid.hr_mpp, run.settings.encoder.random_seed)
    found: dict[str, PatchSource] = {}
    for slide_id in slides:
        entry, grid = run.entry(slide_id), grids[slide_id]
        if child_bags is not None:
            bag = child_bags[slide_id]
        else:
            expected = bag_provenance(run, entry, features, grid.scale.hr_mpp)
            bag = read_bag(run.folder.bag(name, slide_id), layers=(), expected=expected)
        found[slide_id] = with_thumbnails(run, entry, grid, bag)
    return found


def selective_head(name: str) -> MultiScaleHead:
    """Build the smallest head of that name, to be asked what it reads.

    Raises:
        ConfigError: it is a head of one scale.
        HeadError: there is no such head.
    """
    with torch.random.fork_rng(devices=[]):
        head = create_head(name, 1, 2)
    if not isinstance(head, MultiScaleHead):
        raise ConfigError(
            f"head {name!r} takes bags of one scale, and chooses no patches.", fix="Choose zoommil or hdmil."
        )
    return head
