"""Reading the config of a study: one YAML file is one study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

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


def _anchor(raw: dict[str, object], base: Path) -> None:
    """Make paths absolute, once."""
    run = raw.get("run")
    places = [(raw, "out"), (raw, "crchisto"), (raw.get("fields"), "crchisto"), (raw.get("encoder"), "weights")]
    if isinstance(run, dict):
        places += [(run.get("encoder"), "weights"), (run.get("folds"), "clam_splits")]
    for section, name in places:
        if isinstance(section, dict) and isinstance(section.get(name), str):
            section[name] = str(base / Path(section[name]).expanduser())
    for section in (raw.get("encoder"), run.get("encoder") if isinstance(run, dict) else None):
        # An encoder is named by what it is, or by the folder that it was saved in.
        if isinstance(section, dict) and isinstance(section.get("name"), str):
            folder = base / Path(section["name"]).expanduser()
            section["name"] = str(folder) if is_saved_encoder(folder) else section["name"]
