"""The typer app: verbs in the order in which people meet them, and one place that turns errors into exit codes.

Exit codes: 0 all done; 1 finished, but some slides failed; 2 the call or the config is wrong; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lrmil._version import __version__
from lrmil.cli import bench, cohorts, exchange, inspect, labels, predict, run, study
from lrmil.errors import LrmilError, SlideError


class _Verbs(TyperGroup):
    """Says after Ctrl-C what is true of every verb that works for long. Typer says nothing, or "Aborted"."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("\nlrmil: stopped; the same command resumes where it was.", file=sys.stderr)
            sys.exit(130)


app = typer.Typer(
    name="lrmil",
    cls=_Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    # Both --batch-size and --batch_size are ordinary in this field.
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
    help="Classify whole-slide images from 5x pixels alone, with a model that learned from 20x.\n\n"
    "Start with `lrmil demo` (offline, a few minutes), then `lrmil run config.yaml` on your own slides "
    "and `lrmil predict SLIDE --model runs/x/model --out answers`.",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"lrmil {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


run.register(app)
predict.register(app)
cohorts.register(app)
labels.register(app)
inspect.register(app)
exchange.register(app)
bench.register(app)
study.register(app)


def main(argv: list[str] | None = None) -> Any:
    """Run the command line. Errors raised on purpose become one line on stderr and an exit code."""
    # Feature files are written once and then only read; locks on network folders cause more failures than they prevent.
    os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
    try:
        return app(argv)
    except LrmilError as error:
        print(f"lrmil: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, SlideError) else 2)
