"""Looking before running: facts about slides, encoders and this machine."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest

from lrmil.cli import main
from lrmil.encoders import encoder_cards
from lrmil.errors import ConfigError, MissingMpp
from lrmil.geometry import GridSettings
from lrmil.inference.inspect import check_machine, describe_slide
from lrmil.inference.prepare import TileSettings
from lrmil.slides import open_slide, write_pyramid
from lrmil.tissue import TissueSettings

SETTINGS = (GridSettings(patch_px=32), TissueSettings(), TileSettings())


def run(*argv):
    """Call the command line; return its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in argv])
    return stopped.value.code or 0


@pytest.fixture
def glass(tmp_path):
    return write_pyramid(tmp_path / "glass.tif", np.full((512, 1024, 3), 240, np.uint8), 0.5, (1, 4))


def test_facts(write_slide):
    path = write_slide()
    facts = describe_slide(path, *SETTINGS)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert (facts["name"], facts["dimensions"]) == ("case", [1536, 1024])
    assert facts["reader"] == open_slide(path).reader
    assert (facts["mpp"], facts["mpp_source"]) == (0.25, "TIFF resolution tags")
    assert [level["mpp"] for level in facts["levels"]] == [0.25, 1.0, 4.0]
    assert 0.5 < facts["tissue"]["share"] < 0.8
    assert facts["tissue"]["mm2"] == pytest.approx(facts["tissue"]["share"] * 1.536 * 1.024 / 16, rel=1e-3)
    assert facts["low_resolution"] == {"mpp": 2.0, "patch_px": 32, "region_side_l0": 256, "regions": 20, "level": 1}
    assert facts["high_resolution"]["mpp"] == 0.5
    assert 200 < facts["high_resolution"]["patches"] <= 320
    assert facts["snapped"] is True


def test_a_slide_without_tissue_is_described_all_the_same(glass, tmp_path):
    """The message about too little tissue sends people here."""
    facts = describe_slide(glass, *SETTINGS, picture=tmp_path / "glass.png")
    assert facts["tissue"]["share"] == facts["low_resolution"]["regions"] == facts["high_resolution"]["patches"] == 0
    assert cv2.imread(str(tmp_path / "glass.png")).shape == (320, 640, 3)


def test_a_slide_too_coarse_to_train(write_slide):
    assert describe_slide(write_slide(1.0, (1,), 4), *SETTINGS)["high_resolution"] is None


def test_damage_is_said(write_slide, damage, tmp_path):
    path = tmp_path / "torn.tif"
    shutil.copy(write_slide(), path)
    damage(path, 2)
    assert describe_slide(path, *SETTINGS)["tissue"]["unreadable_blocks"] == 1


def test_the_picture_shows_regions_where_they_are(write_slide, tmp_path):
    describe_slide(write_slide(), *SETTINGS, picture=tmp_path / "tissue.png")
    picture = cv2.imread(str(tmp_path / "tissue.png"))[..., ::-1].astype(int)
    height, width = picture.shape[:2]
    assert (width, height) == (624, 416)
    blue = (np.abs(picture - [40, 80, 200]) < 30).all(axis=2)
    # Regions are 104 px wide here, 6 x 4 of them less the corners; the contour of the tissue crosses some lines.
    assert blue[104].mean() > 0.9
    assert blue[0, 110:510].mean() > 0.6
    assert not blue[0, :100].any()
    assert not blue[:100, 0].any()
    assert blue[110:300, 0].mean() > 0.9


def test_a_picture_of_no_known_kind(write_slide, tmp_path):
    with pytest.raises(ConfigError, match=r"\.gif"):
        describe_slide(write_slide(), *SETTINGS, picture=tmp_path / "a.gif")


