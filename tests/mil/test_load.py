"""Checkpoints of the original programs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lrmil.errors import CheckpointError
from lrmil.mil import create_head, load_original


def _plain(in_dim: int = 8, classes: int = 3, hidden: int = 128) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = {
        "mil.attention.0.weight": (hidden, in_dim),
        "mil.attention.0.bias": (hidden,),
        "mil.attention.2.weight": (1, hidden),
        "mil.attention.2.bias": (1,),
        "cls.weight": (classes, in_dim),
        "cls.bias": (classes,),
    }
    return {k: torch.randn(s, generator=g) for k, s in shapes.items()}


def _gated(in_dim: int = 8, classes: int = 3) -> dict[str, torch.Tensor]:
    state = {k: v for k, v in _plain(in_dim, classes).items() if k.startswith("cls")}
    g = torch.Generator().manual_seed(2)
    for name, shape in (("attn_a.0", (128, in_dim)), ("attn_b.0", (128, in_dim)), ("attn_c", (1, 128))):
        state[f"mil.{name}.weight"] = torch.randn(shape, generator=g)
        state[f"mil.{name}.bias"] = torch.randn(shape[0], generator=g)
    return state


def test_plain_teacher_and_student_of_the_authors() -> None:
    state = _plain()
    head = load_original("lrmil", state)
    assert head.describe() == {
        "name": "abmil",
        "in_dim": 8,
        "num_classes": 3,
        "gated": False,
        "hidden_dim": 128,
        "instance_classifier": "none",
    }
    assert not head.training
    bag = torch.randn(5, 8)
    e = torch.tanh(bag @ state["mil.attention.0.weight"].T + state["mil.attention.0.bias"])
    e = (e @ state["mil.attention.2.weight"].T + state["mil.attention.2.bias"])[:, 0]
    z = torch.softmax(e, 0) @ bag
    torch.testing.assert_close(head(bag).logits, z @ state["cls.weight"].T + state["cls.bias"])

    student = load_original(
        "lrmil", state | {"inst_classifier.weight": torch.ones(2, 8), "inst_classifier.bias": e[:2]}
    )
    out = student(bag)
    assert torch.equal(out.logits, head(bag).logits)
    assert out.instance_logits is not None
    torch.testing.assert_close(out.instance_logits, bag.sum(1, keepdim=True) + e[:2])


def test_gated_weights_go_to_the_right_branch() -> None:
    state = _gated()
    bag = torch.randn(5, 8)
    a = torch.tanh(bag @ state["mil.attn_a.0.weight"].T + state["mil.attn_a.0.bias"])
    b = torch.sigmoid(bag @ state["mil.attn_b.0.weight"].T + state["mil.attn_b.0.bias"])
    e = ((a * b) @ state["mil.attn_c.weight"].T + state["mil.attn_c.bias"])[:, 0]
    torch.testing.assert_close(load_original("lrmil", state)(bag).attention_logits, e)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_with_prefixes(tmp_path: Path, prefix: str, suffix: str) -> None:
    path = tmp_path / f"best{suffix}"
    state = {prefix + k: v for k, v in _plain().items()}
    if suffix == ".pth":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        save_file(state, path)
    bag = torch.randn(2, 8)
    assert torch.equal(load_original("abmil", path)(bag).logits, load_original("abmil", _plain())(bag).logits)


def test_keys_that_do_not_fit_are_named() -> None:
    state: dict[str, Any] = _plain()
    state.pop("cls.bias")
    state["extra.weight"] = torch.zeros(1)
    state["mil.attention.2.weight"] = torch.zeros(1, 64)
    state["mil.attention.0.bias"] = torch.full((128,), float("nan"))
    with pytest.raises(CheckpointError) as caught:
        load_original("lrmil", state)
    for part in (
        "cls.bias: missing",
        "extra.weight: unexpected",
        "mil.attention.2.weight: shape (1, 64), wanted (1, 128)",
        "mil.attention.0.bias: holds NaN",
    ):
        assert part in str(caught.value)


def test_other_methods_and_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a checkpoint of 'lrmil'.*attention_net.0.weight.*mil.attn_a"):
        load_original("lrmil", {"attention_net.0.weight": torch.zeros(512, 8)})
    with pytest.raises(CheckpointError, match="no checkpoint layout is known for 'nope'"):
        load_original("nope", {})
    with pytest.raises(CheckpointError, match="no tensors"):
        load_original("lrmil", {"epoch": 3})
    with pytest.raises(CheckpointError, match="no such file"):
        load_original("lrmil", tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.pth"):
        load_original("lrmil", tmp_path / "text.pth")
    whole = tmp_path / "whole.pth"
    torch.save(_plain(), whole)
    (tmp_path / "half.pth").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"half\.pth"):
        load_original("lrmil", tmp_path / "half.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_original("lrmil", tmp_path / "list.pth")


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    torch.save({"cls.weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("evil.pth", "raw.pth"):
        with pytest.raises(CheckpointError, match="not safe to read"):
            load_original("lrmil", tmp_path / name)
    assert not ran.exists()


def test_a_whole_pickled_module_is_refused_with_advice(tmp_path: Path) -> None:
    torch.save(create_head("abmil", 4, 2), tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match="state_dict"):
        load_original("lrmil", tmp_path / "module.pth")
