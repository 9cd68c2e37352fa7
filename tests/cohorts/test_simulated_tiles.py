"""What a simulated tile shows, and what it must not show."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from lrmil.cohorts.simulated import SimulatedSettings, Truth, preset, render_tile
from lrmil.cohorts.simulated.architecture import Wish, lay_out
from lrmil.cohorts.simulated.nuclei import EPITHELIAL, KINDS, build_atlases
from lrmil.cohorts.simulated.settings import NucleusSettings, ScannerSettings, TissueSettings
from lrmil.errors import ConfigError

FEW = 40


def _settings(**nuclei: float) -> SimulatedSettings:
    wanted = {"shapes": FEW, "mitoses": 0.0, "atypical_share": 1.0, "background_atypical_share": 0.0} | nuclei
    return preset(
        "test",
        nuclei=NucleusSettings.model_validate(wanted),
        tissue=TissueSettings(architecture=0, gland_share=0.8, fat_share=0.05, inflamed_share=0.05),
        scanner=ScannerSettings(artefacts=0),
    )


def _twins(settings: SimulatedSettings, seeds: range = range(4)) -> list[list[tuple[npt.NDArray[np.uint8], Truth]]]:
    return [[render_tile(np.random.default_rng(s), settings, 512, 0.5, p) for s in seeds] for p in (True, False)]


def _crops(image: npt.NDArray[np.uint8], truth: Truth, half: int, downsample: int = 1) -> npt.NDArray[np.float32]:
    """Windows of 2 * half + 1 px around epithelial nuclei."""
    if downsample > 1:
        size = (image.shape[1] // downsample, image.shape[0] // downsample)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    margin = (half + 1) * downsample
    side = image.shape[0] * downsample
    x, y = truth.x_px, truth.y_px
    ok = (truth.kind == EPITHELIAL) & (x > margin) & (y > margin) & (x < side - margin) & (y < side - margin)
    cols, rows = (x[ok] / downsample).astype(int), (y[ok] / downsample).astype(int)
    return np.stack([image[r - half : r + half + 1, c - half : c + half + 1] for c, r in zip(cols, rows, strict=True)])


def _roughness(crops: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.array([np.abs(cv2.Laplacian(c.astype(np.float32), cv2.CV_32F)[1:-1, 1:-1]).mean() for c in crops])


def _effect(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Difference of means in standard deviations."""
    return float((a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2))


def test_same_seed_same_pixels_and_truth() -> None:
    settings = _settings()
    first, second = (render_tile(np.random.default_rng(5), settings, 256) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1].x_px, second[1].x_px)
    assert np.array_equal(first[1].pattern, second[1].pattern)
    other = render_tile(np.random.default_rng(6), settings, 256)
    assert not np.array_equal(first[0], other[0])


def test_nucleus_centres_are_darker_than_what_surrounds_them() -> None:
    settings = _settings()
    dark, around = [], []
    for seed in range(3):
        image, truth = render_tile(np.random.default_rng(seed), settings, 512, 0.5, False)
        red = cv2.GaussianBlur(image[..., 0].astype(np.float32), (0, 0), 1.5)
        inside = (truth.x_px < 511) & (truth.y_px < 511)
        rows, cols = truth.y_px[inside].astype(int), truth.x_px[inside].astype(int)
        dark.append(red[rows, cols])
        around.append(np.full(1, np.median(red)))
    assert (np.concatenate(dark) < np.concatenate(around).min()).mean() > 0.9


def test_truth_is_where_the_pixels_are_not_transposed() -> None:
    image, truth = render_tile(np.random.default_rng(1), _settings(), 512, 0.5, False)
    red = cv2.GaussianBlur(image[..., 0].astype(np.float32), (0, 0), 1.5)
    ok = (truth.x_px < 511) & (truth.y_px < 511)
    x, y = truth.x_px[ok].astype(int), truth.y_px[ok].astype(int)
    assert red[y, x].mean() < red[x, y].mean() - 20


def test_at_visibility_zero_colour_is_equal_and_fine_texture_is_not() -> None:
    positive, negative = _twins(_settings(visibility=0.0))
    colour = [np.concatenate([_crops(i, t, 7) for i, t in tiles]).mean((0, 1, 2)) for tiles in (positive, negative)]
    assert np.abs(colour[0] - colour[1]).max() < 1.5  # grey levels of 255
    spread = [np.concatenate([_crops(i, t, 7) for i, t in tiles]).mean((1, 2)).std() for tiles in (positive, negative)]
    assert spread[0] == pytest.approx(spread[1], rel=0.1)
    fine = [_roughness(np.concatenate([_crops(i, t, 7) for i, t in tiles])) for tiles in (positive, negative)]
    coarse = [_roughness(np.concatenate([_crops(i, t, 2, 4) for i, t in tiles])) for tiles in (positive, negative)]
    assert _effect(*fine) > 1.5
    assert abs(_effect(*coarse)) < 0.35 * _effect(*fine)


