"""LIPN: its network, its gate, its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrmil.mil import lipn as module
from lrmil.mil import load_original
from lrmil.mil.dmin import hard_gate, keep_rate
from lrmil.mil.lipn import LIPN, lipn_losses


def _thumbnails(count: int, side: int = 16) -> Tensor:
    g = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, side, side, 3), generator=g, dtype=torch.uint8)


def _lipn(classes: int = 2) -> LIPN:
    torch.manual_seed(0)
    return LIPN(classes)


@pytest.mark.parametrize("case", ["N37", "N200"])
def test_it_matches_the_original(golden: Callable[[str], Any], case: str) -> None:
    file = golden("hdmil_D768_C2")
    both = {k: torch.tensor(v) for part in ("param/", "param_lipn/") for k, v in file.under(part).items()}
    head = load_original("hdmil", both)
    scores = head.lipn(torch.tensor(file[f"in/{case}/lowres_uint8_NHWC"])[0])
    file.expect(f"out/{case}/lipn_raw_scores", scores[None], atol=1e-5)
    gate = hard_gate(scores)
    file.expect(f"out/{case}/lipn_discrete", gate[None])
    file.expect(f"out/{case}/lipn_mask_after_second_gate", hard_gate(gate)[None])
    mask = torch.tensor(file[f"out/{case}/eval_mask"])[0]
    file.expect(f"out/{case}/lipn_mask_rate", keep_rate(mask))
    file.expect(f"out/{case}/lipn_score_rate", keep_rate(gate))
    losses = lipn_losses(gate, mask)
    file.expect(f"loss/{case}/lipn_l1", losses["mask"])
    file.expect(f"loss/{case}/lipn_distill_total", sum(losses.values()))


def test_it_is_as_small_as_listed() -> None:
    lipn = _lipn(3)
    convs = [m for m in lipn.modules() if isinstance(m, nn.Conv2d)]
    found = [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.groups) for c in convs]
    assert found == [
        (3, 16, 3, 2, 1),
        (16, 16, 3, 2, 1),
        (16, 16, 1, 1, 1),
        (16, 48, 3, 2, 1),
        (48, 24, 1, 1, 1),
        (24, 24, 5, 1, 24),
        (24, 48, 1, 1, 1),
        (48, 48, 5, 2, 48),
        (48, 48, 1, 1, 1),
        (48, 48, 3, 1, 48),
        (48, 96, 1, 1, 1),
        (96, 96, 3, 2, 96),
        (96, 64, 1, 1, 1),
        (64, 64, 1, 1, 1),
    ]
    assert all(c.bias is None for c in convs)
    assert [type(m).__name__ for m in lipn.features[5][0]] == ["Conv2d", "BatchNorm2d"]  # type: ignore[arg-type]
    assert sum(isinstance(m, nn.ReLU) for m in lipn.modules()) == 10
    assert lipn(_thumbnails(4)).shape == (4, 3)


@pytest.mark.parametrize("side", [8, 16, 17, 64])
def test_thumbnails_of_any_size_are_centred_and_scored_one_by_one(side: int) -> None:
    lipn = _lipn().eval()
    thumbnails = _thumbnails(5, side)
    scores = lipn(thumbnails)
    torch.testing.assert_close(torch.cat([lipn(t[None]) for t in thumbnails]), scores)
    seen: list[Tensor] = []
    lipn.features[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    lipn(thumbnails)
    torch.testing.assert_close(seen[0], thumbnails.permute(0, 3, 1, 2) / 255 - 0.5)


def test_pieces_without_gradient_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lipn, thumbnails = _lipn().eval(), _thumbnails(11)
    whole = lipn(thumbnails)
    monkeypatch.setattr(module, "_CHUNK", 4)
    calls: list[int] = []
    lipn.features.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    with torch.no_grad():
        torch.testing.assert_close(lipn(thumbnails), whole)
    assert calls == [4, 4, 3]


def test_training_normalises_over_the_whole_slide_and_a_single_patch_by_the_running_statistics() -> None:
    lipn = _lipn()
    with torch.no_grad():
        lipn(_thumbnails(30))
    before = {k: v.clone() for k, v in lipn.state_dict().items()}
    one = lipn(_thumbnails(1))
    assert lipn.training
    assert all(m.training for m in lipn.modules())
    torch.testing.assert_close(one, lipn.eval()(_thumbnails(1)))
    assert all(torch.equal(before[k], v) for k, v in lipn.state_dict().items())
    lipn.train()(_thumbnails(2)).sum().backward()
    assert not torch.equal(before["last.1.running_mean"], lipn.state_dict()["last.1.running_mean"])


def test_the_gate_is_hard_without_noise_and_has_the_gradient_of_the_sigmoid() -> None:
    scores = torch.tensor([[-3.0, 0.0], [1e-3, 40.0]], requires_grad=True)
    gate = hard_gate(scores)
    assert gate.tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert torch.equal(hard_gate(gate), gate)
    gate.sum().backward()
    soft = torch.sigmoid(scores.detach())
    torch.testing.assert_close(scores.grad, soft * (1 - soft))


def test_the_loss_compares_masks_and_their_rates() -> None:
    mask = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    gate = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], requires_grad=True)
    losses = lipn_losses(gate, mask)
    assert float(losses["mask"].detach()) == pytest.approx(2 / 12)
    assert float(losses["keep_rate"].detach()) == pytest.approx((2 / 4 - 3 / 4) ** 2)
    losses["keep_rate"].backward()
    # Straight through the sum: 2 (rho - rho_m) / N for every class.
    torch.testing.assert_close(gate.grad, torch.full((4, 3), 2 * (-1 / 4) / 4))
    assert float(lipn_losses(gate, mask, "first_two")["keep_rate"].detach()) == 0.0


def test_it_learns_a_simple_rule() -> None:
    # White thumbnails are to be kept, black ones not.
    thumbnails = torch.zeros(16, 16, 16, 3, dtype=torch.uint8)
    thumbnails[::2] = 255
    mask = (torch.arange(16) % 2 == 0).float()[:, None].expand(16, 2)
    lipn = _lipn()
    optimiser = torch.optim.Adam(lipn.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = torch.stack(list(lipn_losses(hard_gate(lipn(thumbnails)), mask).values())).sum()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    # A gate is hard: a rounded last digit may still throw one thumbnail over its threshold for a step.
    assert np.median(losses[-20:]) == 0.0
