"""Heads that choose their patches are trained step by step, each step its own part, by the recipe that is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lrmil.errors import ConfigError, CorruptBag, HeadError
from lrmil.mil import HeadSettings, RecordedSource, StoredScales
from lrmil.mil.dmin import RECIPE as DMIN_RECIPE
from lrmil.mil.hdmil import LIPN_RECIPE
from lrmil.mil.zoommil import RECIPE as ZOOM_RECIPE
from lrmil.training import multi_scale
from lrmil.training.loop import fit
from lrmil.training.multi_scale import SlideSource, predict_scales, train_scales
from lrmil.training.objectives.choose import make_objective
from lrmil.training.recipes import HeadTrainingSettings

DIM = 8
SMALL: dict[str, dict[str, Any]] = {
    # Noise of the order of the differences between probabilities, with as few low patches as here
    "zoommil": {"k": 2, "sigma": 0.05, "out_dim": 16, "hidden_dim": 8, "samples": 20, "dropout": 0.0},
    "hdmil": {"embed_dim": 16, "hidden_dim": 8, "degree": 3, "k_sample": 2, "dropout": 0.0},
}


def zoom_slide(name: str, label: int, rng: np.random.Generator, regions: int = 5) -> SlideSource:
    """One low patch says where to look, one mid patch in it, too; the class stands in that patch's children alone."""
    low = rng.normal(0, 0.3, (regions, DIM))
    mid = rng.normal(0, 0.3, (regions, 4, DIM))
    high = rng.normal(0, 0.3, (regions, 4, 4, DIM))
    here, there = rng.integers(regions), rng.integers(4)
    low[here, 0] += 3
    mid[here, there, 1] += 3
    high[here, there, :, 2 + label] += 3
    scales = {"low": low, "mid": mid.reshape(-1, DIM), "high": high.reshape(-1, DIM)}
    source = StoredScales({scale: torch.from_numpy(x.astype(np.float16)) for scale, x in scales.items()})
    return SlideSource(name, source, label)


def child_slide(name: str, label: int, rng: np.random.Generator, count: int = 24) -> SlideSource:
    """A third of the patches tell the class, and their thumbnails are dark."""
    features = rng.normal(0, 0.3, (count, DIM))
    telling = np.arange(count) % 3 == 0
    features[telling, label] += 3
    features[~telling, 5] += 3
    thumbnails = rng.integers(190, 220, (count, 4, 4, 3))
    thumbnails[telling] -= 150
    source = StoredScales(
        {"high": torch.from_numpy(features.astype(np.float32))},
        thumbnails=torch.from_numpy(thumbnails.astype(np.uint8)),
    )
    return SlideSource(name, source, label)


def cohort(head: str, count: int, seed: int = 0) -> list[SlideSource]:
    rng = np.random.default_rng(seed)
    make = {"zoommil": zoom_slide, "hdmil": child_slide}[head]
    return [make(f"s{seed}_{i}", i % 2, rng) for i in range(count)]


def settings(head: str, **changes: Any) -> HeadTrainingSettings:
    options = SMALL[head] | changes.pop("options", {})
    return HeadTrainingSettings(
        **{"head": HeadSettings(name=head, options=options), "learning_rate": 5e-3, "epochs": 3, **changes}
    )


def trained(head: str, **changes: Any) -> multi_scale.TrainedScales:
    return train_scales(cohort(head, 6), cohort(head, 4, 1), settings(head, **changes), num_classes=2, seed=3)


