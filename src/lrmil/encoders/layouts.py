"""Checkpoints come in several layouts; here each becomes the names that the encoder has. Pure functions of dicts.

    timm            blocks.0.attn.qkv.weight, ls1.gamma, reg_token
    DINOv2          the same, but register_tokens, mlp.w12 / mlp.w3 for SwiGLU, blocks possibly in chunks
    transformers    embeddings.*, encoder.layer.0.attention.attention.query.weight, layer_scale1.lambda1, layernorm.*
    CONCH           visual.trunk.<timm> beside visual.attn_pool_contrast.*, visual.ln_contrast.*, visual.proj_contrast
    LRMIL stage 1   CONCH as conch_model.*, and its trunk once more as visual.<timm>

Any of them may sit under `state_dict`, or below prefixes such as `module.`. The trunk is found by its patch embedding,
and everything outside it (text towers, decoders, heads of the pretraining) is left alone.
"""

from __future__ import annotations

import re

import torch

from lrmil.errors import CheckpointError

StateDict = dict[str, torch.Tensor]

_TIMM_ANCHOR = "patch_embed.proj.weight"
_HF_ANCHOR = "embeddings.patch_embeddings.projection.weight"
_NOT_OURS = ("head.", "head_dist.", "mask_token", "dino_head.", "ibot_head.")
_POOL_PARTS = ("attn_pool_contrast.", "ln_contrast.", "proj_contrast")

_HF_NAMES = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)


def unwrap(content: object, *, origin: str) -> StateDict:
    """Return the tensors of a loaded checkpoint, whatever dictionary they are wrapped in.

    Raises:
        CheckpointError: there are none.
    """
    for _ in range(4):
        if not isinstance(content, dict):
            break
        # First, since a training loop may leave a tensor beside it, such as its step.
        wrapped = [
            k for k in ("state_dict", "model_state_dict", "model", "teacher") if isinstance(content.get(k), dict)
        ]
        if wrapped:
            content = content[wrapped[0]]
            continue
        tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
        if tensors:
            return tensors
        break
    raise CheckpointError(f"{origin}: there are no named tensors in it.", fix="Give a state dict, best as safetensors.")


def split_checkpoint(state: StateDict, *, origin: str) -> tuple[StateDict, StateDict]:
    """Return the trunk (in timm's or DINOv2's names) and CONCH's contrast pool (empty where there is none).

    Raises:
        CheckpointError: there is no ViT in it, or several.
    """
    state = {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}
    root = _find_root(state, origin=origin)
    trunk = {key[len(root) :]: value for key, value in state.items() if key.startswith(root)}
    if _HF_ANCHOR in trunk:
        trunk = _from_transformers(trunk)
    trunk = {key: value for key, value in trunk.items() if not key.startswith(_NOT_OURS)}

    queries = [key for key in state if key.endswith("attn_pool_contrast.query")]
    pool: StateDict = {}
    if len(queries) == 1:
        pool_root = queries[0].removesuffix("attn_pool_contrast.query")
        below = ((key[len(pool_root) :], value) for key, value in state.items() if key.startswith(pool_root))
        pool = {key: value for key, value in below if key.startswith(_POOL_PARTS)}
    return trunk, pool


def to_timm(trunk: StateDict, *, no_embed_class: bool) -> StateDict:
    """Turn a trunk in DINOv2's names into timm's; a trunk in timm's names passes through.

    DINOv2 keeps a position for the class token and none for registers. A timm model built with `no_embed_class` has no
    position for either, so that the one of the class token is added to the token itself: the sum is the same.
    """
    out: StateDict = {}
    chunked = any(re.match(r"blocks\.\d+\.\d+\.", key) for key in trunk)
    for key, value in trunk.items():
        if chunked:
            key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        out["reg_token" if key == "register_tokens" else key] = value
    if "register_tokens" in trunk and no_embed_class and {"cls_token", "pos_embed"} <= out.keys():
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def _find_root(state: StateDict, *, origin: str) -> str:
    roots = {key.removesuffix(a) for a in (_HF_ANCHOR, _TIMM_ANCHOR) for key in state if key.endswith(a)}
    if {"visual.", "conch_model.visual.trunk."} <= roots:
        return "visual."  # one module under two names in the released stage-1 files; the values are the same
    if len(roots) == 1:
        return roots.pop()
    if not roots:
        raise CheckpointError(
            f"{origin}: there is no patch embedding in it, so it is not a vision transformer.",
            fix="Give the weight file of the image encoder.",
        )
    raise CheckpointError(
        f"{origin}: there are several vision transformers in it, below {', '.join(sorted(map(repr, roots)))}.",
        fix="Save the wanted one to a file of its own.",
    )


def _from_transformers(trunk: StateDict) -> StateDict:
    renamed: StateDict = {}
    for key, value in trunk.items():
        for pattern, replacement in _HF_NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    for key in [k for k in renamed if ".attn.query." in k]:
        parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            renamed[key.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed
