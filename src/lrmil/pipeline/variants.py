"""What `lrmil ablate`, `lrmil sensitivity`, screens and comparisons of recipes change in a config, as plain data.

A variant is a row of a table: a name, and the settings in which it differs from the config. The config itself is one
of the rows, and what all others are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lrmil.distill import resolve_layers
from lrmil.errors import ConfigError
from lrmil.pipeline.config import RunSettings
from lrmil.pipeline.evaluate import LR_ONLY, TEACHER
from lrmil.pipeline.overrides import validated
from lrmil.settings import fingerprint

Of = Literal["k", "temperature", "layers", "aggregation", "magnification"]
"""What `lrmil sensitivity` can vary"""

TERMS = ("patch", "bag", "soft", "hard")
"""L_patch, L_bag, L_soft, L_hard: the columns of the paper's Table 3"""
TABLE_3: tuple[tuple[str, ...], ...] = (
    (),
    ("patch",),
    ("patch", "bag"),
    ("patch", "bag", "soft"),
    ("patch", "bag", "hard"),
    TERMS,
)
"""Its rows: the terms that are on, beside the cross-entropy"""

HARD_K = (1, 2, 4, 8, 16, 32)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
LAYERS = ((0, 1, -1), (0, 1, -2), (0, 1), (0, -1), (-1,))
"""As in ViTKD; as in the authors' code; and parts of them. For other sets, more CLS tokens must be kept on disk"""
AGGREGATIONS = ("mean", "max", "share")
MAGNIFICATIONS = ((0.25, 1.0), (0.5, 1.0), (0.5, 2.0), (0.5, 4.0), (1.0, 2.0), (1.0, 4.0))
"""High and low resolution, um per pixel: 40x and 10x, 20x and 10x, 20x and 5x, ..."""


OWN = "as it is"
"""Title of the config's own recipe among others"""


@dataclass(frozen=True)
class Variant:
    """One row."""

    name: str
    """Of its folder, variants/<name>/"""
    title: str
    """In tables and figures"""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Nested, as in a config; empty where it is the config itself"""
    terms: tuple[str, ...] = TERMS
    """Losses that are on; without "patch" the student encoder is the frozen one, and there is no stage 1"""

    def applied(self, settings: RunSettings) -> RunSettings:
        """Return `settings` with the changes.

        Raises:
            ConfigError: the result is impossible.
        """
        tree = _merged(settings.model_dump(), self.changes)
        changed = validated(RunSettings, tree, self.title)
        return settings if changed == settings else changed


@dataclass(frozen=True)
class Plan:
    """The rows of one table, and how they are drawn."""

    name: str
    """Of the table's folder"""
    heading: str
    """What is varied, for headings"""
    variants: tuple[Variant, ...]
    reference: Variant
    """The config itself, one of the variants"""
    lines: Mapping[str, tuple[tuple[float, str], ...]] = field(default_factory=dict)
    """(value, title) of the points of each line of the figure; empty where rows have no order"""
    axis: str = ""
    """What the values are"""
    own_scales: bool = False
    """Whether variants need tiles and features of their own"""
    with_teacher: bool = False
    """Whether the 20x teacher is a row, too, and what the variants recover of its lead is told"""
    notes: tuple[str, ...] = ()
    """What was left out, and why"""


def distilled_blocks(settings: Iterable[RunSettings], depth: int) -> tuple[int, ...]:
    """Return every block that one of several configs distils; `depth` is that of the encoder."""
    return tuple(sorted({layer for s in settings for layer in resolve_layers(s.stage1.loss.layers, depth)}))


def ablation_plan(settings: RunSettings) -> Plan:
    """Return the six rows of Table 3. A term that the config itself switches off is off in all: rows that only it tells
    apart become one.
    """
    loss = settings.student.loss
    weights = {"bag": loss.lambda_bag, "soft": loss.lambda_soft, "hard": loss.lambda_hard}
    absent = [term for term, weight in weights.items() if weight == 0]
    rows = list(dict.fromkeys(tuple(t for t in row if t not in absent) for row in TABLE_3))
    variants = tuple(
        Variant(
            f"ablation_{'_'.join(row) or 'none'}",
            " + ".join(row) or "none",
            {"student": {"loss": {f"lambda_{t}": 0.0 for t in weights if t not in row and t not in absent}}},
            row,
        )
        for row in rows
    )
    notes = [f"L_{term} is off in every row, since student.loss.lambda_{term} is 0." for term in absent]
    if settings.stage1.student is not None:
        notes.append(
            "Rows without L_patch look at 5x with the frozen HR encoder, the others with a student of its own."
        )
    return Plan("ablation", "Losses", variants, variants[-1], notes=tuple(notes))


