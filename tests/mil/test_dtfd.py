"""DTFD-MIL: the original's outputs, its two tiers' losses, and each way of getting them wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrmil.errors import CheckpointError, HeadError
from lrmil.mil import create_head, load_original
from lrmil.mil.dtfd import DTFD, join_splits

NAMES = {"AFS": "afs", "MaxS": "maxs", "MaxMinS": "maxmins"}
PARTS = ("classifier", "attention", "dim_reduction", "att_classifier")


def _head(in_dim: int = 6, num_classes: int = 2, **options: Any) -> DTFD:
    torch.manual_seed(0)
    head = create_head("dtfd", in_dim, num_classes, **({"hidden_dim": 8, "attention_dim": 5} | options)).eval()
    assert isinstance(head, DTFD)
    with torch.no_grad():  # far from the symmetric start, so that every difference shows
        for parameter in head.parameters():
            parameter.mul_(3)
    return head


def _bag(count: int, in_dim: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, in_dim, generator=torch.Generator().manual_seed(seed))


def _original(golden: Callable[[str], Any]) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    arrays = golden("dtfd_D768_C2")
    parts = {part: arrays.under(f"param/{part}/") for part in PARTS}
    return arrays, {part: {k: torch.from_numpy(v) for k, v in state.items()} for part, state in parts.items()}


def _loaded(state: Any, distillation: str = "afs") -> DTFD:
    head = load_original("dtfd", state, groups=4, total_instance=8, distillation=distillation)
    assert isinstance(head, DTFD)
    return head


def _split(arrays: Any, slide: str, name: str) -> list[Tensor]:
    order = torch.from_numpy(arrays[f"in/{slide}/{name}/chunk_concat"])
    return list(order.split(arrays[f"in/{slide}/{name}/chunk_sizes"].tolist()))


@pytest.mark.parametrize("slide", ["s37", "s200"])
@pytest.mark.parametrize("name", NAMES)
def test_both_tiers_are_the_originals(golden: Callable[[str], Any], slide: str, name: str) -> None:
    arrays, state = _original(golden)
    head = _loaded(state, distillation=NAMES[name])
    bag, label = torch.from_numpy(arrays[f"in/{slide}/bag"]), torch.tensor(int(arrays[f"in/{slide}/label"]))
    with torch.no_grad():
        m = head.reduction(bag)
        scores = head.attention(m)[0]
        tiers = head.two_tiers(m, scores, _split(arrays, slide, name))
    at, loss = f"out/{slide}/{name}/", f"loss/{slide}/{name}/"
    close = {"rtol": 1e-4, "atol": 1e-5}
    arrays.expect(at + "tier1_bagfeat", tiers.tier1_features, **close)
    arrays.expect(at + "tier1_logits", tiers.tier1_logits, **close)
    arrays.expect(loss + "tier1_ce_mean", head.tier1_loss(tiers, label), **close)
    arrays.expect(at + "distilled_feats_shape", tiers.handed_over.shape)
    arrays.expect(at + "distilled_feats_sum_over_rows", tiers.handed_over.sum(0), **close)
    arrays.expect(at + "distilled_feats_first_row", tiers.handed_over[0], **close)
    arrays.expect(at + "tier2_attention", tiers.tier2_attention[None], **close)
    arrays.expect(at + "tier2_logits", tiers.logits[None], **close)
    probability = head.probabilities(tiers.logits)
    arrays.expect(at + "tier2_prob", probability[None], **close)
    arrays.expect(loss + "tier2_ce", F.cross_entropy(tiers.logits, label), **close)
    # what the original prints as its test loss: the log-likelihood of probabilities taken for log-probabilities
    arrays.expect(loss + "tier2_nll_of_softmax(original test bug)", -probability[label], **close)


@pytest.mark.parametrize("slide", ["s37", "s200"])
def test_instances_are_scored_and_chosen_as_in_the_original(golden: Callable[[str], Any], slide: str) -> None:
    arrays, state = _original(golden)
    heads = {name: _loaded(state, distillation=name) for name in ("maxs", "maxmins", "mas")}
    head = heads["maxs"]
    with torch.no_grad():
        m = head.reduction(torch.from_numpy(arrays[f"in/{slide}/bag"]))
        out = head(torch.from_numpy(arrays[f"in/{slide}/bag"]))
        arrays.expect(f"out/{slide}/attention_raw", out.attention_logits[None], atol=1e-5)
        if slide == "s37":
            arrays.expect("out/s37/mid_feat", m, atol=1e-5)
        for i, rows in enumerate(_split(arrays, slide, "AFS")):
            at = f"out/{slide}/chunk{i}/"
            attention = torch.softmax(out.attention_logits[rows], 0)
            arrays.expect(at + "attn_softmax", attention)
            arrays.expect(at + "cam_prob", head.instance_probabilities(m[rows], attention))

            for key, name, which in (
                ("argmax_attention(MAS)", "mas", 0),
                ("argmax_lastclass(MaxS)", "maxs", 0),
                ("argmin_lastclass(MaxMinS)", "maxmins", -1),
            ):
                arrays.expect(at + key, heads[name].choose(m, attention, rows, 1)[which])


def _original_name(key: str) -> str:
    """Translate our key of a weight to the original's, with a slash behind the part."""
    part, rest = key.split(".", 1)
    if part == "tier2":
        where, rest = rest.split(".", 1)
        return f"att_classifier/{where}." + (f"fc.{rest}" if where == "classifier" else _attention_name(rest))
    if part == "classifier":
        return f"classifier/fc.{rest}"
    if part == "attention":
        return "attention/" + _attention_name(rest)
    if rest.startswith("blocks."):
        _, block, layer, _ = rest.split(".")
        return f"dim_reduction/resBlocks.{block}.block.{layer}.weight"
    return f"dim_reduction/{rest}"


