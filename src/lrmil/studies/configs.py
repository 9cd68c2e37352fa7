"""Reading the config of a study: one YAML file is one study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lrmil.encoders.store import is_saved_encoder
from lrmil.errors import ConfigError
from lrmil.pipeline.overrides import apply_overrides, validated
from lrmil.settings import Settings

S = TypeVar("S", bound=Settings)


def load_config(model: type[S], path: Path, overrides: Sequence[str] | None = None) -> S:
    """Read a config; relative paths in it count from its folder, those of overrides from the current one.

    Without `out` the study's folder is out/<name of the config> beside the config.

    Raises:
        ConfigError: no such file, not YAML, or a field is unknown or out of range.
    """
    raw = _read(path)
    raw.setdefault("out", f"out/{path.stem}")
    _anchor(raw, path.resolve().parent)
    apply_overrides(raw, list(overrides or []))
    _anchor(raw, Path.cwd())
    return validated(model, raw, str(path))


def _read(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such config.", fix="The configs of the studies lie in evidence/.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no settings.")
    return raw


def _anchor(raw: dict[str, Any], base: Path) -> None:
    """Make paths absolute, once."""
    run = _section(raw, "run")
    encoders = [_section(raw, "encoder"), _section(run, "encoder"), _section(_section(run, "stage1"), "student")]
    places = [(raw, "out"), (raw, "crchisto"), (_section(raw, "fields"), "crchisto")]
    places += [(_section(run, "folds"), "clam_splits"), *((encoder, "weights") for encoder in encoders)]
    for section, name in places:
        if isinstance(path := section.get(name), str):
            section[name] = str(base / Path(path).expanduser())
    for encoder in encoders:
        # An encoder is named by what it is, or by the folder that it was saved in.
        called = encoder.get("name")
        if isinstance(called, str) and is_saved_encoder(folder := base / Path(called).expanduser()):
            encoder["name"] = str(folder)


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a section, or an empty one; what is no section is told of when the tree is validated."""
    found = tree.get(name)
    return found if isinstance(found, dict) else {}
