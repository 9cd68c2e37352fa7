"""Many slides: one bad slide costs itself, every answer keeps its place, and exit codes tell how it went."""

from __future__ import annotations

import csv
import json
import shutil

import cv2
import numpy as np
import pytest

from lrmil.cli import main
from lrmil.encoders import embed
from lrmil.errors import BundleError, ConfigError, EncoderError, NotASlide, NoTissue, OutputError
from lrmil.files import read_json
from lrmil.inference import batch
from lrmil.inference.batch import Failure, folder_names, predict_many
from lrmil.inference.predict import Prediction
from lrmil.inference.prepare import TileSettings
from lrmil.slides import open_slide, write_pyramid

FILES = {"prediction.json", "attention.png", "attention_figure.png"}


@pytest.fixture
def slides(tmp_path, write_slide):
    """A good slide, noise, glass, and a good slide of the same name elsewhere."""
    folder = tmp_path / "slides"
    (folder / "b").mkdir(parents=True)
    good, again = folder / "case.tif", folder / "b" / "case.tif"
    shutil.copy(write_slide(), good)
    shutil.copy(write_slide(0.5, (1, 4), 2), again)
    (folder / "noise.svs").write_bytes(np.random.default_rng(0).bytes(1000))
    write_pyramid(folder / "glass.tif", np.full((512, 512, 3), 240, np.uint8), 0.5, (1, 4))
    return [good, folder / "noise.svs", folder / "glass.tif", again]