def _attention_name(key: str) -> str:
    layer, part = key.split(".")
    return {"v": "attention_V.0", "u": "attention_U.0", "w": "attention_weights"}[layer] + f".{part}"


def test_every_weight_has_a_place(golden: Callable[[str], Any], tmp_path: Path) -> None:
    arrays, state = _original(golden)
    torch.save(state, tmp_path / "best_model.pth")
    with pytest.warns(UserWarning, match="assumed distillation='afs', total_instance=4"):
        head = load_original("dtfd", tmp_path / "best_model.pth", groups=4)
    assert head.describe() == {
        "name": "dtfd",
        "in_dim": 768,
        "num_classes": 2,
        "distillation": "afs",
        "groups": 4,
        "total_instance": 4,
        "instance_class": "last",
        "tier2_trains_tier1": False,
        "residual_layers": 0,
        "hidden_dim": 512,
        "attention_dim": 128,
        "dropout": 0.0,
        "random_splits": 1,
        "split_seed": 0,
    }
    for key, value in head.state_dict().items():
        arrays.expect(f"param/{_original_name(key)}", value, rtol=0, atol=0)
    assert len(head.state_dict()) == len(arrays.under("param/"))


def test_prefixes_inside_the_four_state_dicts_are_removed(golden: Callable[[str], Any]) -> None:
    arrays, state = _original(golden)
    wrapped = {part: {f"module.{k}": v for k, v in inner.items()} for part, inner in state.items()}
    bag = torch.from_numpy(arrays["in/s37/bag"])
    assert torch.equal(_loaded(wrapped)(bag).logits, _loaded(state)(bag).logits)


def test_residual_blocks_are_read_and_used() -> None:
    head = _head(residual_layers=2)
    state: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key, value in head.state_dict().items():
        part, name = _original_name(key).split("/")
        state[part][name] = value
    again = _loaded(state)
    assert again.describe()["residual_layers"] == 2
    bag = _bag(9)
    assert torch.equal(again(bag).logits, head(bag).logits)
    w = head.state_dict()
    x = torch.relu(bag @ w["reduction.fc1.weight"].T)
    for i in range(2):
        inner = torch.relu(x @ w[f"reduction.blocks.{i}.0.weight"].T)
        x = x + torch.relu(inner @ w[f"reduction.blocks.{i}.2.weight"].T)
    torch.testing.assert_close(head.reduction(bag), x)


def test_checkpoints_that_do_not_fit_are_refused(golden: Callable[[str], Any]) -> None:
    state = _original(golden)[1]
    with pytest.raises(CheckpointError, match=r"att_classifier\.classifier\.fc\.weight: missing"):
        load_original("dtfd", {part: state[part] for part in PARTS[:3]})
    with pytest.raises(CheckpointError, match="not a checkpoint of 'dtfd'"):
        load_original("dtfd", state["classifier"])
    with pytest.raises(CheckpointError, match=r"classifier\.extra: unexpected"):
        load_original("dtfd", state | {"classifier": state["classifier"] | {"extra": torch.zeros(1)}})


