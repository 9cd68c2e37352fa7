"""Draw docs/architecture.svg from the code's own imports: rooms from top to bottom, a dot where one imports another.

    python scripts/draw_architecture.py

All dots lie right of the diagonal: imports run one way. `tests/test_architecture.py` keeps it so.
"""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lrmil"
ROOMS = {
    "cli": "one file per group of verbs: parse, call, print",
    "benchmarks": "how fast reading and answering are, as ratios in one run",
    "studies": "what the method does to an encoder: probes, negative controls",
    "pipeline": "the stages from cohort to deployed model, each resumable",
    "cohorts": "tables of slides and labels; simulated and assembled slides",
    "inference": "bundle, prediction, heatmap: all that deployment needs",
    "evaluation": "metrics, intervals, paired tests, tables, figures, report",
    "training": "folds, seeds, the one loop, stages 1, 2.1 and 2.2",
    "distill": "the losses, Eqs. 1 to 6, as functions of tensors",
    "mil": "one file per head, one registry, checkpoints of the originals",
    "bags": "feature files: ours, and those of other tools",
    "encoders": "cards of vision transformers, one wrapper with taps",
    "tissue": "where a slide is tissue, and how much of any box",
    "slides": "pixels of any box at any scale, by area average",
    "geometry": "scale, matched grid, slots and token blocks; pure",
    "tasks": "what is predicted: class, number, survival",
    "files": "files that are whole or absent",
    "settings": "the base of every settings model, fingerprints",
    "errors": "the tree of everything raised on purpose",
}
LINE, LEFT, CELL, TOP = 34, 470, 34, 96


def imports() -> dict[str, set[str]]:
    """Rooms that each room imports."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room not in found:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found[room] |= {n.split(".")[1] for n in names if n.startswith("lrmil.")}
    return {room: {r for r in others if r in ROOMS and r != room} for room, others in found.items()}


def draw(uses: dict[str, set[str]]) -> str:
    """Return the picture as SVG."""
    rooms = list(ROOMS)
    width, height = LEFT + CELL * len(rooms) + 20, TOP + LINE * len(rooms) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="16" y="30" font-size="17" font-weight="bold">lrmil: which room imports which</text>',
        '<text x="16" y="54" font-size="13" fill="#555">A room (line) imports the rooms marked in it.</text>',
        '<text x="16" y="72" font-size="13" fill="#555">No mark left of the diagonal: imports run one way.</text>',
    ]
    for i, room in enumerate(rooms):
        y, x = TOP + LINE * i, LEFT + CELL * i
        fill = "#f4f6f8" if i % 2 == 0 else "#ffffff"
        parts += [
            f'<rect x="8" y="{y}" width="{width - 16}" height="{LINE}" fill="{fill}"/>',
            f'<text x="16" y="{y + 22}" font-size="15" font-weight="bold" fill="#12467b">{room}</text>',
            f'<text x="112" y="{y + 22}" font-size="12.5" fill="#222">{escape(ROOMS[room])}</text>',
            f'<text transform="translate({x + 21},{TOP - 8}) rotate(-40)" font-size="12" fill="#12467b">{room}</text>',
            f'<rect x="{x + 4}" y="{y + 4}" width="{CELL - 8}" height="{LINE - 8}" rx="4" fill="#12467b"/>',
        ]
        for j, other in enumerate(rooms):
            if other in uses[room]:
                centre = f'cx="{LEFT + CELL * j + CELL / 2}" cy="{y + LINE / 2}"'
                parts.append(f'<circle {centre} r="6" fill="{"#d9534f" if j < i else "#4f9d69"}"/>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    target = ROOT / "docs" / "architecture.svg"
    target.write_text(draw(imports()), encoding="utf-8")
    print(f"wrote {target.relative_to(ROOT)}")
