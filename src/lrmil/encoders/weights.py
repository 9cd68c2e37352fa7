"""Where weights come from, and how they are put into a network.

Looked for in this order: the path that was given; the environment variable of the card (`CONCH_CKPT_PATH`, ...); the
file that this package ships; the Hugging Face hub, which answers from its cache where it can and honours `HF_TOKEN`,
`HF_HOME` and `HF_HUB_OFFLINE`. Nothing that could run code is ever unpickled.
"""

from __future__ import annotations

import os
import pickle
from importlib import resources
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lrmil.encoders.cards import EncoderCard
from lrmil.encoders.layouts import StateDict, unwrap
from lrmil.errors import CheckpointError, WeightsUnavailable
from lrmil.files import sha256

PICKLED = (".bin", ".pt", ".pth", ".torch", ".ckpt")


def load_weights(card: EncoderCard, path: str | os.PathLike[str] | None = None) -> tuple[StateDict, str]:
    """Read the weights of an encoder from wherever they are.

    Returns:
        the tensors under the names that the file has, and one line that says where they came from.

    Raises:
        WeightsUnavailable: not there; the message says what to do about it.
        CheckpointError: there, and not readable or not safe to read.
    """
    if path is not None:
        file = _local_file(card, Path(path), f"{card.name}: there is no weight file at {path}")
        return read_state_dict(file), f"file {file.name}"
    variable = os.environ.get(card.ckpt_variable)
    if variable:
        file = _local_file(
            card, Path(variable), f"{card.name}: {card.ckpt_variable} names {variable}, where there is no weight file"
        )
        return read_state_dict(file), f"file {file.name}"
    if card.package_file is not None:
        return _read_packaged(card, card.package_file), f"package {card.package_file}"
    file = download(card)
    return read_state_dict(file), f"hub {card.source} {file.name}"


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Read a safetensors file, or a pickled one with `weights_only=True`, into CPU memory.

    Raises:
        CheckpointError: damaged, of another kind, or it holds more than tensors.
    """
    path = Path(path)
    with path.open("rb") as handle:
        head = handle.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: this is a Git LFS pointer, not the weights.", fix="Run `git lfs pull` where it was cloned."
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({error}).", fix="Copy it again."
            ) from error
    if path.suffix not in PICKLED:
        raise CheckpointError(
            f"{path}: weights cannot be read from a {path.suffix or 'nameless'} file.",
            fix=f"Give a .safetensors file, or one of {', '.join(PICKLED)}.",
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: this pickle holds more than tensors and could run code, so it is not read.",
            fix="Save its state dict alone, best as safetensors, on a machine where you trust it.",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable PyTorch file ({error}).", fix="Copy it again.") from error
    return unwrap(content, origin=str(path))


def fill(module: nn.Module, state: StateDict, *, name: str, origin: str) -> None:
    """Put `state` into `module` (which may be on the meta device) as float32, entry by entry and completely.

    Raises:
        CheckpointError: entries are missing, left over, of another shape, or not finite.
    """
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)} and should be {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & state.keys())
        if state[key].shape != wanted[key].shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:4])}{', ...' if len(found) > 4 else ''})"
        for what, found in (("of another shape", shapes), ("missing", missing), ("not expected", unexpected))
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{origin} does not fit {name}: of its entries {'; '.join(problems)}.",
            fix="Name the encoder that this file belongs to.",
        )
    ready = {key: state[key].detach().to(torch.float32, copy=True).contiguous() for key in wanted}
    broken = [key for key, value in ready.items() if not torch.isfinite(value).all()]
    if broken:
        raise CheckpointError(
            f"{origin}: {len(broken)} entries hold NaN or infinity ({broken[0]}, ...).", fix="Copy the file again."
        )
    module.load_state_dict(ready, strict=True, assign=True)


def download(card: EncoderCard) -> Path:
    """Return the weight file of a card from the hub, or from the hub's cache on this machine.

    Raises:
        WeightsUnavailable: gated, offline, or not there.
    """
    if card.source is None:
        raise _unavailable(card, "no hub repository is known for its weights")
    reason = f"{card.source} has none of {', '.join(card.files)}"
    for name in card.files:
        try:
            return Path(huggingface_hub.hf_hub_download(card.source, name))
        except hub_errors.GatedRepoError as error:
            raise _unavailable(card, f"{card.source} is gated and access was not granted") from error
        except hub_errors.RepositoryNotFoundError as error:
            raise _unavailable(card, f"the hub shows no repository {card.source} to you") from error
        except hub_errors.LocalEntryNotFoundError:
            # Offline, or no connection. A later choice of file may still be in the cache.
            offline = huggingface_hub.constants.HF_HUB_OFFLINE
            reason = "they are not on this machine and " + (
                "HF_HUB_OFFLINE forbids asking the hub" if offline else "the hub cannot be reached"
            )
        except hub_errors.EntryNotFoundError:
            continue
        except (hub_errors.OfflineModeIsEnabled, hub_errors.HfHubHTTPError, OSError) as error:
            raise _unavailable(card, f"the hub could not be asked ({type(error).__name__}: {error})") from error
    raise _unavailable(card, reason)


def _unavailable(card: EncoderCard, reason: str) -> WeightsUnavailable:
    steps = []
    online = "unset HF_HUB_OFFLINE and " if huggingface_hub.constants.HF_HUB_OFFLINE else ""
    if card.source and card.gated:
        steps.append(
            f"{online}ask for access on the page of {card.source} on the Hugging Face hub, "
            "then run `hf auth login` or set HF_TOKEN"
        )
    elif card.source:
        steps.append(f"{online}connect this machine to the hub once")
    steps.append(
        f"get {card.files[0]} by other means and set {card.ckpt_variable}, or `weights` in the config, to its path"
    )
    return WeightsUnavailable(
        f"{card.name}: the weights are not available, {reason}.",
        fix=f"Either {'; or '.join(steps)}." if len(steps) > 1 else f"To use it, {steps[0]}.",
    )


def _local_file(card: EncoderCard, path: Path, message: str) -> Path:
    """A file as it is; in a folder, the first name that a download would have."""
    path = path.expanduser()
    candidates = [path / name for name in card.files] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise WeightsUnavailable(f"{message}.", fix="Correct the path; it may name the file or the folder that holds it.")


def _read_packaged(card: EncoderCard, package_file: str) -> StateDict:
    with resources.as_file(resources.files("lrmil.encoders") / package_file) as path:
        if not path.is_file():
            raise WeightsUnavailable(
                f"{card.name}: this installation lacks its weight file {package_file}.", fix="Install lrmil again."
            )
        if card.package_sha256 is not None and sha256(path) != card.package_sha256:
            raise CheckpointError(
                f"{card.name}: {package_file} is not the file that was shipped.", fix="Install again."
            )
        return read_state_dict(path)