@pytest.mark.parametrize(("head", "epochs"), [("zoommil", 12), ("hdmil", 8)])
def test_what_stands_in_a_few_patches_is_learned(head: str, epochs: int) -> None:
    found = train_scales(
        cohort(head, 16), cohort(head, 6, 1), settings(head, epochs=epochs, learning_rate=1e-2), num_classes=2, seed=0
    )
    test = cohort(head, 12, 2)
    recorded = [replace(slide, source=RecordedSource(slide.source), label=None) for slide in test]
    predictions = predict_scales(found.head, recorded)
    assert [p.slide_id for p in predictions] == [slide.slide_id for slide in test]
    right = [int(p.probabilities.argmax()) == slide.label for p, slide in zip(predictions, test, strict=True)]
    assert np.mean(right) > 0.8
    # As deployed, it did so without looking at everything.
    for slide in recorded:
        assert isinstance(slide.source, RecordedSource)
        assert 0 < len(slide.source.fetched["high"]) < slide.source.counts["high"]


@pytest.mark.parametrize("head", SMALL)
def test_predictions_are_the_heads_own_and_the_same_for_the_same_seed(head: str) -> None:
    first, again = trained(head), trained(head)
    for name, value in first.head.state_dict().items():
        assert torch.equal(value, again.head.state_dict()[name]), name
    slides = cohort(head, 3, 9)
    for slide, prediction in zip(slides, predict_scales(first.head, slides), strict=True):
        with torch.no_grad():
            expected = first.head(slide.source).logits
        np.testing.assert_array_equal(prediction.logits, expected.numpy())
        np.testing.assert_allclose(prediction.probabilities, torch.softmax(expected.double(), 0).numpy())
        assert prediction.attention is None


def test_each_step_of_hdmil_trains_its_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, dict[str, torch.Tensor]]] = []

    def watched(head: Any, **arguments: Any) -> Any:
        before = {k: v.clone() for k, v in head.state_dict().items()}
        result = fit(head, **arguments)
        changed = {k for k, v in head.state_dict().items() if not torch.equal(v, before[k])}
        seen.append((head.step, {k: head.state_dict()[k] for k in changed}))
        return result

    monkeypatch.setattr(multi_scale, "fit", watched)
    found = trained("hdmil")
    assert [step for step, _ in seen] == ["dmin", "lipn"]
    for step, changed in seen:
        assert changed, step
        assert {name.split(".")[0] for name in changed} == {step}
    assert list(found.fits) == ["dmin", "lipn"]
    assert found.fit is found.fits["lipn"]


def test_steps_of_hdmil_are_judged_with_all_patches_and_then_as_deployed() -> None:
    val = [replace(slide, source=RecordedSource(slide.source)) for slide in cohort("hdmil", 2, 1)]
    looked: list[tuple[str, int, int]] = []

    def on_epoch(record: Mapping[str, Any]) -> None:
        for slide in val:
            assert isinstance(slide.source, RecordedSource)
            looked.append((record["step"], len(slide.source.fetched.get("high", [])), slide.source.thumbnail_reads))
            slide.source.fetched.clear()
            slide.source.thumbnail_reads = 0

    found = train_scales(cohort("hdmil", 6), val, settings("hdmil"), num_classes=2, seed=3, on_epoch=on_epoch)
    all_rows = val[0].source.counts["high"]
    dmin = [entry for entry in looked[2:] if entry[0] == "dmin"]
    lipn = [entry for entry in looked if entry[0] == "lipn"]
    assert {rows for _, rows, _ in dmin} == {all_rows}
    assert {reads for _, _, reads in dmin} == {0}
    assert min(reads for _, _, reads in lipn[2:]) == 1
    with torch.no_grad():
        chosen = len(found.head(val[0].source).selected["high"])
    assert chosen in {rows for _, rows, _ in lipn}


