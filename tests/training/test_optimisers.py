"""Optimisers and schedules of recipes, against steps written out by hand."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lrmil.errors import TrainingError
from lrmil.mil import create_head, head_cards
from lrmil.mil.recipe import Recipe
from lrmil.training.optimisers import make_optimiser, make_scheduler


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def _loss(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return (model(x) ** 2).sum()


class _RAdamByHand:
    def __init__(self, lr: float, decay: float, betas: tuple[float, float]) -> None:
        self.lr, self.decay, self.betas, self.t = lr, decay, betas, 0
        self.m: list[Tensor] = []
        self.v: list[Tensor] = []

    def step(self, weights: list[Tensor], gradients: list[Tensor], decays: list[bool]) -> None:
        b1, b2 = self.betas
        self.t += 1
        self.m = self.m or [torch.zeros_like(w) for w in weights]
        self.v = self.v or [torch.zeros_like(w) for w in weights]
        longest = 2 / (1 - b2) - 1
        length = longest - 2 * self.t * b2**self.t / (1 - b2**self.t)
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            if decays[i]:
                w *= 1 - self.lr * self.decay
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
            mean = self.m[i] / (1 - b1**self.t)
            if length > 5:
                rectified = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
                w -= self.lr * rectified * mean / ((self.v[i].sqrt() + 1e-8) / math.sqrt(1 - b2**self.t))
            else:
                w -= self.lr * mean


def test_lookahead_radam_is_the_written_out_loop() -> None:
    recipe = Recipe(
        learning_rate=0.05, weight_decay=0.3, betas=(0.8, 0.9), optimiser="lookahead_radam", decay_matrices_only=True
    )
    model, by_hand = _model(), _model()
    optimiser = make_optimiser(recipe, model)
    weights = [p.detach() for p in by_hand.parameters()]  # share memory with the model
    decays = [w.ndim > 1 for w in weights]
    radam, slow = _RAdamByHand(0.05, 0.3, (0.8, 0.9)), None
    jumps = 0
    for step in range(1, 27):
        optimiser.zero_grad()
        _loss(model, step).backward()
        optimiser.step()
        gradients = torch.autograd.grad(_loss(by_hand, step), list(by_hand.parameters()))
        radam.step(weights, list(gradients), decays)
        if step % 6 == 0:
            if slow is None:
                slow = [w.clone() for w in weights]
            for s, w in zip(slow, weights, strict=True):
                s += 0.5 * (w - s)
                jumps += int(not torch.equal(s, w))
                w.copy_(s)
        for p, w in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-10)
    assert jumps == 3 * len(weights)  # at 12, 18 and 24


def test_adam_is_torchs_with_the_recipes_numbers() -> None:
    recipe = Recipe(learning_rate=0.02, weight_decay=0.1, betas=(0.5, 0.9))
    model, other = _model(), _model()
    optimiser = make_optimiser(recipe, model)
    theirs = torch.optim.Adam(other.parameters(), lr=0.02, weight_decay=0.1, betas=(0.5, 0.9))
    for step in range(5):
        for m, o in ((model, optimiser), (other, theirs)):
            o.zero_grad()
            _loss(m, step).backward()
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("optimiser", ["adam", "lookahead_radam"])
def test_biases_and_norms_do_not_decay_where_the_recipe_says_so(optimiser: str) -> None:
    model = _model()
    recipe = Recipe(learning_rate=0.1, weight_decay=0.5, decay_matrices_only=True, optimiser=optimiser)  # type: ignore[arg-type]
    before = copy.deepcopy(model.state_dict())

    def move(recipe: Recipe) -> dict[str, bool]:
        model.load_state_dict(before)
        nn.init.ones_(model[0].bias)
        start = copy.deepcopy(model.state_dict())
        made = make_optimiser(recipe, model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        made.step()
        return {k: not torch.equal(v, start[k]) for k, v in model.state_dict().items() if bool(start[k].any())}

    moved = move(recipe)
    assert moved == {k: k in ("0.weight", "2.weight") for k in moved}
    assert len(moved) >= 5
    assert all(move(replace(recipe, decay_matrices_only=False)).values())


def test_frozen_parameters_are_left_out() -> None:
    model = _model()
    model[0].requires_grad_(False)
    for spare in (False, True):
        made = make_optimiser(Recipe(learning_rate=0.1, decay_matrices_only=spare), model)
        assert {id(p) for g in made.param_groups for p in g["params"]} == {
            id(p) for p in model.parameters() if p.requires_grad
        }
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        make_optimiser(Recipe(learning_rate=0.1), model)


def _rates(recipe: Recipe, losses: list[float]) -> list[float]:
    """Learning rates of the epochs, one more than there are losses."""
    model = _model()
    optimiser = make_optimiser(recipe, model)
    after_epoch = make_scheduler(recipe, optimiser)
    rates = [optimiser.param_groups[0]["lr"]]
    for epoch, loss in enumerate(losses):
        _loss(model, epoch).backward()
        optimiser.step()
        after_epoch(loss)
        rates.append(optimiser.param_groups[-1]["lr"])
    return rates


@pytest.mark.parametrize("optimiser", ["adam", "lookahead_radam"])
def test_schedules(optimiser: str) -> None:
    recipe = Recipe(learning_rate=0.1, optimiser=optimiser)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _rates(recipe, [1.0] * 4) == [0.1] * 5
        cosine = replace(recipe, schedule="cosine", schedule_epochs=4, schedule_factor=0.1)
        wanted = [0.01 + 0.09 * (1 + math.cos(math.pi * t / 4)) / 2 for t in (0, 1, 2, 3, 4, 4, 4)]
        assert _rates(cosine, [1.0] * 6) == pytest.approx(wanted)  # and does not rise again
        step = replace(recipe, schedule="step", schedule_epochs=3, schedule_factor=0.2)
        assert _rates(step, [1.0] * 5) == pytest.approx([0.1] * 3 + [0.02] * 3)
        plateau = replace(recipe, schedule="plateau", schedule_epochs=2, schedule_factor=0.5)
        falling_then_flat = [1.0, 0.9, 0.9, 0.95, 0.9, 0.9]
        assert _rates(plateau, falling_then_flat) == pytest.approx([0.1] * 5 + [0.05] * 2)
    for kind in ("cosine", "step"):
        with pytest.raises(TrainingError, match=f"a {kind} schedule needs a length"):
            _rates(replace(recipe, schedule=kind), [])  # type: ignore[arg-type]


def test_a_stored_optimiser_continues_as_if_never_stopped() -> None:
    recipe = Recipe(learning_rate=0.05, weight_decay=0.1, optimiser="lookahead_radam", decay_matrices_only=True)
    model = _model()
    optimiser = make_optimiser(recipe, model)

    def run(model: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimiser.zero_grad()
            _loss(model, step).backward()
            optimiser.step()

    run(model, optimiser, range(9))
    again = _model()
    again.load_state_dict(model.state_dict())
    other = make_optimiser(recipe, again)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    run(model, optimiser, range(9, 20))
    run(again, other, range(9, 20))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "card", [c for c in head_cards() if c.recipe is not None and c.scales == "one"], ids=lambda card: card.name
)
def test_the_recipe_of_every_head_makes_a_step(card) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    head = create_head(card.name, 16, 2)
    before = copy.deepcopy(head.state_dict())
    optimiser = make_optimiser(card.recipe, head)
    after_epoch = make_scheduler(card.recipe, optimiser)
    out = head(torch.randn(20, 16), label=torch.tensor(1))
    head.total_loss(out, nn.functional.cross_entropy(out.logits, torch.tensor(1))).backward()
    optimiser.step()
    after_epoch(1.0)
    assert any(not torch.equal(v, before[k]) for k, v in head.state_dict().items())
    assert all(bool(torch.isfinite(v).all()) for v in head.state_dict().values())


def test_the_recipes_of_transmil_and_dtfd_are_those_published() -> None:
    recipes = {card.name: card.recipe for card in head_cards()}
    transmil, dtfd = recipes["transmil"], recipes["dtfd"]
    assert transmil is not None
    assert dtfd is not None
    made = make_optimiser(transmil, create_head("transmil", 16, 2, dim=16, heads=4, landmarks=4))
    decayed, spared = made.param_groups
    assert (decayed["lr"], decayed["weight_decay"], spared["weight_decay"]) == (2e-4, 1e-5, 0.0)
    assert (transmil.accumulate, transmil.patience, transmil.select_by, transmil.epochs) == (2, 10, "loss", 200)
    assert (dtfd.learning_rate, dtfd.weight_decay, dtfd.clip_norm, dtfd.epochs) == (1e-4, 1e-4, 5.0, 200)
    rates = _rates(dtfd, [1.0] * 101)
    assert rates[99] == 1e-4
    assert rates[100] == pytest.approx(2e-5)
    assert (dtfd.first_epoch, dtfd.select_by, dtfd.patience) == (160, "auc", None)
