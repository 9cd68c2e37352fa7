"""One slide: the answer is what encoder and head say about its low-resolution pixels, and about nothing finer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from lrmil.encoders import embed
from lrmil.errors import (
    ConfigError,
    ImplausibleMpp,
    MissingMpp,
    NotASlide,
    NoTissue,
    SlideTooCoarse,
    SlideTooSmall,
    TooManyUnreadable,
)
from lrmil.geometry import match_grids
from lrmil.inference import load_bundle
from lrmil.inference.bundle import HeadSpec, TrainedOn, save_bundle
from lrmil.mil import HeadOutput, MILHead, create_head
from lrmil.mil import registry as heads
from lrmil.slides import RecordingSlide, open_slide, write_pyramid
from lrmil.slides.openslide_reader import OpenSlideSlide
from lrmil.slides.tiff.tiles import TileStore


@pytest.fixture(scope="module")
def answer(bundle, write_slide):
    return bundle.predict(write_slide())


def by_hand(slide, boxes, parts):
    """Probabilities and attention of these regions, step by step."""
    pixels = np.stack([slide.read_box(tuple(box), (32, 32)) for box in boxes.tolist()])
    with torch.inference_mode():
        out = parts[1](torch.from_numpy(embed(parts[0], pixels).embedding))
    return torch.softmax(out.logits.double(), 0).numpy(), out.attention.numpy()


def test_the_answer_is_the_head_of_the_embeddings_of_the_pixels(answer, parts, write_slide):
    slide = open_slide(write_slide())
    probabilities, attention = by_hand(slide, answer.boxes_l0, parts)
    assert list(answer.probabilities) == ["benign", "in situ", "invasive"]
    np.testing.assert_allclose(list(answer.probabilities.values()), probabilities, rtol=1e-5)
    np.testing.assert_allclose(answer.attention, attention, rtol=1e-4)
    assert answer.predicted == list(answer.probabilities)[int(probabilities.argmax())]
    assert sum(answer.probabilities.values()) == pytest.approx(1.0, abs=1e-12)
    assert answer.attention.sum() == pytest.approx(1.0, abs=1e-5)
    assert answer.attention.max() > 1.5 * answer.attention.min(), "a flat attention would prove nothing here"


def test_attention_belongs_to_its_region(answer, parts, write_slide):
    """Each region scored alone gets the attention logit that its row has."""
    slide = open_slide(write_slide())
    logits = []
    for box in answer.boxes_l0.tolist():
        features = embed(parts[0], slide.read_box(tuple(box), (32, 32))[None]).embedding
        with torch.inference_mode():
            logits.append(parts[1](torch.from_numpy(features)).attention_logits.item())
    alone = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(answer.attention, alone, rtol=0.02)


def test_two_calls_and_any_batching_give_one_answer(bundle, answer, write_slide):
    for options in ({}, {"batch_size": 1}, {"batch_size": 7, "threads": 4}):
        again = bundle.predict(write_slide(), **options)
        assert (again.boxes_l0 == answer.boxes_l0).all()
        np.testing.assert_allclose(again.attention, answer.attention, rtol=1e-3 if options else 0)
        for name, p in answer.probabilities.items():
            assert again.probabilities[name] == pytest.approx(p, abs=1e-4 if options else 0)


def test_a_loaded_bundle_answers_bit_for_bit_as_the_parts(tmp_path, bundle, manifest, parts, answer, write_slide):
    save_bundle(tmp_path / "a", manifest, bundle.encoder, bundle.head)
    again = load_bundle(tmp_path / "a", device="cpu").predict(write_slide())
    assert again.probabilities == answer.probabilities
    assert (again.attention == answer.attention).all()
    assert again.model["checksum"] == answer.model["checksum"]


@pytest.mark.parametrize(
    ("mpp", "downsamples", "region_level", "levels"),
    [
        (0.25, (1, 4, 16), 1, {1, 2}),
        (0.25, (1, 2, 4, 8), 3, {3}),
        (0.25, (1,), 0, {0}),
        (0.5, (1, 4, 16), 1, {1, 2}),
        (0.5, (1, 2, 4, 8), 2, {2, 3}),
        (0.5, (1,), 0, {0}),
        (0.243, (1, 2, 4, 8), 3, {3}),
        (0.26, (1, 2, 4, 8), 3, {3}),
        (0.3, (1, 2, 4, 8), 2, {2, 3}),
        (0.3, (1, 4, 16), 1, {1, 2}),
    ],
)
def test_nothing_finer_than_low_resolution_is_asked_for(
    bundle, write_slide, monkeypatch, mpp, downsamples, region_level, levels
):
    """Also not for the picture; and what is asked of the file itself agrees with what was recorded."""
    opened = set()
    read_level, fetch = OpenSlideSlide._read_level, TileStore.fetch

    def spy(self, level, *place):
        opened.add(level.index)
        return read_level(self, level, *place)

    def spy_on_tiles(self, rect):
        opened.add(rect.level)
        return fetch(self, rect)

    monkeypatch.setattr(OpenSlideSlide, "_read_level", spy)
    monkeypatch.setattr(TileStore, "fetch", spy_on_tiles)
    slide = RecordingSlide(open_slide(write_slide(mpp, downsamples, 2 if mpp == 0.5 else 1)))
    answer = bundle.predict(slide, picture=True)

    assert slide.finest_mpp >= 2.0 * 0.95
    # Without snapping, sides are rounded to whole level-0 pixels: 1706 px instead of 1706.67.
    assert slide.finest_mpp >= answer.scale["working_mpp"] * 0.995
    assert slide.finest_level == region_level
    assert slide.levels[region_level].downsample * mpp <= 2.0 * 1.05
    coarser = [v for v in slide.levels if v.index > region_level]
    assert not coarser or coarser[0].downsample * mpp > 2.0 * 1.05, "a coarser level would have done"
    assert opened == {request.level for request in slide.requests} == levels
    regions = [request for request in slide.requests if request.size_px == (32, 32)]
    assert len(regions) >= answer.num_regions
    assert {request.level for request in regions} == {region_level}

    reported = {v["level"]: v for v in answer.scale["levels_opened"]}
    assert set(reported) <= opened
    assert reported[region_level]["mpp"] == pytest.approx(mpp * downsamples[region_level])
    assert reported[region_level]["reads"] >= answer.num_regions
    assert answer.scale["working_mpp"] == pytest.approx({0.243: 1.944, 0.26: 2.08}.get(mpp, 2.0))
    assert answer.scale["snapped"] == (mpp != 0.3)
    assert any("resampled" in note for note in answer.warnings) == (mpp == 0.3)


def test_the_picture_of_an_unsnapped_slide_is_no_finer_than_its_regions(bundle, write_slide):
    """A whole number of pixels near 2.0 um is 7 x 0.28 = 1.96; regions are 228 or 229 px wide."""
    slide = RecordingSlide(open_slide(write_slide(0.28, (1,))))
    bundle.predict(slide, picture=True)
    assert 2.0 * 0.995 <= slide.finest_mpp <= 2.0


@pytest.mark.parametrize("downsamples", [(1, 4, 16), (1, 2, 4, 8), (1,)])
def test_twins_of_40x_and_20x_get_the_same_answer(bundle, write_slide, downsamples):
    forty, twenty = (bundle.predict(write_slide(mpp, downsamples, shrink)) for mpp, shrink in ((0.25, 1), (0.5, 2)))
    assert (forty.boxes_l0 == 2 * twenty.boxes_l0).all()
    np.testing.assert_allclose(forty.attention, twenty.attention, rtol=0.05)
    for name, p in forty.probabilities.items():
        assert twenty.probabilities[name] == pytest.approx(p, abs=0.002)


def test_other_tissue_gets_another_answer(bundle, answer, tmp_path, tissue_picture):
    """So that the closeness of twins means something."""
    pale = 255 - (255 - tissue_picture(768, 512, seed=9)) // 2
    other = bundle.predict(write_pyramid(tmp_path / "other.tif", pale, 0.5, (1, 4)))
    assert max(abs(other.probabilities[n] - p) for n, p in answer.probabilities.items()) > 0.01


def test_the_users_mpp_wins(bundle, write_slide):
    path = write_slide(0.25)
    answer = bundle.predict(path, mpp=0.5)
    assert (answer.scale["mpp_l0"], answer.scale["mpp_source"]) == (0.5, "user")
    assert answer.scale["region_side_l0"] == 128
    with open_slide(path) as slide, pytest.raises(ConfigError, match="mpp was given with a slide that is open"):
        bundle.predict(slide, mpp=0.5)


def test_an_open_slide_stays_open_and_its_past_is_not_reported(bundle, write_slide):
    slide = open_slide(write_slide())
    slide.read_box((0, 0, 8, 8), (8, 8))
    answer = bundle.predict(slide)
    assert [v["level"] for v in answer.scale["levels_opened"]] == [1, 2]
    reads = answer.scale["levels_opened"][0]["reads"]
    assert bundle.predict(slide).scale["levels_opened"][0]["reads"] == reads == 20
    assert slide.read_box((0, 0, 8, 8), (8, 8)).shape == (8, 8, 3)


@pytest.mark.parametrize("mpp", [1.0, 2.0, 2.08, 1.3])
def test_a_slide_too_coarse_to_train_can_be_answered(bundle, write_slide, mpp):
    answer = bundle.predict(write_slide(mpp, (1,), 4))
    assert answer.num_regions > 0
    assert sum(answer.probabilities.values()) == pytest.approx(1.0)
    with open_slide(write_slide(mpp, (1,), 4)) as slide:
        grid = match_grids(bundle.manifest.grid, slide.mpp, slide.dimensions)
        assert not grid.scale.has_hr
        assert grid.num_children == 0


def test_a_slide_coarser_than_the_model(bundle, write_slide):
    with pytest.raises(SlideTooCoarse, match=r"case: its pixels are 2\.2 um wide, coarser than the 2 um/px"):
        bundle.predict(write_slide(2.2, (1,), 4))


def test_no_tissue(bundle, tmp_path):
    path = write_pyramid(tmp_path / "glass.tif", np.full((1024, 1024, 3), 240, np.uint8), 0.5, (1, 4))
    with pytest.raises(NoTissue, match=r"glass: too little tissue: 0\.0%.*lrmil info"):
        bundle.predict(path)


def test_little_tissue_is_answered_with_a_warning(bundle, tmp_path, tissue_picture, answer):
    path = write_pyramid(tmp_path / "biopsy.tif", tissue_picture(256, 256), 0.5, (1, 4))
    little = bundle.predict(path)
    assert little.num_regions == 4
    assert little.warnings == [
        "little tissue: 4 regions; 90 % of the training slides had 5 to 60, so trust the answer less"
    ]
    assert answer.warnings == []


def test_one_region_is_counted_in_the_singular(tmp_path, manifest, parts, tissue_picture):
    path = write_pyramid(tmp_path / "crumb.tif", tissue_picture(128, 128), 0.5, (1,))
    trained = manifest.trained_on.model_copy(update={"regions_per_slide": (2.0, 3.0, 4.0)})
    save_bundle(tmp_path / "model", manifest.model_copy(update={"trained_on": trained}), *parts)
    answer = load_bundle(tmp_path / "model", device="cpu").predict(path)
    assert answer.warnings[0].startswith("little tissue: 1 region;")
    assert answer.attention.tolist() == [1.0]


def test_damage_is_left_out_counted_and_said(bundle, tmp_path, write_slide, slide_40x, damage, parts, answer):
    """A tile of the level that regions are read from: 32 px of 1 um, a quarter of one region."""
    path = tmp_path / "damaged.tif"
    write_pyramid(path, slide_40x, 0.25, (1, 4, 16), tile_px=32, compression="deflate")
    damage(path, 1, [(4, 4)])
    hurt = bundle.predict(path)
    x0, y0, x1, y1 = answer.boxes_l0.T
    bad = (x0 < 640) & (x1 > 512) & (y0 < 640) & (y1 > 512)
    assert bad.sum() == 1
    assert (hurt.boxes_l0 == answer.boxes_l0[~bad]).all()
    assert (hurt.num_regions, hurt.unreadable) == (19, 1)
    assert len(hurt.warnings) == 1
    assert hurt.warnings[0].startswith("1 region could not be decoded, left out: the pixels of level-0 box x 512..768")
    probabilities, attention = by_hand(open_slide(write_slide()), hurt.boxes_l0, parts)
    np.testing.assert_allclose(list(hurt.probabilities.values()), probabilities, rtol=1e-3)
    np.testing.assert_allclose(hurt.attention, attention, rtol=1e-2)
    assert hurt.as_json()["patches"] == {"encoded": 19, "unreadable": 1}

    damage(path, 1, [(c, 4) for c in range(2, 10)] + [(4, 6)])
    with pytest.raises(TooManyUnreadable, match=r"damaged: 5 of 20 patches cannot be decoded, where 20% are allowed"):
        bundle.predict(path)


def test_a_damaged_overview_is_said(bundle, tmp_path, write_slide, damage):
    path = tmp_path / "torn.tif"
    shutil.copy(write_slide(0.5, (1,), 2), path)
    damage(path, 0, [(2, 1)])
    answer = bundle.predict(path)
    assert any("of the overview could not be decoded" in note for note in answer.warnings)


def test_prediction_json(bundle, answer, write_slide, bundle_folder, tmp_path):
    answer.write(tmp_path / "prediction.json")
    content = json.loads((tmp_path / "prediction.json").read_text(), parse_constant=pytest.fail)
    assert set(content) == {
        *("slide", "path", "task", "predicted", "probabilities", "warnings", "seconds", "patches", "bytes_read"),
        *("scale", "model", "regions"),
    }
    assert content["slide"] == "case"
    assert content["path"] == str(write_slide())
    assert content["task"] == "diagnosis"
    assert content["probabilities"] == answer.probabilities
    assert content["predicted"] in content["probabilities"]
    assert content["patches"] == {"encoded": 20, "unreadable": 0}
    assert content["model"] == {
        "folder": str(bundle_folder),
        "checksum": bundle.manifest.checksum,
        "created": "2025-01-01T00:00:00+00:00",
    }
    seconds = content["seconds"]
    assert set(seconds) == {"tissue", "reading", "encoding", "mil", "total"}
    assert min(seconds.values()) >= 0
    assert sum(v for k, v in seconds.items() if k != "total") == pytest.approx(seconds["total"], abs=1e-3)
    assert 0 < content["bytes_read"] < 50e6
    scale = content["scale"]
    assert scale["dimensions_l0"] == [1536, 1024]
    assert (scale["mpp_l0"], scale["mpp_source"]) == (0.25, "TIFF resolution tags")
    assert (scale["working_mpp"], scale["snapped"], scale["region_side_l0"], scale["patch_px"]) == (2.0, True, 256, 32)
    assert scale["levels_opened"] == [
        {"level": 1, "mpp": 1.0, "reads": 20},
        {"level": 2, "mpp": 4.0, "reads": 1},
    ]
    assert len(content["regions"]) == 20
    for region, box, weight in zip(content["regions"], answer.boxes_l0.tolist(), answer.attention, strict=True):
        x, y = region["x_l0"], region["y_l0"]
        assert [x, y, x + region["width_l0"], y + region["height_l0"]] == box
        assert region["attention"] == float(weight)
    assert {(r["width_l0"], r["height_l0"]) for r in content["regions"]} == {(256, 256)}
    assert json.dumps(answer.as_json(), allow_nan=False)


def test_bytes_are_those_of_the_slide(bundle, tmp_path, write_slide):
    """A 20x slide without a pyramid has to be read as a whole; the level that suits 5x is 16 times smaller."""
    alone, pyramid = write_slide(0.5, (1,), 2), write_slide(0.5, (1, 4, 16), 2)
    few, many = (bundle.predict(path).bytes_read for path in (pyramid, alone))
    assert few is not None
    assert many > 0.7 * alone.stat().st_size
    assert few < 0.5 * many


def test_progress(bundle, write_slide):
    told = []
    bundle.predict(write_slide(), batch_size=8, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(8, 20), (16, 20), (20, 20)]


def test_heads_are_given_positions_and_need_not_give_attention(tmp_path, manifest, parts, write_slide, monkeypatch):
    class Surveyor(MILHead):
        seen = None

        def score(self, bag, *, label, coords):
            Surveyor.seen = coords
            return HeadOutput(logits=bag[:, : self.num_classes].mean(0))

    monkeypatch.setattr(heads, "_HEADS", dict(heads._HEADS))
    heads.register_head(heads.HeadCard("surveyor", "", "", "", gives_attention=False))(Surveyor)
    spec = HeadSpec(name="surveyor", in_dim=128, num_classes=3)
    save_bundle(tmp_path, manifest.model_copy(update={"head": spec}), parts[0], create_head("surveyor", 128, 3))
    answer = load_bundle(tmp_path, device="cpu").predict(write_slide())
    assert (Surveyor.seen.numpy() == answer.boxes_l0[:, :2]).all()
    assert answer.attention is None
    assert [r["attention"] for r in answer.as_json()["regions"]] == [None] * 20


def test_answers_are_not_compared_by_accident(answer):
    """Arrays have no single truth value; two answers are equal only if they are one."""
    assert answer == answer
    assert answer != replace(answer)


def test_trained_on_is_checked(manifest):
    facts = manifest.trained_on.model_dump()
    with pytest.raises(ValueError):
        TrainedOn.model_validate(facts | {"regions_per_slide": (1.0, 2.0)})


class TestBadFiles:
    @pytest.fixture
    def bad(self, shared_data):
        return shared_data / "bad"

    @pytest.mark.parametrize(
        ("name", "error", "text"),
        [
            ("broken.svs", NotASlide, "broken.svs: "),
            ("smalltif.tif", NotASlide, "16-bit"),
            ("small.svs", SlideTooSmall, "16 x 16 px"),
            ("unreadable.svs", SlideTooSmall, "16 x 16 px"),
            ("boxes.tiff", ImplausibleMpp, "352.778 um/px.*--mpp"),
            ("missing.svs", NotASlide, "there is no file"),
        ],
    )
    def test_refused(self, bundle, bad, name, error, text):
        with pytest.raises(error, match=text):
            bundle.predict(bad / name)

    def test_opens_and_cannot_be_read(self, tmp_path, manifest, parts, bad):
        """The file is 16 px small: a model that looks at 8-px patches gets as far as reading it."""
        tiny = manifest.model_copy(update={"grid": manifest.grid.model_copy(update={"patch_px": 8})})
        save_bundle(tmp_path, tiny, *parts)
        with pytest.raises(TooManyUnreadable, match="unreadable: 100% of its overview cannot be decoded"):
            load_bundle(tmp_path, device="cpu").predict(bad / "unreadable.svs")


class TestRealSlides:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory, manifest, parts):
        """Regions of 512 um; the encoder sees them at a quarter of their side."""
        folder = tmp_path_factory.mktemp("model")
        grid = manifest.grid.model_copy(update={"patch_px": 256})
        save_bundle(folder, manifest.model_copy(update={"grid": grid}), *parts)
        return load_bundle(folder, device="cpu")

    def test_without_mpp(self, model, shared_data):
        path = shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs"
        with pytest.raises(MissingMpp, match="--mpp"):
            model.predict(path)
        answer = model.predict(path, mpp=0.5)
        assert [v["level"] for v in answer.scale["levels_opened"]] == [1]
        assert answer.num_regions == 15

    def test_absurd_mpp(self, model, shared_data):
        path = shared_data / "slides" / "CropBreastSlide.tiff"
        with pytest.raises(ImplausibleMpp, match=r"264\.583.*--mpp"):
            model.predict(path)
        assert model.predict(path, mpp=0.25).num_regions >= 1

    def test_only_20x_there(self, model, shared_data):
        answer = model.predict(shared_data / "slides" / "CMU-1-Small-Region.svs")
        assert [v["level"] for v in answer.scale["levels_opened"]] == [0]
        assert answer.scale["working_mpp"] == pytest.approx(1.996)
        assert answer.num_regions == 5
