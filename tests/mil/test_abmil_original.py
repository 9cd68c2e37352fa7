"""Attention-based MIL with one sigmoid output, against its authors' program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lrmil.errors import CheckpointError, HeadError
from lrmil.mil import MILHead, create_head, load_original


def _digits_to_features(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The program's own feature extractor, 28 x 28 pixels to 500 numbers."""

    def layer(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return state[f"feature_extractor_{name}.weight"], state[f"feature_extractor_{name}.bias"]

    x = F.max_pool2d(F.relu(F.conv2d(images, *layer("part1.0"))), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, *layer("part1.3"))), 2)
    return F.relu(F.linear(x.flatten(1), *layer("part2.0")))


@pytest.mark.parametrize("name", ["abmil_plain", "abmil_gated"])
def test_golden(golden: Callable[[str], Any], name: str) -> None:
    file = golden(name)
    state = {k: torch.from_numpy(v) for k, v in file.under("param/").items()}
    with pytest.warns(UserWarning, match=r"feature extractor \(6 tensors.*not read; give the head the 500 features"):
        head = load_original("abmil_original", state)
    assert head.describe()["gated"] == (name == "abmil_gated")
    seen = set()

    def expect(key: str, actual: Any) -> None:
        file.expect(key, actual)
        seen.add(key)

    for case in ("N37", "N200"):
        features = _digits_to_features(state, torch.from_numpy(file[f"in/{case}/images"])[0].float())
        out = head(features, label=torch.from_numpy(file[f"in/{case}/y"]))
        probability = head.probabilities(out.logits)[1:]
        if case == "N37":
            expect("out/N37/H", features)
        expect(f"out/{case}/A_raw", out.attention_logits[:, None])
        expect(f"out/{case}/A", out.attention[None])
        expect(f"out/{case}/logit", out.logits[None, 1:])
        expect(f"out/{case}/Y_prob", probability[None])
        expect(f"out/{case}/Y_hat", (probability >= 0.5).float()[None])
        total = head.total_loss(out, torch.tensor(1e6))
        expect(f"loss/{case}/nll", total[None, None])
    assert seen == {k for k in file.arrays if k.startswith(("out/", "loss/"))}


def _sure(logit: float, classes: int = 2) -> MILHead:
    head = create_head("abmil_original", 3, classes)
    with torch.no_grad():
        head.classifier.weight.zero_()
        head.classifier.bias.fill_(logit)
    return head


def test_one_output_makes_two_probabilities() -> None:
    out = _sure(1.5)(torch.randn(4, 3))
    assert out.logits.tolist() == [0.0, 1.5]
    p = torch.sigmoid(torch.tensor(1.5))
    torch.testing.assert_close(_sure(1.5).probabilities(out.logits), torch.stack([1 - p, p]))
    assert out.losses == {}
    alone = _sure(1.5, classes=1)
    assert alone(torch.randn(4, 3)).logits.tolist() == [1.5]
    torch.testing.assert_close(alone.probabilities(torch.tensor([1.5])), p[None])


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize(("logit", "label", "wanted"), [(50.0, 0, 11.5129), (-50.0, 1, 11.5129), (50.0, 1, 1e-5)])
def test_the_loss_is_clamped(classes: int, logit: float, label: int, wanted: float) -> None:
    """Without the clamp, the first two would be 50, or infinite in float32."""
    loss = _sure(logit, classes)(torch.randn(4, 3), label=torch.tensor(label)).losses["nll"]
    torch.testing.assert_close(loss, torch.tensor(wanted), rtol=2e-2, atol=0)


def test_without_a_label_the_loss_is_that_of_the_bag() -> None:
    head = _sure(0.3)
    assert head.total_loss(head(torch.randn(4, 3)), torch.tensor(2.5)) == 2.5


def test_more_classes_and_other_labels_are_refused() -> None:
    with pytest.raises(HeadError, match=r"cannot tell 3.*Choose abmil"):
        create_head("abmil_original", 3, 3)
    with pytest.raises(HeadError, match="a label is 2, but 2 classes"):
        _sure(0.0)(torch.randn(4, 3), label=torch.tensor(2))


def test_older_gated_checkpoints_and_those_of_other_widths() -> None:
    own = create_head("abmil_original", 6, 2, gated=True, hidden_dim=4).eval()
    names = {"attention_v": "attention_V.0", "attention_u": "attention_U.0", "classifier": "classifier.0"}
    for last in ("attention_w", "attention_weights"):
        renamed = names | {"attention_w": last}
        state = {f"{renamed[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in own.state_dict().items()}
        bag = torch.randn(5, 6)
        assert torch.equal(load_original("abmil_original", state)(bag).logits, own(bag).logits)
    state["classifier.0.weight"] = torch.zeros(2, 6)
    with pytest.raises(CheckpointError, match=r"classifier.0.weight: shape \(2, 6\), wanted \(1, 6\)"):
        load_original("abmil_original", state)
