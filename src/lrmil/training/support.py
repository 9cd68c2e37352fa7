"""Which head can learn which task, and how: one table, and what follows from it. docs/tasks.md shows it to people.

as it is   the loss of the task takes the place of the cross-entropy of the head's logits
bins       also: the head's own losses are given the quantile bin of the training split in place of the class
streams    also: the loss of the task is taken of the head's further logits, too (`HeadOutput.streams`)
refused    some part of the method is defined for classes alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lrmil.errors import ConfigError
from lrmil.mil import HeadSettings
from lrmil.mil.readout import Meaning
from lrmil.training.objectives import Objective

How = Literal["as it is", "bins", "streams", "refused"]


@dataclass(frozen=True)
class Support:
    """How one head learns one task."""

    how: How
    why: str = ""
    """For people: what is done, or why it is refused"""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Options that may have these values alone, the default among them"""


_AS_IT_IS = Support("as it is")
_ANY: dict[Meaning, Support] = dict.fromkeys(("classification", "regression", "cox", "hazards"), _AS_IT_IS)
_TIER1 = Support(
    "streams", "tier 1 learns the target of the slide for every pseudo-bag", {"distillation": ("afs", "mas")}
)
_MAX = Support(
    "streams",
    "the stream of instances learns the target of the slide, too",
    {"loss": ("ce",), "average": (False,), "one_output": (False,)},
)
_NO_MASKS = Support("refused", "its masks and its losses are defined by class probabilities")


def _bins(what: str) -> Support:
    return Support("bins", f"the instance loss takes {what}")


_CLAM: dict[Meaning, Support] = {
    "classification": _AS_IT_IS,
    "regression": _bins("quantile bins of the number for classes"),
    "cox": _bins(
        "quantile bins of the events' times for classes (none for a slide whose bin is not known, being censored)"
    ),
    "hazards": _bins(
        "the intervals of time for classes (none for a slide whose interval is not known, being censored)"
    ),
}
MATRIX: dict[str, dict[Meaning, Support]] = {
    "abmil": _ANY,
    "abmil_original": _ANY | {"hazards": Support("refused", "it has one output, not one an interval")},
    "clam_mb": _CLAM,
    "clam_sb": _CLAM,
    "dmin": _ANY | {"regression": _NO_MASKS, "cox": _NO_MASKS, "hazards": _NO_MASKS},
    "dsmil": _ANY | {"regression": _MAX, "cox": _MAX, "hazards": _MAX},
    "dtfd": _ANY
    | {
        "regression": _TIER1,
        "cox": _TIER1,
        "hazards": Support("streams", _TIER1.why, {**_TIER1.only, "random_splits": (1,)}),
    },
    "hdmil": _ANY | {"regression": _NO_MASKS, "cox": _NO_MASKS, "hazards": _NO_MASKS},
    "instance_max": _ANY
    | {
        "regression": Support("as it is", "the instance with the largest output decides"),
        "cox": Support("as it is", "the instance with the largest output decides"),
        "hazards": Support("refused", "it picks the instance that is most sure of a class"),
    },
    "max_pool": _ANY,
    "mean_pool": _ANY,
    "transmil": _ANY,
    "zoommil": _ANY,
}
"""By name of the head and meaning of its logits"""


def support(head: str, meaning: Meaning) -> Support:
    """Return how a head learns a task; a head that is not in the table is taken as it is."""
    return MATRIX.get(head, _ANY)[meaning]


def fitting_head(head: HeadSettings, objective: Objective) -> HeadSettings:
    """Return a head with the options that a task asks of it.

    Raises:
        ConfigError: the head cannot learn that task, or not with these options; names it.
    """
    found = support(head.name, objective.name)
    if found.how == "refused":
        able = [name for name, row in MATRIX.items() if row[objective.name].how != "refused"]
        raise ConfigError(
            f"head {head.name!r} cannot learn {objective.name}: {found.why}.", fix=f"Choose one of: {', '.join(able)}."
        )
    for option, allowed in found.only.items():
        value = head.options.get(option, allowed[0])
        if value not in allowed:
            wanted = " or ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in allowed)
            raise ConfigError(
                f"head {head.name!r} with {option}: {str(value).lower()} cannot learn {objective.name}, since that is "
                f"defined by classes.",
                fix=f"Set {option}: {wanted}.",
            )
    if found.how != "bins":
        return head
    wanted_classes = {"instance_classes": objective.label_classes}
    if head.options.get("instance_classes", objective.label_classes) != objective.label_classes:
        raise ConfigError(
            f"head {head.name!r} has instance_classes: {head.options['instance_classes']}, but the task has "
            f"{objective.label_classes} bins.",
            fix="Leave that option out.",
        )
    return head.model_copy(update={"options": head.options | wanted_classes})
