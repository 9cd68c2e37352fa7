"""CLAM against its program, and its instance loss against a slow reference in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.errors import CheckpointError, HeadError
from lrmil.mil import MILHead, create_head, load_original
from lrmil.mil.clam import CLAMMultiBranch
from lrmil.mil.smooth_top1_svm import smooth_top1_svm

HEADS = ("clam_sb", "clam_mb")


def _bag(count: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def _head(name: str, classes: int = 3, seed: int = 0, **options: Any) -> MILHead:
    torch.manual_seed(seed)
    return create_head(name, 6, classes, **{"embed_dim": 7, "attention_dim": 5, **options})


class Slow:
    """CLAM in eval mode, one instance and one class at a time, in double precision."""

    def __init__(self, head: MILHead, bag: torch.Tensor) -> None:
        self.w = {k: v.double().numpy() for k, v in head.state_dict().items()}
        self.classes, self.multi = head.num_classes, isinstance(head, CLAMMultiBranch)
        self.h, scores = [], []
        for x in bag.double().numpy():
            h = np.maximum(self._linear("embed", x), 0)
            u = np.tanh(self._linear("attention_v", h))
            if "attention_u.weight" in self.w:
                u = u / (1 + np.exp(-self._linear("attention_u", h)))
            self.h.append(h)
            scores.append(self._linear("attention_w", u))
        self.scores = np.array(scores)
        self.attention = np.exp(self.scores) / np.exp(self.scores).sum(axis=0)
        pooled = [sum(a * h for a, h in zip(column, self.h, strict=True)) for column in self.attention.T]
        self.pooled = np.array(pooled)
        if self.multi:
            self.logits = np.array([self._linear(f"classifiers.{c}", pooled[c])[0] for c in range(self.classes)])
        else:
            self.logits = self._linear("classifiers", pooled[0])

    def _linear(self, name: str, x: Any) -> Any:
        return self.w[f"{name}.weight"] @ x + self.w[f"{name}.bias"]

    def instance_loss(self, label: int, kind: str, *, subtyping: bool, k: int) -> float:
        total = 0.0
        for c in range(self.classes):
            order = np.argsort(self.attention[:, c if self.multi else 0])
            k = min(k, len(order))
            if c == label:
                rows = [(n, 1) for n in order[-k:]] + [(n, 0) for n in order[:k]]
            elif subtyping:
                rows = [(n, 0) for n in order[-k:]]
            else:
                continue
            losses = []
            for n, target in rows:
                s = self._linear(f"instance_classifiers.{c}", self.h[n])
                lead = s[1 - target] - s[target] + (kind == "svm")
                soft = math.log1p(math.exp(lead))
                losses.append(max(0.0, lead) if kind == "svm" and abs(s[0] - s[1]) >= math.log(1000) else soft)
            total += sum(losses) / len(losses)
        return total / self.classes if subtyping else total


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(HEADS),
    count=st.integers(1, 25),
    classes=st.integers(2, 4),
    gated=st.booleans(),
    kind=st.sampled_from(["svm", "ce"]),
    subtyping=st.booleans(),
    k=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_it_follows_its_equations(
    name: str, count: int, classes: int, gated: bool, kind: str, subtyping: bool, k: int, seed: int
) -> None:
    head = _head(name, classes, seed, gated=gated, instance_loss=kind, subtyping=subtyping, k_sample=k).eval()
    bag, label = _bag(count, seed=seed), seed % classes
    slow, out = Slow(head, bag), head(bag, label=torch.tensor(label))

    def close(actual: torch.Tensor | None, wanted: Any) -> None:
        assert actual is not None
        np.testing.assert_allclose(actual.detach().numpy(), wanted, rtol=2e-4, atol=2e-5)

    close(out.logits, slow.logits)
    counts = int(out.logits.argmax()) if name == "clam_mb" else 0
    close(out.attention_logits, slow.scores[:, counts])
    close(out.attention, slow.attention[:, counts])
    close(out.bag_feature, slow.pooled if name == "clam_mb" else slow.pooled[0])
    if name == "clam_mb":
        close(out.class_attention_logits, slow.scores)
    else:
        assert out.class_attention_logits is None
    wanted = slow.instance_loss(label, kind, subtyping=subtyping, k=k)
    close(out.losses["instance"], 0.3 * wanted)
    close(head.total_loss(out, torch.tensor(2.0)), 0.7 * 2.0 + 0.3 * wanted)


def test_multi_branch_shows_the_attention_of_the_predicted_class() -> None:
    head = _head("clam_mb", 4).eval()
    for seed in range(6):
        out = head(_bag(9, seed=seed), label=torch.tensor(0))
        assert out.class_attention_logits is not None
        assert torch.equal(out.attention_logits, out.class_attention_logits[:, out.logits.argmax()])


@pytest.mark.parametrize("name", ["clam_sb_D768_C2", "clam_sb_nogate_D512_C2", "clam_mb_D768_C2"])
def test_golden(golden: Callable[[str], Any], name: str) -> None:
    file = golden(name)
    method = name[:7]
    state = {k: torch.from_numpy(v) for k, v in file.under("param/").items()}
    seen = set()

    def expect(key: str, actual: Any) -> None:
        file.expect(key, actual)
        seen.add(key)

    for kind in ("svm", "ce"):
        for subtyping in (False, True):
            head = load_original(method, state, instance_loss=kind, subtyping=subtyping)
            assert head.describe()["gated"] == ("nogate" not in name)
            assert head.describe()["size"] == "small"
            for case in ("N37", "N200"):
                bag, label = (torch.from_numpy(file[f"in/{case}/{part}"]) for part in ("bag", "label"))
                out = head(bag, label=label)
                branches = out.attention_logits[:, None] if method == "clam_sb" else out.class_attention_logits
                ce = F.cross_entropy(out.logits[None], label)
                expect(f"out/{case}/logits", out.logits[None])
                expect(f"out/{case}/Y_prob", head.probabilities(out.logits)[None])
                expect(f"out/{case}/Y_hat", out.logits.argmax()[None, None])
                expect(f"out/{case}/A_raw", branches.T)
                expect(f"out/{case}/A", torch.softmax(branches, dim=0).T)
                expect(f"out/{case}/M", out.bag_feature.reshape(-1, 512))
                expect(f"loss/{case}/bag_ce", ce)
                which = f"{kind}_subtyping{int(subtyping)}"
                expect(f"loss/{case}/instance_{which}", out.losses["instance"] / (1 - head.bag_loss_weight))
                expect(f"loss/{case}/total_0.7bag+0.3inst_{which}", head.total_loss(out, ce))
                _, targets, predictions = head.judge_instances(torch.relu(head.embed(bag)), branches, int(label))
                expect(f"out/{case}/inst_labels_subtyping{int(subtyping)}", targets)
                expect(f"out/{case}/inst_preds_subtyping{int(subtyping)}", predictions)
    assert seen == {k for k in file.arrays if k.startswith(("out/", "loss/"))}


@pytest.mark.parametrize("name", HEADS)
def test_the_defaults_are_the_published_sizes(name: str) -> None:
    n = 1 if name == "clam_sb" else 3
    bag = {"classifiers.weight": (3, 512)} if n == 1 else {f"classifiers.{c}.weight": (1, 512) for c in range(3)}
    instances = {f"instance_classifiers.{c}.weight": (2, 512) for c in range(3)}

    def shapes(**options: Any) -> dict[str, tuple[int, ...]]:
        state = create_head(name, 768, 3, **options).state_dict()
        return {k: tuple(v.shape) for k, v in state.items() if k.endswith("weight")}

    small = {"embed.weight": (512, 768), "attention_w.weight": (n, 256)} | bag | instances
    assert shapes() == small | {"attention_v.weight": (256, 512), "attention_u.weight": (256, 512)}
    assert shapes(gated=False, size="big")["attention_v.weight"] == (384, 512)
    assert "attention_u.weight" not in shapes(gated=False)


@pytest.mark.parametrize("name", HEADS)
def test_attention_dropout_is_on_or_off_and_has_its_own_rate(name: str) -> None:
    for rate, attention in ((0.6, 0.25), (0.25, 0.25), (0.0, 0.0)):
        head: Any = _head(name, dropout=rate)
        assert (head.embed_dropout.p, head.attention_dropout.p) == (rate, attention)
    without = _head(name, dropout=0.0)
    bag = _bag(10)
    assert torch.equal(without.train()(bag).logits, without.eval()(bag).logits)
    with_dropout = _head(name)
    assert not torch.equal(with_dropout.train()(bag).logits, with_dropout(bag).logits)
    assert torch.equal(with_dropout.eval()(bag).logits, with_dropout(bag).logits)


def test_gated_attention_drops_both_factors() -> None:
    """Dropping the product once would zero a quarter of it; dropping both factors zeroes 1 - 0.75^2."""
    torch.manual_seed(0)
    head = create_head("clam_sb", 6, 2).train()
    hidden = head(_bag(400)).hidden
    assert float((hidden == 0).float().mean()) == pytest.approx(1 - 0.75**2, abs=0.01)


@pytest.mark.parametrize("name", HEADS)
def test_the_label_changes_the_loss_only(name: str) -> None:
    head = _head(name).eval()
    bag = _bag(20)
    without = head(bag)
    assert without.losses == {}
    for label in range(3):
        out = head(bag, label=torch.tensor(label))
        assert torch.equal(out.logits, without.logits)
        assert torch.equal(out.attention, without.attention)
    for wrong in (-1, 3):
        with pytest.raises(HeadError, match=f"a label is {wrong}, but 3 classes"):
            head(bag, label=torch.tensor(wrong))


@pytest.mark.parametrize("name", HEADS)
def test_without_the_instance_loss_the_bag_counts_fully(name: str) -> None:
    head = _head(name, instance_loss="none")
    out = head(_bag(4), label=torch.tensor(1))
    assert out.losses == {}
    assert head.total_loss(out, torch.tensor(2.0)) == 2.0
    half = _head(name, bag_weight=0.5).eval()
    plain = _head(name).eval()
    losses = [h(_bag(4), label=torch.tensor(1)).losses["instance"] for h in (half, plain)]
    torch.testing.assert_close(losses[0] / 0.5, losses[1] / 0.3)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("subtyping", [False, True])
def test_small_bags_train(name: str, count: int, subtyping: bool) -> None:
    """k_sample is 8: more than there are instances."""
    head = _head(name, subtyping=subtyping).train()
    out = head(_bag(count), label=torch.tensor(1))
    head.total_loss(out, F.cross_entropy(out.logits[None], torch.tensor([1]))).backward()
    gradients = {k: p.grad for k, p in head.named_parameters()}
    assert all(torch.isfinite(g).all() for g in gradients.values() if g is not None)
    judged = {k for k, g in gradients.items() if k.startswith("instance") and g is not None and bool(g.any())}
    wanted = range(3) if subtyping else (1,)
    assert judged == {f"instance_classifiers.{c}.{part}" for c in wanted for part in ("weight", "bias")}


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_those_of_finite_differences(name: str, subtyping: bool) -> None:
    head = _head(name, subtyping=subtyping, k_sample=2).double().eval()

    def loss(bag: torch.Tensor) -> torch.Tensor:
        out = head(bag, label=torch.tensor(1))
        return head.total_loss(out, F.cross_entropy(out.logits[None], torch.tensor([1])))

    assert torch.autograd.gradcheck(loss, _bag(5).double().requires_grad_())


@pytest.mark.parametrize("name", HEADS)
def test_extreme_attention_still_ranks_instances(name: str) -> None:
    """All but one share underflow to 0, and ranking by the shares would draw among them by chance."""
    head: Any = _head(name, 2, dropout=0.0, k_sample=2, instance_loss="ce").eval()
    branches = torch.tensor([[0.0], [900.0], [600.0], [300.0], [-300.0]]).repeat(1, 2)
    embedded = torch.zeros(5, 7)
    embedded[:, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    with torch.no_grad():
        classifier = head.instance_classifiers[1]
        classifier.weight.zero_()
        classifier.bias.zero_()
        classifier.weight[1, 0] = 1.0
    loss, targets, _ = head.judge_instances(embedded, branches, 1)
    assert targets.tolist() == [1, 1, 0, 0]
    rows = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(-2.0)), math.log1p(math.exp(4.0)), math.log(2.0)]
    assert float(loss.detach()) == pytest.approx(sum(rows) / 4, rel=1e-5)


def _original(head: MILHead, layer: int, last: int) -> dict[str, torch.Tensor]:
    """The head's weights under the program's names, attention at `layer`, ungated output at `last`."""
    at = f"attention_net.{layer}"
    gated = "attention_u.weight" in head.state_dict()
    names = {
        "embed": "attention_net.0",
        "attention_v": f"{at}.attention_a.0" if gated else f"{at}.module.0",
        "attention_u": f"{at}.attention_b.0",
        "attention_w": f"{at}.attention_c" if gated else f"{at}.module.{last}",
    }
    state = {}
    for key, value in head.state_dict().items():
        layer_name, part = key.rsplit(".", 1)
        state[f"{names.get(layer_name, layer_name)}.{part}"] = value
    return state


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("gated", "layer", "last", "dropout"),
    [(True, 3, 0, 0.25), (True, 2, 0, 0.0), (False, 3, 3, 0.25), (False, 3, 2, 0.0), (False, 2, 2, 0.0)],
)
@pytest.mark.parametrize("svm", [False, True])
def test_checkpoints_of_all_versions(name: str, gated: bool, layer: int, last: int, dropout: float, svm: bool) -> None:
    own = _head(name, gated=gated).eval()
    state = {f"module.{k}": v for k, v in _original(own, layer, last).items()}
    if svm:
        state["module.instance_loss_fn.labels"] = torch.tensor([0, 1])
    head = load_original(name, state)
    described = own.describe() | {"dropout": dropout, "instance_loss": "svm" if svm else "ce"}
    assert head.describe() == described
    bag = _bag(5)
    assert torch.equal(head(bag).logits, own(bag).logits)


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    single, multi = _original(_head("clam_sb"), 3, 3), _original(_head("clam_mb"), 3, 3)
    with pytest.raises(CheckpointError, match="not a checkpoint of 'clam_sb'"):
        load_original("clam_sb", multi)
    with pytest.raises(CheckpointError, match="not a checkpoint of 'clam_mb'"):
        load_original("clam_mb", single)
    single.pop("instance_classifiers.1.bias")
    single["attention_net.3.attention_c.weight"] = torch.zeros(3, 5)
    with pytest.raises(CheckpointError) as caught:
        load_original("clam_sb", single)
    assert "instance_classifiers.1.bias: missing" in str(caught.value)
    assert "attention_net.3.attention_c.weight: shape (3, 5), wanted (1, 5)" in str(caught.value)


def test_big_checkpoints_are_recognised() -> None:
    own = create_head("clam_sb", 6, 2, size="big")
    assert load_original("clam_sb", _original(own, 3, 3)).describe()["size"] == "big"


@pytest.mark.parametrize("name", ["clam_sb", "clam_mb"])
def test_instance_classes_may_differ_from_one_output(name: str) -> None:
    """A number has one output; its quantile bins are classes of the instance loss, all ranked by the one branch."""
    torch.manual_seed(0)
    head = create_head(name, 5, 1, instance_classes=3, subtyping=True, dropout=0.0, k_sample=2).eval()
    bag = torch.randn(9, 5)
    out = head(bag, label=torch.tensor(2))
    assert out.logits.shape == (1,)
    assert len(head.instance_classifiers) == 3
    embedded = torch.relu(head.embed(bag))
    top = out.attention_logits.topk(2).indices
    bottom = out.attention_logits.topk(2, largest=False).indices
    negative = torch.zeros(2, dtype=torch.int64)
    wanted = sum(smooth_top1_svm(head.instance_classifiers[c](embedded[top]), negative) for c in (0, 1))
    both = head.instance_classifiers[2](embedded[torch.cat([top, bottom])])
    wanted = (wanted + smooth_top1_svm(both, torch.tensor([1, 1, 0, 0]))) / 3
    torch.testing.assert_close(out.losses["instance"], 0.3 * wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(HeadError, match="3 classes are numbered"):
        head(bag, label=torch.tensor(3))


def test_branches_that_cannot_rank_the_instance_classes_are_refused() -> None:
    with pytest.raises(HeadError, match="2 attention branches cannot rank"):
        create_head("clam_mb", 5, 2, instance_classes=3)
    assert create_head("clam_mb", 5, 4, instance_classes=4).instance_classes == 4
