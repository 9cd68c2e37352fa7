"""Checkpoints of the original programs, read into our heads.

What each program called its keys is in `layouts`, a file a method.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lrmil.errors import CheckpointError
from lrmil.mil.base import Head
from lrmil.mil.layouts import LAYOUTS, OriginalFormat
from lrmil.mil.layouts.layout import State
from lrmil.mil.registry import create_head

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "model.")


def load_original(name: str, source: str | os.PathLike[str] | Mapping[str, Any], **options: Any) -> Any:
    """Read a checkpoint of an original program.

    Args:
        name: the method: "lrmil" (the authors' MILClassifier and StudentMIL, plain or gated); "abmil" is the same.
            "abmil_original" (Ilse et al., plain or gated). "clam_sb", "clam_mb" (old and new CLAM, gated or not) and
            "instance_max" (CLAM's MIL_fc and MIL_fc_mc). "dsmil" (of features or of images, any query and value).
            "transmil". "dtfd" (a dict of four state dicts). "zoommil". "hdmil", whose two files go in together as
            {"dmin": ..., "lipn": ...} or one dict; "dmin" alone.
            A feature extractor in the file is not read, and a warning says so.
        source: a .pth/.pt/.bin/.safetensors file, or a state dict. The prefixes `module.` and `model.` are removed, and
            a dict that holds the state under "state_dict" or "model" is opened. Pickles are read as tensors only.
        **options: options of the head, for what the weights do not tell, such as `nystrom_keep` of "transmil" and
            `distillation` of "dtfd"; they win over what is read off the weights. A warning names those that matter and
            are not given.

    Returns:
        The head, in eval mode: a `MILHead`, or a `MultiScaleHead` where `HeadCard.scales` is "many".

    Raises:
        CheckpointError: unsafe or unreadable, of another method, or some keys do not fit; the message names them.
        HeadError: the head has no such option.
    """
    formats = LAYOUTS.get(name)
    if formats is None:
        raise CheckpointError(
            f"no checkpoint layout is known for {name!r}.", fix=f"Choose one of: {', '.join(sorted(LAYOUTS))}."
        )
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    state = _without_prefixes(_flat_state(source if isinstance(source, Mapping) else _read(Path(source)), where))
    for layout in formats:
        if layout.marks <= state.keys():
            return _build(layout, state, where, options)
    wanted = "; or ".join(", ".join(sorted(f.marks)) for f in formats)
    raise CheckpointError(
        f"{where} is not a checkpoint of {name!r}: its keys are {_some(state)}; those of {name!r} have {wanted}.",
        fix="Check the file, or the method's name.",
    )


def _build(layout: OriginalFormat, state: State, where: str, chosen: Mapping[str, Any]) -> Head:
    in_dim, num_classes, options = layout.shape(state)
    head = create_head(layout.head, in_dim, num_classes, **{**options, **chosen})
    own = head.state_dict()
    found: State = {}
    problems = []
    for key, value in state.items():
        target = layout.names.get(key)
        if key in layout.ignored or key.startswith(layout.ignored_prefixes):
            continue
        if target is None or target not in own:
            problems.append(f"{key}: unexpected")
        elif value.shape != own[target].shape:
            problems.append(f"{key}: shape {tuple(value.shape)}, wanted {tuple(own[target].shape)}")
        elif not bool(torch.isfinite(value).all()):
            problems.append(f"{key}: holds NaN or infinity")
        else:
            found[target] = value.float()
    for key, target in layout.names.items():
        if target in own and key not in state:
            problems.append(f"{key}: missing")
    if problems:
        raise CheckpointError(
            f"{where}, read as {layout.title}, does not fit: {'; '.join(problems)}.",
            fix="Is it a checkpoint of another variant or method?",
        )
    head.load_state_dict(found)
    if missing := [f"{name}={getattr(head.options, name)!r}" for name in layout.untold if name not in chosen]:
        warnings.warn(
            f"{where}, read as {layout.title}: the weights do not tell all options; assumed {', '.join(missing)}.",
            UserWarning,
            stacklevel=3,
        )
    if remark := layout.remark(state):
        warnings.warn(f"{where}, read as {layout.title}: {remark}", UserWarning, stacklevel=3)
    return head.eval()


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.", fix="Check the path.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not safe to read, since it holds more than tensors, or it is no checkpoint at all.",
            fix="Save its state_dict() with the program that made it, and load that.",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({error}).", fix="Is it whole?") from error


def _flat_state(loaded: Mapping[str, Any], where: str) -> State:
    """Open wrappers, and join nested dicts of tensors by dots."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{where} holds a {type(loaded).__name__}, not a state dict.")
    for wrapper in _WRAPPERS:
        if isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    state: State = {}
    for key, value in loaded.items():
        if isinstance(value, Mapping):
            inner = _without_prefixes({str(k): v for k, v in value.items() if isinstance(v, Tensor)})
            state |= {f"{key}.{k}": v for k, v in inner.items()}
        elif isinstance(value, Tensor):
            state[str(key)] = value
    if not state:
        raise CheckpointError(f"{where} holds no tensors.", fix="Is it a state dict?")
    return state


def _without_prefixes(state: State) -> State:
    while state and (prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None)):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _some(state: State) -> str:
    keys = sorted(state)
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
