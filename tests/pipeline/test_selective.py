"""ZoomMIL and HDMIL on a cohort: what they train on, what they answer, and what their answers cost on slide files."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from lrmil.bags import read_bag
from lrmil.encoders import Encoder
from lrmil.errors import BagError, ConfigError
from lrmil.geometry import MatchedGrid
from lrmil.inference.layouts import ZOOM_SCALES
from lrmil.inference.prepare import prepare_slide
from lrmil.inference.scales import THUMBNAIL, SlideScales
from lrmil.mil import HeadSettings, PatchSource, StoredScales
from lrmil.pipeline.context import Run, Split
from lrmil.pipeline.encode import encode_children
from lrmil.pipeline.jobs import do_jobs, job_outputs
from lrmil.pipeline.scales import encode_scales, scale_sources
from lrmil.pipeline.selective import ChoiceJob, answer_entry, selective_job, stored_selective_head, time_selective
from lrmil.pipeline.tile import tile_cohort
from lrmil.pipeline.zoom_features import FileScales
from lrmil.training.stage2 import TeacherSettings

HEADS = ("zoommil", "hdmil")
OPTIONS: dict[str, dict[str, Any]] = {
    "zoommil": {"k": 2, "samples": 5, "out_dim": 16, "hidden_dim": 8, "sigma": 0.05},
    "hdmil": {"embed_dim": 16, "hidden_dim": 8, "degree": 3, "k_sample": 4},
}
WORK = {
    "encode": "lrmil.inference.scales.encode_patches",
    "children": "lrmil.pipeline.encode.child_reads",
    "thumbnails": "lrmil.inference.scales.read_thumbnails",
    "train": "lrmil.pipeline.selective.train_scales",
    "predict": "lrmil.pipeline.selective.predict_scales",
}


@dataclass
class Bench:
    """Some slides of the lab, tiled, with everything encoded for both heads."""

    run: Run
    encoder: Encoder
    grids: dict[str, MatchedGrid]
    split: Split

    def sources(self, head: str) -> dict[str, PatchSource]:
        return scale_sources(self.run, self.grids, list(self.grids), self.encoder, head)

    def settings(self, head: str, **changes: Any) -> TeacherSettings:
        fields = {"epochs": 2, "learning_rate": 1e-2, **changes}
        return TeacherSettings(head=HeadSettings(name=head, options=OPTIONS[head]), **fields)

    def outputs(self, head: str, **changes: Any) -> Any:
        settings = self.settings(head, **changes)
        return outputs_of(
            self.run, selective_job(self.run, self.split, self.sources(head), head, settings, self.encoder)
        )


def outputs_of(run: Run, job: ChoiceJob) -> Any:
    do_jobs(run, [job], workers=1)
    return job_outputs(job)


@pytest.fixture(scope="module")
def encoded(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(lab, tmp_path_factory.mktemp("selective"), encode=True)


def bench(lab: Any, out: Path, *, encode: bool = False, **changes: Any) -> Bench:
    run = lab.parts(out, encoder={"precision": "float32"}, **changes)
    encoder = run.build_encoder()
    grids = tile_cohort(run)
    slides = list(grids)
    split = Split("0", "fold 1 of 3", tuple(slides[:6]), tuple(slides[6:9]), tuple(slides[9:]))
    if encode:
        encode_children(run, grids, encoder, ())
        for head in HEADS:
            encode_scales(run, grids, encoder, head)
    assert run.failures == []
    return Bench(run, encoder, grids, split)


@pytest.fixture
def own(lab: Any, encoded: Bench, tmp_path: Path) -> Bench:
    """A copy to change."""
    shutil.copytree(encoded.run.folder.root, tmp_path / "run")
    return bench(lab, tmp_path / "run")


@pytest.fixture
def work(watch: Callable[..., None]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, target in WORK.items():
        watch(target, lambda *args, name=name, **kwargs: counts.update([name]))
    return counts


def test_zoommil_trains_on_all_patches_of_the_regions_that_lrmil_sees(encoded: Bench) -> None:
    sources = encoded.sources("zoommil")
    for slide, grid in encoded.grids.items():
        n = grid.num_regions
        assert sources[slide].counts == {"low": n, "mid": 4 * n, "high": 16 * n}
    assert sum(g.num_children for g in encoded.grids.values()) < sum(s.counts["high"] for s in sources.values())
    names = {p.name for p in (encoded.run.folder.root / "features").iterdir()}
    assert names == {"tiny_0.5mpp", "tiny_2mpp_all", "tiny_1mpp_all", "tiny_0.5mpp_all", "thumbnails_8mpp"}


@pytest.mark.parametrize("head", HEADS)
def test_what_is_precomputed_is_what_is_read_from_the_slide(head: str, encoded: Bench) -> None:
    slide_id = next(iter(encoded.grids))
    known = encoded.sources(head)[slide_id]
    with encoded.run.entry(slide_id).open() as slide:
        scales = list(known.counts)
        live = SlideScales(slide, encoded.grids[slide_id], encoded.encoder, scales, precision="float32")
        assert dict(live.counts) == dict(known.counts)
        for scale, count in known.counts.items():
            rows = torch.arange(count)
            torch.testing.assert_close(known.fetch(scale, rows), live.fetch(scale, rows), rtol=2e-3, atol=2e-3)
        if head == "hdmil":
            assert torch.equal(known.thumbnails(), live.thumbnails())


def test_children_of_the_teacher_are_not_encoded_again(lab: Any, own: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    slide_id = next(iter(own.grids))
    for folder in ("tiny_2mpp_all", "tiny_1mpp_all", "tiny_0.5mpp_all"):
        own.run.folder.bag(folder, slide_id).unlink()
    grid, seen = own.grids[slide_id], Counter()
    original = SlideScales._encode

    def watched(self: SlideScales, scale: str, rows: Any, cost: Any) -> Any:
        seen[scale] += len(rows)
        return original(self, scale, rows, cost)

    monkeypatch.setattr(SlideScales, "_encode", watched)
    encode_scales(own.run, own.grids, own.encoder, "zoommil")
    n = grid.num_regions
    assert seen == {"low": n, "mid": 4 * n, "high": 16 * n - grid.num_children}
    # And they are at their places.
    children = read_bag(own.run.folder.bag("tiny_0.5mpp", slide_id))
    everything = read_bag(own.run.folder.bag("tiny_0.5mpp_all", slide_id))
    place = {tuple(xy): row for row, xy in enumerate(everything.coords_l0.tolist())}  # type: ignore[union-attr]
    rows = [place[tuple(xy)] for xy in children.coords_l0.tolist()]  # type: ignore[union-attr]
    np.testing.assert_array_equal(everything.features[rows], children.features)


def test_nothing_is_encoded_twice_and_everything_again_where_something_changed(
    lab: Any, own: Bench, work: Counter[str]
) -> None:
    for head in HEADS:
        encode_scales(own.run, own.grids, own.encoder, head)
    assert not work
    slides = list(own.grids)
    own.run.folder.bag("tiny_1mpp_all", slides[0]).write_bytes(b"broken")
    own.run.folder.bag("thumbnails_8mpp", slides[1]).with_suffix(".npz").write_bytes(b"broken")
    for head in HEADS:
        encode_scales(own.run, own.grids, own.encoder, head)
    assert work["thumbnails"] == 1
    assert 1 <= work["encode"] <= 3
    work.clear()
    other = bench(lab, own.run.folder.root, tiles={"min_region_tissue": 0.3})
    encode_scales(other.run, other.grids, other.encoder, "hdmil")
    assert work["thumbnails"] == len(slides)


def test_files_that_do_not_fit_are_refused(own: Bench) -> None:
    slide_id = next(iter(own.grids))
    path = own.run.folder.bag("tiny_1mpp_all", slide_id)
    with h5py.File(path, "r+") as handle:
        handle["slot"][...] = handle["slot"][...][::-1]
    with pytest.raises(BagError, match="not all patches"):
        own.sources("zoommil")
    path.unlink()
    with pytest.raises(BagError, match="no such"):
        own.sources("zoommil")
    own.run.folder.bag("thumbnails_8mpp", slide_id).with_suffix(".npz").unlink()
    with pytest.raises(BagError, match="thumbnails"):
        own.sources("hdmil")
    with pytest.raises(ConfigError, match="abmil"):
        own.sources("abmil")


def test_features_beyond_memory_are_read_as_they_are_asked_for(lab: Any, encoded: Bench) -> None:
    inside = encoded.sources("zoommil")
    small = bench(lab, encoded.run.folder.root, memory_gb=1e-6)
    outside = small.sources("zoommil")
    slide_id = next(iter(inside))
    assert isinstance(inside[slide_id], StoredScales)
    assert isinstance(outside[slide_id], FileScales)
    rows = torch.tensor([5, 0, 3, 3])
    for scale, count in inside[slide_id].counts.items():
        assert outside[slide_id].counts[scale] == count
        assert torch.equal(outside[slide_id].fetch(scale, rows), inside[slide_id].fetch(scale, rows))


def test_a_ratio_without_a_middle_is_refused_before_anything_is_encoded(lab: Any, tmp_path: Path) -> None:
    other = bench(lab, tmp_path, grid={"lr_mpp": 1.0})
    with pytest.raises(ConfigError, match="middle"):
        encode_scales(other.run, other.grids, other.encoder, "zoommil")


@pytest.mark.parametrize("head", HEADS)
def test_answers_from_slide_files_agree_and_cost_what_was_chosen(
    head: str, lab: Any, own: Bench, work: Counter[str]
) -> None:
    outputs = own.outputs(head)
    assert list(outputs) == list(own.split.test)
    model = stored_selective_head(own.run, own.split, head)
    sources = own.sources(head)
    # From here on there are no features.
    shutil.rmtree(own.run.folder.root / "features")
    work.clear()
    entries = [own.run.entry(slide) for slide in own.split.test]
    costs = time_selective(own.run, head, entries, own.encoder, model)
    assert work["train"] == work["predict"] == work["children"] == 0
    assert not (own.run.folder.root / "features").exists()
    for cost, slide_id in zip(costs, own.split.test, strict=True):
        with torch.inference_mode():
            expected = model(sources[slide_id])
        # Stored features are float16, so a patch on the edge may go the other way; these do not.
        np.testing.assert_allclose(outputs[slide_id].logits, expected.logits.numpy(), atol=1e-6)
        chosen = {scale: len(rows) for scale, rows in expected.selected.items()}
        assert {s: c["patches_encoded"] for s, c in cost.scales.items() if s != THUMBNAIL} == chosen
        assert {s: c["patches_read"] for s, c in cost.scales.items() if s != THUMBNAIL} == chosen
        assert cost.patches_encoded == cost.patches_read == sum(chosen.values())
        parts = cost.tissue_s + cost.reading_s + cost.encoding_s + cost.mil_s
        assert parts == pytest.approx(cost.total_s, rel=0.05)
        for name, scale in cost.scales.items():
            # Bytes may all have come from what the reader kept in memory; pixels are counted in any case.
            assert scale["bytes_read"] is None or scale["bytes_read"] >= 0
            assert (scale["source_px"] > 0) == (scale["patches_read"] > 0), name
        if head == "hdmil":
            assert cost.scales[THUMBNAIL]["patches_read"] == own.grids[slide_id].num_children
            assert cost.scales[THUMBNAIL]["patches_encoded"] == 0
    work.clear()
    again = time_selective(own.run, head, entries, own.encoder, model)
    assert again == costs
    assert not work
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    time_selective(own.run, head, entries[:1], own.encoder, model)
    assert work, "other weights choose other patches"


def test_slides_of_both_common_scans_are_answered(own: Bench) -> None:
    """The same pixels, told to be a scan at 40x and one at 20x."""
    own.outputs("zoommil")
    model = stored_selective_head(own.run, own.split, "zoommil")
    s = own.run.settings
    regions = []
    for mpp in (0.25, 0.5):
        entry = replace(own.run.entry(own.split.test[0]), mpp=mpp)
        with entry.open() as slide:
            regions.append(prepare_slide(slide, s.grid, s.tissue, s.tiles).grid.num_regions)
        cost = answer_entry(own.run, entry, own.encoder, model)
        counts = {scale: cost.scales[scale]["patches_encoded"] for scale in ZOOM_SCALES}
        assert counts == {"low": regions[-1], "mid": 8, "high": 8}
    assert regions[0] < regions[1]


@pytest.mark.parametrize("head", HEADS)
def test_a_trained_head_is_kept_and_answers_come_from_disk(head: str, own: Bench, work: Counter[str]) -> None:
    first = own.outputs(head)
    assert work["train"] == work["predict"] == 1
    again = own.outputs(head)
    assert work["train"] == work["predict"] == 1
    assert list(again) == list(first)
    for slide, output in first.items():
        np.testing.assert_array_equal(again[slide].probabilities, output.probabilities)
    step = own.run.folder.fold("0") / "heads" / head
    assert {p.name for p in step.iterdir()} == {
        *("done.json", "head.json", "head.safetensors", "history.json", "outputs.npz")
    }
    settings = own.settings(head)
    everyone = outputs_of(
        own.run,
        selective_job(own.run, own.split, own.sources(head), head, settings, own.encoder, slides=list(own.grids)),
    )
    assert work["train"] == 1
    assert work["predict"] == 2
    assert set(everyone) == set(own.grids)
    own.outputs(head, learning_rate=1e-3)
    assert work["train"] == 2


@pytest.mark.parametrize("head", HEADS)
def test_a_job_that_traveled_trains_the_same_head(own: Bench, head: str) -> None:
    settings = own.settings(head)
    job = selective_job(own.run, own.split, own.sources(head), head, settings, own.encoder)
    stayed = outputs_of(own.run, job)
    elsewhere = replace(pickle.loads(pickle.dumps(job)), step=job.step.with_name("elsewhere"))
    for slide, output in outputs_of(own.run, elsewhere).items():
        np.testing.assert_array_equal(output.probabilities, stayed[slide].probabilities)


def test_training_looks_at_no_slide_of_the_test_part(own: Bench) -> None:
    sources = own.sources("zoommil")
    asked: set[str] = set()

    class Spy:
        def __init__(self, name: str) -> None:
            self.name = name
            self.counts = sources[name].counts

        def fetch(self, scale: str, rows: Any) -> Any:
            asked.add(self.name)
            return sources[self.name].fetch(scale, rows)

        def thumbnails(self) -> Any:
            return sources[self.name].thumbnails()

    spies: dict[str, Any] = {name: Spy(name) for name in sources}
    settings = own.settings("zoommil")
    job = selective_job(own.run, own.split, spies, "zoommil", settings, own.encoder, slides=own.split.train[:1])
    outputs_of(own.run, job)
    assert asked == {*own.split.train, *own.split.val}