@pytest.mark.parametrize(("head", "recipes"), [("zoommil", [ZOOM_RECIPE]), ("hdmil", [DMIN_RECIPE, LIPN_RECIPE])])
def test_the_original_recipe_is_that_of_each_step(
    head: str, recipes: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used, optimisers = [], []

    def watched(model: Any, *, recipe: Any, **arguments: Any) -> Any:
        used.append(recipe)
        return fit(model, recipe=replace(recipe, epochs=1, first_epoch=0), **arguments)

    def watched_optimiser(recipe: Any, model: Any) -> Any:
        optimisers.append(make(recipe, model))
        return optimisers[-1]

    make = multi_scale.make_optimiser
    monkeypatch.setattr(multi_scale, "fit", watched)
    monkeypatch.setattr(multi_scale, "make_optimiser", watched_optimiser)
    trained(head, recipe="original", learning_rate=0.5)
    assert used == list(recipes)
    assert [o.param_groups[0]["weight_decay"] for o in optimisers] == [r.weight_decay for r in recipes]
    assert all(group["lr"] < 0.5 for o in optimisers for group in o.param_groups)


def test_the_recipe_of_the_paper_is_the_same_for_all_steps() -> None:
    found = trained("hdmil", epochs=2)
    assert [len(f.history) for f in found.fits.values()] == [2, 2]


@pytest.mark.parametrize("kind", ["regression", "survival"])
def test_zoommil_learns_other_tasks_and_hdmil_refuses_by_name(kind: str) -> None:
    rng = np.random.default_rng(0)

    def with_targets(slides: list[SlideSource]) -> list[SlideSource]:
        targets = [np.array([rng.uniform(1, 9), float(i % 3 > 0)]) for i in range(len(slides))]
        return [
            replace(s, label=None, target=t if kind == "survival" else float(t[0]))
            for s, t in zip(slides, targets, strict=True)
        ]

    objective = make_objective(kind)  # type: ignore[arg-type]
    train, val = with_targets(cohort("zoommil", 12)), with_targets(cohort("zoommil", 6, 1))
    found = train_scales(train, val, settings("zoommil", epochs=1), objective=objective, seed=0)
    answer = predict_scales(found.head, val, readout=found.readout)[0]
    assert answer.value is not None
    assert np.isfinite(answer.value)
    slides = with_targets(cohort("hdmil", 4))
    with pytest.raises(ConfigError, match="hdmil"):
        train_scales(slides, slides, settings("hdmil"), objective=objective, seed=0)


def test_bad_input_is_named() -> None:
    slides = cohort("zoommil", 4)
    with pytest.raises(ConfigError, match="validation"):
        train_scales(slides, [], settings("zoommil"), num_classes=2, seed=0)
    one_scale = HeadTrainingSettings(head=HeadSettings(name="abmil"))
    with pytest.raises(ConfigError, match="abmil"):
        train_scales(slides, slides, one_scale, num_classes=2, seed=0)
    with pytest.raises(ConfigError, match="s0_1"):
        train_scales([slides[0], replace(slides[1], label=2)], slides, settings("zoommil"), num_classes=2, seed=0)
    flat = SlideSource("flat", StoredScales({"high": torch.ones(3, DIM)}), 0)
    with pytest.raises(CorruptBag, match=r"flat.*'low' and 'mid'"):
        train_scales([*slides, flat], slides, settings("zoommil"), num_classes=2, seed=0)
    wide = SlideSource("wide", StoredScales({n: torch.ones(c, DIM + 1) for n, c in slides[0].source.counts.items()}), 0)
    with pytest.raises(CorruptBag, match="wide"):
        train_scales(slides, [wide], settings("zoommil"), num_classes=2, seed=0)
    with pytest.raises(HeadError, match="thumbnails"):
        train_scales([flat], [flat], settings("hdmil"), num_classes=2, seed=0)
    broken = zoom_slide("broken", 0, np.random.default_rng(0))
    rows = torch.arange(broken.source.counts["low"])
    scales = {n: broken.source.fetch(n, torch.arange(c)).clone() for n, c in broken.source.counts.items()}
    scales["low"][rows[2]] = torch.nan
    with pytest.raises(HeadError, match=r"broken.*NaN.*row 2"):
        train_scales([replace(broken, source=StoredScales(scales))], slides, settings("zoommil"), num_classes=2, seed=0)
