"""The training loop: which epoch is kept, when it stops, what it reports, and what it refuses."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrmil.mil.recipe import Recipe, SelectBy
from lrmil.training.loop import (
    FitResult,
    LoopSettings,
    TrainingError,
    Validation,
    fit,
    isolated_seed,
    run_epoch,
)

NAN = math.nan


def _script(
    results: list[tuple[float, float]],
    *,
    patience: int | None = 20,
    select_by: SelectBy = "auc",
    epochs: int | None = None,
    **changes: Any,
) -> tuple[FitResult, nn.Linear]:
    """Run `fit` on a model whose weight is the number of the epoch, with scripted (auc, loss) for each epoch."""
    model = nn.Linear(1, 1)
    seen = {"epoch": 0}

    def train(generator: torch.Generator) -> Mapping[str, float]:
        assert model.training
        assert not torch.is_inference_mode_enabled()
        seen["epoch"] += 1
        with torch.no_grad():
            model.weight.fill_(seen["epoch"])
        return {"loss": 0.0, "loading_s": 0.0, "steps_s": 0.0}

    def validate() -> Validation:
        assert not model.training
        assert torch.is_inference_mode_enabled()
        auc, loss = results[seen["epoch"] - 1]
        return Validation(loss=loss, score=auc, details={"accuracy": 0.5}, undefined="there is no AUC")

    recipe = Recipe(1e-4, epochs=epochs or len(results), patience=patience, select_by=select_by, **changes)
    return fit(model, train=train, validate=validate, recipe=recipe, seed=0), model


def test_the_papers_recipe_is_adam_at_one_rate_with_patience() -> None:
    settings = LoopSettings(learning_rate=0.5, weight_decay=0.25, epochs=7, patience=3)
    assert settings.paper_recipe("auc") == Recipe(
        0.5, 0.25, epochs=7, patience=3, select_by="auc", source=settings.paper_recipe("loss").source
    )
    assert LoopSettings().patience == 20


def test_the_highest_auc_is_kept_and_its_weights_restored() -> None:
    result, model = _script([(0.5, 1.0), (0.8, 0.9), (0.7, 0.1)])
    assert result.best_epoch == 2
    assert model.weight.item() == 2
    assert not model.training
    assert result.best.score == 0.8
    assert result.selected_by == "auc"
    assert [r["best"] for r in result.history] == [True, True, False]
    assert not result.stopped_early


def test_among_equal_aucs_the_lowest_loss_is_kept_without_prolonging() -> None:
    aucs = [(0.8, 1.0), (0.8, 0.9), (0.8, 0.95), (0.8, 0.7), (0.8, 0.6)]
    result, model = _script(aucs, patience=3)
    # The AUC never rose after epoch 1, so epoch 4 is the last one.
    assert len(result.history) == 4
    assert result.stopped_early
    assert result.best_epoch == 4
    assert model.weight.item() == 4


def test_patience_counts_epochs_without_a_strict_rise() -> None:
    result, _ = _script([(0.5, 1.0), (0.4, 1.0), (0.6, 1.0), (0.6, 1.0), (0.6, 1.0), (0.9, 1.0)], patience=2)
    assert len(result.history) == 5
    assert result.best_epoch == 3
    longer, _ = _script([(0.5, 1.0), (0.4, 1.0), (0.6, 1.0), (0.6, 1.0), (0.6, 1.0), (0.9, 1.0)], patience=3)
    assert longer.best_epoch == 6


def test_a_lower_auc_with_a_lower_loss_is_not_better() -> None:
    assert _script([(0.9, 1.0), (0.8, 0.1)])[0].best_epoch == 1


def test_by_loss_the_lowest_loss_is_kept() -> None:
    result, model = _script([(0.9, 1.0), (0.5, 0.4), (0.99, 0.5), (0.9, 0.4)], select_by="loss")
    assert result.selected_by == "loss"
    assert result.best_epoch == 2
    assert model.weight.item() == 2


def test_an_undefined_auc_falls_back_to_the_loss_and_says_so() -> None:
    with pytest.warns(UserWarning, match="there is no AUC: the best epoch is chosen by validation loss"):
        result, _ = _script([(NAN, 1.0), (NAN, 0.4), (NAN, 0.5)])
    assert result.selected_by == "loss"
    assert result.best_epoch == 2
    assert len(result.notes) == 1
    assert math.isnan(result.history[0]["val_auc"])


@pytest.mark.parametrize("loss", [NAN, math.inf])
def test_a_validation_loss_that_is_not_finite_is_an_error(loss: float) -> None:
    with pytest.raises(TrainingError, match=r"epoch 2.*Lower the learning rate"):
        _script([(0.5, 1.0), (0.5, loss)])


def test_the_kept_state_is_a_copy_and_covers_buffers() -> None:
    model = nn.BatchNorm1d(1)

    def train(generator: torch.Generator) -> Mapping[str, float]:
        model.running_mean += 1  # type: ignore[operator]
        return {"loss": 0.0}

    losses = iter([0.1, 0.2, 0.3])
    fit(
        model,
        train=train,
        validate=lambda: Validation(next(losses)),
        recipe=Recipe(1e-4, epochs=3),
        seed=0,
    )
    assert model.running_mean is not None
    assert model.running_mean.item() == 1


def test_history_is_json_and_reaches_the_callback() -> None:
    model, seen = nn.Linear(1, 1), []
    result = fit(
        model,
        train=lambda g: {"loss": 0.5, "loading_s": 0.0, "steps_s": 0.0},
        validate=lambda: Validation(0.25, 0.75, details={"accuracy": 1.0}),
        recipe=Recipe(1e-4, epochs=2, select_by="auc"),
        seed=0,
        on_epoch=seen.append,
    )
    assert seen == result.history == json.loads(json.dumps(result.history))
    first = result.history[0]
    assert {k: first[k] for k in ("epoch", "train_loss", "val_loss", "val_auc", "val_accuracy", "best")} == {
        "epoch": 1, "train_loss": 0.5, "val_loss": 0.25, "val_auc": 0.75, "val_accuracy": 1.0, "best": True,
    }  # fmt: skip
    assert 0 <= sum(result.time_shares().values()) <= 1 + 1e-9


def test_another_score_goes_by_its_name() -> None:
    model = nn.Linear(1, 1)
    scores = iter([-1.0, 0.25, 0.125])
    result = fit(
        model,
        train=lambda g: {"loss": 0.5},
        validate=lambda: Validation(0.25, next(scores), "r2"),
        recipe=Recipe(1e-4, epochs=3, select_by="auc"),
        seed=0,
    )
    assert (result.selected_by, result.best_epoch, result.best.score) == ("r2", 2, 0.25)
    assert [r["val_r2"] for r in result.history] == [-1.0, 0.25, 0.125]
    assert "val_auc" not in result.history[0]


def test_an_earliest_stop_prolongs_training_but_keeps_an_earlier_epoch() -> None:
    losses = [(NAN, 1.0), (NAN, 0.1), *[(NAN, 0.5)] * 10]
    for earliest, epochs in ((0, 5), (5, 5), (8, 8), (100, 12)):
        result, model = _script(losses, patience=3, select_by="loss", earliest_stop=earliest)
        assert len(result.history) == epochs
        assert result.best_epoch == model.weight.item() == 2


def test_epochs_before_the_first_are_neither_kept_nor_counted() -> None:
    losses = [(NAN, x) for x in (0.1, 0.2, 0.3, 0.9, 0.8, 0.8, 0.8, 0.7)]
    result, model = _script(losses, patience=2, select_by="loss", first_epoch=4)
    assert [r["best"] for r in result.history] == [False, False, False, True, True, False, False]
    assert result.best_epoch == model.weight.item() == 5
    with pytest.raises(TrainingError, match="no epoch before 9 is kept, but there are 8"):
        _script(losses, first_epoch=9)


def test_no_patience_runs_all_epochs_and_last_keeps_the_last() -> None:
    losses = [(NAN, 0.1 * x) for x in range(1, 31)]
    result, model = _script(losses, select_by="loss")
    assert len(result.history) == 21
    result, model = _script(losses, select_by="loss", patience=None)
    assert (len(result.history), result.best_epoch, result.stopped_early) == (30, 1, False)
    result, model = _script(losses, select_by="last", patience=2)
    assert (result.best_epoch, model.weight.item(), result.selected_by) == (30, 30, "last")


def test_the_schedule_hears_every_validation_loss_but_that_of_the_last_epoch() -> None:
    heard: list[float] = []
    losses = iter([0.5, 0.25, 1.0])
    fit(
        nn.Linear(1, 1),
        train=lambda g: {"loss": 0.5},
        validate=lambda: Validation(next(losses)),
        recipe=Recipe(1e-4, epochs=3, select_by="loss"),
        seed=0,
        after_epoch=heard.append,
    )
    assert heard[:2] == [0.5, 0.25]


def _batches(count: int, size: int, **options: Any) -> list[list[int]]:
    seen: list[list[int]] = []
    run_epoch(
        count,
        size,
        load=lambda indices: indices,
        step=lambda indices: seen.append(indices.tolist()) or {"loss": torch.tensor(0.0)},
        optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0),
        generator=torch.Generator().manual_seed(0),
        name=str,
        **options,
    )
    return seen


@pytest.mark.parametrize(("count", "sizes"), [(5, [5]), (8, [8]), (15, [15]), (17, [9, 8]), (26, [9, 9, 8])])
def test_batches_of_at_least_so_many(count: int, sizes: list[int]) -> None:
    batches = _batches(count, 8, at_least=True)
    assert [len(b) for b in batches] == sizes
    assert sorted(i for b in batches for i in b) == list(range(count))


def test_weights_draw_with_replacement() -> None:
    drawn = [b[0] for b in _batches(1000, 1, weights=torch.tensor([0.0, 3.0, 1.0] + [0.0] * 997))]
    assert len(drawn) == 1000
    assert set(drawn) == {1, 2}
    assert 0.7 < drawn.count(1) / 1000 < 0.8


def _line_fit(seed: int, prefetch: bool = False, batch_size: int = 3) -> tuple[list[float], list[list[int]], Any]:
    """Fit y = 2x with dropout; return the weight after each epoch, the order of the items, and the result."""
    with isolated_seed(seed):
        model = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 1))
    x = torch.arange(40.0).reshape(10, 4) / 40
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    order: list[list[int]] = []
    weights: list[float] = []

    def load(indices: np.ndarray) -> Tensor:
        order.append(indices.tolist())
        return x[torch.from_numpy(indices)]

    def step(batch: Tensor) -> Mapping[str, Tensor]:
        loss = (model(batch) - 2 * batch.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    def train(generator: torch.Generator) -> Mapping[str, float]:
        return run_epoch(
            10, batch_size, load=load, step=step, optimizer=optimizer, generator=generator, name=str, prefetch=prefetch
        )

    def validate() -> Validation:
        weights.append(model[1].weight.sum().item())
        return Validation(float((model(x) - 2 * x.sum(1, keepdim=True)).square().mean()))

    result = fit(model, train=train, validate=validate, recipe=Recipe(1e-4, epochs=4), seed=seed)
    return weights, order, result


def test_it_learns_and_reproduces_from_its_seed() -> None:
    weights, order, result = _line_fit(5)
    again, same_order, _ = _line_fit(5)
    assert weights == again
    assert order == same_order
    assert result.history[-1]["val_loss"] < result.history[0]["val_loss"]
    other, other_order, _ = _line_fit(6)
    assert order != other_order
    assert weights != other


def test_prefetching_changes_nothing() -> None:
    assert _line_fit(5, prefetch=True)[:2] == _line_fit(5)[:2]


def test_every_item_is_seen_once_an_epoch_in_a_new_order() -> None:
    _, order, _ = _line_fit(5)
    epochs = [[item for batch in order[i : i + 4] for item in batch] for i in range(0, 16, 4)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert epochs[0] != epochs[1]
    assert [len(b) for b in order[:4]] == [3, 3, 3, 1]


def test_global_random_numbers_are_given_back() -> None:
    torch.manual_seed(123)
    wanted = torch.rand(3)
    torch.manual_seed(123)
    _line_fit(5)
    assert torch.equal(torch.rand(3), wanted)


class _Counting(torch.optim.SGD):
    steps = 0

    def step(self, closure: Any = None) -> Any:
        type(self).steps += 1
        return super().step(closure)


def test_averages_go_over_items_not_over_batches() -> None:
    weight = nn.Parameter(torch.zeros(1))
    done: list[tuple[int, int]] = []
    averages = run_epoch(
        40,
        3,
        load=lambda indices: indices,
        step=lambda indices: {"loss": torch.tensor(float(indices.mean()))},
        optimizer=_Counting([weight], lr=1.0),
        generator=torch.Generator().manual_seed(0),
        name=str,
        on_step=lambda n, total: done.append((n, total)),
    )
    assert averages["loss"] == pytest.approx(19.5)
    assert _Counting.steps == 14
    assert done[0] == (3, 40)
    assert done[-1] == (40, 40)
    assert averages["loading_s"] >= 0
    assert averages["steps_s"] > 0


@pytest.mark.parametrize("bad", [0, 7, 29])
def test_a_training_loss_that_is_not_finite_names_the_item(bad: int) -> None:
    def step(index: int) -> Mapping[str, Tensor]:
        return {"loss": torch.tensor(1.0), "hard": torch.tensor(NAN if index == bad else 1.0)}

    with pytest.raises(TrainingError, match=rf"\(hard\) is not finite; first for slide s{bad}\b"):
        run_epoch(
            30,
            1,
            load=lambda indices: int(indices[0]),
            step=step,
            optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0),
            generator=torch.Generator().manual_seed(0),
            name=lambda indices: f"slide s{indices[0]}",
        )


def test_an_error_while_loading_ahead_is_not_lost() -> None:
    threads = set()

    def load(indices: np.ndarray) -> np.ndarray:
        threads.add(threading.current_thread().name)
        if 3 in indices:
            raise OSError("disk gone")
        return indices

    with pytest.raises(OSError, match="disk gone"):
        run_epoch(
            6,
            2,
            load=load,
            step=lambda indices: {"loss": torch.tensor(0.0)},
            optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0),
            generator=torch.Generator().manual_seed(0),
            name=str,
            prefetch=True,
        )
    assert len(threads) == 1
    assert threading.current_thread().name not in threads
