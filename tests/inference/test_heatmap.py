"""Pictures of answers: paint lies where the region lies, whatever the size of the slide."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from lrmil.errors import ConfigError, HeadError
from lrmil.evaluation.plots import save_figure
from lrmil.inference.heatmap import attention_figure, draw_attention
from lrmil.inference.images import save_image
from lrmil.slides import Overview


@pytest.fixture(scope="module")
def answer(bundle, write_slide):
    return bundle.predict(write_slide(), picture=True)


def with_attention_on(answer, *rows):
    """The answer, with attention on these regions alone."""
    attention = np.full(answer.num_regions, 1e-6, np.float32)
    attention[list(rows)] = 1
    return replace(answer, attention=attention)


def with_overview(answer, width, height):
    """The answer, seen on an empty overview of another size: uneven numbers of level-0 pixels per pixel."""
    rgb = np.full((height, width, 3), 240, np.uint8)
    scanned = np.ones((height, width), bool)
    w0, h0 = answer.scale["dimensions_l0"]
    step = (w0 / width, h0 / height)
    return replace(answer, overview=Overview(rgb, scanned, 0.25 * step[0], step, 0, 0))


def yellow(picture):
    """Where viridis is at its upper end: much red and green, little blue."""
    return picture.astype(int) @ [1, 1, -2] > 150


def test_the_region_with_most_attention_is_brightest(answer, tmp_path):
    """Read back from the file, on a slide that is wider than high, for a region off the diagonal."""
    row = answer.boxes_l0.tolist().index([1024, 256, 1280, 512])
    save_image(tmp_path / "attention.png", draw_attention(with_attention_on(answer, row)))
    picture = cv2.cvtColor(cv2.imread(str(tmp_path / "attention.png")), cv2.COLOR_BGR2RGB)
    height, width = picture.shape[:2]
    assert (width, height) == (768, 512)
    bright = yellow(picture)
    y, x = np.nonzero(bright)
    assert (x.min(), x.max() + 1, y.min(), y.max() + 1) == (512, 640, 128, 256)
    assert bright[128:256, 512:640].mean() > 0.95


@pytest.mark.parametrize("size", [(96, 64), (300, 201), (601, 400), (1000, 667), (5000, 3333), (6001, 146)])
def test_paint_covers_its_boxes_to_the_pixel(answer, size):
    """Small overviews are enlarged and large ones shrunk; the paint is laid on afterwards, so it stays sharp."""
    seen = with_overview(answer, *size)
    picture = draw_attention(seen)
    height, width = picture.shape[:2]
    assert 600 <= max(width, height) <= 2048
    assert width / height == pytest.approx(size[0] / size[1], rel=0.01)
    painted = (picture != 240).any(axis=2)
    wanted = np.zeros((height, width), bool)
    for box in answer.boxes_l0:
        x0, y0, x1, y1 = np.floor(box / [1536, 1024, 1536, 1024] * [width, height, width, height] + 0.5).astype(int)
        wanted[y0:y1, x0:x1] = True
    assert (painted == wanted).all()


def test_paint_lies_on_the_tissue(answer):
    """The ellipse of tissue is under paint, but for the slivers in the corners, which have too little of it."""
    bare = answer.overview.rgb
    picture = draw_attention(answer)
    bare = cv2.resize(bare, (picture.shape[1], picture.shape[0]), interpolation=cv2.INTER_CUBIC)
    tissue = bare.astype(int).min(axis=2) < 200
    painted = (picture != bare).any(axis=2)
    assert (painted & tissue).sum() > 0.97 * tissue.sum()
    corner = picture[:100, :100]
    assert (corner == bare[:100, :100]).all()


def test_small_slides_are_looked_at_more_closely_but_not_beyond_low_resolution(bundle, answer, write_slide):
    assert answer.overview.mpp == 2.0
    assert answer.overview.rgb.shape == (128, 192, 3)
    assert bundle.predict(write_slide()).overview.mpp == 8.0


def test_what_could_not_be_read_is_not_shown_as_glass(answer):
    rgb = np.full((40, 60, 3), 255, np.uint8)
    scanned = np.ones((40, 60), bool)
    scanned[:10, :10] = False
    for unreadable, colour in ((0, 255), (1, 160)):
        overview = Overview(rgb, scanned, 6.4, (25.6, 25.6), unreadable, 100)
        picture = draw_attention(replace(answer, overview=overview))
        assert (picture[:80, :80] == colour).all()
        assert (picture[-80:, :80] == 255).all()
        assert (rgb == 255).all(), "the overview itself is left alone"


def test_equal_attention_is_one_colour(answer):
    flat = with_overview(replace(answer, attention=np.full(20, 0.05, np.float32)), 768, 512)
    picture = draw_attention(flat)
    colours = np.unique(picture[(picture != 240).any(axis=2)], axis=0)
    assert len(colours) == 1


def test_figure(answer, tmp_path):
    figure = attention_figure(answer)
    texts = [t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text"))]
    assert f"case: {answer.predicted}, {max(answer.probabilities.values()):.1%}" in texts
    assert "slide" in texts
    assert any("percentile" in t for t in texts)
    assert any("µm" in t for t in texts)
    panels = [image.get_array() for axes in figure.axes for image in axes.get_images()]
    assert (panels[1] == draw_attention(answer)).all()
    assert panels[0].shape == panels[1].shape
    save_figure(tmp_path / "figure.png", figure)
    assert max(cv2.imread(str(tmp_path / "figure.png")).shape) > 800


def test_a_head_without_attention(answer):
    for draw in (draw_attention, attention_figure):
        with pytest.raises(HeadError, match=r"case: .*no attention"):
            draw(replace(answer, attention=None))


def test_pictures_keep_their_colours(tmp_path):
    red = np.zeros((5, 9, 3), np.uint8)
    red[..., 0] = 200
    save_image(tmp_path / "new" / "a.PNG", red)
    back = cv2.imread(str(tmp_path / "new" / "a.PNG"))
    assert (back[..., ::-1] == red).all()
    save_image(tmp_path / "a.jpg", red)
    assert np.abs(cv2.imread(str(tmp_path / "a.jpg"))[..., ::-1].astype(int) - red).max() < 8
    for name in ("a.bmpx", "a", "a.svs"):
        with pytest.raises(ConfigError, match=r"Use \.png or \.jpg"):
            save_image(tmp_path / name, red)
    assert not list(tmp_path.glob("*.bmpx"))
