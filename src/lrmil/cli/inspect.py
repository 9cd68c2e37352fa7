"""`lrmil info`, `lrmil encoders`, `lrmil doctor`: look before you run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(info)
    app.command()(encoders)
    app.command()(doctor)


def info(
    slide: Annotated[Path, typer.Argument(help="A slide file.")],
    mpp: Annotated[float | None, typer.Option(help="um per level-0 pixel, where the slide does not say it.")] = None,
    lr_mpp: Annotated[float, typer.Option(help="Low resolution to plan for.")] = 2.0,
    hr_mpp: Annotated[float, typer.Option(help="High resolution to plan for.")] = 0.5,
    patch_px: Annotated[int, typer.Option(help="Side of a patch in pixels.")] = 256,
    picture: Annotated[Path | None, typer.Option(help="Write the tissue and the regions as an image.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a slide is, how large its pixels are, where that comes from, and how many patches it would give."""
    from lrmil.inference.inspect import describe_slide

    facts = describe_slide(slide, mpp=mpp, lr_mpp=lr_mpp, hr_mpp=hr_mpp, patch_px=patch_px, picture=picture)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    _print_facts(facts)


def encoders(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the encoders that can be named in a config, with width, patch side, licence and access."""
    from rich.console import Console
    from rich.table import Table

    from lrmil.encoders import encoder_cards

    cards = sorted(encoder_cards(), key=lambda c: c.name)
    if as_json:
        print(json.dumps([c.model_dump(mode="json") for c in cards], indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "width", "layers", "token px", "input px", "mpp", "access", "licence"):
        table.add_column(column, justify="right" if column in ("width", "layers", "token px", "input px") else "left")
    for c in cards:
        access = "gated" if c.gated else ("shipped" if c.package_file else "open")
        table.add_row(
            c.name,
            str(c.embed_dim()),
            str(c.depth),
            str(c.token_px),
            str(c.input_px),
            ", ".join(f"{m:g}" for m in c.native_mpp) or "-",
            access,
            c.licence,
        )
    Console().print(table)
    print(
        "\nAny other timm vision transformer works too, as timm:NAME. Gated weights: accept their terms on the hub and"
    )
    print("set HF_TOKEN, or give a local file with encoder.weights.")


def doctor() -> None:
    """Check this machine: versions, devices, readers, encoder weights at hand. Paste the output into a bug report."""
    from lrmil.inference.inspect import check_machine

    problems = 0
    for check in check_machine():
        mark = {"ok": "ok  ", "note": "note", "bad": "BAD "}[check.state]
        print(f"{mark} {check.subject}: {check.finding}")
        problems += check.state == "bad"
    if problems:
        raise typer.Exit(1)


def _print_facts(facts: dict[str, Any]) -> None:
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        if isinstance(value, list):
            print(f"{key:<{width}}  " + f"\n{'':<{width}}  ".join(str(v) for v in value))
        else:
            print(f"{key:<{width}}  {value}")