def test_two_tiers_by_the_formula() -> None:
    """Written out instance by instance, for three classes and all four ways of handing over."""
    w, bag = _head(num_classes=3).state_dict(), _bag(11)
    split = [torch.tensor([4, 0, 7, 2]), torch.tensor([10, 1, 9, 3]), torch.tensor([5, 8, 6])]
    m = torch.relu(bag @ w["reduction.fc1.weight"].T)

    def gated(prefix: str, row: Tensor) -> Tensor:
        v, u = (w[f"{prefix}.{k}.weight"] @ row + w[f"{prefix}.{k}.bias"] for k in "vu")
        return w[f"{prefix}.w.weight"][0] @ (torch.tanh(v) / (1 + torch.exp(-u))) + w[f"{prefix}.w.bias"][0]

    for distillation in ("afs", "maxs", "maxmins", "mas"):
        head = _head(num_classes=3, distillation=distillation, groups=3, total_instance=6, instance_class="last")
        handed, tier1 = [], []
        for rows in split:
            e = torch.stack([gated("attention", m[n]) for n in rows])
            a = torch.exp(e) / torch.exp(e).sum()
            feature = sum(a[i] * m[n] for i, n in enumerate(rows))
            tier1.append(w["classifier.weight"] @ feature + w["classifier.bias"])
            p = [float(torch.softmax(w["classifier.weight"] @ (a[i] * m[n]), 0)[2]) for i, n in enumerate(rows)]
            best = sorted(range(len(rows)), key=lambda i: -p[i])
            handed += {
                "afs": [feature],
                "maxs": [m[rows[i]] for i in best[:2]],
                "maxmins": [m[rows[i]] for i in best[:2] + best[-2:]],
                "mas": [m[rows[int(a.argmax())]]],
            }[distillation]
        rows2 = torch.stack(handed)
        b = torch.softmax(torch.stack([gated("tier2.attention", row) for row in rows2]), 0)
        wanted = w["tier2.classifier.weight"] @ (b @ rows2) + w["tier2.classifier.bias"]
        tiers = head.two_tiers(m, head(bag).attention_logits, split)
        torch.testing.assert_close(tiers.handed_over, rows2)
        torch.testing.assert_close(tiers.tier1_logits, torch.stack(tier1))
        torch.testing.assert_close(tiers.logits, wanted)
        label = torch.tensor(1)
        mean_ce = sum(-torch.log_softmax(row, 0)[1] for row in tier1) / 3
        torch.testing.assert_close(head.tier1_loss(tiers, label), mean_ce)


def test_attention_is_softmaxed_within_a_pseudo_bag() -> None:
    head, bag = _head(groups=2), _bag(8)
    m, scores = head.reduction(bag), head(bag).attention_logits
    split = [torch.arange(4), torch.arange(4, 8)]
    torch.testing.assert_close(head.two_tiers(m, scores, split).tier1_features[1], torch.softmax(scores[4:], 0) @ m[4:])
    out = head(bag)
    assert out.attention is not None
    torch.testing.assert_close(out.attention, torch.softmax(scores, 0))
    assert out.hidden is not None
    torch.testing.assert_close(head.attention.w(out.hidden).squeeze(1), scores)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), groups=st.integers(1, 9), splits=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_instance_is_in_one_pseudo_bag(count: int, groups: int, splits: int, seed: int) -> None:
    head = _head(groups=groups, random_splits=splits, split_seed=seed)
    made = head._splits(count)
    assert len(made) == splits
    for split in made:
        sizes = [len(rows) for rows in split]
        assert len(split) == min(groups, count)  # fewer instances than pseudo-bags: none is empty
        assert max(sizes) - min(sizes) <= 1
        assert sorted(torch.cat(split).tolist()) == list(range(count))


@pytest.mark.parametrize("distillation", ["afs", "maxs", "maxmins", "mas"])
@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_few_instances_and_a_small_total_still_hand_something_over(distillation: str, count: int) -> None:
    head = _head(distillation=distillation, groups=4, total_instance=3)  # 3 // 4 is 0
    m = head.reduction(_bag(count))
    split = head._splits(count)[0]
    tiers = head.two_tiers(m, head(_bag(count)).attention_logits, split)
    assert len(tiers.handed_over) == min(4, count) * (2 if distillation == "maxmins" else 1)
    head.train()
    out = head(_bag(count), label=torch.tensor(1))
    head.total_loss(out, F.cross_entropy(out.logits, torch.tensor(1))).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


