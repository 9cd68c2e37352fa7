"""DSMIL's MILNet, trained on features or, with a feature extractor inside, on images."""

from __future__ import annotations

from typing import Any

from lrmil.mil.layouts.layout import HeadShape, OriginalFormat, State, left_out, matrix_shape, with_bias

_EXTRACTOR = "i_classifier.feature_extractor."
_VALUE = "b_classifier.v.1"


def _dsmil(title: str, instance_scores: str, query: dict[str, str]) -> OriginalFormat:
    linear = len(query) == 1

    def shape(state: State) -> HeadShape:
        outputs, in_dim = matrix_shape(state, f"{instance_scores}.weight")
        options: dict[str, Any] = {"loss": "bce", "query": "linear" if linear else "nonlinear"}
        if f"{_VALUE}.weight" in state:
            options["passing_v"] = True
        if outputs == 1:
            options["one_output"] = True
        return in_dim, max(outputs, 2), options

    def remark(state: State) -> str | None:
        width = matrix_shape(state, f"{instance_scores}.weight")[1]
        notes = [left_out(state, _EXTRACTOR, f"give the head the {width} features it makes of an image")]
        if linear and f"{_VALUE}.weight" in state:
            notes.append(
                "its projection of instances is read with a ReLU behind it, which the first version of the program "
                "did not have and the weights do not tell; if the file is that old, load it with value_relu=False."
            )
        return " ".join(note for note in notes if note) or None

    return OriginalFormat(
        title=f"DSMIL's MILNet, {title}",
        head="dsmil",
        marks=frozenset({f"{instance_scores}.weight", "b_classifier.fcc.weight"} | {f"{key}.weight" for key in query}),
        names=with_bias(
            {instance_scores: "instance_scores", **query, _VALUE: "value.1", "b_classifier.fcc": "bag_scores"}
        ),
        shape=shape,
        ignored_prefixes=(_EXTRACTOR,),
        remark=remark,
    )


_NONLINEAR = {"b_classifier.q.0": "query.0", "b_classifier.q.2": "query.2"}
_LINEAR = {"b_classifier.q": "query"}
DSMIL = (
    _dsmil("of features", "i_classifier.fc.0", _NONLINEAR),
    _dsmil("of features, linear query", "i_classifier.fc.0", _LINEAR),
    _dsmil("of images", "i_classifier.fc", _NONLINEAR),
    _dsmil("of images, linear query", "i_classifier.fc", _LINEAR),
)
