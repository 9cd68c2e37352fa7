"""The methods that `lrmil compare` knows: the rows of its tables, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lrmil.errors import ConfigError
from lrmil.pipeline.baselines import MAJORITY, constant_title
from lrmil.pipeline.config import RunSettings
from lrmil.pipeline.evaluate import GROUPS, LR_ONLY, LRMIL
from lrmil.pipeline.reporting import Reporter
from lrmil.tasks import TaskKind
from lrmil.training.objectives import make_objective
from lrmil.training.stage2 import TeacherSettings
from lrmil.training.support import support

Sees = Literal["nothing", "hr", "chosen", "lr", "lrmil"]
"""hr: all 20x patches. chosen: patches that the method chooses itself. lr: 5x by the frozen encoder. lrmil: the whole
path, 5x by the distilled encoder"""


@dataclass(frozen=True)
class Method:
    """One row."""

    name: str
    """In the config"""
    title: str
    """In tables, as in the paper"""
    group: str
    """Block of the table: Reference, Full HR, SC (selective computation), LR only, Ours"""
    sees: Sees
    head: str = ""
    """Name of its head; of LRMIL and LR-only the config's student says it"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the head that a comparison sets; the config's `compare.options` go before them"""
    in_paper: bool = True


# In comparisons classes exclude each other, which is what CLAM calls subtyping.
_SUBTYPING = {"subtyping": True}

METHODS: tuple[Method, ...] = (
    Method("majority", MAJORITY, GROUPS[MAJORITY], "nothing", in_paper=False),
    Method("max_pool", "Max-P", "Full HR", "hr", "max_pool"),
    Method("mean_pool", "Mean-P", "Full HR", "hr", "mean_pool"),
    Method("instance_max", "Instance max", "Full HR", "hr", "instance_max", in_paper=False),
    Method("abmil", "ABMIL", "Full HR", "hr", "abmil"),
    Method("clam_mb", "CLAM-MB", "Full HR", "hr", "clam_mb", _SUBTYPING),
    Method("clam_sb", "CLAM-SB", "Full HR", "hr", "clam_sb", _SUBTYPING),
    Method("dsmil", "DSMIL", "Full HR", "hr", "dsmil"),
    Method("transmil", "TransMIL", "Full HR", "hr", "transmil", {"rollout": False}),
    Method("dtfd", "DTFD-MIL", "Full HR", "hr", "dtfd"),
    Method("zoommil", "ZOOMMIL", "SC", "chosen", "zoommil"),
    Method("hdmil", "HDMIL", "SC", "chosen", "hdmil"),
    Method("lr_only", LR_ONLY, GROUPS[LR_ONLY], "lr", in_paper=False),
    Method("lrmil", LRMIL, GROUPS[LRMIL], "lrmil"),
)
_OF_TORCHMIL = "torchmil:"


def methods_named(names: Sequence[str], kind: TaskKind = "classification") -> tuple[Method, ...]:
    """Return the methods of these names, in the order of `METHODS`; `torchmil:CLASS` is that class on 20x patches.

    `majority` is the answer that looks at no slide: where no classes are asked for, it has another title.

    Raises:
        ConfigError: there is no such method.
    """
    known = {method.name: method for method in METHODS}
    wrong = [n for n in names if n not in known and not n.startswith(_OF_TORCHMIL)]
    if wrong:
        raise ConfigError(
            f"compare.methods: there is no method {wrong[0]!r}.",
            fix=f"Choose from {', '.join(known)}, or {_OF_TORCHMIL}CLASS.",
        )
    chosen = [m if m.sees != "nothing" else replace(m, title=constant_title(kind)) for m in METHODS if m.name in names]
    foreign = [n for n in dict.fromkeys(names) if n not in known]
    own = [Method(n, n.removeprefix(_OF_TORCHMIL), "Full HR", "hr", n, in_paper=False) for n in foreign]
    return (*chosen, *own)


def reference_of(name: str | None, methods: Sequence[Method], *, features_alone: bool = False) -> Method:
    """Return the method that all others are compared with: `name`, or by default LRMIL; ABMIL where LRMIL cannot be.

    Raises:
        ConfigError: it is not among the methods, or there is no other.
    """
    wanted = name or ("abmil" if features_alone else "lrmil")
    found = next((m for m in methods if m.name == wanted), None)
    if found is None:
        raise ConfigError(
            f"compare.methods: {wanted} is missing, with which all others are compared.",
            fix=f"Add {wanted} to the list, or name another method as compare.reference.",
        )
    if len(methods) < 2:
        raise ConfigError(f"compare.methods: there is only {wanted}, and nothing to compare it with.", fix="Add some.")
    return found


def for_features(settings: RunSettings, reporter: Reporter) -> RunSettings:
    """Return settings for a cohort without slides. Of the default list, methods that need slides are left out.

    Raises:
        ConfigError: names the methods that were asked for and need slides.
    """
    needing = {m.name for m in METHODS if m.sees not in ("nothing", "hr")}
    refused = [n for n in settings.compare.methods if n in needing]
    if refused and "methods" in settings.compare.model_fields_set:
        raise ConfigError(
            f"compare.methods: {', '.join(refused)} need slides, and the cohort brings features alone.",
            fix="Leave them out, or add a column path.",
        )
    if refused:
        reporter.line(f"Features alone: {', '.join(refused)} need slides and are left out.")
    return _without(settings, refused)


def for_task(settings: RunSettings, reporter: Reporter) -> RunSettings:
    """Return settings for a task that not every head can learn: the default list loses the methods that cannot.

    Methods that were asked for by name stay, and are refused by theirs when heads are made.
    """
    if "methods" in settings.compare.model_fields_set:
        return settings
    meaning = make_objective(settings.cohort.kind, 2, settings.objective).name
    heads = {m.name: m.head for m in METHODS if m.head}
    refused = [n for n in settings.compare.methods if n in heads and support(heads[n], meaning).how == "refused"]
    if not refused:
        return settings
    reporter.line(f"Left out of the methods: {', '.join(refused)}, which cannot learn {meaning}.")
    return _without(settings, refused)


def _without(settings: RunSettings, refused: Sequence[str]) -> RunSettings:
    """Return settings whose default list of methods is shorter; it still counts as the default."""
    kept = [n for n in settings.compare.methods if n not in refused]
    shorter = settings.compare.model_copy(update={"methods": kept})
    if "methods" not in settings.compare.model_fields_set:
        shorter.model_fields_set.discard("methods")
    return settings.model_copy(update={"compare": shorter})


def baseline_settings(settings: RunSettings, method: Method) -> TeacherSettings:
    """Return how a baseline is trained: like the teacher but for its head, or by its own program's recipe."""
    head = {"name": method.head, "options": {**method.options, **settings.compare.options.get(method.name, {})}}
    return TeacherSettings.model_validate(
        settings.teacher.model_dump() | {"head": head, "recipe": settings.compare.recipe}
    )
