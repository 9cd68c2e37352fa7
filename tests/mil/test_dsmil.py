"""DSMIL against its program, and against a slow reference in double precision."""

from __future__ import annotations

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
from lrmil.mil.readout import Readout


def _bag(count: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def _head(classes: int = 3, seed: int = 0, **options: Any) -> MILHead:
    torch.manual_seed(seed)
    return create_head("dsmil", 6, classes, **{"init": "torch", **options})


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _softmax(x: Any) -> Any:
    return np.exp(x) / np.exp(x).sum()


class Slow:
    """DSMIL in eval mode, one instance and one class at a time, in double precision."""

    def __init__(self, head: MILHead, bag: torch.Tensor) -> None:
        self.w = {k: v.double().numpy() for k, v in head.state_dict().items()}
        rows = bag.double().numpy()
        queries = [self._query(h) for h in rows]
        values = [self._value(h, relu=head.describe()["value_relu"]) for h in rows]
        self.scores = np.array([self._linear("instance_scores", h) for h in rows])
        self.largest = self.scores.max(axis=0)
        outputs = self.scores.shape[1]
        columns, pooled = [], []
        for c in range(outputs):
            critical = queries[int(np.argmax(self.scores[:, c]))]
            column = np.array([np.dot(q, critical) / np.sqrt(128) for q in queries])
            columns.append(column)
            pooled.append(sum(a * v for a, v in zip(_softmax(column), values, strict=True)))
        self.attention_logits, self.pooled = np.array(columns).T, np.array(pooled)
        kernel, bias = self.w["bag_scores.weight"], self.w["bag_scores.bias"]
        self.bag = np.array([sum(kernel[o, c] @ pooled[c] for c in range(outputs)) + bias[o] for o in range(outputs)])

    def _linear(self, name: str, x: Any) -> Any:
        return self.w[f"{name}.weight"] @ x + self.w[f"{name}.bias"]

    def _query(self, h: Any) -> Any:
        if "query.weight" in self.w:
            return self._linear("query", h)
        return np.tanh(self._linear("query.2", np.maximum(self._linear("query.0", h), 0)))

    def _value(self, h: Any, *, relu: bool) -> Any:
        if "value.1.weight" not in self.w:
            return h
        projected = self._linear("value.1", h)
        return np.maximum(projected, 0) if relu else projected


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 15),
    classes=st.integers(1, 4),
    loss=st.sampled_from(["ce", "bce"]),
    query=st.sampled_from(["linear", "nonlinear"]),
    passing_v=st.booleans(),
    value_relu=st.booleans(),
    average=st.booleans(),
    seed=st.integers(0, 999),
)
def test_it_follows_its_equations(
    count: int, classes: int, loss: str, query: str, passing_v: bool, value_relu: bool, average: bool, seed: int
) -> None:
    options: dict[str, Any] = {"loss": loss, "query": query, "passing_v": passing_v, "value_relu": value_relu}
    head = _head(classes, seed, **options, average=average).eval()
    bag = _bag(count, seed=seed)
    label = seed % (classes if loss == "ce" else max(classes, 2))
    slow, out = Slow(head, bag), head(bag, label=torch.tensor(label))

    def close(actual: torch.Tensor | None, wanted: Any) -> None:
        assert actual is not None
        np.testing.assert_allclose(actual.detach().numpy(), wanted, rtol=2e-4, atol=2e-5)

    probability = {"ce": _softmax, "bce": _sigmoid}[loss]
    wanted = probability(slow.bag)
    if average:
        wanted = (wanted + probability(slow.largest)) / 2
    else:
        close(out.logits, slow.bag)
    close(head.probabilities(out.logits), wanted)
    close(out.bag_feature, slow.pooled)
    counts = int(out.logits.argmax())
    close(out.attention_logits, slow.attention_logits[:, counts])
    close(out.attention, _softmax(slow.attention_logits[:, counts]))
    if classes > 1:
        close(out.class_attention_logits, slow.attention_logits)

    target = np.array([float(label)]) if classes == 1 else np.eye(classes)[label]

    def one(x: Any) -> float:
        if loss == "ce":
            return float(-np.log(_softmax(x)[label]))
        p = _sigmoid(x)
        return float(-(target * np.log(p) + (1 - target) * np.log(1 - p)).mean())

    # The joined probabilities are for prediction only: the loss is that of the two streams.
    given_loss = torch.tensor(one(slow.bag))
    close(head.total_loss(out, given_loss), 0.5 * one(slow.bag) + 0.5 * one(slow.largest))