def _gradients(head: DTFD, bag: Tensor, *, tier1: float, tier2: float) -> dict[str, Tensor]:
    torch.manual_seed(5)
    head.train().zero_grad()
    out = head(bag, label=torch.tensor(1))
    (tier1 * out.losses["tier1"] + tier2 * F.cross_entropy(out.logits, torch.tensor(1))).backward()
    # A softmax does not see the bias of its scores: leave that out.
    named = {k: p for k, p in head.named_parameters() if not k.endswith("w.bias")}
    return {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in named.items()}


@pytest.mark.parametrize("distillation", ["afs", "maxs", "maxmins", "mas"])
def test_each_tier_is_trained_by_its_own_loss(distillation: str) -> None:
    bag = _bag(20)
    own = _head(distillation=distillation)
    for name, gradient in _gradients(own, bag, tier1=0, tier2=1).items():
        assert bool(gradient.any()) == name.startswith("tier2."), name
    for name, gradient in _gradients(own, bag, tier1=1, tier2=0).items():
        assert bool(gradient.any()) != name.startswith("tier2."), name
    shared = _head(distillation=distillation, tier2_trains_tier1=True)
    assert bool(_gradients(shared, bag, tier1=0, tier2=1)["reduction.fc1.weight"].any())


def test_one_adam_does_what_two_do() -> None:
    """The original steps tier 1, then tier 2; with both losses computed first, one step does the same."""
    bag, label = _bag(20), torch.tensor(1)
    one, two = _head(), _head()
    adam = torch.optim.Adam(one.parameters(), lr=1e-2, weight_decay=1e-3)
    second = [p for n, p in two.named_parameters() if n.startswith("tier2.")]
    first = [p for n, p in two.named_parameters() if not n.startswith("tier2.")]
    adams = [torch.optim.Adam(p, lr=1e-2, weight_decay=1e-3) for p in (first, second)]
    for step in range(3):
        torch.manual_seed(step)
        adam.zero_grad()
        out = one.train()(bag, label=label)
        one.total_loss(out, F.cross_entropy(out.logits, label)).backward()
        adam.step()
        torch.manual_seed(step)
        out = two.train()(bag, label=label)
        losses = out.losses["tier1"], F.cross_entropy(out.logits, label)
        for optimiser, loss in zip(adams, losses, strict=True):
            optimiser.zero_grad()
            loss.backward(retain_graph=True)
        for optimiser in adams:
            optimiser.step()
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_total_loss_is_both_tiers_and_keeps_what_else_the_bags_loss_holds() -> None:
    head = _head().train()
    out = head(_bag(20), label=torch.tensor(1))
    torch.testing.assert_close(head.total_loss(out, torch.tensor(2.5)), out.losses["tier1"] + 2.5)
    with pytest.raises(HeadError, match="without a label, tier 1"):
        head.total_loss(head(_bag(20)), torch.tensor(2.5))


def test_training_draws_new_splits_and_prediction_does_not() -> None:
    head, bag = _head(), _bag(20)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert torch.equal(head(bag).logits, head(bag).logits)
    assert torch.equal(torch.random.get_rng_state(), before)  # and leaves the global generator alone
    assert not torch.equal(head(bag).logits, _head(split_seed=1)(bag).logits)
    head.train()
    torch.manual_seed(1)
    once, other = head(bag).logits, head(bag).logits
    assert not torch.equal(once, other)
    torch.manual_seed(1)
    assert torch.equal(head(bag).logits, once)


