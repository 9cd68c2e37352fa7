"""`lrmil import` and `lrmil export`: feature files of other tools, in and out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from lrmil.errors import BagError


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(name="import")(import_features)
    app.command(name="export")(export_features)


def import_features(
    source: Annotated[Path, typer.Argument(help="A feature file, or a folder of them (TRIDENT, CLAM, STAMP, mopadi).")],
    out: Annotated[Path, typer.Argument(help="Folder for lrmil feature files.")],
    patches: Annotated[
        Path | None, typer.Option(help="CLAM: folder of the patches/*.h5 that the features belong to.")
    ] = None,
    mpp: Annotated[float | None, typer.Option(help="um per level-0 pixel, where the files do not say it.")] = None,
    coords_unit: Annotated[
        Literal["px_l0", "um"] | None,
        typer.Option(help="What coordinates are where the files do not say it: level-0 pixels or micrometres."),
    ] = None,
) -> None:
    """Read feature files of other tools and write them as lrmil's. What a file does not say is never guessed.

    Exit code 1 means that some files could not be used; each is named with its reason.
    """
    from lrmil.bags.exchange import import_folder

    done, failures = import_folder(source, out, patches=patches, mpp_l0=mpp, coords_unit=coords_unit)
    _report(done, failures, out)


def export_features(
    source: Annotated[Path, typer.Argument(help="A feature file of lrmil, or a folder of them.")],
    out: Annotated[Path, typer.Argument(help="Folder for TRIDENT feature files.")],
) -> None:
    """Write lrmil's feature files the way TRIDENT does, for every tool that reads those."""
    from lrmil.bags.exchange import export_folder

    done, failures = export_folder(source, out)
    _report(done, failures, out)


def _report(done: list[Path], failures: list[BagError], out: Path) -> None:
    print(f"{len(done)} files written to {out}")
    for error in failures:
        print(f"lrmil: {error}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)
