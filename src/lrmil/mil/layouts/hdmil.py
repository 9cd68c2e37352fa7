"""HDMIL's two checkpoints: DMIN's alone, or DMIN's and LIPN's together.

HDMIL writes a file for each step. Put their dicts together, `{**dmin, **lipn}`, or as `{"dmin": dmin, "lipn": lipn}`.
"""

from __future__ import annotations

from lrmil.errors import CheckpointError
from lrmil.mil.layouts.layout import HeadShape, OriginalFormat, State, matrix_shape, with_bias

_MOST_CLASSES = 256
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _dmin_names(prefix: str, own: str) -> dict[str, str]:
    attention = "attention_net.3.attention"
    linear = {
        "attention_net.0": "embed.0",
        f"{attention}_a.0": "attention_v",
        f"{attention}_b.0": "attention_u",
        f"{attention}_c": "attention_w",
    }
    names = with_bias(linear)
    for c in range(_MOST_CLASSES):
        for layer in ("classifiers", "instance_classifiers"):
            names[f"{layer}.{c}.act_fun.0.cheby_coeffs"] = f"{layer}.{c}.coefficients"
    return {prefix + old: own + new for old, new in names.items()}


def _lipn_names(prefix: str) -> dict[str, str]:
    names = with_bias({"classifier": "classifier"})

    def layer(conv: str, norm: str, new: str) -> None:
        names[f"{conv}.weight"] = f"{new}.0.weight"
        names.update({f"{norm}.{part}": f"{new}.1.{part}" for part in _NORM})

    for i in range(5):
        layer(f"features.{i}.block.0", f"features.{i}.block.1", f"features.{i}")
    for i in (5, 6):
        for place, part in enumerate(("start_dw", "expand", "middle_dw", "proj")):
            layer(f"features.{i}.{part}_conv", f"features.{i}.{part}_norm", f"features.{i}.{place}")
    layer("conv.block.0", "conv.block.1", "last")
    return {f"{prefix}extractor.{old}": f"lipn.{new}" for old, new in names.items()}


def _dmin(title: str, head: str, prefix: str, own: str, lipn: str | None) -> OriginalFormat:
    first = f"{prefix}classifiers.0.act_fun.0.cheby_coeffs"
    last = f"{prefix}attention_net.3.attention_c.weight"

    def shape(state: State) -> HeadShape:
        embed_dim, in_dim = matrix_shape(state, f"{prefix}attention_net.0.weight")
        num_classes, hidden_dim = matrix_shape(state, last)
        if state[first].ndim != 3:
            raise CheckpointError(f"{first} has {state[first].ndim} dimensions, not 3.", fix="Is it of another method?")
        degree = state[first].shape[2] - 1
        return in_dim, num_classes, {"embed_dim": embed_dim, "hidden_dim": hidden_dim, "degree": degree}

    names = _dmin_names(prefix, own) | ({} if lipn is None else _lipn_names(lipn))
    marks = {first, last} | (set() if lipn is None else {f"{lipn}extractor.classifier.weight"})
    return OriginalFormat(
        title=title,
        head=head,
        marks=frozenset(marks),
        names=names,
        shape=shape,
        # Numbers of the classes, which the SVM loss of the original keeps.
        ignored=frozenset({f"{prefix}instance_loss_fn.labels"}),
    )


DMIN = (_dmin("HDMIL's DMIN", "dmin", "", "", None),)
HDMIL = (
    _dmin("HDMIL's DMIN and LIPN", "hdmil", "", "dmin.", ""),
    _dmin("HDMIL's DMIN and LIPN, by name", "hdmil", "dmin.", "dmin.", "lipn."),
)
