"""Settings from outside: `--set section.field=value`, and one message that lists every problem of a config."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from lrmil.errors import ConfigError
from lrmil.settings import Settings

AnySettings = TypeVar("AnySettings", bound=Settings)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Change a tree of plain values in place; an override is `field=value` or `section.field=value`, value in YAML.

    Raises:
        ConfigError: it has another form, or the value is no YAML.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        names = [name.strip().replace("-", "_") for name in key.split(".")]
        if not equals or not all(names):
            raise ConfigError(f"--set {override!r} is not of the form section.field=value.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: {text!r} is not valid YAML.", fix="Quote it.") from error
        *parents, leaf = names
        place = raw
        for parent in parents:
            inner = place.get(parent)
            if inner is None:
                inner = place[parent] = {}
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {override!r}: {parent} is not a section.")
            place = inner
        place[leaf] = value


def validated(model: type[AnySettings], raw: dict[str, Any], source: str) -> AnySettings:
    """Make settings of a tree of plain values.

    Raises:
        ConfigError: lists every field that is unknown, missing or out of range, with the near name where there is one.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(_explain(model, problem) for problem in error.errors())
        raise ConfigError(f"{source}: {problems}.") from error


def _explain(model: type[Settings], problem: Any) -> str:
    loc = problem["loc"]
    where = ".".join(str(part) for part in loc) or "settings"
    if problem["type"] == "extra_forbidden":
        return f"{where} is no setting{_hint(model, loc)}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    given = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}{given}"


def _hint(model: type[Settings], loc: tuple[Any, ...]) -> str:
    """Suggest the near name in the same section, or the same name in another section."""
    name = str(loc[-1])
    section: Any = model
    for part in loc[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        section = field.annotation if field else None
    near = difflib.get_close_matches(name, list(getattr(section, "model_fields", {})), n=1)
    if near:
        return f" (did you mean {'.'.join([*map(str, loc[:-1]), near[0]])}?)"
    elsewhere = [path for path in _paths(model) if path.split(".")[-1] == name]
    return f" (there is {' and '.join(elsewhere)})" if elsewhere else ""


def _paths(model: type[Settings], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from _paths(field.annotation, f"{prefix}{name}.")
