"""The direct reader and OpenSlide: the same pixels, features and answers, or nearly so where tiles are reduced."""

from __future__ import annotations

import numpy as np
import pytest

from lrmil.geometry import match_grids
from lrmil.inference import load_bundle
from lrmil.inference.bundle import save_bundle
from lrmil.inference.prepare import TileSettings
from lrmil.inference.stream import child_reads, encode_patches, region_reads
from lrmil.slides import open_slide, write_pyramid

CMU = "CMU-1-Small-Region.svs"
PATCH_PX = 32


@pytest.fixture(scope="module")
def answer_by(tmp_path_factory, manifest, parts):
    """`answer_by(reader, path)`: what a bundle that names this reader says about a slide."""
    bundles = {}
    for reader in ("auto", "openslide"):
        folder = tmp_path_factory.mktemp(reader) / "model"
        save_bundle(folder, manifest.model_copy(update={"tiles": TileSettings(reader=reader)}), *parts)
        bundles[reader] = load_bundle(folder, device="cpu")
    return lambda reader, path: bundles[reader].predict(path)


@pytest.fixture(scope="module")
def jpeg_pyramid(tmp_path_factory, slide_40x):
    """`jpeg_pyramid(downsamples, chroma)` writes the picture as a scanner would."""

    def write(downsamples, chroma):
        path = tmp_path_factory.mktemp("jpeg") / "case.tif"
        return write_pyramid(path, slide_40x, 0.25, downsamples, 128, "jpeg", 80, chroma=chroma)

    return write


def encoded(path, reader, parts, manifest, reads_of):
    """All pixels (N, 3) that were asked for, and the features."""
    with open_slide(path, reader=reader) as slide:
        assert slide.reader == reader
        reads = reads_of(match_grids(manifest.grid, slide.mpp, slide.dimensions))
        pixels = [slide.read_box(read.box_l0, read.size_px) for read in reads]
        done = encode_patches(slide, reads, PATCH_PX, parts[0], batch_size=32, threads=2)
    assert not done.log.unreadable
    return np.concatenate([image.reshape(-1, 3) for image in pixels]), done


def cosines(a, b):
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("chroma", ["444", "420"])
@pytest.mark.parametrize("reads_of", [region_reads, child_reads])
def test_exact_levels_give_equal_features(jpeg_pyramid, parts, manifest, chroma, reads_of):
    path = jpeg_pyramid((1, 2, 4, 8), chroma)
    pixels, direct = encoded(path, "tiff", parts, manifest, reads_of)
    wanted, other = encoded(path, "openslide", parts, manifest, reads_of)
    assert (pixels == wanted).all()
    assert (direct.rows == other.rows).all()
    assert (direct.embedding == other.embedding).all()
    assert np.ptp(direct.embedding, axis=0).max() > 0.1, "equal patches would prove nothing"


@pytest.mark.parametrize("chroma", ["444", "420"])
def test_exact_levels_give_equal_answers(jpeg_pyramid, answer_by, chroma):
    path = jpeg_pyramid((1, 2, 4, 8), chroma)
    direct, other = answer_by("auto", path), answer_by("openslide", path)
    assert direct.scale["reader"] == "tiff"
    assert other.scale["reader"] == "openslide"
    assert (direct.boxes_l0 == other.boxes_l0).all()
    assert direct.probabilities == other.probabilities
    assert (direct.attention == other.attention).all()


@pytest.mark.parametrize("chroma", ["444", "420"])
def test_reduced_tiles_give_nearly_equal_features(jpeg_pyramid, parts, manifest, chroma):
    """Only 40x is there: an average over eight pixels."""
    path = jpeg_pyramid((1,), chroma)
    pixels, direct = encoded(path, "tiff", parts, manifest, region_reads)
    wanted, other = encoded(path, "openslide", parts, manifest, region_reads)
    assert 0 < np.abs(pixels.astype(int) - wanted).mean() < (0.5 if chroma == "444" else 1.5)
    assert cosines(direct.embedding, other.embedding).min() >= 0.999


@pytest.mark.parametrize("chroma", ["444", "420"])
def test_reduced_tiles_give_nearly_equal_answers(jpeg_pyramid, answer_by, chroma):
    path = jpeg_pyramid((1,), chroma)
    nearly_equal(answer_by("auto", path), answer_by("openslide", path))


def nearly_equal(direct, other):
    assert direct.predicted == other.predicted
    assert (direct.boxes_l0 == other.boxes_l0).all()
    for name, probability in other.probabilities.items():
        assert direct.probabilities[name] == pytest.approx(probability, abs=0.01)
    np.testing.assert_allclose(direct.attention, other.attention, rtol=0.1)


class TestCmu:
    """A real scan, 20x only."""

    def test_features_at_20x(self, shared_data, parts, manifest):
        def some_children(grid):
            return child_reads(grid)[::30]

        pixels, direct = encoded(shared_data / "slides" / CMU, "tiff", parts, manifest, some_children)
        wanted, other = encoded(shared_data / "slides" / CMU, "openslide", parts, manifest, some_children)
        assert (pixels == wanted).all()
        assert (direct.embedding == other.embedding).all()

    def test_features_at_5x(self, shared_data, parts, manifest):
        path = shared_data / "slides" / CMU
        pixels, direct = encoded(path, "tiff", parts, manifest, region_reads)
        wanted, other = encoded(path, "openslide", parts, manifest, region_reads)
        assert 0 < np.abs(pixels.astype(int) - wanted).mean() < 0.5
        assert cosines(direct.embedding, other.embedding).min() >= 0.999

    def test_answer(self, shared_data, answer_by):
        path = shared_data / "slides" / CMU
        nearly_equal(answer_by("auto", path), answer_by("openslide", path))
