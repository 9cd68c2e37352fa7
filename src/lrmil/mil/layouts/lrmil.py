"""The authors' MILClassifier (teacher) and StudentMIL, plain and gated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lrmil.mil.layouts.layout import HeadShape, OriginalFormat, State, matrix_shape, with_bias


def _lrmil_shape(first_layer: str, *, gated: bool) -> Callable[[State], HeadShape]:
    def shape(state: State) -> HeadShape:
        hidden, in_dim = matrix_shape(state, first_layer)
        options: dict[str, Any] = {"gated": gated, "hidden_dim": hidden}
        if "inst_classifier.weight" in state:
            options["instance_classifier"] = "features"
        return in_dim, matrix_shape(state, "cls.weight")[0], options

    return shape


LRMIL = (
    OriginalFormat(
        title="LRMIL's MILClassifier or StudentMIL, plain attention",
        head="abmil",
        marks=frozenset({"mil.attention.0.weight", "cls.weight"}),
        names=with_bias(
            {
                "mil.attention.0": "attention_v",
                "mil.attention.2": "attention_w",
                "cls": "classifier",
                "inst_classifier": "instance_classifier",
            }
        ),
        shape=_lrmil_shape("mil.attention.0.weight", gated=False),
    ),
    OriginalFormat(
        title="LRMIL's MILClassifier or StudentMIL, gated attention",
        head="abmil",
        marks=frozenset({"mil.attn_a.0.weight", "cls.weight"}),
        names=with_bias(
            {
                "mil.attn_a.0": "attention_v",
                "mil.attn_b.0": "attention_u",
                "mil.attn_c": "attention_w",
                "cls": "classifier",
                "inst_classifier": "instance_classifier",
            }
        ),
        shape=_lrmil_shape("mil.attn_a.0.weight", gated=True),
    ),
)