def test_positive_and_negative_twins_differ_in_nothing_but_the_pattern() -> None:
    positive, negative = _twins(_settings(visibility=0.0), range(2))
    for (_, a), (_, b) in zip(positive, negative, strict=True):
        assert np.array_equal(a.x_px, b.x_px)
        assert np.array_equal(a.kind, b.kind)
        assert (a.pattern[a.kind == EPITHELIAL] > 0).all()
        assert not (b.pattern > 0).any()


def test_visibility_makes_positive_nuclei_darker_at_5x() -> None:
    shift = []
    for visibility in (0.0, 0.5, 1.0):
        positive, negative = _twins(_settings(visibility=visibility), range(2))
        mean = [np.concatenate([_crops(i, t, 2, 4) for i, t in tiles]).mean() for tiles in (positive, negative)]
        shift.append(mean[1] - mean[0])
    assert abs(shift[0]) < 1.5
    assert shift[0] + 3 < shift[1] < shift[2] - 3


def test_pattern_strength_zero_leaves_no_difference() -> None:
    settings = _settings(pattern_strength=0.0, visibility=1.0)
    positive, negative = _twins(settings, range(2))
    fine = [_roughness(np.concatenate([_crops(i, t, 7) for i, t in tiles])) for tiles in (positive, negative)]
    assert abs(_effect(*fine)) < 0.2


def test_architecture_shows_in_gland_shape_only_when_asked_for() -> None:
    def shares(architecture: float, positive: bool) -> tuple[float, float]:
        settings = preset(
            "test", tissue=TissueSettings(architecture=architecture, gland_share=1, fat_share=0, inflamed_share=0)
        )
        wish = Wish(10.0 if positive else 0.0, 1, outline="whole")
        layouts = [lay_out(np.random.default_rng(s), settings.tissue, 500, 500, wish) for s in range(3)]
        glands = np.mean([(layout.gland_um > 0).mean() for layout in layouts])
        lumina = np.mean([(layout.lumen_um > 0).mean() for layout in layouts])
        return float(glands), float(lumina)

    assert shares(0.0, True) == shares(0.0, False)
    crowded, plain = shares(1.0, True), shares(1.0, False)
    assert crowded[0] > plain[0] + 0.05  # more of the tissue is gland
    assert crowded[1] < 0.75 * plain[1]  # and less of that is lumen


def test_5x_tile_is_the_area_average_of_the_20x_tile() -> None:
    settings = _settings()
    fine, _ = render_tile(np.random.default_rng(3), settings, 512, 0.5, True)
    coarse, truth = render_tile(np.random.default_rng(3), settings, 128, 2.0, True)
    assert coarse.shape == (128, 128, 3)
    assert np.array_equal(coarse, cv2.resize(fine, (128, 128), interpolation=cv2.INTER_AREA))
    assert truth.x_px.max() < 128


def test_40x_and_20x_show_the_same_tissue() -> None:
    settings = _settings()
    low, a = render_tile(np.random.default_rng(8), settings, 256, 0.5, None)
    high, b = render_tile(np.random.default_rng(8), settings, 512, 0.25, None)
    assert np.allclose(2 * a.x_px, b.x_px, atol=1e-3)
    halved = cv2.resize(high, (256, 256), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(halved - low.astype(int)).mean() < 5


def test_every_label_has_a_pattern_of_its_own_with_the_same_light() -> None:
    atlases = build_atlases(NucleusSettings(shapes=FEW, visibility=0), 7, 3)
    light, detail = [], []
    for pattern in range(7):
        sprites = atlases[EPITHELIAL, pattern].sprites
        passed = 10 ** (-0.68 * sprites[..., 1])
        light.append((passed * sprites[..., 0]).sum((1, 2)) / sprites[..., 0].sum((1, 2)))
        detail.append(sprites[..., 1])
    for pattern in range(1, 7):
        assert np.abs(light[pattern] - light[0]).max() < 0.03
        assert np.abs(detail[pattern] - detail[0]).mean() > 0.003


def test_tile_shows_tissue_colours() -> None:
    image, truth = render_tile(np.random.default_rng(2), preset("test"), 512)
    mean = image.reshape(-1, 3).mean(0)
    assert mean[0] > mean[1] + 10  # pink and purple: green is absorbed most
    assert mean[2] > mean[1] + 10
    assert set(np.unique(truth.kind)) <= set(range(len(KINDS)))


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="demo"):
        preset("huge")


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="patients=9"):
        preset("test", patients=9)
    with pytest.raises(ValueError, match="together exceed 1"):
        TissueSettings(gland_share=0.9, fat_share=0.2)
