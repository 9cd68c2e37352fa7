"""ZoomMIL: the original's numbers, its choices, its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrmil.errors import CheckpointError, HeadError
from lrmil.mil import RecordedSource, StoredScales, create_head, head_cards, load_original
from lrmil.mil import zoommil as module
from lrmil.mil.perturbed_topk import perturbed_topk
from lrmil.mil.scales import children_of
from lrmil.mil.zoommil import ZoomMIL

SCALES = ("low", "mid", "high")


def _slide(low: int = 20, r2: int = 4, r3: int = 16, width: int = 6, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {s: torch.randn(low * r, width, generator=g) for s, r in zip(SCALES, (1, r2, r3), strict=True)}


def _head(**options: Any) -> ZoomMIL:
    torch.manual_seed(2)
    head: ZoomMIL = create_head("zoommil", 6, 3, **options)
    return head


def test_it_matches_the_original(golden: Callable[[str], Any]) -> None:
    file = golden("zoommil_D768_C2")
    head = load_original("zoommil", {k: torch.tensor(v) for k, v in file.under("param/").items()})
    assert head.describe()["k"] == 12
    case = "N14_56_224"
    record = RecordedSource(StoredScales({s: torch.tensor(file[f"in/{case}/{s}"])[0] for s in SCALES}))
    label = torch.tensor(file[f"in/{case}/label"])
    out = head(record)
    record.check(out.selected)
    for scale in SCALES:
        file.expect(f"out/{case}/ga_{scale}_mag_logits", out.scale_attention_logits[scale][None, :, None], atol=1e-5)
    for scale in SCALES[:2]:
        file.expect(f"out/{case}/aux_ga_{scale}_mag_logits", out.selection_logits[scale][None, :, None], atol=1e-5)
    low_chosen, mid_chosen = out.selected["mid"][::4] // 4, out.selected["high"][::4] // 4
    file.expect(f"out/{case}/selected_low_index", low_chosen[None])
    places = torch.searchsorted(out.selected["mid"], mid_chosen)
    file.expect(f"out/{case}/selected_mid_index_within_zoomed", places[None])
    file.expect(f"out/{case}/M", out.bag_feature[None], atol=1e-5)
    file.expect(f"out/{case}/logits", out.logits[None])
    file.expect(f"out/{case}/Y_prob", head.probabilities(out.logits)[None])
    file.expect(f"out/{case}/Y_hat", out.logits.argmax()[None, None])
    file.expect(f"loss/{case}/ce", nn.functional.cross_entropy(out.logits[None], label))
    torch.testing.assert_close(out.scale_attention("high").sum(), torch.tensor(1.0))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_its_checkpoints_say_what_does_not_fit(prefix: str) -> None:
    state = {prefix + k: v for k, v in _as_original(_head(out_dim=8, hidden_dim=4)).items()}
    head = load_original("zoommil", state, k=3)
    assert {k: head.describe()[k] for k in ("in_dim", "num_classes", "out_dim", "hidden_dim", "k")} == {
        "in_dim": 6,
        "num_classes": 3,
        "out_dim": 8,
        "hidden_dim": 4,
        "k": 3,
    }
    state.pop(f"{prefix}aux_ga_mid_mag.attention_b.0.bias")
    state[f"{prefix}fc_high_mag.0.weight"] = torch.zeros(8, 7)
    with pytest.raises(CheckpointError, match=r"fc_high_mag.0.weight: shape \(8, 7\).*attention_b.0.bias: missing"):
        load_original("zoommil", state)


def _as_original(head: ZoomMIL) -> dict[str, Tensor]:
    from lrmil.mil.layouts.zoommil import ZOOMMIL

    return {old: head.state_dict()[new] for old, new in ZOOMMIL[0].names.items()}


def test_a_slide_with_fewer_patches_than_k_is_read_whole_at_low_and_mid() -> None:
    head, slide = _head(k=50).eval(), _slide(low=3)
    out = head(StoredScales(slide))
    assert len(out.selected["mid"]) == 12
    assert len(out.selected["high"]) == 48  # min(3 * 4, 50) mid patches of 4 each
    one = head(StoredScales(_slide(low=1)))
    assert {s: len(r) for s, r in one.selected.items()} == {"low": 1, "mid": 4, "high": 16}


@pytest.mark.parametrize(("r2", "r3"), [(4, 16), (4, 64), (1, 3)])
def test_what_is_read_is_the_children_of_the_best(r2: int, r3: int) -> None:
    head = _head(k=3).eval()
    out = head(StoredScales(_slide(20, r2, r3)))
    best = out.selection_logits["low"].topk(3).indices.sort().values
    assert torch.equal(out.selected["low"], torch.arange(20))
    assert torch.equal(out.selected["mid"], children_of(best, r2))
    again = out.selected["mid"][out.selection_logits["mid"].topk(3).indices.sort().values]
    assert torch.equal(out.selected["high"], children_of(again, r3 // r2))


def test_a_choice_between_tiny_probabilities_is_not_lost_to_underflow() -> None:
    head = _head(k=2).eval()
    with torch.no_grad():
        head.low.selection.w.weight.mul_(1e6)  # type: ignore[union-attr]
    out = head(StoredScales(_slide()))
    logits = out.selection_logits["low"]
    assert int((torch.softmax(logits, 0) == 0).sum()) >= 19
    assert torch.equal(out.selected["mid"][::4] // 4, logits.topk(2).indices.sort().values)


def test_training_mixes_children_as_the_kronecker_product_does(monkeypatch: pytest.MonkeyPatch) -> None:
    head, slide = _head(k=3, dropout=0.0, sigma=0.05, samples=9).train(), _slide()
    seen: dict[str, Tensor] = {}
    for scale in ("mid", "high"):
        layer = getattr(head, scale)
        layer.register_forward_pre_hook(lambda _, args, scale=scale: seen.__setitem__(scale, args[0]))
    choices: list[Tensor] = []
    choose = head._choose

    def spy(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, weights = choose(logits)
        assert weights is not None
        choices.append(torch.zeros(len(weights), len(logits)).index_copy(1, rows, weights))
        return rows, weights

    monkeypatch.setattr(head, "_choose", spy)
    record = RecordedSource(StoredScales(slide))
    out = head(record)
    record.check(out.selected)
    first, second = choices
    mid = torch.kron(first, torch.eye(4)) @ slide["mid"]
    high = torch.kron(second, torch.eye(4)) @ (torch.kron(first, torch.eye(16)) @ slide["high"])
    torch.testing.assert_close(seen["mid"], mid)
    torch.testing.assert_close(seen["high"], high)
    assert (first > 0).sum() > 3  # several samples disagreed, or nothing would have been mixed
    assert set(out.selected["mid"].tolist()) == set(children_of(first.any(0).nonzero()[:, 0], 4).tolist())


@pytest.mark.parametrize("jacobian", ["diagonal", "full"])
def test_the_loss_of_the_slide_trains_what_chooses(jacobian: str) -> None:
    head = _head(k=3, sigma=0.05, jacobian=jacobian).train()
    nn.functional.cross_entropy(head(StoredScales(_slide())).logits[None], torch.tensor([1])).backward()
    for name, parameter in head.named_parameters():
        # The choice does not change where all scores rise together: this bias has a gradient of rounding only.
        if name.endswith("selection.w.bias") or name.endswith("attention.w.bias"):
            continue
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_in_eval_mode_all_but_the_choice_has_the_gradient_of_finite_differences() -> None:
    head = _head(k=2, out_dim=5, hidden_dim=3).eval().double()
    slide = {s: f.double() for s, f in _slide(4).items()}

    class Double(StoredScales):
        def fetch(self, scale: str, rows: Tensor) -> Tensor:
            return slide[scale][rows]

    parameter = head.mid.embed[0].weight

    def loss() -> Tensor:
        return head(Double(slide)).logits.square().sum()

    loss().backward()
    for i, j in ((0, 0), (2, 3), (4, 5)):
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                parameter[i, j] += step
                values.append(float(loss()))
        with torch.no_grad():
            parameter[i, j] += 1e-6
        assert parameter.grad is not None
        assert float(parameter.grad[i, j]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9)


def test_dropout_is_on_the_embedding_and_on_both_gates() -> None:
    head = _head()
    rates = [m.p for m in head.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.25] * 8  # 3 embeddings, 5 attentions whose two gates share one module
    attention = head.low.attention
    calls = []
    attention.dropout.register_forward_hook(lambda *_: calls.append(1))
    attention(torch.randn(2, 512))
    assert len(calls) == 2


def test_missing_children_are_an_error_not_a_division() -> None:
    class Incomplete:
        counts = {"low": 3, "mid": 11, "high": 44}  # noqa: RUF012

        def fetch(self, scale: str, rows: Tensor) -> Tensor:
            return torch.zeros(len(rows), 6)

        def thumbnails(self) -> Tensor:
            raise AssertionError

    with pytest.raises(HeadError, match="scale 'mid' has 11 patches for 3 of 'low'"):
        _head()(Incomplete())


def test_label_does_not_change_the_answer_and_the_recipe_is_the_published_one() -> None:
    head, source = _head().eval(), StoredScales(_slide())
    assert torch.equal(head(source).logits, head(source, label=torch.tensor(2)).logits)
    recipe = next(card.recipe for card in head_cards() if card.name == "zoommil")
    assert recipe is not None
    assert (recipe.learning_rate, recipe.weight_decay, recipe.epochs) == (1e-4, 0.0, 100)
    assert (recipe.schedule, recipe.schedule_epochs, recipe.schedule_factor) == ("plateau", 5, 0.8)
    assert (recipe.select_by, recipe.balanced_sampler) == ("weighted_f1", True)


def test_a_slide_of_many_patches_trains_and_predicts() -> None:
    low = 50_000
    source = StoredScales(
        {s: torch.randn(n, 6).half() for s, n in (("low", low), ("mid", 4 * low), ("high", 16 * low))}
    )
    head = _head(out_dim=16, hidden_dim=8)
    out = head.train()(source)
    out.logits.sum().backward()
    assert len(out.selected["mid"]) <= 4 * 12 * 100
    with torch.inference_mode():
        out = head.eval()(source)
    assert {s: len(r) for s, r in out.selected.items()} == {"low": low, "mid": 48, "high": 48}


def test_noise_is_added_to_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(scores: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append(scores)
        assert options == {"sigma": 0.002, "samples": 100, "jacobian": "diagonal"}
        return perturbed_topk(scores, k, **options)

    monkeypatch.setattr(module, "perturbed_topk", spy)
    out = _head().train()(StoredScales(_slide()))
    for scores, scale in zip(seen, ("low", "mid"), strict=True):
        torch.testing.assert_close(scores, torch.softmax(out.selection_logits[scale], 0))