@pytest.mark.parametrize("name", ["dsmil_D512_C1_binary", "dsmil_D768_C2"])
def test_golden(golden: Callable[[str], Any], name: str) -> None:
    file = golden(name)
    state = {k: torch.from_numpy(v) for k, v in file.under("param/").items()}
    head, averaging = load_original("dsmil", state), load_original("dsmil", state, average=True)
    binary = "binary" in name
    assert (head.num_classes, head.describe()["one_output"], head.describe()["loss"]) == (2, binary, "bce")
    first = 1 if binary else 0  # of the two logits of one output, the first is 0
    seen = set()

    def expect(key: str, actual: Any) -> None:
        file.expect(key, actual)
        seen.add(key)

    for case in ("N37", "N200"):
        bag = torch.from_numpy(file[f"in/{case}/bag"])
        multihot = torch.from_numpy(file[f"in/{case}/label_multihot"])[0]
        label = multihot[0].long() if binary else multihot.argmax()
        out = head(bag, label=label)
        scores = head.instance_scores(bag)
        columns = out.attention_logits[:, None] if binary else out.class_attention_logits
        expect(f"out/{case}/instance_logits", scores)
        expect(f"out/{case}/max_logits", scores.amax(dim=0))
        expect(f"out/{case}/argmax", scores.argmax(dim=0))
        expect(f"out/{case}/bag_logits", out.logits[None, first:])
        expect(f"out/{case}/A", torch.softmax(columns, dim=0))
        expect(f"out/{case}/B", out.bag_feature[None])
        expect(f"out/{case}/score_bag", head.probabilities(out.logits)[None, first:])
        expect(f"out/{case}/score_average_sum", 2 * averaging.probabilities(averaging(bag).logits)[None, first:])
        expect(f"loss/{case}/bag_bce", out.losses["bag"] / 0.5)
        expect(f"loss/{case}/max_bce", out.losses["max"] / 0.5)
        expect(f"loss/{case}/total", head.total_loss(out, torch.tensor(1e6)))
    assert seen == {k for k in file.arrays if k.startswith(("out/", "loss/"))}


def test_every_class_sees_the_rows_of_all_classes() -> None:
    """A convolution by groups, or a linear layer a class, would see only its own."""
    head: Any = _head(3)
    assert head.bag_scores.weight.shape == (3, 3, 6)
    bag = _bag(8)
    before = head.eval()(bag).logits
    with torch.no_grad():
        head.bag_scores.weight[0, 2] += 1.0
    after = head(bag)
    torch.testing.assert_close(after.logits[0] - before[0], after.bag_feature[2].sum())
    assert torch.equal(after.logits[1:], before[1:])


def test_bags_of_several_classes_use_the_critical_instance_of_each() -> None:
    head: Any = _head(2, query="linear").eval()
    with torch.no_grad():
        head.instance_scores.weight.zero_()
        head.instance_scores.weight[0, 0] = head.instance_scores.weight[1, 1] = 1.0
    bag = torch.zeros(3, 6)
    bag[0, 0], bag[2, 1] = 5.0, 5.0
    query = bag @ head.query.weight.T + head.query.bias
    wanted = torch.stack([query @ query[0], query @ query[2]], dim=1) / 128**0.5
    torch.testing.assert_close(head(bag).class_attention_logits, wanted)


def test_probabilities_are_sigmoids_only_where_the_loss_says_so() -> None:
    logits = torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64)
    assert torch.equal(_head(loss="bce").probabilities(logits), torch.sigmoid(logits))
    assert torch.equal(_head(loss="ce").probabilities(logits), torch.softmax(logits, dim=0))
    one: Any = _head(2, loss="bce", one_output=True)
    assert one.bag_scores.weight.shape == (1, 1, 6)
    out = one(_bag(5))
    assert out.logits[0] == 0.0
    p = torch.sigmoid(out.logits[1])
    torch.testing.assert_close(one.probabilities(out.logits), torch.stack([1 - p, p]))
    assert out.attention_logits.shape == (5,)
    assert out.class_attention_logits is None


def test_sigmoids_are_divided_by_their_sum_where_probabilities_must_sum_to_1() -> None:
    logits = torch.tensor([[0.3, 2.0, -1.0], [-900.0, -901.0, -902.0]], dtype=torch.float64)
    sigmoids = torch.sigmoid(logits[0])
    read = Readout().read(_head(loss="bce"), logits).probabilities
    np.testing.assert_allclose(read[0], (sigmoids / sigmoids.sum()).numpy())
    # All next to 0: the quotients are still there.
    np.testing.assert_allclose(read[1], np.exp([0, -1, -2]) / np.exp([0, -1, -2]).sum())
    assert torch.equal(torch.from_numpy(Readout().read(_head(), logits).probabilities), torch.softmax(logits, dim=1))
    one = _head(2, loss="bce", one_output=True)
    assert torch.equal(one.class_shares(logits[:, :2]), one.probabilities(logits[:, :2]))


def test_one_output_equals_cross_entropy_of_its_two_logits() -> None:
    head = _head(2, loss="bce", one_output=True)
    for label in (0, 1):
        out = head(_bag(7), label=torch.tensor(label))
        ce = F.cross_entropy(out.logits[None], torch.tensor([label]))
        torch.testing.assert_close(out.losses["bag"], 0.5 * ce)


def test_averaging_does_not_saturate() -> None:
    """The plain way, the logit of the mean of two sigmoids, is infinite here in float32."""
    head: Any = _head(2, loss="bce", average=True).eval()
    with torch.no_grad():
        for layer in (head.instance_scores, head.bag_scores):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([60.0, -60.0]))
    torch.testing.assert_close(head(_bag(3)).logits, torch.tensor([60.0, -60.0]))


