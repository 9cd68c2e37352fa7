"""Steps of a head: slides that step together, what the teacher adds, clipping, shuffling, accumulation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lrmil.distill import Stage2LossSettings, region_scores, student_loss
from lrmil.mil import MILHead, create_head
from lrmil.mil.recipe import Recipe
from lrmil.training.objectives import Classification, Cox, FittedObjective, Hazards, Regression
from lrmil.training.slide_bags import ResidentBags, SlideBag
from lrmil.training.steps import HeadStep
from lrmil.training.teaching import Distil, TeacherSignal, distillation

D = 6
RECIPE = Recipe(1e-3)
CPU = torch.device("cpu")


def _bags(count: int) -> list[SlideBag]:
    rng = np.random.default_rng(7)
    return [
        SlideBag(
            f"s{i}",
            rng.standard_normal((int(rng.integers(5, 12)), D)).astype(np.float32),
            i % 2,
            target=np.array([float(rng.integers(1, 9)), float(i % 3 != 0)]),
        )
        for i in range(count)
    ]


def _signals(bags: list[SlideBag], outputs: int) -> dict[str, TeacherSignal]:
    rng = np.random.default_rng(1)
    return {
        b.slide_id: TeacherSignal(
            rng.standard_normal(outputs).astype(np.float32),
            rng.standard_normal(len(b.features)).astype(np.float32),
            np.arange(len(b.features)),
        )
        for b in bags
    }


def _head(name: str, outputs: int, **options: Any) -> MILHead:
    torch.manual_seed(3)
    return create_head(name, D, outputs, **options).train()


def _step(
    head: MILHead,
    bags: list[SlideBag],
    fitted: FittedObjective,
    targets: Any,
    *,
    recipe: Recipe = RECIPE,
    labels: Any = None,
    distil: Distil | None = None,
) -> HeadStep:
    labels = [None] * len(bags) if labels is None else [None if x is None else torch.tensor(x) for x in labels]
    return HeadStep(head, fitted, recipe, ResidentBags(bags, CPU), fitted.tensor(targets), labels, distil)


def _gradient(head: MILHead) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().clone() for p in head.parameters()])


SMALL = {
    "clam_sb": {"embed_dim": 8, "attention_dim": 4, "instance_classes": 4, "k_sample": 2, "dropout": 0.5},
    "dtfd": {"hidden_dim": 8, "attention_dim": 4, "groups": 3, "dropout": 0.5},
    "dsmil": {},
    "abmil": {},
}


@pytest.mark.parametrize("name", list(SMALL))
def test_slides_that_step_together_have_the_gradient_of_their_joint_loss(name: str) -> None:
    """Against the way that keeps all graphs, dropout and random splits included."""
    bags = _bags(9)
    targets = Cox().targets(bags, "training")
    fitted = Cox().fit(targets)
    labels = fitted.labels(targets) if name == "clam_sb" else [None] * len(bags)
    settings = Stage2LossSettings(lambda_ce=0.5, lambda_bag=0.25)
    signals = _signals(bags, 1)
    distil = distillation(bags, signals, settings, fitted, CPU)
    head = _head(name, 1, **SMALL[name])
    step = _step(head, bags, fitted, targets, labels=labels, distil=distil)
    rows = np.array([4, 0, 8, 2, 5, 1])
    torch.manual_seed(11)
    scalars = step(rows)
    after = torch.rand(3)
    two_pass = _gradient(head)

    head.zero_grad()
    torch.manual_seed(11)
    outputs = [
        head(torch.from_numpy(bags[i].features), label=None if labels[i] is None else torch.tensor(labels[i]))
        for i in rows
    ]
    assert torch.equal(torch.rand(3), after), "as many random numbers are drawn as in one pass"
    t = torch.tensor(targets)
    spread = np.std([s.logits for s in signals.values()])
    joint = fitted.loss(torch.stack([o.logits for o in outputs]), t[rows])
    total = torch.zeros(())
    for i, output in zip(rows, outputs, strict=True):
        losses = dict(output.losses)
        if name == "dtfd":
            every = torch.cat([o.streams["tier1"] for o in outputs])
            owner = torch.cat([t[[j]].expand(len(o.streams["tier1"]), 2) for j, o in zip(rows, outputs, strict=True)])
            losses["tier1"] = fitted.loss(every, owner)
        if name == "dsmil":
            losses["max"] = 0.5 * fitted.loss(torch.cat([o.streams["max"] for o in outputs]), t[rows])
        own = head.total_loss(replace(output, losses=losses), joint)
        signal = signals[bags[i].slide_id]
        teacher_logits = torch.tensor(signal.logits)
        scores = region_scores(torch.tensor(signal.attention_logits), torch.tensor(signal.region), len(signal.region))
        taught = student_loss(
            own,
            output.logits,
            output.attention_logits,
            output.instance_logits,
            teacher_logits,
            scores,
            settings,
            bag_distance=lambda a, b: ((a - b) / spread).square().sum(),
        )
        total = total + taught.total / len(rows)
    total.backward()
    torch.testing.assert_close(two_pass, _gradient(head), rtol=1e-4, atol=1e-6)
    assert bool(two_pass.any())
    torch.testing.assert_close(scalars["loss"], total.detach())
    torch.testing.assert_close(scalars["cox"], joint.detach())


def test_only_one_slide_keeps_a_graph_at_a_time() -> None:
    """The largest count of instances that autograd holds at once is that of one bag."""
    bags = _bags(8)
    targets = Cox().targets(bags, "training")
    fitted, head = Cox().fit(targets), _head("abmil", 1)
    alive = largest = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, largest
            self.tensor, self.rows = tensor, len(tensor) if tensor.ndim == 2 and tensor.shape[1] == 128 else 0
            alive += self.rows
            largest = max(largest, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.rows

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        _step(head, bags, fitted, targets)(np.arange(8))
    one = max(len(b.features) for b in bags)
    assert 0 < largest <= 2 * one < sum(len(b.features) for b in bags)


def test_the_teachers_terms_are_not_weighed_by_the_head() -> None:
    """CLAM weighs the loss of the bag by 0.7: that is not for L_bag, L_soft and L_hard."""
    bags = _bags(4)
    fitted = Classification(2).fit(np.array([0, 1]))
    settings = Stage2LossSettings(lambda_bag=2.0, lambda_soft=3.0, lambda_hard=0.5)
    distil = distillation(bags, _signals(bags, 2), settings, fitted, CPU)
    for name, weight in (("clam_sb", 0.7), ("dsmil", 0.0), ("abmil", 1.0)):
        options = {"dropout": 0.0} if name == "clam_sb" else {"loss": "bce"} if name == "dsmil" else {}
        head = _head(name, 2, **options)
        step = _step(head, bags, fitted, np.array([0, 1, 0, 1]), labels=[0, 1, 0, 1], distil=distil)
        found = step(np.array([1]))
        own = sum(found[k] for k in found.keys() - {"loss", "ce", "bag", "soft", "hard"})
        wanted = weight * found["ce"] + own + 2 * found["bag"] + 3 * found["soft"] + 0.5 * found["hard"]
        torch.testing.assert_close(found["loss"], wanted)


def test_several_slides_a_step_average_their_gradients() -> None:
    bags = _bags(5)
    for objective, targets in (
        (Classification(2), np.array([0, 1, 0, 1, 0])),
        (Regression(), np.array([1.0, 5, 2, 8, 3])),
        (Hazards(2), Hazards(2).targets(bags, "training")),
    ):
        fitted = objective.fit(targets)
        head = _head("abmil", fitted.outputs)
        step = _step(head, bags, fitted, targets)
        together = step(np.array([3, 0, 4]))
        found = _gradient(head)
        alone = []
        losses = []
        for i in (3, 0, 4):
            head.zero_grad()
            losses.append(step(np.array([i]))["loss"])
            alone.append(_gradient(head))
        torch.testing.assert_close(found, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together["loss"], torch.stack(losses).mean())


def test_gradients_are_clipped_module_by_module() -> None:
    bags = _bags(2)
    fitted = Classification(2).fit(np.array([0, 1]))
    head = _head("abmil", 2)
    targets = np.array([0, 1])
    _step(head, bags, fitted, targets)(np.array([0]))
    free = {name: torch.cat([p.grad.flatten() for p in m.parameters()]) for name, m in head.named_children()}
    norms = {name: g.norm().item() for name, g in free.items()}
    limit = sorted(norms.values())[1]  # one module below, one at, one above
    head.zero_grad()
    _step(head, bags, fitted, targets, recipe=replace(RECIPE, clip_norm=limit))(np.array([0]))
    for name, module in head.named_children():
        found = torch.cat([p.grad.flatten() for p in module.parameters()])
        assert found.norm().item() == pytest.approx(min(norms[name], limit), rel=1e-4)
        torch.testing.assert_close(found / found.norm(), free[name] / free[name].norm())


def test_shuffled_instances_are_still_matched_with_the_teacher() -> None:
    bags = [replace(b, coords=np.arange(2 * len(b.features)).reshape(-1, 2)) for b in _bags(3)]
    fitted = Classification(2).fit(np.array([0, 1]))
    distil = distillation(bags, _signals(bags, 2), Stage2LossSettings(hard_mode="hidden"), fitted, CPU)
    head = _head("abmil", 2, instance_classifier="hidden")
    found = {}
    seen: list[tuple[Tensor, Tensor]] = []
    head.register_forward_pre_hook(
        lambda module, given, named: seen.append((given[0], named["coords"])), with_kwargs=True
    )
    for shuffle in (False, True):
        head.zero_grad()
        recipe = replace(RECIPE, shuffle_instances=shuffle)
        scalars = _step(head, bags, fitted, np.array([0, 1, 0]), recipe=recipe, distil=distil)(np.array([1]))
        found[shuffle] = (_gradient(head), scalars)
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[True][1], found[False][1], rtol=1e-4, atol=1e-6)
    (bag, coords), (shuffled, shuffled_coords) = seen
    assert not torch.equal(bag, shuffled)
    order = shuffled_coords[:, 0] // 2
    assert torch.equal(bag[order], shuffled)
    assert torch.equal(coords[order], shuffled_coords)
