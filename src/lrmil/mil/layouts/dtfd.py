"""DTFD-MIL: a dict of four state dicts, `classifier`, `attention`, `dim_reduction` and `att_classifier`.

The file does not say how many pseudo-bags there were, nor what they handed to tier 2: give `distillation`, `groups` and
`total_instance` where they are not AFS, 4 and 4. Instances are ranked by the last class, as they were in training.
"""

from __future__ import annotations

from lrmil.mil.layouts.layout import HeadShape, OriginalFormat, State, matrix_shape, with_bias

_MOST_BLOCKS = 16


def _shape(state: State) -> HeadShape:
    hidden, in_dim = matrix_shape(state, "dim_reduction.fc1.weight")
    return (
        in_dim,
        matrix_shape(state, "classifier.fc.weight")[0],
        {
            "hidden_dim": hidden,
            "attention_dim": matrix_shape(state, "attention.attention_V.0.weight")[0],
            "residual_layers": sum(key.endswith(".block.0.weight") for key in state),
            "instance_class": "last",
        },
    )


DTFD = (
    OriginalFormat(
        title="DTFD-MIL",
        head="dtfd",
        marks=frozenset({"dim_reduction.fc1.weight", "attention.attention_V.0.weight", "classifier.fc.weight"}),
        names={
            "dim_reduction.fc1.weight": "reduction.fc1.weight",
            **{
                f"dim_reduction.resBlocks.{i}.block.{part}.weight": f"reduction.blocks.{i}.{part}.weight"
                for i in range(_MOST_BLOCKS)
                for part in (0, 2)
            },
        }
        | with_bias(
            {
                "attention.attention_V.0": "attention.v",
                "attention.attention_U.0": "attention.u",
                "attention.attention_weights": "attention.w",
                "classifier.fc": "classifier",
                "att_classifier.attention.attention_V.0": "tier2.attention.v",
                "att_classifier.attention.attention_U.0": "tier2.attention.u",
                "att_classifier.attention.attention_weights": "tier2.attention.w",
                "att_classifier.classifier.fc": "tier2.classifier",
            }
        ),
        shape=_shape,
        untold=("distillation", "groups", "total_instance"),
    ),
)
