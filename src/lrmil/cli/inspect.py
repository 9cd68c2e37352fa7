"""`lrmil info`, `lrmil encoders`, `lrmil doctor`: look before you run."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    model: Annotated[Path | None, typer.Option(help="Plan with the settings of this bundle.")] = None,
    lr_mpp: Annotated[float, typer.Option(help="Low resolution to plan for, without --model.")] = 2.0,
    hr_mpp: Annotated[float, typer.Option(help="High resolution to plan for.")] = 0.5,
    patch_px: Annotated[int, typer.Option(help="Side of a patch in pixels.")] = 256,
    picture: Annotated[Path | None, typer.Option(help="Write the tissue and the regions as an image.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a slide is, how large its pixels are, where that comes from, and how many patches it would give."""
    from pydantic import ValidationError

    from lrmil.errors import ConfigError
    from lrmil.geometry import GridSettings
    from lrmil.inference.bundle import read_manifest
    from lrmil.inference.inspect import describe_slide
    from lrmil.inference.prepare import TileSettings
    from lrmil.tissue import TissueSettings

    if model is not None:
        manifest = read_manifest(model)
        grid, tissue, tiles = manifest.grid, manifest.tissue, manifest.tiles
    else:
        try:
            grid = GridSettings(lr_mpp=lr_mpp, hr_mpp=hr_mpp, patch_px=patch_px)
        except ValidationError as error:
            raise ConfigError(
                "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors()) + "."
            ) from error
        tissue, tiles = TissueSettings(), TileSettings()
    facts = describe_slide(slide, grid, tissue, tiles, mpp=mpp, picture=picture)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for subject, text in _slide_lines(facts):
        print(f"{subject:<16} {text}")
    if picture is not None:
        print(f"{'picture':<16} {picture}")


def _slide_lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    (width, height), tissue = facts["dimensions"], facts["tissue"]
    low, high = facts["low_resolution"], facts["high_resolution"]
    yield "slide", facts["name"]
    yield "reader", f"{facts['reader']} ({facts['vendor']})"
    size_mm = [side * facts["mpp"] / 1000 for side in (width, height)]
    yield "size", f"{width} x {height} px, {size_mm[0]:.1f} x {size_mm[1]:.1f} mm"
    yield "scale", f"{facts['mpp']:.4g} um/px (from: {facts['mpp_source']})"
    for level in facts["levels"]:
        yield f"level {level['index']}", f"{level['width_px']} x {level['height_px']} px, {level['mpp']:.4g} um/px"
    pen = f"; pen marks {tissue['pen_share']:.1%}" if tissue["pen_share"] else ""
    yield "tissue", f"{tissue['share']:.1%} of the slide, {tissue['mm2']:.2f} mm2{pen}"
    if tissue["unreadable_blocks"]:
        yield "damage", f"blocks of the overview that cannot be decoded: {tissue['unreadable_blocks']}"
    yield (
        "low resolution",
        f"{low['regions']} regions of {low['patch_px']} px at {low['mpp']:.4g} um/px, read from level {low['level']}",
    )
    if high is None:
        yield "high resolution", "not available: the slide is too coarse to train with; it can be predicted on"
    else:
        yield "high resolution", f"{high['patches']} patches of {low['patch_px']} px at {high['mpp']:.4g} um/px"
    if facts["snapped"]:
        yield "grid", "whole level-0 pixels, box averages"
    else:
        yield "grid", "resampled by area: no power of two leads from the slide's scale to the wanted one"


def encoders(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the encoders that can be named in a config, with width, patch side, access and licence."""
    from lrmil.encoders import encoder_cards

    cards = sorted(encoder_cards(), key=lambda c: c.name)
    if as_json:
        print(json.dumps([c.model_dump(mode="json") for c in cards], indent=2))
        return
    rows = [("name", "width", "layers", "token px", "input px", "trained at um/px", "access", "licence")]
    for c in cards:
        numbers = [str(value) for value in (c.embed_dim(), c.depth, c.token_px, c.input_px)]
        scales = ", ".join(f"{m:g}" for m in c.native_mpp) or "photographs"
        access = "gated" if c.gated else ("shipped" if c.package_file else "open")
        # What stands in brackets is for --json: lines stay short.
        rows.append((c.name, numbers[0], numbers[1], numbers[2], numbers[3], scales, access, c.licence.split(" (")[0]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (t.rjust(w) if 1 <= i <= 4 else t.ljust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(cells).rstrip())
    print(
        "\nAny other timm vision transformer works too, as timm:NAME. Gated weights: accept their terms on the hub\n"
        "and set HF_TOKEN, or give a local file with encoder.weights. Conditions in full: lrmil encoders --json"
    )


def doctor() -> None:
    """Check this machine: versions, devices, readers, encoder weights at hand. Paste the output into a bug report."""
    from lrmil.inference.inspect import check_machine

    checks = check_machine()
    width = max(len(check.subject) for check in checks)
    for check in checks:
        print(f"{'BAD' if check.state == 'bad' else check.state:<4}  {check.subject:<{width}}  {check.finding}")
    if any(check.state == "bad" for check in checks):
        raise typer.Exit(1)