def run(*argv):
    """Call the command line; return its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in argv])
    return stopped.value.code or 0


def table(path):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_a_bad_slide_does_not_stop_the_others(slides, bundle_folder, tmp_path):
    out, told = tmp_path / "out", []
    failures = predict_many(slides, bundle_folder, out, device="cpu", on_result=told.append)
    assert [(f.path, type(f.error)) for f in failures] == [(str(slides[1]), NotASlide), (str(slides[2]), NoTissue)]
    assert [type(result) for result in told] == [Prediction, Failure, Failure, Prediction]
    assert {p.name for p in out.iterdir()} == {"case", "case-2", "predictions.csv", "failures.csv"}
    for name, path in (("case", slides[0]), ("case-2", slides[3])):
        assert {p.name for p in (out / name).iterdir()} == FILES
        assert read_json(out / name / "prediction.json")["path"] == str(path)

    rows = table(out / "failures.csv")
    assert [list(row) for row in rows] == [["path", "error", "message"]] * 2
    assert [(r["path"], r["error"]) for r in rows] == [(str(slides[1]), "NotASlide"), (str(slides[2]), "NoTissue")]
    assert rows[1]["message"] == str(failures[1].error)

    answers = table(out / "predictions.csv")
    assert [(a["slide"], a["folder"], a["path"]) for a in answers] == [
        ("case", "case", str(slides[0])),
        ("case", "case-2", str(slides[3])),
    ]
    for row, answer in zip(answers, (told[0], told[3]), strict=True):
        assert row["predicted"] == answer.predicted
        for name, p in answer.probabilities.items():
            assert float(row[f"p_{name}"]) == pytest.approx(p, abs=1e-6)
        assert (row["regions"], row["unreadable"]) == ("20", "0")
        assert float(row["seconds"]) > 0


def test_answers_are_written_as_they_come(slides, bundle_folder, tmp_path):
    """A call that is stopped half-way leaves what it has."""
    out = tmp_path / "out"

    def stop(result):
        if isinstance(result, Failure):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_many(slides, bundle_folder, out, device="cpu", heatmap=False, on_result=stop)
    assert len(table(out / "predictions.csv")) == len(table(out / "failures.csv")) == 1
    assert {p.name for p in (out / "case").iterdir()} == {"prediction.json"}


def test_nothing_of_an_earlier_call_is_left_to_mislead(slides, bundle_folder, tmp_path):
    out = tmp_path / "out"
    predict_many(slides[:2], bundle_folder, out, device="cpu")
    (out / "case" / "notes.txt").write_text("mine")
    shutil.copy(slides[1], slides[0])
    failures = predict_many([slides[0]], bundle_folder, out, device="cpu")
    assert len(failures) == 1
    assert not (out / "predictions.csv").exists()
    assert {p.name for p in (out / "case").iterdir()} == {"notes.txt"}
    assert [row["path"] for row in table(out / "failures.csv")] == [str(slides[0])]
    predict_many([slides[3]], bundle_folder, out, device="cpu", heatmap=False)
    assert not (out / "failures.csv").exists()
    assert len(table(out / "predictions.csv")) == 1


def test_folder_names():
    paths = ["a/x.svs", "b/x.tif", "b/X.tif", "c/x-2.svs", "d/y.ome.tif", "x.svs"]
    assert folder_names(paths) == ["x", "x-2", "X-3", "x-2-2", "y.ome", "x-4"]


def test_an_encoder_that_fails_on_one_slide(slides, bundle_folder, tmp_path, monkeypatch):
    """Half precision may overflow on one slide: that is its failure alone."""
    with open_slide(slides[0]) as slide:
        victim = slide.read_box((256, 0, 512, 256), (32, 32))

    def overflow(encoder, images, **options):
        if any((image == victim).all() for image in images):
            raise EncoderError("features are not finite.")
        return embed(encoder, images, **options)

    monkeypatch.setattr("lrmil.inference.stream.encoding.embed", overflow)
    chosen = [slides[0], slides[3]]
    failures = predict_many(chosen, bundle_folder, tmp_path / "out", device="cpu", heatmap=False)
    assert [f.path for f in failures] == [str(slides[0])]
    # The name does not depend on what failed before.
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"case-2", "predictions.csv", "failures.csv"}


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error"), RuntimeError("out of memory")])
def test_whatever_ends_one_slide_ends_no_other(slides, bundle_folder, tmp_path, monkeypatch, error):
    """Also while its pictures are drawn: no answer is then left that the table does not hold."""
    opened, draw = TileSettings.open, batch._draw

    def torn(self, path, mpp=None):
        if path == slides[1]:
            raise error
        return opened(self, path, mpp)

    def undrawn(answer, folder):
        if folder.name == "case":
            raise error
        draw(answer, folder)

    monkeypatch.setattr(TileSettings, "open", torn)
    monkeypatch.setattr(batch, "_draw", undrawn)
    out = tmp_path / "out"
    failures = predict_many([slides[0], slides[1], slides[3]], bundle_folder, out, device="cpu")
    assert [f.path for f in failures] == [str(slides[0]), str(slides[1])]
    assert [row["error"] for row in table(out / "failures.csv")] == [type(error).__name__] * 2
    assert failures[0].message.startswith(f"case.tif: {type(error).__name__}")
    assert [row["folder"] for row in table(out / "predictions.csv")] == ["case-2"]
    assert list((out / "case").iterdir()) == []


def test_each_row_of_the_tables_is_written_once(slides, bundle_folder, tmp_path, monkeypatch):
    """A thousand slides are no thousand tables of up to a thousand rows."""
    written = []
    monkeypatch.setattr(batch, "_as_csv", lambda rows, as_csv=batch._as_csv: written.append(len(rows)) or as_csv(rows))
    predict_many([slides[0], slides[1]] * 3, bundle_folder, tmp_path / "out", device="cpu", heatmap=False)
    assert written == [2, 2, 1, 1, 1, 1]
    assert len(table(tmp_path / "out" / "predictions.csv")) == len(table(tmp_path / "out" / "failures.csv")) == 3


def test_a_wrong_setting_and_a_full_disk_are_no_slide_s_fault(slides, bundle_folder, tmp_path, monkeypatch):
    for error in (ConfigError("float16 on a CPU"), OutputError("the disk is full")):

        def wrong(*args, error=error, **options):
            raise error

        target = "stream.encoding.embed" if isinstance(error, ConfigError) else "predict.Prediction.write"
        with monkeypatch.context() as patched:
            patched.setattr(f"lrmil.inference.{target}", wrong)
            with pytest.raises(type(error)):
                predict_many(slides, bundle_folder, tmp_path / "out", device="cpu")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_wrong_for_all_slides_is_raised_at_once(slides, bundle_folder, tmp_path):
    with pytest.raises(BundleError):
        predict_many(slides, tmp_path, tmp_path / "out")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot be used as a folder"):
            predict_many(slides, bundle_folder, out, device="cpu")


class TestCommandLine:
    def test_all_well(self, slides, bundle_folder, tmp_path, capsys):
        out = tmp_path / "out"
        assert run("predict", slides[0], slides[3], "--model", bundle_folder, "--out", out, "--device", "cpu") == 0
        printed, errors = capsys.readouterr()
        assert errors == ""
        first = read_json(out / "case" / "prediction.json")
        assert f"case: {first['predicted']}   (benign {first['probabilities']['benign']:.1%}" in printed
        assert "20 regions at 2 um/px, read from level 1 (1 um/px), level 2 (4 um/px), " in printed
        assert "MB" in printed
        assert f"2 of 2 slides answered; see {out}" in printed
        assert cv2.imread(str(out / "case" / "attention.png")).shape == (512, 768, 3)

    def test_some_failed(self, slides, bundle_folder, tmp_path, capsys):
        out = tmp_path / "out"
        code = run("predict", *slides, "--model", bundle_folder, "--out", out, "--no-heatmap", "--device", "cpu")
        assert code == 1
        printed, errors = capsys.readouterr()
        assert "2 of 4 slides answered" in printed
        assert errors.splitlines()[0].startswith("lrmil: noise.svs: ")
        assert errors.splitlines()[1].startswith("lrmil: glass: too little tissue")
        assert errors.splitlines()[2] == f"lrmil: what failed is listed in {out / 'failures.csv'}"
        assert not list(out.rglob("*.png"))

    def test_json_lines(self, slides, bundle_folder, tmp_path, capsys):
        out = tmp_path / "out"
        options = ("--model", bundle_folder, "--out", out, "--json", "--no-heatmap", "--device", "cpu")
        assert run("predict", *slides, *options) == 1
        lines = [json.loads(line, parse_constant=pytest.fail) for line in capsys.readouterr().out.splitlines()]
        assert [line["path"] for line in lines] == [str(path) for path in slides]
        assert lines[0] == read_json(out / "case" / "prediction.json")
        assert lines[3] == read_json(out / "case-2" / "prediction.json")
        assert lines[1].keys() == {"path", "error", "message"}
        assert lines[2]["error"] == "NoTissue"

    def test_mpp_and_notes(self, bundle_folder, tmp_path, tissue_picture, capsys):
        path = write_pyramid(tmp_path / "biopsy.tif", tissue_picture(256, 256), 0.25, (1, 4))
        options = ("--model", bundle_folder, "--out", tmp_path / "out", "--no-heatmap", "--device", "cpu")
        assert run("predict", path, "--mpp", 0.5, "--batch_size", 2, "--threads", 1, *options) == 0
        assert "note: little tissue: 4 regions" in capsys.readouterr().out
        assert read_json(tmp_path / "out" / "biopsy" / "prediction.json")["scale"]["mpp_source"] == "user"

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (("--model", "nowhere"), "no bundle.json there"),
            (("--device", "gpu"), "device 'gpu'"),
            (("--threads", "0"), "threads"),
            (("--colour", "red"), "colour"),
        ],
    )
    def test_a_wrong_call(self, slides, bundle_folder, tmp_path, capsys, options, text):
        given = ["predict", slides[0], "--out", tmp_path / "out", "--device", "cpu", "--model", bundle_folder, *options]
        assert run(*given) == 2
        errors = capsys.readouterr().err
        assert text in errors
        assert "Traceback" not in errors
        assert not (tmp_path / "out").exists()

    def test_an_altered_bundle(self, slides, bundle_folder, tmp_path, capsys):
        copy = shutil.copytree(bundle_folder, tmp_path / "copy")
        with (copy / "head.safetensors").open("ab") as handle:
            handle.write(b"x")
        assert run("predict", slides[0], "--model", copy, "--out", tmp_path / "out") == 2
        assert "head.safetensors is not the file that was written" in capsys.readouterr().err

    def test_help_says_what_is_written(self, capsys):
        assert run("predict", "--help") == 0
        text = capsys.readouterr().out
        for word in ("prediction.json", "attention.png", "failures.csv", "--mpp"):
            assert word in text
