"""ZoomMIL's own checkpoints."""

from __future__ import annotations

from lrmil.mil.layouts.layout import HeadShape, OriginalFormat, State, matrix_shape, with_bias


def _shape(state: State) -> HeadShape:
    out_dim, in_dim = matrix_shape(state, "fc_low_mag.0.weight")
    hidden_dim = matrix_shape(state, "ga_low_mag.attention_a.0.weight")[0]
    return in_dim, matrix_shape(state, "classify_head.weight")[0], {"out_dim": out_dim, "hidden_dim": hidden_dim}


def _names() -> dict[str, str]:
    names = {"classify_head": "classifier"}
    for scale in ("low", "mid", "high"):
        names[f"fc_{scale}_mag.0"] = f"{scale}.embed.0"
        for old, new in ((f"ga_{scale}_mag", "attention"), (f"aux_ga_{scale}_mag", "selection")):
            if (scale, new) == ("high", "selection"):
                continue
            names[f"{old}.attention_a.0"] = f"{scale}.{new}.v"
            names[f"{old}.attention_b.0"] = f"{scale}.{new}.u"
            names[f"{old}.attention_c"] = f"{scale}.{new}.w"
    return with_bias(names)


ZOOMMIL = (
    OriginalFormat(
        title="ZoomMIL, three magnifications",
        head="zoommil",
        marks=frozenset({"aux_ga_low_mag.attention_c.weight", "aux_ga_mid_mag.attention_c.weight"}),
        names=_names(),
        shape=_shape,
    ),
)