def recipes_plan(settings: RunSettings, changes: Mapping[str, Mapping[str, Any]]) -> Plan:
    """Return the config's own recipe, others, and no distillation at all.

    Args:
        settings: the config.
        changes: what each other recipe changes in the config, nested as there, by its title.

    Raises:
        ConfigError: a title is that of a row which is there anyway.
    """
    taken = sorted({OWN, LR_ONLY, TEACHER} & changes.keys())
    if taken:
        raise ConfigError(f"no recipe can be called {taken[0]!r}: another row is.", fix="Give it another heading.")
    own = Variant("own", OWN)
    others = tuple(recipe_variant(title, told) for title, told in changes.items())
    without = ablation_plan(settings).variants[0]
    none = Variant(without.name, LR_ONLY, without.changes, without.terms)
    return Plan("recipes", "Recipes", (none, own, *others), own, with_teacher=True)


def recipe_variant(title: str, changes: Mapping[str, Any]) -> Variant:
    """Return the variant of a recipe; its folder depends on what it changes, so that a new title trains nothing."""
    return Variant(f"recipe_{fingerprint(dict(changes))}", title, changes)


def sensitivity_plan(of: Of, settings: RunSettings, depth: int, values: Sequence[Any] | None = None) -> Plan:
    """Return the rows of a sensitivity table. The config's own value is always among them.

    Args:
        of: what is varied.
        settings: the config.
        depth: blocks of the encoder.
        values: to use in place of the usual ones: numbers for k and temperature, lists of blocks for layers, names for
            aggregation, pairs of um per pixel (high resolution first) for magnification.

    Raises:
        ConfigError: a value is impossible, or what is varied has no effect with this config.
    """
    if of not in _PLANS:
        raise ConfigError(f"sensitivity of {of!r} is not known.", fix=f"Choose from {', '.join(get_args(Of))}.")
    return _PLANS[of](settings, depth, values)


def _k_plan(settings: RunSettings, depth: int, values: Sequence[Any] | None) -> Plan:
    loss = settings.student.loss
    _require_on("k", settings, "lambda_hard")
    ks = sorted({*(_numbers(values, int) or HARD_K), loss.hard_k})
    variants = tuple(Variant(f"k_{k}", f"k = {k}", _loss(hard_k=k)) for k in ks)
    lines = {"": tuple((float(k), v.title) for k, v in zip(ks, variants, strict=True))}
    notes = ("Of a slide with N regions, no more than N / 2 are used at either end: larger k are the same there.",)
    reference = variants[ks.index(loss.hard_k)]
    return Plan("k", "k of L_hard", variants, reference, lines, "k: regions at either end", notes=notes)


def _temperature_plan(settings: RunSettings, depth: int, values: Sequence[Any] | None) -> Plan:
    loss = settings.student.loss
    _require_on("temperature", settings, "lambda_bag", "lambda_soft")
    wanted = _numbers(values, float) or TEMPERATURES
    bag, attention = loss.bag_temperature, loss.attention_temperature

    def title(b: float, a: float) -> str:
        return f"bag {b:g}, attention {a:g}"

    own = Variant("temperature_own", title(bag, attention))
    variants = {own.title: own}
    lines: dict[str, tuple[tuple[float, str], ...]] = {}
    if loss.lambda_bag:
        taus = sorted({*wanted, bag})
        lines["L_bag"] = tuple((t, title(t, attention)) for t in taus)
        for t in taus:
            found = Variant(f"bag_temperature_{t:g}", title(t, attention), _loss(bag_temperature=t))
            variants.setdefault(found.title, found)
    if loss.lambda_soft:
        taus = sorted({*wanted, attention})
        lines["L_soft"] = tuple((t, title(bag, t)) for t in taus)
        for t in taus:
            found = Variant(f"attention_temperature_{t:g}", title(bag, t), _loss(attention_temperature=t))
            variants.setdefault(found.title, found)
    return Plan("temperature", "Temperatures", tuple(variants.values()), own, lines, "temperature")


def _layers_plan(settings: RunSettings, depth: int, values: Sequence[Any] | None) -> Plan:
    if values is not None and not all(isinstance(v, list) and v and all(type(x) is int for x in v) for v in values):
        raise ConfigError("layers are lists of block numbers.", fix="Like --values '[0, 1, -1], [-1]'.")
    own = resolve_layers(settings.stage1.loss.layers, depth)
    usual = [layers for layers in LAYERS if all(-depth <= layer < depth for layer in layers)]
    sets = list(dict.fromkeys([own, *(resolve_layers(v, depth) for v in values or usual)]))
    variants = tuple(
        Variant(
            f"layers_{'-'.join(map(str, s))}",
            f"blocks {', '.join(map(str, s))}",
            {} if s == own else _layers(settings, s),
        )
        for s in sets
    )
    return Plan("layers", "Distilled blocks, from 0", variants, variants[0])


