"""Where weights come from, and everything that can be wrong with them."""

from __future__ import annotations

import ast
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

import lrmil.encoders
from lrmil.encoders import EncoderCard, create_encoder, packaged, resolve_card
from lrmil.encoders.weights import download, read_state_dict
from lrmil.errors import CheckpointError, ConfigError, WeightsUnavailable

Make = Callable[..., Any]


@pytest.fixture
def trained(tiny: Make, tmp_path: Path) -> Path:
    """A weight file of a tiny encoder."""
    path = tmp_path / "some" / "model.safetensors"
    path.parent.mkdir()
    save_file(tiny(seed=1).trunk.state_dict(), path)
    return path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("kind", ["safetensors", "bin", "pt", "pth", "legacy pth", "folder"])
def test_local_files(tiny_card: Make, trained: Path, kind: str) -> None:
    wanted = read_state_dict(trained)
    path = trained.parent if kind == "folder" else trained.with_suffix(f".{kind.split()[-1]}")
    if kind not in ("safetensors", "folder"):
        torch.save(wanted, path, _use_new_zipfile_serialization=not kind.startswith("legacy"))
    encoder = create_encoder(tiny_card().name, weights=path)
    assert encoder.trunk.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in encoder.trunk.state_dict().items())
    assert encoder.weights_source == f"file {'model.safetensors' if kind == 'folder' else path.name}"


@pytest.mark.usefixtures("no_hub")
def test_environment_variable_and_explicit_path(
    tiny_card: Make, tiny: Make, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = tiny_card("my-vit", source="someone/something", gated=True)
    monkeypatch.setenv("MY_VIT_CKPT_PATH", str(trained))
    by_variable = create_encoder("my-vit")
    assert by_variable.weights_source == "file model.safetensors"
    other = tiny(seed=2)
    save_file(other.trunk.state_dict(), tmp_path / "other.safetensors")
    assert create_encoder("my-vit", weights=tmp_path / "other.safetensors").weights_sha256 == other.weights_sha256
    monkeypatch.setenv(card.ckpt_variable, str(tmp_path / "gone.bin"))
    with pytest.raises(WeightsUnavailable, match=r"MY_VIT_CKPT_PATH names .*gone\.bin"):
        create_encoder("my-vit")


def test_missing_file(tiny_card: Make, tmp_path: Path) -> None:
    for path in (tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(WeightsUnavailable, match="no weight file at"):
            create_encoder(tiny_card().name, weights=path)


def test_half_precision_becomes_float32(tiny_card: Make, trained: Path, tmp_path: Path) -> None:
    half = {key: value.half() for key, value in read_state_dict(trained).items()}
    save_file(half, tmp_path / "half.safetensors")
    encoder = create_encoder(tiny_card().name, weights=tmp_path / "half.safetensors")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.trunk.norm.weight, half["norm.weight"].float())
    assert all(p.requires_grad for p in encoder.parameters())


def test_weights_do_not_share_memory_with_the_file(tiny_card: Make, trained: Path) -> None:
    name = tiny_card().name
    first = create_encoder(name, weights=trained)
    before = first.weights_sha256
    trained.write_bytes(b"\0" * trained.stat().st_size)
    assert first.weights_sha256 == before


@pytest.mark.parametrize("rows", [65, 26])
def test_position_table_of_another_side_is_kept_whole(
    tiny_card: Make, trained: Path, tmp_path: Path, normal: Make, rows: int
) -> None:
    state = read_state_dict(trained) | {"pos_embed": normal(1, rows, 32)}
    save_file(state, tmp_path / "other.safetensors")
    encoder = create_encoder(tiny_card().name, weights=tmp_path / "other.safetensors")
    assert torch.equal(encoder.trunk.pos_embed, state["pos_embed"])
    assert encoder.table_px == {65: 64, 26: 40}[rows]
    assert encoder(normal(1, 3, 32, 32)).embedding.shape == (1, 32)


class Nasty:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_pickles_that_could_run_code_are_refused(tiny_card: Make, tmp_path: Path, suffix: str, how: str) -> None:
    path = tmp_path / f"nasty{suffix}"
    content = {"patch_embed.proj.weight": torch.zeros(1), "extra": Nasty(tmp_path / "ran")}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match="could run code"):
        create_encoder(tiny_card().name, weights=path)
    assert not (tmp_path / "ran").exists()


