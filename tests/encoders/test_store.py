"""An encoder in a folder: what was saved is what is loaded, or an error says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError

from lrmil.encoders import Encoder, cards, create_encoder, load_encoder, save_encoder
from lrmil.encoders.store import is_saved_encoder
from lrmil.errors import BundleAltered, BundleError, ConfigError, GridMismatch, OutputError

Make = Callable[..., Any]
ARCHITECTURES = [{}, {"reg_tokens": 4, "init_values": 1e-5, "no_embed_class": True}]


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=["plain", "registers"])
def test_round_trip_is_bit_identical(tiny: Make, normal: Make, tmp_path: Path, arch: dict[str, Any]) -> None:
    encoder: Encoder = tiny(arch=arch, table_px=64, embedding="cls+token_mean", options={"input_px": 48})
    loaded = load_encoder(save_encoder(encoder, tmp_path / "model"))
    images = normal(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(loaded(images).embedding, encoder(images).embedding)
    assert loaded.describe() == encoder.describe()
    assert loaded.weights_source == encoder.weights_source
    assert not loaded.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    first = (tmp_path / "model" / "encoder.safetensors").read_bytes()
    save_encoder(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "encoder.safetensors").read_bytes() == first


def test_attention_pool_is_saved(tiny: Make, normal: Make, tmp_path: Path) -> None:
    encoder = tiny(embedding="attention_pool_projected", attention_pool_width=16)
    loaded = load_encoder(save_encoder(encoder, tmp_path))
    images = normal(2, 3, 32, 32)
    with torch.no_grad():
        embedding = loaded(images).embedding
        assert torch.equal(embedding, encoder(images).embedding)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))


def test_legacy_slice_is_remembered(tiny: Make, tmp_path: Path) -> None:
    encoder = tiny(table_px=64, options={"position_embedding": "legacy_slice"})
    assert load_encoder(save_encoder(encoder, tmp_path)).position_embedding == "legacy_slice"


def test_float16_rounds_once(tiny: Make, tmp_path: Path) -> None:
    encoder = tiny()
    save_encoder(encoder, tmp_path / "half", dtype="float16")
    save_encoder(encoder, tmp_path / "full")
    sizes = [(tmp_path / name / "encoder.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    loaded = load_encoder(tmp_path / "half")
    assert torch.equal(loaded.trunk.norm.weight, encoder.trunk.norm.weight.half().float())
    assert loaded.weights_sha256 == json.loads((tmp_path / "half" / "encoder.json").read_text())["weights_sha256"]
    save_encoder(loaded, tmp_path / "again", dtype="float16")
    assert load_encoder(tmp_path / "again").weights_sha256 == loaded.weights_sha256
    with pytest.raises(ConfigError, match="int8"):
        save_encoder(encoder, tmp_path, dtype="int8")  # type: ignore[arg-type]


def test_needs_no_registry_and_no_hub(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoder(tiny(source="someone/something"), tmp_path)
    cards._CARDS.clear()
    cards._NAMES.clear()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert load_encoder(tmp_path).depth == 3


def test_the_folder_is_a_name(tiny: Make, tmp_path: Path) -> None:
    encoder = tiny()
    save_encoder(encoder, tmp_path)
    assert create_encoder(tmp_path).weights_sha256 == encoder.weights_sha256
    assert create_encoder(str(tmp_path), input_px=64).token_grid_side == 8
    for options in ({"embedding": "token_mean"}, {"random_seed": 0}, {"weights": tmp_path}):
        with pytest.raises(ConfigError, match="saved encoder has its own weights"):
            create_encoder(tmp_path, **options)
    with pytest.raises(GridMismatch):
        load_encoder(tmp_path, input_px=30)


def test_a_trained_student_is_saved_as_it_is_now(tiny: Make, tmp_path: Path) -> None:
    encoder = tiny()
    before = encoder.weights_sha256
    with torch.no_grad():
        encoder.trunk.norm.bias.add_(1)
    loaded = load_encoder(save_encoder(encoder, tmp_path))
    assert loaded.weights_sha256 == encoder.weights_sha256 != before


def test_altered_or_incomplete_folders(tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no encoder\.json"):
        load_encoder(tmp_path)
    save_encoder(tiny(), tmp_path)
    weights, record = tmp_path / "encoder.safetensors", tmp_path / "encoder.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleAltered, match=r"not the file that encoder\.json was written for"):
        load_encoder(tmp_path)
    weights.unlink()
    with pytest.raises(BundleError, match=r"no encoder\.safetensors"):
        load_encoder(tmp_path)
    weights.write_bytes(content)
    facts = json.loads(record.read_text())
    record.write_text(json.dumps(facts | {"surprise": 1}))
    with pytest.raises(BundleError, match="surprise"):
        load_encoder(tmp_path)
    record.write_text("{ not json")
    with pytest.raises(BundleError, match=r"encoder\.json"):
        load_encoder(tmp_path)


def test_a_crash_while_writing_leaves_no_half_encoder(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoder(tiny(), tmp_path)

    def full_disk(*args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OutputError, match="disk is full"):
        save_encoder(tiny(seed=1), tmp_path)
    assert not is_saved_encoder(tmp_path)
    assert not list(tmp_path.glob("*tmp*"))
