from __future__ import annotations

import numpy as np
import pytest
import torch

from lrmil.bags.authors import read_aggregated, read_student_features, read_teacher_meta
from lrmil.errors import BagError, CorruptBag

N, D = 50, 768
ATTENTION = torch.linspace(-2, 2, N)
BAG = torch.linspace(0, 1, D)


def meta_file(path, attention, bag_repr, n=N):
    coords = torch.stack([torch.arange(n) * 256, torch.arange(n) * 0 + 512], dim=1)
    meta = {
        "pid": "TCGA-AB-1234",
        "label": 1,
        "coords_20x": coords,
        "attention": attention,
        "bag_repr": bag_repr,
        "logits": torch.tensor([[0.25, -0.5]]),
    }
    torch.save(meta, path)
    return path


def test_swapped_fields_of_the_release_are_put_right(tmp_path):
    meta = read_teacher_meta(meta_file(tmp_path / "s.pt", attention=BAG, bag_repr=ATTENTION))
    assert meta.swapped
    np.testing.assert_allclose(meta.attention_logits, ATTENTION)
    np.testing.assert_allclose(meta.bag_feature, BAG)
    assert (meta.patient_id, meta.label, meta.logits.tolist()) == ("TCGA-AB-1234", 1, [0.25, -0.5])
    assert meta.coords_20x[3].tolist() == [768, 512]


def test_a_corrected_file_is_left_as_it_is(tmp_path):
    meta = read_teacher_meta(meta_file(tmp_path / "s.pt", attention=ATTENTION[:, None], bag_repr=BAG[None]))
    assert not meta.swapped
    np.testing.assert_allclose(meta.attention_logits, ATTENTION)


def test_as_many_patches_as_features_cannot_be_told_by_length(tmp_path):
    path = meta_file(tmp_path / "s.pt", attention=torch.zeros(D), bag_repr=torch.ones(D), n=D)
    with pytest.raises(CorruptBag, match=r"both have 768 values.*swapped=True"):
        read_teacher_meta(path)
    assert read_teacher_meta(path, swapped=True).attention_logits.sum() == D
    assert read_teacher_meta(path, swapped=False).attention_logits.sum() == 0


def test_neither_fits(tmp_path):
    path = meta_file(tmp_path / "s.pt", attention=torch.zeros(D), bag_repr=torch.zeros(7))
    with pytest.raises(CorruptBag, match="50 patches, but 768 attention values and 7 bag features"):
        read_teacher_meta(path)


def test_missing_fields(tmp_path):
    torch.save({"attention": ATTENTION}, tmp_path / "s.pt")
    with pytest.raises(CorruptBag, match=r"lacks coords_20x, bag_repr, logits \(it has attention\)"):
        read_teacher_meta(tmp_path / "s.pt")
    torch.save(ATTENTION, tmp_path / "t.pt")
    with pytest.raises(BagError, match="one tensor, not a dict"):
        read_teacher_meta(tmp_path / "t.pt")


def aggregated_file(path, **changes):
    hr = torch.tensor([[1024 + 256, 512], [1024, 512], [256, 768 + 512]])  # two in region 1, one in region 0
    raw = {
        "teacher_final": [torch.full((4,), float(i)) for i in range(3)],
        "teacher_layers": {0: torch.zeros(3, 4), 10: torch.ones(3, 4)},
        "coords_20x": hr,
        "coords_5x": torch.tensor([[0, 512], [1024, 512]]),
        "links_5x_to_20x": [[2], [0, 1]],
    }
    torch.save(raw | changes, path)
    return path


def test_aggregated_file(tmp_path):
    found = read_aggregated(aggregated_file(tmp_path / "w_aggregated.pt"), l0_per_20x_px=2)
    assert found.hr.slide == "w"
    assert found.hr.features[:, 0].tolist() == [0, 1, 2]
    assert sorted(found.hr.layer_cls) == [0, 10]
    assert found.hr.region.tolist() == [1, 1, 0]
    assert found.hr.slot.tolist() == [1, 0, 13]  # column 1 of row 3 is slot 4*3 + 1: x is the column
    assert found.hr.coords_l0.tolist() == [[2560, 1024], [2048, 1024], [512, 2560]]
    assert found.hr.patch_side_l0 == 512
    assert found.coords_5x.tolist() == [[0, 512], [1024, 512]]


def test_aggregated_without_a_frame_has_no_level_0_places(tmp_path):
    assert read_aggregated(aggregated_file(tmp_path / "w_aggregated.pt")).hr.coords_l0 is None


def test_aggregated_from_grids_that_do_not_align(tmp_path):
    off = aggregated_file(tmp_path / "a.pt", coords_5x=torch.tensor([[0, 500], [1000, 500]]))
    assert read_aggregated(off).hr.slot is None
    unlinked = read_aggregated(aggregated_file(tmp_path / "b.pt", links_5x_to_20x=[[2], [0]]))
    assert unlinked.hr.region is None
    assert [links.tolist() for links in unlinked.links] == [[2], [0]]


@pytest.mark.parametrize(
    ("links", "message"), [([[2], [0, 3]], "linked to HR patch 3; there are 3"), ([[0]], "2 regions, but 1 lists")]
)
def test_aggregated_with_broken_links(tmp_path, links, message):
    with pytest.raises(CorruptBag, match=message):
        read_aggregated(aggregated_file(tmp_path / "a.pt", links_5x_to_20x=links))


def test_student_features(tmp_path):
    torch.save({"feats_5x": torch.ones(2, 3), "coords_5x": torch.tensor([[0, 512], [1024, 512]])}, tmp_path / "w.pt")
    bag = read_student_features(tmp_path / "w.pt", l0_per_20x_px=1)
    assert (bag.slide, bag.patch_side_l0) == ("w", 1024)
    assert bag.coords_l0.tolist() == [[0, 512], [1024, 512]]
    torch.save(torch.ones(2, 3), tmp_path / "v.pt")
    assert read_student_features(tmp_path / "v.pt").coords_l0 is None