def test_several_splits_average_probabilities_not_logits() -> None:
    head, bag = _head(random_splits=5), _bag(20)
    m, scores = head.reduction(bag), head(bag).attention_logits
    logits = torch.stack([head.two_tiers(m, scores, split).logits for split in head._splits(20)])
    assert len({tuple(row.tolist()) for row in logits}) == 5
    mean = torch.softmax(logits, 1).mean(0)
    torch.testing.assert_close(head.probabilities(head(bag).logits), mean)
    assert not torch.allclose(torch.softmax(logits.mean(0), 0), mean, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(splits=st.integers(1, 6), classes=st.integers(1, 5), size=st.sampled_from([0.1, 5.0, 300.0]))
def test_joined_logits_hold_the_mean_probability(splits: int, classes: int, size: float) -> None:
    logits = size * torch.randn(splits, classes, generator=torch.Generator().manual_seed(splits)).double()
    joined = join_splits(logits)
    torch.testing.assert_close(torch.softmax(joined, 0), torch.softmax(logits, 1).mean(0))
    if classes == 1 or splits == 1:  # a single output is a plain mean; a single split stays as it is
        torch.testing.assert_close(joined, logits.mean(0))


def test_which_class_ranks() -> None:
    bag, label = _bag(30), torch.tensor(0)

    def handed(instance_class: str, *, classes: int, train: bool, label: Tensor | None) -> int:
        head = _head(num_classes=classes, distillation="maxs", instance_class=instance_class).train(train)
        logits = head.two_tiers(head.reduction(bag), head(bag).attention_logits, head._splits(30)[0]).tier1_logits
        return head._ranking_class(logits, label)

    predicted = handed("label", classes=3, train=False, label=None)
    assert handed("last", classes=3, train=True, label=label) == 2
    assert handed("label", classes=3, train=True, label=label) == 0
    assert handed("label", classes=3, train=False, label=torch.tensor((predicted + 1) % 3)) == predicted
    assert handed("auto", classes=3, train=True, label=label) == 0
    assert handed("auto", classes=2, train=True, label=label) == 1
    m, head = torch.randn(6, 8), _head(num_classes=3, distillation="maxs", groups=1, total_instance=1)
    even = torch.full((6,), 1 / 6)
    best = {int(head.choose(m, even, torch.arange(6), c)[0]) for c in range(3)}
    assert len(best) > 1  # the class makes a difference
    with pytest.raises(HeadError, match="a label is -1"):
        _head(num_classes=3, distillation="maxs").train()(bag, label=torch.tensor(-1))


@pytest.mark.parametrize("distillation", ["afs", "maxs", "maxmins", "mas"])
def test_the_label_does_not_change_a_prediction(distillation: str) -> None:
    head, bag = _head(num_classes=3, distillation=distillation), _bag(20)
    answers = [head(bag, label=label).logits for label in (None, torch.tensor(0), torch.tensor(2))]
    assert all(torch.equal(answers[0], other) for other in answers)


def test_ranking_ignores_the_bias_and_uses_attention() -> None:
    head = _head()
    m, attention = _bag(5, 8).abs(), torch.softmax(_bag(5, 1)[:, 0] * 3, 0)
    before = head.instance_probabilities(m, attention)
    with torch.no_grad():
        head.classifier.bias.add_(torch.tensor([5.0, -5.0]))
    assert torch.equal(head.instance_probabilities(m, attention), before)
    assert not torch.allclose(head.instance_probabilities(m, torch.full((5,), 0.2)), before, atol=1e-3)


@pytest.mark.parametrize("distillation", ["afs", "maxs", "maxmins", "mas"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_instances_are_found_wherever_they_are(distillation: str, value: float) -> None:
    for row in range(9):
        bag = _bag(9)
        bag[row, 2] = value
        with pytest.raises(HeadError, match=rf"1 of the 9 instances.*row {row}"):
            _head(distillation=distillation)(bag)


def test_one_output_cannot_rank() -> None:
    for distillation in ("maxs", "maxmins"):
        with pytest.raises(HeadError, match=rf"{distillation} ranks instances.*Choose afs or mas"):
            _head(num_classes=1, distillation=distillation)
    for distillation in ("afs", "mas"):
        head = _head(num_classes=1, distillation=distillation, random_splits=3)
        out = head.train()(_bag(9))
        tier1 = F.mse_loss(out.streams["tier1"], torch.full((4, 1), 0.5))
        out = replace(out, losses={"tier1": tier1})
        head.total_loss(out, F.mse_loss(out.logits, torch.tensor([0.5]))).backward()
        assert bool(head.reduction.fc1.weight.grad.any())  # type: ignore[union-attr]


def test_it_is_built_again_from_its_description() -> None:
    head = _head(distillation="maxmins", residual_layers=1, groups=3, random_splits=2)
    again = create_head(**json.loads(json.dumps(head.describe()))).eval()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(_bag(5)).logits, head(_bag(5)).logits)
