"""Encoders that this package ships: weights/<name>.json describes weights/<name>.safetensors.

The JSON is written by whoever trained the weights and is the only place that says how wide the network is. Needed:
width, depth, heads, token_px, input_px, mean, std, sha256. Understood as well: mlp_ratio, init_values (LayerScale),
reg_tokens, table_px (default: input_px), credit (to be cited), and any field of a card, such as title or native_mpp.
"""

from __future__ import annotations

import json
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from lrmil.encoders.cards import EncoderCard, register_encoder

_REQUIRED = ("width", "depth", "heads", "token_px", "input_px", "mean", "std", "sha256")
_ARCH_ARGS = ("mlp_ratio", "init_values", "reg_tokens", "no_embed_class")


def register_all() -> None:
    """Put the cards of all shipped encoders into the registry."""
    folder = resources.files("lrmil.encoders") / "weights"
    if folder.is_dir():
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if entry.name.endswith(".json"):
                register_encoder(packaged_card(entry))


def packaged_card(entry: Traversable) -> EncoderCard:
    """Make a card from the JSON beside a shipped weight file."""
    name = entry.name.removesuffix(".json")
    facts: dict[str, Any] = json.loads(entry.read_text(encoding="utf-8"))
    missing = [key for key in _REQUIRED if key not in facts]
    if missing:
        raise ValueError(f"{entry.name} lacks {', '.join(missing)}")
    arch_args = {"embed_dim": facts["width"], "depth": facts["depth"], "num_heads": facts["heads"]}
    arch_args |= {"patch_size": facts["token_px"]} | {key: facts[key] for key in _ARCH_ARGS if key in facts}
    fields = {
        "name": name,
        "title": name,
        "architecture": "vit_small_patch8_224",
        "arch_args": arch_args,
        "table_px": facts.get("table_px", facts["input_px"]),
        "licence": "Apache-2.0",
        "share_derivatives": True,
        "citation": facts.get("credit", ""),
        "package_file": f"weights/{name}.safetensors",
        "package_sha256": facts["sha256"],
    }
    fields |= {key: facts[key] for key in facts.keys() & EncoderCard.model_fields.keys()}
    return EncoderCard.model_validate(fields)