def test_torch_load_is_only_called_with_weights_only() -> None:
    """In this whole package."""
    calls = 0
    for source in Path(lrmil.encoders.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.serialization.load"):
                calls += 1
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                assert ast.unparse(given["weights_only"]) == "True", f"{source}:{node.lineno}"
    assert calls


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"nonsense that is long enough to be a header", "not a readable safetensors"),
        ("a.safetensors", b"", "not a readable safetensors"),
        ("a.bin", b"nonsense", "could run code|not a readable PyTorch"),
        ("a.pth", b"", "not a readable PyTorch"),
        ("a.pth", b"PK\x03\x04 cut off", "not a readable PyTorch"),
        ("a.h5", b"x", "cannot be read from a .h5"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_damaged_files(tiny_card: Make, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        create_encoder(tiny_card().name, weights=tmp_path / name)


def test_truncated_file(tiny_card: Make, trained: Path) -> None:
    trained.write_bytes(trained.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        create_encoder(tiny_card().name, weights=trained)


def test_file_of_another_width(tiny_card: Make, trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"attn.qkv.weight is \(96, 32\) and should be \(192, 64\)"):
        create_encoder(tiny_card(arch={"embed_dim": 64}).name, weights=trained)


def test_missing_and_unexpected_entries_are_named(tiny_card: Make, trained: Path, tmp_path: Path) -> None:
    state = read_state_dict(trained)
    del state["blocks.1.mlp.fc2.bias"]
    state["blocks.0.ls1.gamma"] = torch.ones(32)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 missing \(blocks.1.mlp.fc2.bias\); 1 not expected \(blocks.0.ls1.gamma\)"
    ):
        create_encoder(tiny_card().name, weights=tmp_path / "odd.safetensors")


def test_a_classifier_on_top_is_left_out(tiny_card: Make, trained: Path, tmp_path: Path) -> None:
    state = read_state_dict(trained) | {"head.weight": torch.ones(10, 32), "mask_token": torch.ones(1, 32)}
    save_file(state, tmp_path / "classifier.safetensors")
    name = tiny_card().name
    with_head = create_encoder(name, weights=tmp_path / "classifier.safetensors")
    assert with_head.weights_sha256 == create_encoder(name, weights=trained).weights_sha256


def test_weights_that_are_no_numbers(tiny_card: Make, trained: Path, tmp_path: Path) -> None:
    state = read_state_dict(trained)
    state["norm.weight"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinity \(norm.weight"):
        create_encoder(tiny_card().name, weights=tmp_path / "nan.safetensors")


def test_weights_and_random_seed_exclude_each_other(tiny_card: Make, trained: Path) -> None:
    with pytest.raises(ConfigError, match="exclude"):
        create_encoder(tiny_card().name, weights=trained, random_seed=0)


# The hub ------------------------------------------------------------------------------------------------------------


def _error(kind: type[Exception]) -> Exception:
    """An error of the hub library without the server's response that its constructor wants."""
    return kind.__new__(kind, "said the hub")


def _hub_answers(monkeypatch: pytest.MonkeyPatch, answers: dict[str, object]) -> list[tuple[str, str]]:
    asked: list[tuple[str, str]] = []

    def hf_hub_download(repo_id: str, filename: str, **kwargs: object) -> object:
        asked.append((repo_id, filename))
        answer = answers.get(filename, answers.get("*"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return asked


def test_hub_file_is_used(tiny_card: Make, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _hub_answers(monkeypatch, {"model.safetensors": str(trained)})
    encoder = create_encoder(tiny_card(source="someone/something").name)
    assert asked == [("someone/something", "model.safetensors")]
    assert encoder.weights_source == "hub someone/something model.safetensors"


def test_second_choice_of_file(tiny_card: Make, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(read_state_dict(trained), trained.with_name("pytorch_model.bin"))
    missing = _error(hub_errors.RemoteEntryNotFoundError)
    answers = {"model.safetensors": missing, "pytorch_model.bin": str(trained.with_name("pytorch_model.bin"))}
    asked = _hub_answers(monkeypatch, answers)
    create_encoder(tiny_card(source="someone/something").name)
    assert [name for _, name in asked] == ["model.safetensors", "pytorch_model.bin"]


def test_gated_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    _hub_answers(monkeypatch, {"*": _error(hub_errors.GatedRepoError)})
    with pytest.raises(WeightsUnavailable) as caught:
        create_encoder("conch-v1", input_px=256)
    message = str(caught.value)
    for part in ("conch-v1", "MahmoodLab/CONCH is gated", "ask for access", "HF_TOKEN", "CONCH_CKPT_PATH"):
        assert part in message
    assert "pytorch_model.bin" in message
    assert "\n" not in message


def test_repository_that_is_not_shown(tiny_card: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _hub_answers(monkeypatch, {"*": _error(hub_errors.RepositoryNotFoundError)})
    with pytest.raises(WeightsUnavailable, match="no repository someone/something"):
        create_encoder(tiny_card(source="someone/something").name)


def test_repository_without_such_files(tiny_card: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _hub_answers(monkeypatch, {"*": _error(hub_errors.RemoteEntryNotFoundError)})
    with pytest.raises(WeightsUnavailable, match=r"has none of model.safetensors, pytorch_model.bin"):
        create_encoder(tiny_card(source="someone/something").name)


@pytest.mark.parametrize(
    "error",
    [
        hub_errors.LocalEntryNotFoundError("no connection and not cached"),
        hub_errors.OfflineModeIsEnabled("offline"),
        _error(hub_errors.HfHubHTTPError),
        ConnectionError("no route"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_hub_out_of_reach(tiny_card: Make, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _hub_answers(monkeypatch, {"*": error})
    with pytest.raises(WeightsUnavailable, match=r"not available, .*hub.*TINY_\d+_CKPT_PATH"):
        create_encoder(tiny_card(source="someone/something").name)


def test_really_offline_and_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub library itself, told to stay offline, with an empty cache: nothing is faked here."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        WeightsUnavailable, match=r"forbids asking.*unset HF_HUB_OFFLINE and ask for access.*CONCH_CKPT"
    ):
        create_encoder("conch-v1", input_px=256)


def test_really_offline_and_in_the_cache(
    tiny_card: Make, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that an earlier download left in the hub's cache is found without asking anyone."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--something"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    torch.save(read_state_dict(trained), snapshot / "pytorch_model.bin")
    card: EncoderCard = tiny_card(source="someone/something")
    assert download(card) == snapshot / "pytorch_model.bin"
    assert create_encoder(card.name).weights_source == "hub someone/something pytorch_model.bin"


def test_timm_model_without_published_weights() -> None:
    card = resolve_card("vit_tiny_patch16_384").model_copy(update={"source": None})
    with pytest.raises(WeightsUnavailable, match=r"no hub repository is known.*VIT_TINY_PATCH16_384_CKPT_PATH"):
        download(card)


# Encoders that the package ships ------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tiny: Make, tmp_path: Path) -> Path:
    """weights/tiny-shipped.json and .safetensors, as a training script would leave them."""
    from lrmil.files import sha256

    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(tiny(seed=1).trunk.state_dict(), folder / "tiny-shipped.safetensors")
    facts = {"width": 32, "depth": 3, "heads": 4, "token_px": 8, "input_px": 32}
    facts |= {"mean": [0.7, 0.5, 0.7], "std": [0.2, 0.2, 0.2], "native_mpp": [0.5, 2.0], "credit": "Those who made it"}
    facts["sha256"] = sha256(folder / "tiny-shipped.safetensors")
    (folder / "tiny-shipped.json").write_text(json.dumps(facts))
    return folder / "tiny-shipped.json"


@pytest.mark.usefixtures("no_hub")
def test_shipped_encoder(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: shipped.parents[1])
    packaged.register_all()
    card = resolve_card("tiny-shipped")
    assert (card.width, card.native_mpp, card.mean) == (32, (0.5, 2.0), (0.7, 0.5, 0.7))
    assert card.citation == "Those who made it"
    encoder = create_encoder("tiny-shipped")
    assert encoder.weights_source == "package weights/tiny-shipped.safetensors"
    assert encoder.trunk.blocks[0].attn.num_heads == 4

    weights = shipped.with_suffix(".safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="not the file that was shipped"):
        create_encoder("tiny-shipped")
    weights.unlink()
    with pytest.raises(WeightsUnavailable, match="installation lacks"):
        create_encoder("tiny-shipped")


def test_shipped_encoder_needs_its_facts(shipped: Path) -> None:
    facts = json.loads(shipped.read_text())
    del facts["heads"]
    shipped.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="lacks heads"):
        packaged.packaged_card(shipped)


@pytest.mark.usefixtures("no_hub")
def test_all_that_is_shipped_loads() -> None:
    for card in lrmil.encoders.encoder_cards():
        if card.package_file:
            encoder = create_encoder(card.name)
            assert encoder.card.share_derivatives, card.name
            assert encoder.weights_source == f"package {card.package_file}"
