"""Settings are strict and immutable; their fingerprint depends on values alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from lrmil.geometry import GridSettings
from lrmil.settings import Settings, fingerprint

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


class Colour(Settings):
    red: float = Field(0.5, description="red")
    shades: tuple[str, ...] = Field(("a", "b"), description="names")


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: reversed_keys(v) for k, v in reversed(value.items())}
    return [reversed_keys(v) for v in value] if isinstance(value, list) else value


def test_unknown_field_is_an_error() -> None:
    with pytest.raises(ValidationError, match="gren"):
        Colour.model_validate({"gren": 1.0})


def test_settings_do_not_change() -> None:
    colour = Colour()
    with pytest.raises(ValidationError, match="frozen"):
        colour.red = 1.0
    assert colour.red == 0.5


@settings(deadline=None, max_examples=60)
@given(plain)
def test_fingerprint_ignores_the_order_of_keys(value: Any) -> None:
    assert fingerprint(value) == fingerprint(reversed_keys(value))


def test_fingerprint_sees_every_value() -> None:
    seen = [
        fingerprint(Colour()),
        fingerprint(Colour(red=0.25)),
        fingerprint(Colour(shades=("b", "a"))),
        fingerprint(Colour(), 1),
        fingerprint(1, Colour()),
        fingerprint("1", Colour()),
        fingerprint([Colour().model_dump(mode="json")], 1),
    ]
    assert len(set(seen)) == len(seen)
    assert all(len(s) == 12 and int(s, 16) >= 0 for s in seen)


def test_fingerprint_of_settings_is_that_of_their_values() -> None:
    assert fingerprint(Colour()) == fingerprint({"shades": ["a", "b"], "red": 0.5})
    assert fingerprint(GridSettings()) == fingerprint(GridSettings(patch_px=256, lr_mpp=2.0))


def test_fingerprint_is_the_same_in_another_process() -> None:
    # Python's own hash() is salted for each process; resuming a run depends on this one not being so.
    code = "from lrmil.settings import fingerprint as f; print(f({'a': 1, 'b': ['µm', None]}, 'x'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == fingerprint({"b": ["µm", None], "a": 1}, "x")