class TestInfo:
    def test_printed(self, write_slide, capsys, tmp_path):
        assert run("info", write_slide(), "--patch-px", 32, "--picture", tmp_path / "a.png") == 0
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert lines["size"] == "1536 x 1024 px, 0.4 x 0.3 mm"
        assert lines["scale"] == "0.25 um/px (from: TIFF resolution tags)"
        assert lines["grid"] == "whole level-0 pixels, box averages"
        assert lines["picture"] == str(tmp_path / "a.png")

    def test_plan_of_a_model(self, write_slide, bundle_folder, capsys):
        assert run("info", write_slide(), "--model", bundle_folder) == 0
        assert "20 regions of 32 px at 2 um/px, read from level 1" in capsys.readouterr().out

    def test_too_coarse_resampled_damaged(self, write_slide, damage, tmp_path, capsys):
        path = tmp_path / "torn.tif"
        shutil.copy(write_slide(1.3, (1,), 4), path)
        damage(path, 0)
        assert run("info", path, "--patch-px", 32) == 0
        text = capsys.readouterr().out
        assert "too coarse to train with; it can be predicted on" in text
        assert "resampled by area" in text
        assert "cannot be decoded" in text

    def test_json(self, glass, capsys):
        assert run("info", glass, "--json") == 0
        assert json.loads(capsys.readouterr().out)["tissue"]["share"] == 0

    def test_refusals(self, shared_data, write_slide, capsys):
        with pytest.raises(MissingMpp):
            describe_slide(shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs", *SETTINGS)
        assert run("info", shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs") == 1
        assert "--mpp" in capsys.readouterr().err
        assert run("info", write_slide(), "--hr-mpp", 0.7) == 2
        assert "lr_mpp / hr_mpp must be a whole number" in capsys.readouterr().err


class TestEncoders:
    def test_listed(self, capsys):
        assert run("encoders") == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 120
        table = {line.split()[0]: line for line in lines if line}
        assert {card.name for card in encoder_cards()} <= set(table)
        assert "shipped" in table["lrmil-small"]
        assert table["lrmil-small"].split()[1:5] == ["128", "12", "8", "64"]
        assert "gated" in table["uni2-h"]
        assert "timm:NAME" in lines[-2]

    def test_json(self, capsys):
        assert run("encoders", "--json") == 0
        cards = json.loads(capsys.readouterr().out)
        assert {c["name"] for c in cards} == {c.name for c in encoder_cards()}
        assert all(c["licence"] for c in cards)


class TestDoctor:
    def test_this_machine(self, capsys):
        code = run("doctor")
        text = capsys.readouterr().out
        assert code == 0, text
        for subject in ("python", "lrmil", "torch", "openslide", "cpu", "disk", "reader openslide", "model hub"):
            assert f"  {subject} " in text
        assert "encoder lrmil-small" in text
        assert "million weights" in text

    def test_a_weight_file_that_is_gone(self, monkeypatch, tmp_path, capsys):
        variable = next(card.ckpt_variable for card in encoder_cards() if card.name == "conch-v1")
        monkeypatch.setenv(variable, str(tmp_path / "gone.bin"))
        assert run("doctor") == 1
        assert "BAD   encoder conch-v1" in capsys.readouterr().out
        (tmp_path / "gone.bin").write_bytes(b"x")
        found = {check.subject: check for check in check_machine()}["encoder conch-v1"]
        assert (found.state, found.finding) == ("ok", f"{variable}={tmp_path / 'gone.bin'}")

    def test_hub_settings(self, monkeypatch):
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "x")
        hub = {check.subject: check for check in check_machine()}["model hub"]
        assert (hub.state, hub.finding) == ("ok", "offline by HF_HUB_OFFLINE; a token is set")
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
        hub = {check.subject: check for check in check_machine()}["model hub"]
        assert hub.state == "note"
        assert "HF_TOKEN" in hub.finding

    def test_a_damaged_installation(self, monkeypatch):
        from lrmil.errors import CheckpointError
        from lrmil.inference import inspect

        def damaged(card):
            raise CheckpointError(f"{card.name}: not the file that was shipped.", fix="Install again.")

        monkeypatch.setattr(inspect, "load_weights", damaged)
        found = {check.subject: check for check in check_machine()}["encoder lrmil-small"]
        assert (found.state, found.finding) == ("bad", "lrmil-small: not the file that was shipped. Install again.")
