"""CLAM's models of all its versions: CLAM_SB, CLAM_MB, MIL_fc and MIL_fc_mc.

Layers that do nothing are numbered too. In older versions dropout was a flag: without it, the attention is layer 2 of
`attention_net`, not 3, and the ungated attention's last layer is 2, not 3. Now the first is always 3, and the second is
2 only where dropout is 0. The rate of dropout is not in the file: where there was any, heads get the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrmil.mil.layouts.layout import HeadShape, OriginalFormat, State, matrix_shape, with_bias

_MOST_CLASSES = 256
_SIZES = {(512, 256): {"size": "small"}, (512, 384): {"size": "big"}}
_SVM_BUFFER = "instance_loss_fn.labels"
"""Class numbers, which the SVM loss keeps; they say only that it was used"""


def _clam(head: str, attention: Mapping[str, str], *, dropout: bool) -> OriginalFormat:
    classes = range(_MOST_CLASSES)
    several = head == "clam_mb"
    bag = {f"classifiers.{c}": f"classifiers.{c}" for c in classes} if several else {"classifiers": "classifiers"}
    instances = {f"instance_classifiers.{c}": f"instance_classifiers.{c}" for c in classes}
    first, last = f"{next(iter(attention))}.weight", f"{list(attention)[-1]}.weight"

    def shape(state: State) -> HeadShape:
        embed, in_dim = matrix_shape(state, "attention_net.0.weight")
        hidden = matrix_shape(state, first)[0]
        options: dict[str, Any] = dict(
            _SIZES.get((embed, hidden), {"embed_dim": embed, "attention_dim": hidden}),
            gated=len(attention) == 3,
            instance_loss="svm" if _SVM_BUFFER in state else "ce",
        )
        if not dropout:
            options["dropout"] = 0.0
        return in_dim, matrix_shape(state, last if several else "classifiers.weight")[0], options

    return OriginalFormat(
        title=f"CLAM's {head.upper()}, {'gated' if len(attention) == 3 else 'ungated'} at {next(iter(attention))}",
        head=head,
        marks=frozenset({f"{key}.weight" for key in attention} | {f"{next(iter(bag))}.weight"}),
        names=with_bias({"attention_net.0": "embed", **attention, **bag, **instances}),
        shape=shape,
        ignored=frozenset({_SVM_BUFFER}),
    )


def _gated(layer: int) -> dict[str, str]:
    at = f"attention_net.{layer}.attention"
    return {f"{at}_a.0": "attention_v", f"{at}_b.0": "attention_u", f"{at}_c": "attention_w"}


def _ungated(layer: int, last: int) -> dict[str, str]:
    at = f"attention_net.{layer}.module"
    return {f"{at}.0": "attention_v", f"{at}.{last}": "attention_w"}


def _all_versions(head: str) -> tuple[OriginalFormat, ...]:
    return (
        _clam(head, _gated(3), dropout=True),
        _clam(head, _gated(2), dropout=False),
        _clam(head, _ungated(3, 3), dropout=True),
        _clam(head, _ungated(3, 2), dropout=False),
        _clam(head, _ungated(2, 2), dropout=False),
    )


def _instance_max(title: str, embed: str, last: str, options: dict[str, Any]) -> OriginalFormat:
    def shape(state: State) -> HeadShape:
        width, in_dim = matrix_shape(state, f"{embed}.weight")
        return in_dim, matrix_shape(state, f"{last}.weight")[0], options | {"embed_dim": width}

    return OriginalFormat(
        title=f"CLAM's {title}",
        head="instance_max",
        marks=frozenset({f"{embed}.weight", f"{last}.weight"}),
        names=with_bias({embed: "embed", last: "classifier"}),
        shape=shape,
    )


CLAM_SB = _all_versions("clam_sb")
CLAM_MB = _all_versions("clam_mb")
INSTANCE_MAX = (
    _instance_max("MIL_fc", "fc.0", "classifier", {}),
    _instance_max("MIL_fc_mc", "fc.0", "classifiers", {}),
    _instance_max("older MIL_fc", "classifier.0", "classifier.3", {}),
    _instance_max("older MIL_fc without dropout", "classifier.0", "classifier.2", {"dropout": 0.0}),
)
