"""What heads are trained for: losses against slow ones written from the definitions, distances, scores, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import f1_score, log_loss, r2_score, roc_auc_score

from lrmil.distill import Stage2LossSettings, bag_distillation_loss
from lrmil.errors import ConfigError
from lrmil.mil import create_head
from lrmil.mil.readout import Readout, survival_curve
from lrmil.training.objectives import (
    Classification,
    Cox,
    Hazards,
    Objective,
    ObjectiveSettings,
    Regression,
    make_objective,
)
from lrmil.training.objectives.cox import cox_loss
from lrmil.training.objectives.hazards import hazard_divergence, hazards_loss
from lrmil.training.objectives.quantile_bins import bin_of, quantile_edges
from lrmil.training.objectives.survival import concordance, known_bins
from lrmil.training.slide_bags import SlideBag

LOSS = Stage2LossSettings()
# Twelve patients with equal times, among events as among censored ones.
TIME = np.array([5.0, 3, 8, 3, 12, 1, 8, 8, 20, 15, 2, 6])
EVENT = np.array([1.0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0])
RISK = np.array([0.3, 1.2, -0.5, 0.9, -1.1, 0.2, 0.0, 0.4, -0.8, -2.0, 1.5, 0.1])
SURVIVAL = np.stack([TIME, EVENT], axis=1)


def _bags(targets: Any) -> list[SlideBag]:
    return [SlideBag(f"s{i}", np.zeros((2, 3), np.float32), None, target=t) for i, t in enumerate(targets)]


def _slow_cox(risk: Any, time: Any, event: Any) -> float:
    terms = []
    for i in range(len(risk)):
        if event[i]:
            at_risk = [risk[j] for j in range(len(risk)) if time[j] >= time[i]]
            terms.append(-(risk[i] - math.log(sum(math.exp(r) for r in at_risk))))
    return sum(terms) / len(terms) if terms else 0.0


def _slow_hazards(logits: Any, interval: int, event: float) -> float:
    """The likelihood itself, as a product of probabilities."""
    likelihood = 1.0
    for j, y in enumerate(logits):
        hazard = 1 / (1 + math.exp(-y))
        if j < interval:
            likelihood *= 1 - hazard
        if j == interval:
            likelihood *= hazard if event else 1 - hazard
    return -math.log(likelihood)


def _slow_concordance(risk: Any, time: Any, event: Any) -> float:
    won = pairs = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            first = event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j]))
            if i != j and first:
                pairs += 1
                won += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    return won / pairs if pairs else math.nan


patients = st.lists(
    st.tuples(st.integers(-3, 3).map(float), st.integers(1, 5).map(float), st.booleans()), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=60)
@given(patients)
def test_cox_and_concordance_against_the_definition(rows: list[tuple[float, float, bool]]) -> None:
    risk, time, event = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    found = cox_loss(torch.tensor(risk), torch.tensor(time), torch.tensor(event))
    assert found.item() == pytest.approx(_slow_cox(risk, time, event), abs=1e-9)
    wanted = _slow_concordance(risk, time, event)
    assert concordance(risk, np.stack([time, event], axis=1)) == pytest.approx(wanted, nan_ok=True)


def test_cox_and_concordance_against_other_programs() -> None:
    """Sum over events by torchsurv 0.2.0 (ties: breslow; efron gives 10.0131); C by torchsurv and lifelines 0.30.3."""
    found = cox_loss(*map(torch.tensor, (RISK, TIME, EVENT)))
    assert found.item() * EVENT.sum() == pytest.approx(10.65355396270752, rel=1e-7)
    assert concordance(RISK, SURVIVAL) == pytest.approx(0.9318181818181818)


def test_cox_gradients_by_finite_differences_and_its_invariances() -> None:
    risk = torch.tensor(RISK, requires_grad=True)
    time, event = torch.tensor(TIME), torch.tensor(EVENT)
    assert torch.autograd.gradcheck(lambda r: cox_loss(r, time, event), (risk,))
    # The scale of time and the zero of the risk are free; the order of slides is, too.
    base = cox_loss(risk, time, event)
    torch.testing.assert_close(cox_loss(risk + 7, time, event), base)
    torch.testing.assert_close(cox_loss(risk, time * 30.4, event), base)
    order = torch.randperm(12)
    torch.testing.assert_close(cox_loss(risk[order], time[order], event[order]), base)
    # Risks that no exponential holds.
    huge = torch.tensor([500.0, -500.0, 0.0])
    assert cox_loss(huge, torch.tensor([3.0, 1.0, 2.0]), torch.ones(3)).item() == pytest.approx((1000 + 500 + 0) / 3)


def test_cox_of_one_slide_or_without_events_is_zero() -> None:
    alone = torch.tensor([2.5], requires_grad=True)
    for event in (0.0, 1.0):
        loss = cox_loss(alone, torch.tensor([4.0]), torch.tensor([event]))
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, alone)
        assert gradient == 0
    risk = torch.randn(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(cox_loss(risk, torch.arange(1.0, 6), torch.zeros(5)), risk)
    assert not gradient.any()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-6, 6), min_size=2, max_size=5), st.integers(0, 4), st.booleans())
def test_hazards_against_the_likelihood(logits: list[float], place: int, event: bool) -> None:
    place = min(place, len(logits) - 1)
    y = torch.tensor([logits, logits], dtype=torch.float64)
    found = hazards_loss(y, torch.tensor([place, place]), torch.tensor([int(event)] * 2))
    assert found.item() == pytest.approx(_slow_hazards(logits, place, event), abs=1e-9)


def test_the_hazards_likelihood_is_one_over_all_outcomes() -> None:
    logits = torch.randn(1, 4, dtype=torch.float64)
    events = [hazards_loss(logits, torch.tensor([j]), torch.tensor([1])).neg().exp() for j in range(4)]
    never = hazards_loss(logits, torch.tensor([3]), torch.tensor([0])).neg().exp()
    assert sum(events).item() + never.item() == pytest.approx(1)
    # What lies after the interval does not count, however sure.
    extreme = torch.tensor([[0.0, 0.0, 1e4, -1e4]])
    assert hazards_loss(extreme, torch.tensor([1]), torch.tensor([0])).item() == pytest.approx(2 * math.log(2))
    assert torch.isfinite(hazards_loss(torch.tensor([[1e4]]), torch.tensor([0]), torch.tensor([0])))


def test_hazards_gradients_by_finite_differences() -> None:
    y = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    interval, event = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 1, 1, 0, 0, 0])
    assert torch.autograd.gradcheck(lambda logits: hazards_loss(logits, interval, event), (y,))


def test_intervals_are_quantiles_of_the_events_times_alone() -> None:
    fitted = Hazards(4).fit(SURVIVAL)
    assert fitted.readout.edges == pytest.approx(np.quantile(TIME[EVENT == 1], [0.25, 0.5, 0.75]))
    assert fitted.outputs == fitted.label_classes == 4
    edges = fitted.readout.edges
    # A time on an edge lies above it; a censored one is unknown, except in the last interval.
    targets = np.array([[edges[0], 1], [edges[0] - 1e-9, 1], [edges[0], 0], [99, 0], [99, 1]])
    assert fitted.labels(targets) == [1, 0, None, 3, 3]
    assert fitted.tensor(targets).tolist() == [[1, 1], [0, 1], [1, 0], [3, 0], [3, 1]]
    assert known_bins(targets, edges) == fitted.labels(targets)
    # Equal times make an empty interval, which nobody ends in and all pass through.
    tied = Hazards(4).fit(np.array([[t, 1.0] for t in (5, 5, 5, 5, 5, 9)]))
    assert tied.outputs == 4
    assert tied.tensor(np.array([[4.0, 1], [5, 1], [9, 1]]))[:, 0].tolist() == [0, 3, 3]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-100, 100), min_size=5, max_size=40), st.integers(2, 5))
def test_bins(values: list[float], bins: int) -> None:
    edges = quantile_edges(np.array(values), bins)
    found = bin_of(np.array(values), edges)
    assert len(edges) == bins - 1
    assert list(edges) == sorted(edges)
    assert [sum(v >= e for e in edges) for v in values] == found.tolist()


def test_regression_is_standardised_by_the_training_split() -> None:
    train = np.array([10.0, 20, 30, 60])
    fitted = Regression().fit(train)
    z = fitted.tensor(np.array([30.0, 0.0]))
    np.testing.assert_allclose(z, [0.0, -30 / train.std()], rtol=1e-6)
    logits = torch.tensor([[0.5], [-1.0]])
    assert fitted.loss(logits, z).item() == pytest.approx(((logits[:, 0] - z) ** 2).mean().item())
    head = create_head("abmil", 3, 1)
    value = fitted.readout.read(head, logits).value
    np.testing.assert_allclose(value, [30 + 0.5 * train.std(), 30 - train.std()])
    # The unit does not matter to the loss.
    other = Regression().fit(train * 1000 + 5)
    torch.testing.assert_close(other.tensor(np.array([30.0, 0.0]) * 1000 + 5), z)
    assert fitted.labels(np.array([-5.0, 17.4, 17.5, 24.9, 25, 37.5, 1e9])) == [0, 0, 1, 1, 2, 3, 3]


def test_distances_are_zero_only_at_the_teacher_and_pass_it_no_gradient() -> None:
    torch.manual_seed(0)
    for objective, targets in (
        (Classification(3), np.array([0, 1, 2])),
        (Regression(), np.array([1.0, 2, 3])),
        (Cox(), SURVIVAL),
        (Hazards(), SURVIVAL),
    ):
        fitted = objective.fit(targets)
        teachers = torch.randn(5, fitted.outputs)
        distance = fitted.bag_distance(teachers, LOSS)
        teacher = teachers[0].clone().requires_grad_()
        student = (teachers[0] + 0.5 * torch.arange(fitted.outputs) + 0.25).requires_grad_()
        loss = distance(teacher, student)
        assert loss.item() > 0
        loss.backward()
        assert teacher.grad is None
        assert student.grad is not None
        assert bool(student.grad.any())
        assert distance(teacher, teachers[0]).item() == pytest.approx(0, abs=1e-7)


def test_each_distance_is_the_one_defined() -> None:
    teacher, student = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.0, 1.0, 1.5])
    warm = Stage2LossSettings(bag_temperature=2.0)
    kl = Classification(3).fit(np.array([0, 1, 2])).bag_distance(teacher[None], warm)
    assert kl(teacher, student) == bag_distillation_loss(student, teacher, temperature=2.0)

    squared = Regression().fit(np.array([100.0, 900.0])).bag_distance(torch.zeros(2, 1), LOSS)
    assert squared(torch.tensor([0.5]), torch.tensor([2.0])).item() == pytest.approx(1.5**2)

    spread = torch.tensor([[0.0], [3.0], [9.0]])
    cox = Cox().fit(SURVIVAL).bag_distance(spread, LOSS)
    m, s = spread.mean(), spread.std(correction=0)
    wanted = ((torch.tensor(2.0) - m) / s - (torch.tensor(-1.0) - m) / s) ** 2
    assert cox(torch.tensor([2.0]), torch.tensor([-1.0])).item() == pytest.approx(wanted.item(), rel=1e-5)
    constant = Cox().fit(SURVIVAL).bag_distance(torch.ones(3, 1), LOSS)
    assert constant(torch.tensor([1.0]), torch.tensor([3.0])).item() == pytest.approx(4)

    p, q = torch.sigmoid(teacher.double()), torch.sigmoid(student.double())
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert hazard_divergence(teacher, student).item() == pytest.approx(wanted.item(), rel=1e-5)
    fitted = Hazards(3).fit(SURVIVAL)
    softened = fitted.bag_distance(teacher[None], warm)(teacher, student)
    assert softened.item() == pytest.approx(4 * hazard_divergence(teacher / 2, student / 2).item())
    plain = Stage2LossSettings(bag_temperature=2.0, temperature_squared=False)
    assert fitted.bag_distance(teacher[None], plain)(teacher, student).item() == pytest.approx(softened.item() / 4)
    assert torch.isfinite(hazard_divergence(torch.tensor([200.0, -200.0]), torch.tensor([-200.0, 200.0])))


def test_a_temperature_where_there_is_none_is_refused() -> None:
    warm = Stage2LossSettings(bag_temperature=2.0)
    for objective, targets in ((Regression(), TIME), (Cox(), SURVIVAL)):
        with pytest.raises(ConfigError, match="bag_temperature is 2, but L_bag"):
            objective.fit(targets).bag_distance(torch.zeros(2, 1), warm)
        off = Stage2LossSettings(bag_temperature=2.0, lambda_bag=0)
        objective.fit(targets).bag_distance(torch.zeros(2, 1), off)


def test_readouts() -> None:
    head = create_head("abmil", 3, 2)
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    classes = Readout().read(head, logits)
    np.testing.assert_allclose(classes.probabilities, torch.softmax(logits.double(), 1))
    assert classes.value is None
    hazards = Readout(meaning="hazards", edges=(12.0,)).read(head, logits)
    h = 1 / (1 + np.exp(-logits.double().numpy()))
    s = np.cumprod(1 - h, axis=1)
    assert hazards.survival is not None
    np.testing.assert_allclose(hazards.survival, s[:, :1])
    np.testing.assert_allclose(hazards.value, -s.sum(axis=1))
    assert hazards.probabilities.shape == (2, 0)
    one = Readout(meaning="hazards", edges=(12.0,)).read(head, logits[0])
    assert float(one.value) == pytest.approx(-s[0].sum())
    assert one.survival is not None
    assert one.survival.shape == (1,)
    cox = Readout(meaning="cox").read(head, torch.tensor([1.25]))
    assert float(cox.value) == 1.25
    # Equal edges: one time, behind the empty interval.
    tied = Readout(meaning="hazards", edges=(5.0, 5.0, 9.0))
    curve = tied.read(head, torch.arange(4.0)).survival
    assert tied.times == (5.0, 9.0)
    np.testing.assert_allclose(curve, survival_curve(torch.arange(4.0).double())[1:3])
    # A higher hazard anywhere is a higher risk.
    higher = Readout(meaning="hazards", edges=(12.0,)).read(head, logits + torch.tensor([0.5, 0.0]))
    assert (higher.value > hazards.value).all()
    for readout in (Readout(), Readout(meaning="regression", mean=3, sd=2), Readout(meaning="hazards", edges=(1, 2))):
        assert Readout.model_validate_json(readout.model_dump_json()) == readout
    for wrong in ({"meaning": "hazards"}, {"edges": (1.0,)}, {"meaning": "hazards", "edges": (2.0, 1.0)}):
        with pytest.raises(ValueError, match="ascending order"):
            Readout(**wrong)  # type: ignore[arg-type]
    assert survival_curve(torch.tensor([60.0, 0.0])).min() > 0


def test_validation_of_classes_has_every_published_score() -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 3):
        logits = torch.tensor(rng.standard_normal((40, classes)), dtype=torch.float32)
        y = np.arange(40) % classes
        p = torch.softmax(logits.double(), 1).numpy()
        each = [roc_auc_score(y == c, p[:, c]) for c in range(classes)]
        accuracy = float((p.argmax(1) == y).mean())
        head, fitted = create_head("abmil", 3, classes), Classification(classes).fit(y)
        wanted = {
            "auc": np.mean(each),
            "auc+accuracy": (sum(each) + accuracy) / 2,
            "weighted_f1": f1_score(y, p.argmax(1), average="weighted"),
            "loss": np.mean(each),
        }
        for select_by, score in wanted.items():
            found = fitted.validation(head, logits, y, select_by)  # type: ignore[arg-type]
            assert found.name == ("auc" if select_by == "loss" else select_by)
            assert found.score == pytest.approx(score)
            assert found.auc == pytest.approx(np.mean(each))
            assert found.loss == pytest.approx(log_loss(y, p), rel=1e-5)
            assert found.details["accuracy"] == accuracy
        missing = fitted.validation(head, logits[y != 1], y[y != 1], "auc+accuracy")
        assert math.isnan(missing.score)
        assert "class is missing" in missing.undefined


def test_validation_of_a_number_and_of_survival() -> None:
    head = create_head("abmil", 3, 1)
    fitted = Regression().fit(np.array([0.0, 10, 20]))
    logits, targets = torch.tensor([[0.5], [-0.25], [1.0]]), np.array([12.0, 5, 30])
    found = fitted.validation(head, logits, targets, "weighted_f1")
    value = 10 + fitted.sd * logits[:, 0].double().numpy()
    assert found.name == "r2"
    assert found.score == pytest.approx(r2_score(targets, value))
    assert found.details["rmse"] == pytest.approx(np.sqrt(((value - targets) ** 2).mean()))
    assert found.loss == pytest.approx(F.mse_loss(logits[:, 0], fitted.tensor(targets)).item(), rel=1e-5)
    assert math.isnan(fitted.validation(head, logits[:1], targets[:1], "auc").score)

    cox = Cox().fit(SURVIVAL).validation(head, torch.tensor(RISK)[:, None], SURVIVAL, "auc")
    assert (cox.name, cox.score) == ("c_index", pytest.approx(0.9318181818181818))
    assert cox.loss == pytest.approx(_slow_cox(RISK, TIME, EVENT))
    many = torch.tensor(norm.rvs(size=(12, 4), random_state=1))
    fitted_hazards = Hazards().fit(SURVIVAL)
    found = fitted_hazards.validation(head, many, SURVIVAL, "auc")
    risk = fitted_hazards.readout.read(head, many).value
    assert found.score == pytest.approx(_slow_concordance(risk, TIME, EVENT))
    assert found.loss == pytest.approx(
        np.mean([_slow_hazards(y, int(b), e) for y, b, e in zip(many, bin_of(TIME, fitted_hazards.edges), EVENT)])  # noqa: B905
    )


@pytest.mark.parametrize(
    ("objective", "targets", "message"),
    [
        (Regression(), [1.0, None], "training slide s1 has target None; wanted a finite number"),
        (Regression(), [1.0, math.nan], "slide s1 has target nan"),
        (Regression(), [1.0, np.array([1.0, 2.0])], r"slide s1 has target \[1.0, 2.0\]"),
        (Cox(), [(3.0, 1), 2.0], r"slide s1 has target 2.0; wanted \(time, event\)"),
        (Cox(), [(3.0, 1), (0.0, 1)], r"slide s1 has target \[0.0, 1.0\]; wanted \(time, event\) with a positive time"),
        (Hazards(), [(3.0, 1), (5.0, 2)], r"slide s1 has target \[5.0, 2.0\]"),
        (Hazards(), [(math.inf, 1), (5.0, 1)], "slide s0 has target"),
    ],
)
def test_impossible_targets_are_refused_by_slide(objective: Objective, targets: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective.targets(_bags(targets), "training")


def test_targets_that_cannot_be_learned_from_are_refused() -> None:
    with pytest.raises(ConfigError, match="all 3 training slides have the target 4"):
        Regression().fit(np.array([4.0, 4, 4]))
    with pytest.raises(ConfigError, match="2 events, too few for 4 intervals"):
        Hazards(4).fit(np.array([[1.0, 1], [2, 1], [3, 0]]))
    with pytest.raises(ConfigError, match="0 events of 2 training slides put no two of them in order"):
        Cox().fit(np.array([[1.0, 0], [2, 0]]))
    with pytest.raises(ConfigError, match="no two validation slides"):
        Cox().fit(SURVIVAL).check_validation(np.array([[1.0, 0], [2, 1]]))
    Hazards().fit(SURVIVAL).check_validation(np.array([[1.0, 0], [2, 1]]))
    Cox().fit(SURVIVAL).check_validation(np.array([[1.0, 1], [2, 0]]))


def test_objectives_by_kind_of_task() -> None:
    chosen = ObjectiveSettings(survival="cox", cox_bags=40, label_bins=5, intervals=6)
    assert make_objective("classification", 3) == Classification(3)
    assert make_objective("regression", settings=chosen) == Regression(5)
    assert make_objective("survival") == Hazards(4)
    assert make_objective("survival", settings=chosen) == Cox(40, 5)
    assert make_objective("survival", settings=ObjectiveSettings(intervals=6)).outputs == 6
    with pytest.raises(ConfigError, match="needs some, not None"):
        make_objective("classification")
    for objective in (Classification(3), Regression(5), Cox(40, 5), Hazards(6)):
        targets = np.array([0, 1, 2]) if objective.name == "classification" else TIME
        fitted = objective.fit(SURVIVAL if objective.name in ("cox", "hazards") else targets)
        assert (objective.outputs, objective.label_classes) == (fitted.outputs, fitted.label_classes)
        assert fitted.readout.meaning == objective.name
