"""The bundle: it comes back bit for bit, and a changed one is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from lrmil.errors import BundleAltered, BundleError, ConfigError, OutputError
from lrmil.files import read_json, write_json
from lrmil.inference import load_bundle
from lrmil.inference.bundle import CHECKED_FILES, FORMAT, HeadSpec, load_parts, read_manifest, save_bundle
from lrmil.mil import create_head
from lrmil.settings import fingerprint


@pytest.fixture
def copy(bundle_folder, tmp_path):
    return shutil.copytree(bundle_folder, tmp_path / "copy")


def reseal(folder, **changes):
    """Edit bundle.json and renew its checksum, as someone who means it would."""
    content = read_json(folder / "bundle.json") | changes
    del content["checksum"]
    write_json(folder / "bundle.json", content | {"checksum": fingerprint(content)})


def test_round_trip(bundle_folder, parts, manifest):
    found, encoder, head = load_parts(bundle_folder)
    for was, now in zip(parts, (encoder, head), strict=True):
        before, after = was.state_dict(), now.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert before.keys()
        assert not now.training
    assert encoder.describe() == parts[0].describe()
    assert head.describe() == parts[1].describe()
    written = {"files", "checksum", "recipe"}
    assert found.model_dump(exclude=written) == manifest.model_dump(exclude=written)
    assert found.recipe == {"seed": 0, "broken": None, "sides": [1, 2]}, "JSON has no NaN"
    assert set(found.files) == set(CHECKED_FILES)


def test_the_same_model_twice(tmp_path, bundle_folder, parts, manifest):
    """Equal content, equal identity; another model, another."""
    again = save_bundle(tmp_path / "again", manifest, *parts)
    assert again.checksum == read_manifest(bundle_folder).checksum
    assert again == read_manifest(tmp_path / "again").model_copy(update={"recipe": manifest.recipe})
    head = create_head("abmil", 128, 3)
    assert save_bundle(tmp_path / "other", manifest, parts[0], head).checksum != again.checksum


def test_what_lies_in_it(bundle_folder):
    assert {p.name for p in bundle_folder.iterdir()} == {"bundle.json", "README.md", *CHECKED_FILES}
    content = json.loads((bundle_folder / "bundle.json").read_text(), parse_constant=pytest.fail)
    assert content["format"] == FORMAT == "lrmil-bundle/1"
    assert content["classes"] == ["benign", "in situ", "invasive"]
    assert content["grid"] == {"patch_px": 32, "lr_mpp": 2.0, "hr_mpp": 0.5, "mpp_tolerance": 0.05}
    card = (bundle_folder / "README.md").read_text()
    for fact in ("benign (6 slides), in situ (2 slides), invasive (4 slides)", "12 slides of 9 patients", "2 um/px"):
        assert fact in card
    assert "a-large-encoder" in card
    assert "| LRMIL, AUC | 0.9 |" in card


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["bundle.json", *CHECKED_FILES])
def test_one_flipped_bit(copy, name, place):
    data = bytearray((copy / name).read_bytes())
    data[round(place * (len(data) - 1))] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError) as caught:
        read_manifest(copy)
    if name in CHECKED_FILES:
        assert isinstance(caught.value, BundleAltered)
        assert name in str(caught.value)


@pytest.mark.parametrize("name", CHECKED_FILES)
def test_a_missing_or_cut_file(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(BundleAltered, match=name):
        load_bundle(copy)
    (copy / name).unlink()
    with pytest.raises(BundleAltered, match=f"{name} is missing.*Copy the whole folder"):
        load_bundle(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["in situ", "benign", "invasive"]},
        {"grid": {"patch_px": 32, "lr_mpp": 4.0, "hr_mpp": 1.0, "mpp_tolerance": 0.05}},
        {"licence_note": "do as you like"},
        {"more": 1},
        {"checksum": ""},
    ],
)
def test_an_edited_description(copy, change):
    content = read_json(copy / "bundle.json")
    write_json(copy / "bundle.json", content | change)
    with pytest.raises(BundleAltered, match=r"bundle\.json is not the file that was written"):
        load_bundle(copy)


def test_mere_formatting_is_no_edit(copy):
    content = read_json(copy / "bundle.json")
    (copy / "bundle.json").write_text(json.dumps(dict(reversed(content.items()))))
    assert read_manifest(copy).classes == ["benign", "in situ", "invasive"]


def test_the_readme_may_be_edited(copy):
    (copy / "README.md").write_text("for the tumour board")
    assert read_manifest(copy).task == "diagnosis"


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret", "README.md"])
def test_a_file_list_that_points_elsewhere(copy, name):
    (copy.parent / "secret").write_text("x")
    files = read_json(copy / "bundle.json")["files"]
    for listed in ({name: "0" * 64}, files | {name: "0" * 64}, {}, {k: v for k, v in files.items() if "head" not in k}):
        reseal(copy, files=listed)
        with pytest.raises(BundleError, match="lists other files"):
            read_manifest(copy)


def test_another_format(copy):
    reseal(copy, format="lrmil-bundle/9")
    with pytest.raises(BundleError, match=r"'lrmil-bundle/9'.*reads 'lrmil-bundle/1'.*lrmil version"):
        load_bundle(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "{}", "\xff\x00"])
def test_no_description_at_all(copy, text):
    (copy / "bundle.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError):
        load_bundle(copy)


def test_no_bundle_there(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(BundleError, match=r"no bundle\.json there.*lrmil run"):
            load_bundle(folder)


def test_a_field_that_this_version_does_not_know(copy):
    reseal(copy, dialect="new")
    with pytest.raises(BundleError, match="dialect"):
        load_bundle(copy)


def test_a_head_that_this_version_does_not_know(copy):
    head = read_json(copy / "bundle.json")["head"]
    reseal(copy, head=head | {"name": "oracle"})
    with pytest.raises(BundleError, match=r"'oracle'.*lrmil version"):
        load_bundle(copy)
    reseal(copy, head=head | {"options": {"gated": True}})
    with pytest.raises(BundleError, match="attention_u"):
        load_bundle(copy)


def test_parts_that_do_not_belong_together(tmp_path, copy, parts, manifest):
    encoder, _ = parts
    with pytest.raises(BundleError, match=r"gives 128 numbers.*the head takes 64"):
        save_bundle(tmp_path / "a", manifest, encoder, create_head("abmil", 64, 3))
    with pytest.raises(BundleError, match=r"3 classes.*gives 2"):
        save_bundle(tmp_path / "a", manifest, encoder, create_head("abmil", 128, 2))
    assert not (tmp_path / "a").exists()
    reseal(copy, classes=["benign", "malignant"])
    with pytest.raises(BundleError, match="2 classes"):
        load_bundle(copy)


def test_a_write_that_breaks_off_leaves_no_bundle(copy, parts, manifest, monkeypatch):
    """The old description must not vouch for new weights."""

    def full(*_):
        raise OutputError("the disk is full.")

    monkeypatch.setattr("lrmil.inference.bundle.write_text", full)
    with pytest.raises(OutputError):
        save_bundle(copy, manifest, *parts)
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        load_bundle(copy)


def test_heads_with_options_come_back(tmp_path, parts, manifest):
    head = create_head("abmil", 128, 3, gated=True, hidden_dim=16).eval()
    spec = HeadSpec(name="abmil", in_dim=128, num_classes=3, options={"gated": True, "hidden_dim": 16})
    save_bundle(tmp_path, manifest.model_copy(update={"head": spec}), parts[0], head)
    _, _, loaded = load_parts(tmp_path)
    bag = torch.randn(5, 128)
    assert torch.equal(loaded(bag).logits, head(bag).logits)


def test_the_large_encoder_is_neither_built_nor_looked_for(bundle_folder, write_slide, monkeypatch):
    def forbidden(*_args, **_options):
        raise AssertionError("looked for weights that are not in the bundle")

    import huggingface_hub

    from lrmil.encoders import factory, weights

    for module, name in (
        (factory, "create_encoder"),
        (factory, "load_weights"),
        (weights, "load_weights"),
        (weights, "download"),
        (weights, "_read_packaged"),
        (huggingface_hub, "hf_hub_download"),
    ):
        monkeypatch.setattr(module, name, forbidden)
    with pytest.raises(AssertionError):
        factory.create_encoder("lrmil-small")
    assert load_bundle(bundle_folder, device="cpu").predict(write_slide()).num_regions == 20


def test_answering_imports_nothing_that_trains(bundle_folder, write_slide):
    code = (
        "import sys\n"
        "from lrmil.inference import load_bundle\n"
        "answer = load_bundle(sys.argv[1], device='cpu').predict(sys.argv[2])\n"
        "print(answer.num_regions, *sorted({'.'.join(m.split('.')[:2]) for m in sys.modules if m.startswith('lrmil')}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle_folder), str(write_slide())],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    regions, *rooms = done.stdout.split()
    assert regions == "20"
    assert "lrmil.inference" in rooms
    assert not {"lrmil.training", "lrmil.distill", "lrmil.pipeline", "lrmil.cohorts", "lrmil.cli"} & set(rooms)


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "", "cpu:x"])
def test_a_device_that_is_not_there(bundle_folder, device):
    with pytest.raises(ConfigError, match="lrmil doctor"):
        load_bundle(bundle_folder, device=device)
