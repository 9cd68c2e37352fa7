"""The base of every settings model. Each room owns its settings; `pipeline.config` composes them into one tree.

That tree is the YAML file, the CLI flags and what is written beside every output; its hash decides what is done.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Immutable, and strict about names: an unknown field is an error, not a silent no-op."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def fingerprint(*parts: Any) -> str:
    """Return 12 hex digits that identify `parts` (Settings, dicts, lists, numbers, strings); key order is ignored."""
    plain = [p.model_dump(mode="json") if isinstance(p, BaseModel) else p for p in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