def _layers(settings: RunSettings, layers: Sequence[int]) -> dict[str, Any]:
    """Pairs of blocks that a config names for its own layers are of no use to others."""
    loss = {"loss": {"layers": list(layers)}}
    paired = settings.stage1.student is not None and settings.stage1.student.layer_pairs
    return {"stage1": loss | {"student": {"layer_pairs": []}} if paired else loss}


def _aggregation_plan(settings: RunSettings, depth: int, values: Sequence[Any] | None) -> Plan:
    loss = settings.student.loss
    _require_on("aggregation", settings, "lambda_soft", "lambda_hard")
    titles = {"mean": "mean of logits", "max": "largest logit", "share": "share of attention"}
    wanted = list(values or AGGREGATIONS)
    wrong = [str(v) for v in wanted if v not in titles]
    if wrong:
        raise ConfigError(f"there is no region aggregation {wrong[0]!r}.", fix=f"Choose from {', '.join(titles)}.")
    own = "share" if loss.teacher_scores == "softmax" else loss.region_aggregation
    notes: tuple[str, ...] = ()
    if loss.unmatched == "released" and "share" in wanted:
        wanted.remove("share")
        notes = ("The share of attention is left out: it cannot be had with student.loss.unmatched: released.",)
    names = [a for a in AGGREGATIONS if a in {own, *wanted}]
    variants = tuple(Variant(f"aggregation_{a}", titles[a], {} if a == own else _scores(a)) for a in names)
    heading = "Score of a region from its children"
    return Plan("aggregation", heading, variants, variants[names.index(own)], notes=notes)


def _magnification_plan(settings: RunSettings, depth: int, values: Sequence[Any] | None) -> Plan:
    if values is not None and not all(isinstance(v, list) and len(v) == 2 for v in values):
        raise ConfigError(
            "magnifications are pairs of um per pixel, high resolution first.", fix="Like --values '[0.5, 2], [1, 4]'."
        )
    own = (settings.grid.hr_mpp, settings.grid.lr_mpp)
    pairs = [(hr, lr) for hr, lr in (_numbers(v, float) for v in values)] if values else list(MAGNIFICATIONS)
    kept = [own]
    notes: list[str] = []
    for hr, lr in dict.fromkeys(pairs):
        try:
            _pair(hr, lr).applied(settings)
        except ConfigError as error:
            notes.append(f"{_pair(hr, lr).title} is left out: {error.message}")
            continue
        if (hr, lr) != own:
            kept.append((hr, lr))
    variants = tuple(_pair(hr, lr, changed=(hr, lr) != own) for hr, lr in sorted(kept))
    reference = variants[sorted(kept).index(own)]
    heading = "Magnifications, high and low"
    return Plan("magnification", heading, variants, reference, own_scales=True, notes=tuple(notes))


_PLANS: dict[str, Callable[[RunSettings, int, Sequence[Any] | None], Plan]] = {
    "k": _k_plan,
    "temperature": _temperature_plan,
    "layers": _layers_plan,
    "aggregation": _aggregation_plan,
    "magnification": _magnification_plan,
}


def _pair(hr_mpp: float, lr_mpp: float, *, changed: bool = True) -> Variant:
    title = f"{10 / hr_mpp:g}x and {10 / lr_mpp:g}x ({hr_mpp:g} and {lr_mpp:g} um/px)"
    changes = {"grid": {"hr_mpp": hr_mpp, "lr_mpp": lr_mpp}} if changed else {}
    return Variant(f"magnification_{hr_mpp:g}_{lr_mpp:g}", title, changes)


def _loss(**changes: Any) -> dict[str, Any]:
    return {"student": {"loss": changes}}


def _scores(aggregation: str) -> dict[str, Any]:
    if aggregation == "share":
        return _loss(teacher_scores="softmax")
    return _loss(teacher_scores="logits", region_aggregation=aggregation)


def _require_on(of: str, settings: RunSettings, *weights: str) -> None:
    """See that what is varied has an effect."""
    if not any(getattr(settings.student.loss, weight) for weight in weights):
        names = " and ".join(f"student.loss.{weight}" for weight in weights)
        verb = "is" if len(weights) == 1 else "are"
        raise ConfigError(f"sensitivity of {of}: {names} {verb} 0, so that it has no effect.", fix="Set a weight.")


def _numbers(values: Sequence[Any] | None, kind: type) -> list[Any]:
    """Return the values as numbers of one kind."""
    for value in values or []:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or kind(value) != value or value <= 0:
            raise ConfigError(
                f"{value!r} is no {'whole ' if kind is int else ''}number above 0.", fix="Check --values."
            )
    return [kind(value) for value in values or []]


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        result[key] = _merged(base[key], value) if isinstance(value, Mapping) else value
    return result
