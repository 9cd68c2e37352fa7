"""TransMIL; its Lightning files put `model.` before every key.

The file does not say which release of nystrom-attention it was trained with: 0.0.9, which the repository pins, needs
`nystrom_keep="head"`; 0.0.11 and later need the default.
"""

from __future__ import annotations

from lrmil.errors import CheckpointError
from lrmil.mil.layouts.layout import HeadShape, OriginalFormat, State, matrix_shape, with_bias


def _shape(state: State) -> HeadShape:
    dim, in_dim = matrix_shape(state, "_fc1.0.weight")
    convolution = state["layer1.attn.res_conv.weight"]
    if convolution.ndim != 4:
        raise CheckpointError(
            f"layer1.attn.res_conv.weight has shape {tuple(convolution.shape)}, wanted (heads, 1, 33, 1)."
        )
    return in_dim, matrix_shape(state, "_fc2.weight")[0], {"dim": dim, "heads": len(convolution)}


TRANSMIL = (
    OriginalFormat(
        title="TransMIL",
        head="transmil",
        marks=frozenset({"_fc1.0.weight", "cls_token", "layer1.attn.res_conv.weight"}),
        names={
            key: key
            for key in (
                "cls_token",
                "layer1.attn.to_qkv.weight",
                "layer1.attn.res_conv.weight",
                "layer2.attn.to_qkv.weight",
                "layer2.attn.res_conv.weight",
            )
        }
        | with_bias(
            {
                "_fc1.0": "fc1",
                "layer1.norm": "layer1.norm",
                "layer1.attn.to_out.0": "layer1.attn.to_out",
                "pos_layer.proj": "pos_layer.proj",
                "pos_layer.proj1": "pos_layer.proj1",
                "pos_layer.proj2": "pos_layer.proj2",
                "layer2.norm": "layer2.norm",
                "layer2.attn.to_out.0": "layer2.attn.to_out",
                "norm": "norm",
                "_fc2": "fc2",
            }
        ),
        shape=_shape,
        untold=("nystrom_keep",),
    ),
)