def test_averaging_is_for_prediction() -> None:
    head, plain = _head(average=True), _head()
    bag = _bag(5)
    assert torch.equal(head.train()(bag).logits, plain.train()(bag).logits)
    assert not torch.equal(head.eval()(bag).logits, plain.eval()(bag).logits)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_label_and_loss(loss: str) -> None:
    head = _head(loss=loss).eval()
    bag = _bag(9)
    without = head(bag)
    assert without.losses == {}
    assert head.total_loss(without, torch.tensor(2.0)) == 2.0
    for label in range(3):
        assert torch.equal(head(bag, label=torch.tensor(label)).logits, without.logits)
    for wrong in (-1, 3):
        with pytest.raises(HeadError, match=f"a label is {wrong}, but 3 classes"):
            head(bag, label=torch.tensor(wrong))


def test_gradients_reach_all_weights_also_from_one_instance() -> None:
    """Attention of one instance is 1 whatever its query, so only there the query learns nothing."""
    for count in (1, 2, 30):
        head = _head(passing_v=True, dropout_v=0.2).train()
        out = head(_bag(count), label=torch.tensor(2))
        head.total_loss(out, F.cross_entropy(out.logits[None], torch.tensor([2]))).backward()
        for name, weight in head.named_parameters():
            assert weight.grad is not None
            assert torch.isfinite(weight.grad).all(), name
            assert bool(weight.grad.any()) == (count > 1 or not name.startswith("query")), name


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_gradients_are_those_of_finite_differences(loss: str) -> None:
    head = _head(loss=loss, passing_v=True).double().eval()

    def total(bag: torch.Tensor) -> torch.Tensor:
        out = head(bag, label=torch.tensor(1))
        return head.total_loss(out, F.cross_entropy(out.logits[None], torch.tensor([1])))

    assert torch.autograd.gradcheck(total, _bag(5).double().requires_grad_())


def test_first_weights() -> None:
    torch.manual_seed(0)
    head: Any = create_head("dsmil", 32, 3, passing_v=True)
    for matrix in (head.instance_scores.weight, head.value[1].weight, head.bag_scores.weight.flatten(1)):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5, rtol=0)
    assert not any(p.any() for name, p in head.named_parameters() if name.endswith("bias"))
    plain: Any = create_head("dsmil", 32, 3, init="torch")
    assert plain.instance_scores.bias.any()


@pytest.mark.parametrize(("classes", "loss"), [(3, "bce"), (1, "bce"), (2, "ce")])
def test_one_output_is_for_two_classes_by_bce(classes: int, loss: str) -> None:
    with pytest.raises(HeadError, match=f"not {classes} by {loss}"):
        _head(classes, loss=loss, one_output=True)


def _original(head: MILHead, *, images: bool) -> dict[str, torch.Tensor]:
    names = {
        "instance_scores": "i_classifier.fc" if images else "i_classifier.fc.0",
        "bag_scores": "b_classifier.fcc",
        "value.1": "b_classifier.v.1",
        "query": "b_classifier.q",
        "query.0": "b_classifier.q.0",
        "query.2": "b_classifier.q.2",
    }
    state = {}
    for key, value in head.state_dict().items():
        layer, part = key.rsplit(".", 1)
        state[f"{names[layer]}.{part}"] = value
    return state


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize(("query", "passing_v"), [("nonlinear", False), ("nonlinear", True), ("linear", False)])
def test_checkpoints_of_features(classes: int, query: str, passing_v: bool) -> None:
    own = _head(classes, loss="bce", query=query, passing_v=passing_v).eval()
    head = load_original("dsmil", _original(own, images=False))
    assert head.describe() == own.describe() | {"init": "orthogonal"}
    assert torch.equal(head(_bag(5)).logits, own(_bag(5)).logits)


def test_what_is_not_read_is_said() -> None:
    own = _head(2, loss="bce", query="linear", passing_v=True, value_relu=False).eval()
    state = _original(own, images=True)
    state |= {f"i_classifier.feature_extractor.{k}.weight": torch.zeros(2, 3, 3, 3) for k in ("conv1", "layer1")}
    with pytest.warns(UserWarning, match=r"feature extractor \(2 tensors.*give the head the 6 features.*value_relu"):
        head = load_original("dsmil", state, value_relu=False)
    assert torch.equal(head(_bag(5)).logits, own(_bag(5)).logits)


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    state = _original(_head(2), images=False)
    with pytest.raises(CheckpointError, match=r"b_classifier.fcc.weight: shape \(2, 3, 6\), wanted \(2, 2, 6\)"):
        load_original("dsmil", state | {"b_classifier.fcc.weight": torch.zeros(2, 3, 6)})
    with pytest.raises(CheckpointError, match=r"i_classifier\.other: unexpected"):
        load_original("dsmil", state | {"i_classifier.other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="not a checkpoint of 'clam_sb'"):
        load_original("clam_sb", state)
