"""`lrmil demo`, `lrmil run` and its stages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from lrmil.pipeline.config import RunSettings
    from lrmil.pipeline.reporting import Reporter
    from lrmil.pipeline.run import Outcome

Config = Annotated[Path, typer.Argument(help="YAML config; see `lrmil init`.")]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.FIELD=VALUE", help="Change one setting, like student.epochs=50; may be repeated."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and the result.")]

STAGE_HELP = {
    "tile": "Find the tissue of every slide and lay the matched grid over it.",
    "encode": "Encode the 20x patches with the frozen encoder (and tile, where that is not done).",
    "distill": "Stage 1: teach each fold's student encoder to see at 5x what the frozen encoder saw at 20x.",
    "teacher": "Stage 2.1: train each fold's 20x teacher head on the slide labels.",
    "student": "Stage 2.2: train each fold's 5x student head on labels, teacher logits and teacher attention.",
}


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(demo)
    app.command()(init)
    app.command()(run)
    app.command()(compare)
    app.command()(heatmaps)
    app.command()(ablate)
    app.command()(sensitivity)
    for name, text in STAGE_HELP.items():
        _add_stage(app, name, text)


def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("demo"),
    quiet: Quiet = False,
) -> None:
    """The whole method on a simulated cohort, offline, in some minutes: ends with a table and `demo/report.html`."""
    from lrmil.pipeline.demo import run_demo
    from lrmil.pipeline.reporting import Reporter

    result = run_demo(out, Reporter(out / "log.jsonl", quiet=quiet))
    _finish(result)


def init(
    cohort: Annotated[Path, typer.Argument(help="CSV with slide_id, patient_id, a label column and path.")],
    config: Annotated[Path, typer.Option(help="Config to write.")] = Path("config.yaml"),
    encoder: Annotated[str, typer.Option(help="See `lrmil encoders`.")] = "conch_v1",
    kind: Annotated[
        Literal["classification", "regression", "survival"],
        typer.Option(help="What is asked: a class, a number, or survival."),
    ] = "classification",
    task: Annotated[
        str | None,
        typer.Option(
            help="Column of the labels or numbers, by default label; for survival any name.", show_default=False
        ),
    ] = None,
    time: Annotated[str, typer.Option(help="Survival: column of the time until the event or last follow-up.")] = "time",
    event: Annotated[str, typer.Option(help="Survival: column that says whether the event was seen.")] = "event",
    out: Annotated[str, typer.Option(help="Output folder of the run.")] = "runs/first",
) -> None:
    """Check a cohort table and write a commented config for it."""
    from lrmil.pipeline.starter import write_starter

    task = task or ("survival" if kind == "survival" else "label")
    lines = write_starter(cohort, config, encoder=encoder, task=task, out=out, kind=kind, time=time, event=event)
    for line in lines:
        print(line)
    print(f"wrote {config}; next: lrmil run {config}")


def run(config: Config, overrides: Override = None, quiet: Quiet = False) -> None:
    """Cohort in, cross-validated low-resolution model out. Resumes; skips what is done.

    Writes to the config's `out` folder: tiles/, features/, folds/, tables/, report.html and model/, the bundle for
    `lrmil predict`. Exit code 1 means that some slides failed; they are listed in failures.csv.
    """
    from lrmil.pipeline.run import run_all

    _finish(run_all(*_open(config, overrides, quiet)))


def compare(
    config: Config,
    methods: Annotated[
        str | None,
        typer.Option(help="Rows of the tables, like abmil,clam_sb,lrmil; else what the config's compare.methods says."),
    ] = None,
    overrides: Override = None,
    quiet: Quiet = False,
) -> None:
    """LRMIL beside the paper's ten methods, on the same slides, folds and features.

    Writes to compare/ in the config's `out` folder: tables shaped like the paper's (CSV, Markdown, LaTeX), paired
    differences with tests, every fold, calibration, predictions and figures. Resumes; methods may be added later.
    Seconds per slide are measured from the slide files, with nothing cached.
    """
    from lrmil.pipeline.compare import compare as compare_methods

    if methods is not None:
        overrides = [*(overrides or []), f"compare.methods=[{methods}]"]
    _finish(compare_methods(*_open(config, overrides, quiet)))


def ablate(config: Config, overrides: Override = None, quiet: Quiet = False) -> None:
    """Which losses matter: the six rows of the paper's Table 3, on the same slides, folds and seeds.

    The rows switch L_patch, L_bag, L_soft and L_hard on, beside the cross-entropy. Without L_patch the student looks at
    5x with the frozen encoder, and there is no stage 1. A loss whose weight is 0 in the config is off in every row.

    Writes to ablation/ in the config's `out` folder: table3 as the paper prints it, results with intervals, paired
    differences from the full method (CSV, Markdown, LaTeX), predictions and figures. Resumes; what `lrmil run` has
    trained is not trained again.
    """
    from lrmil.pipeline.ablate import ablate as ablate_losses

    _finish(ablate_losses(*_open(config, overrides, quiet)))


def sensitivity(
    config: Config,
    of: Annotated[
        Literal["k", "temperature", "layers", "aggregation", "magnification"],
        typer.Option(help="What to vary, all else as in the config."),
    ],
    values: Annotated[
        str | None,
        typer.Option(help="Values in place of the usual ones, like 1,2,4 or '[0, 1, -1], [-1]' or '[0.5, 2], [1, 4]'."),
    ] = None,
    overrides: Override = None,
    quiet: Quiet = False,
) -> None:
    """How much one setting matters: the method with other values of it, on the same slides, folds and seeds.

    - **k**: regions at either end in L_hard; 1, 2, 4, 8, 16, 32
    - **temperature**: of L_bag, then of L_soft; 1, 2, 4, 8
    - **layers**: blocks distilled in stage 1
    - **aggregation**: how a region's score comes of its children: mean or max of logits, or share of attention
    - **magnification**: pairs of um per pixel, high and low. Each is a run of its own in variants/, with tiles and
      features; pairs that a slide or the encoder's token grid does not allow are left out, and it is said why

    Writes to sensitivity/ in the config's `out` folder: results with intervals, paired differences from the config's
    own value (CSV, Markdown, LaTeX), predictions and figures. Resumes; what `lrmil run` has trained is not trained
    again.
    """
    from lrmil.pipeline.ablate import sensitivity as vary

    _finish(vary(*_open(config, overrides, quiet), of, _listed(values)))


def _listed(values: str | None) -> list[Any] | None:
    """Read --values: a list in YAML, with or without its brackets."""
    import yaml

    from lrmil.errors import ConfigError

    if values is None:
        return None
    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"--values {values!r} is not a list.", fix="Write 1,2,4 or '[0, 1], [2]'.") from error
    if not found:
        raise ConfigError("--values is empty.", fix="Write 1,2,4 or '[0, 1], [2]', or leave it out.")
    return list(found)


def heatmaps(
    config: Config,
    slides: Annotated[list[str], typer.Argument(metavar="SLIDE_ID...", help="Slides of the cohort, by their ids.")],
    methods: Annotated[
        str,
        typer.Option(help="What is shown, in this order: teacher, and any method of `lrmil compare` with attention."),
    ] = "teacher,lr_only,lrmil",
    overrides: Override = None,
    quiet: Quiet = False,
) -> None:
    """Where the models look on a slide, side by side: teacher, LR without distillation, LRMIL, and other heads.

    Writes heatmaps/SLIDE_ID.png in the config's `out` folder. Everything comes from the fold that tests the slide,
    never from a model that trained on it; true areas are outlined where known. ZoomMIL and HDMIL show the patches that
    they chose. Trains nothing: says what to run first if a model is missing.
    """
    from lrmil.pipeline.heatmaps import heatmaps as draw

    names = [name.strip() for name in methods.split(",") if name.strip()]
    settings, reporter = _open(config, overrides, quiet)
    for path in draw(settings, slides, reporter, names):
        print(path)


def _add_stage(app: typer.Typer, name: str, text: str) -> None:
    def stage(config: Config, overrides: Override = None, quiet: Quiet = False) -> None:
        from lrmil.pipeline.run import run_until

        _finish(run_until(name, *_open(config, overrides, quiet)))

    stage.__doc__ = f"{text} Runs what it needs first; skips what is done."
    app.command(name=name)(stage)


def _open(config: Path, overrides: list[str] | None, quiet: bool) -> tuple[RunSettings, Reporter]:
    from lrmil.pipeline.config import load_config
    from lrmil.pipeline.folder import RunFolder
    from lrmil.pipeline.reporting import Reporter

    settings = load_config(config, overrides)
    return settings, Reporter(RunFolder(settings.out).log, quiet=quiet)


def _finish(outcome: Outcome) -> None:
    for line in outcome.summary:
        print(line)
    if outcome.failures:
        print(f"lrmil: {len(outcome.failures)} slides failed, see {outcome.folder.failures}:", file=sys.stderr)
        for failure in outcome.failures:
            print(f"  {failure.slide_id} ({failure.stage}): {failure.message}", file=sys.stderr)
        raise typer.Exit(1)
