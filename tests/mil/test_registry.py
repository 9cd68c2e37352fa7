"""Heads by name."""

from __future__ import annotations

import pytest
import torch

from lrmil.errors import HeadError
from lrmil.mil import HeadCard, HeadOutput, MILHead, create_head, head_cards, register_head, registry


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_HEADS", dict(registry._HEADS))


@pytest.mark.parametrize("card", [c for c in head_cards() if c.scales == "one"], ids=lambda card: card.name)
@pytest.mark.parametrize("count", [1, 2, 300])
@pytest.mark.parametrize("classes", [2, 7])
def test_every_head_answers_bags_of_any_size(card: HeadCard, count: int, classes: int) -> None:
    if classes > 2 and card.name == "abmil_original":
        with pytest.raises(HeadError, match="one output"):
            create_head(card.name, 32, classes)
        return
    head = create_head(card.name, 32, classes).eval()
    out = head(torch.randn(count, 32), label=torch.tensor(1))
    assert out.logits.shape == (classes,)
    assert torch.isfinite(out.logits).all()
    torch.testing.assert_close(head.probabilities(out.logits).sum(), torch.tensor(1.0))
    assert (out.attention_logits is not None) == card.gives_attention
    if out.attention is not None:
        assert out.attention.shape == (count,)
        torch.testing.assert_close(out.attention.sum(), torch.tensor(1.0))
    if out.attention_logits is not None:
        torch.testing.assert_close(torch.softmax(out.attention_logits, 0), out.attention)
    assert card.citation
    assert card.licence_note


def test_another_head_joins_by_name(clean_registry: None) -> None:
    @register_head(HeadCard("first", "first instance", "nobody", "ours", gives_attention=False))
    class First(MILHead):
        def score(self, bag: torch.Tensor, *, label: object, coords: object) -> HeadOutput:
            return HeadOutput(bag[0, : self.num_classes])

    assert "first" in [card.name for card in head_cards()]
    head = create_head("first", 4, 2)
    assert head(torch.arange(8.0).reshape(2, 4)).logits.tolist() == [0.0, 1.0]
    assert head.describe() == {"name": "first", "in_dim": 4, "num_classes": 2}
    with pytest.raises(HeadError, match="two heads are named 'first'"):
        register_head(head.card)(First)


def test_unknown_names_and_options_are_refused_with_the_known_ones() -> None:
    with pytest.raises(HeadError, match=r"no head named 'abmill'.*abmil"):
        create_head("abmill", 4, 2)
    with pytest.raises(HeadError, match=r"'abmil': gate: .*Its options are: gated, hidden_dim, instance_classifier"):
        create_head("abmil", 4, 2, gate=True)
    with pytest.raises(HeadError, match="hidden_dim"):
        create_head("abmil", 4, 2, hidden_dim=0)
    with pytest.raises(HeadError, match="at least 1"):
        create_head("abmil", 4, 0)
