"""Ilse et al.'s Attention and GatedAttention, trained on digits with a feature extractor of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrmil.mil.layouts.layout import HeadShape, OriginalFormat, State, left_out, matrix_shape, with_bias

_EXTRACTOR = "feature_extractor_part"


def _format(title: str, names: Mapping[str, str], options: dict[str, Any]) -> OriginalFormat:
    first = f"{next(iter(names))}.weight"

    def shape(state: State) -> HeadShape:
        hidden, in_dim = matrix_shape(state, first)
        return in_dim, 2, options | {"hidden_dim": hidden}

    def remark(state: State) -> str | None:
        return left_out(state, _EXTRACTOR, f"give the head the {matrix_shape(state, first)[1]} features it makes")

    return OriginalFormat(
        title=f"Ilse et al.'s {title}",
        head="abmil_original",
        marks=frozenset(f"{key}.weight" for key in names),
        names=with_bias(names),
        shape=shape,
        ignored_prefixes=(_EXTRACTOR,),
        remark=remark,
    )


def _gated(title: str, last: str) -> OriginalFormat:
    names = {
        "attention_V.0": "attention_v",
        "attention_U.0": "attention_u",
        last: "attention_w",
        "classifier.0": "classifier",
    }
    return _format(title, names, {"gated": True})


ABMIL_ORIGINAL = (
    _format(
        "Attention",
        {"attention.0": "attention_v", "attention.2": "attention_w", "classifier.0": "classifier"},
        {"gated": False},
    ),
    _gated("GatedAttention", "attention_w"),
    _gated("GatedAttention, older", "attention_weights"),
)
