"""Rooms import downward only, and no file grows past what one can read at a sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lrmil

ROOT = Path(lrmil.__file__).parent
# Lowest first. A room may import the rooms before it, and itself.
ROOMS = (
    *("_version", "errors", "settings", "files", "tasks", "geometry", "slides", "tissue", "encoders", "bags", "mil"),
    *("distill", "training", "evaluation", "inference", "cohorts", "pipeline", "studies", "benchmarks", "cli"),
)
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            names = [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("lrmil.")}
    return found


def test_every_file_belongs_to_a_room() -> None:
    assert {room_of(path) for path in FILES} - {"__init__", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for path in (p for p in FILES if room_of(p) == room):
        upward = imported_rooms(path) - allowed
        assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}"


def test_inference_does_not_load_what_only_training_needs() -> None:
    for path in (p for p in FILES if room_of(p) == "inference"):
        assert not imported_rooms(path) & {"training", "distill"}, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
