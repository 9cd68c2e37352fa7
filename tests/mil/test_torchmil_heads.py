"""Models of torchmil as heads: the real ones where it is installed, and modules of the same shape for the rest."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrmil.errors import HeadError
from lrmil.mil import create_head
from lrmil.mil import torchmil_heads as interop
from lrmil.mil.registry import head_card

WIDTH = 12
COORDS = torch.tensor([[x * 512, y * 512] for x in range(6) for y in range(5)])
SMALL: dict[str, dict[str, Any]] = {
    "ABMIL": {"att_dim": 8},
    "CAMIL": {"nystrom_att_dim": 16, "n_landmarks": 4},
    "CLAM_SB": {"att_dim": 8, "k_sample": 3},
    "DSMIL": {"att_dim": 8},
    "DeepGraphSurv": {"att_dim": 8},
    "GTP": {"att_dim": 16, "n_clusters": 4, "n_heads": 2},
    "PatchGCN": {"att_dim": 8},
    "ProbSmoothABMIL": {"att_dim": 8, "n_samples_train": 4, "n_samples_test": 8},
    "SETMIL": {"att_dim": 16},
    "SmABMIL": {"att_dim": 8},
    "SmTransformerABMIL": {"pool_att_dim": 8, "transf_att_dim": 16},
    "SmoothABMIL": {"att_dim": 8},
    "TransMIL": {"att_dim": 16},
    "TransformerABMIL": {"pool_att_dim": 8, "transf_att_dim": 16},
    "TransformerProbSmoothABMIL": {"transf_att_dim": 16, "n_samples_train": 4, "n_samples_test": 8},
}
OWN_LOSSES = {"CLAM_SB", "DSMIL", "GTP", "ProbSmoothABMIL", "SmoothABMIL", "TransformerProbSmoothABMIL"}
NO_ATTENTION = {"GTP", "TransMIL"}


@pytest.fixture
def torchmil() -> ModuleType:
    return pytest.importorskip("torchmil.models")


def build(name: str, classes: int = 2, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return create_head(f"torchmil:{name}", WIDTH, classes, **{**SMALL[name], **options})


@pytest.fixture
def bag() -> Tensor:
    return torch.randn(len(COORDS), WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("torchmil")
def test_every_model_is_either_tried_here_or_refused_by_name() -> None:
    assert {name.removeprefix("torchmil:") for name in interop.names()} == set(SMALL)


@pytest.mark.usefixtures("torchmil")
@pytest.mark.parametrize("name", SMALL)
def test_a_model_answers_and_learns(name: str, bag: Tensor) -> None:
    head = build(name).train()
    label = torch.tensor(1)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    first = last = 0.0
    for epoch in range(12):
        out = head(bag, label=label, coords=COORDS)
        ce = F.cross_entropy(out.logits[None], label[None])
        optimizer.zero_grad()
        head.total_loss(out, ce).backward()
        optimizer.step()
        first, last = (float(ce.detach()) if epoch == 0 else first), float(ce.detach())
    assert last < first
    out = head.eval()(bag, coords=COORDS)
    assert out.logits.shape == (2,)
    assert out.logits[0] == 0
    assert torch.equal(out.logits, head(bag, coords=COORDS).logits), "one answer a slide"
    assert (out.attention is None) == (name in NO_ATTENTION)
    assert head.card.gives_attention == (name not in NO_ATTENTION)
    if out.attention is not None:
        assert out.attention.shape == (len(bag),)
        torch.testing.assert_close(out.attention.sum(), torch.tensor(1.0))
        torch.testing.assert_close(torch.softmax(out.attention_logits, 0), out.attention)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_logits_are_those_of_the_model(torchmil: ModuleType, name: str, bag: Tensor) -> None:
    """The same weights in torchmil's own class, asked torchmil's way."""
    head = build(name).eval()
    model = getattr(torchmil, name)(in_shape=(WIDTH,), **SMALL[name])
    model.load_state_dict(head.model.state_dict())
    cells = (COORDS // 512)[None]
    touching = (cells[0][:, None] - cells[0][None]).abs().amax(-1) <= 1
    adj = touching.float().fill_diagonal_(0)
    adj = (adj / torch.outer(adj.sum(1), adj.sum(1)).sqrt())[None].to_sparse()
    asked = model.predict.__code__.co_varnames
    more = {name: value for name, value in {"coords": cells, "adj": adj}.items() if name in asked}
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model.eval().predict(bag[None], **more, return_inst_pred=False)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(head(bag, coords=COORDS).logits[1].detach(), expected.reshape(()), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("torchmil")
@pytest.mark.parametrize("name", sorted(OWN_LOSSES))
def test_what_is_minimised_is_the_sum_of_torchmils_terms(name: str, bag: Tensor) -> None:
    head = build(name).train()
    label = torch.tensor(1)
    torch.manual_seed(5)
    out = head(bag, label=label, coords=COORDS)
    total = head.total_loss(out, F.cross_entropy(out.logits[None], label[None]))
    terms = {n: v for n, v in out.losses.items() if n != "counted_twice"}
    assert len(terms) > 1
    torch.testing.assert_close(total, sum(terms.values()), check_dtype=False)
    assert not head(bag, coords=COORDS).losses, "no label, no losses"
    for classes in (1, 7):
        with pytest.raises(HeadError, match=f"{name} has losses of its own .*{classes} outputs"):
            build(name, classes)


@pytest.mark.usefixtures("torchmil")
@pytest.mark.parametrize("name", sorted(set(SMALL) - OWN_LOSSES))
def test_one_output_and_many(name: str, bag: Tensor) -> None:
    assert build(name, 1)(bag, coords=COORDS).logits.shape == (1,)
    head = build(name, 7)
    out = head(bag, label=torch.tensor(6), coords=COORDS)
    assert out.logits.shape == (7,)
    assert len(out.logits.unique()) == 7
    assert not out.losses
    assert not torch.equal(build(name, 7, seed=1).state_dict()[_widest(head)], head.state_dict()[_widest(head)])


def _widest(head: nn.Module) -> str:
    return next(n for n, v in head.state_dict().items() if n.endswith("weight") and v.shape[0] == 7)


@pytest.mark.usefixtures("torchmil")
def test_cross_entropy_of_two_classes_is_torchmils_loss(bag: Tensor) -> None:
    head = build("ABMIL").train()
    out = head(bag, label=torch.tensor(0))
    assert not out.losses
    own = F.binary_cross_entropy_with_logits(out.logits[1], torch.tensor(0.0))
    torch.testing.assert_close(F.cross_entropy(out.logits[None], torch.tensor([0])), own)


@pytest.mark.usefixtures("torchmil")
def test_a_head_is_built_again_from_its_description(bag: Tensor) -> None:
    head = build("SETMIL", 3, set_n_layers=2).eval()
    described = head.describe()
    assert described == {
        "name": "torchmil:SETMIL",
        "in_dim": WIDTH,
        "num_classes": 3,
        "att_dim": 16,
        "set_n_layers": 2,
    }
    again = create_head(**described).eval()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(bag, coords=COORDS).logits, head(bag, coords=COORDS).logits)


@pytest.mark.usefixtures("torchmil")
def test_trying_a_model_draws_nothing_from_the_generator() -> None:
    build("ABMIL")
    after = torch.randn(3)
    torch.manual_seed(0)
    importlib.import_module("torchmil.models").ABMIL(in_shape=(WIDTH,), att_dim=8)
    assert torch.equal(torch.randn(3), after)


@pytest.mark.usefixtures("torchmil")
def test_setmil_sees_rows_and_columns_not_pixels(bag: Tensor) -> None:
    head = build("SETMIL").eval()
    expected = head(bag, coords=COORDS).logits
    assert torch.equal(head(bag, coords=COORDS + 70_000).logits, expected)
    assert torch.equal(head(bag, coords=COORDS * 4).logits, expected)
    assert not torch.equal(head(bag, coords=COORDS.flip(0)[torch.randperm(30)]).logits, expected)


@pytest.mark.usefixtures("torchmil")
def test_what_there_is_not_is_refused_by_name(bag: Tensor) -> None:
    for name, reason in (
        ("DTFDMIL", "use dtfd"),
        ("IIBMIL", "prototypes"),
        ("VAEABMIL", "must be built with feat_ext"),
        ("MILModelWrapper", "wraps models"),
        ("Nothing", "no model named 'Nothing'.*torchmil:ABMIL"),
    ):
        with pytest.raises(HeadError, match=reason):
            create_head(f"torchmil:{name}", WIDTH, 2)
    with pytest.raises(HeadError, match=r"no option 'gate'.*att_dim, att_act, gated"):
        create_head("torchmil:ABMIL", WIDTH, 2, gate=True)
    with pytest.raises(HeadError, match="cannot be built"):
        create_head("torchmil:TransMIL", WIDTH, 2, n_layers=1)
    with pytest.raises(HeadError, match=r"cannot be run on a small bag.*n_landmarks"):
        create_head("torchmil:CAMIL", WIDTH, 2)
    for name in ("SETMIL", "PatchGCN"):
        with pytest.raises(HeadError, match="no coords"):
            build(name)(bag)
    with pytest.raises(HeadError, match="no instances"):
        build("ABMIL")(bag[:0])


@pytest.mark.usefixtures("torchmil")
def test_cards_are_read_without_building() -> None:
    assert head_card("torchmil:ABMIL").gives_attention
    assert not head_card("torchmil:TransMIL").gives_attention
    assert head_card("abmil").name == "abmil"
    with pytest.raises(HeadError, match="no head named 'abmill'"):
        head_card("abmill")


def test_without_torchmil_the_way_to_get_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmil", None)
    monkeypatch.setitem(sys.modules, "torchmil.models", None)
    with pytest.raises(HeadError, match=r"needs torchmil.*pip install 'lrmil\[torchmil\]'"):
        create_head("torchmil:ABMIL", WIDTH, 2)
    assert interop.names() == ()


class _Fake(nn.Module):
    """Shaped like a model of torchmil."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.last = nn.Linear(in_dim, 1)

    def forward(self, X: Tensor) -> Tensor:
        return self.last(X.mean(1)).squeeze(-1)

    def compute_loss(self, Y: Tensor, X: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        answer = self(X)
        return answer, {"BCE": F.binary_cross_entropy_with_logits(answer, Y.float())}

    def predict(self, X: Tensor, return_inst_pred: bool = False) -> Tensor:
        return self(X)


class _Genes(_Fake):
    def forward(self, X: Tensor, genes: Tensor) -> Tensor:
        return super().forward(X)


class _Summed(_Fake):
    """Whatever its width, its classes cannot be told apart."""

    def forward(self, X: Tensor) -> Tensor:
        answer = self.last(X.mean(1))
        return answer.sum(1) if answer.shape[1] == 1 else answer.cumsum(1)[0]


class _Fickle(_Fake):
    calls = 0

    def forward(self, X: Tensor) -> Tensor:
        _Fickle.calls += 1
        return super().forward(X) + _Fickle.calls


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    models = ModuleType("torchmil.models")
    for kind in (_Fake, _Genes, _Summed, _Fickle):
        setattr(models, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "torchmil", ModuleType("torchmil"))
    monkeypatch.setitem(sys.modules, "torchmil.models", models)


@pytest.mark.usefixtures("fakes")
def test_models_of_other_versions_are_judged_by_what_they_do(bag: Tensor) -> None:
    assert create_head("torchmil:_Fake", WIDTH, 3)(bag).logits.shape == (3,)
    with pytest.raises(HeadError, match="needs genes of every bag"):
        create_head("torchmil:_Genes", WIDTH, 2)
    assert create_head("torchmil:_Summed", WIDTH, 2)(bag).logits.shape == (2,)
    with pytest.raises(HeadError, match="cannot be widened to 3 classes"):
        create_head("torchmil:_Summed", WIDTH, 3)
    with pytest.raises(HeadError, match="answers the same bag differently"):
        create_head("torchmil:_Fickle", WIDTH, 2)
