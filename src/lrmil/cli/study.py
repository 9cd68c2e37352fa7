"""`lrmil study`: experiments that show what the method does, and whether it can tell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lrmil.pipeline.reporting import Reporter

Config = Annotated[Path, typer.Argument(help="Config of the study, like evidence/probe-tissue.yaml.")]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change one setting; may be repeated."),
]
Publish = Annotated[Path | None, typer.Option(help="Copy the small tables and figures into this folder, too.")]
Train = Annotated[bool, typer.Option(help="--no-train: only tables and figures of what is finished.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and the result.")]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    studies = typer.Typer(no_args_is_help=True, help="Experiments with known truth: what stage 1 and stage 2 bring.")
    studies.command()(probe)
    studies.command()(curve)
    studies.command("look")(look_at)
    studies.command()(controls)
    studies.command()(slides)
    studies.command("ceiling")(ceiling_of)
    studies.command()(screen)
    studies.command()(gaps)
    app.add_typer(studies, name="study")


def probe(
    config: Config,
    overrides: Override = None,
    publish: Publish = None,
    train: Train = True,
    quiet: Quiet = False,
) -> None:
    """What a region's embedding tells of its nuclei: 20x, 5x, and 5x after stage 1, with negative controls.

    Ridge regression from embeddings to the composition of regions with known nuclei, trained and tested on different
    images. Resumes; each recipe, fold and seed is done once. Writes to the study's output folder: cells.csv,
    results.csv, retrieval.csv, summary.json, table.md and figures.
    """
    from lrmil.studies.run import run_probe
    from lrmil.studies.settings import load_study

    settings = load_study(config, overrides)
    for path in run_probe(settings, _reporter(settings.out, quiet), publish=publish, train=train):
        print(path)


def curve(
    summaries: Annotated[list[Path], typer.Argument(help="NAME_summary.json of each study, as published.")],
    recipe: Annotated[str, typer.Option(help="Name of the way to distil that is shown.")] = "paper",
    embedding: Annotated[str, typer.Option(help="cls, token_mean or both.")] = "token_mean",
    ceiling: Annotated[
        Path | None, typer.Option(help="CSV of `lrmil study ceiling` on these studies, to draw in place of their own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Picture and table to write: OUT.png, OUT.csv.")] = Path("recovery"),
) -> None:
    """What stage 1 recovers of the gap between 20x and 5x, against how visible the evidence is at 5x.

    From studies of simulated tissue that differ in nuclei.visibility. Recovery is given where the 95 % interval of
    20x - 5x lies above 0, with its own interval.
    """
    from lrmil.studies.curve import write_curve

    for path in write_curve(summaries, recipe, embedding, out, ceiling):
        print(path)


def ceiling_of(config: Config, overrides: Override = None, publish: Publish = None, quiet: Quiet = False) -> None:
    """What 5x pixels show: the student's network trained on the truth of thousands of simulated regions.

    Tells a loss of information from a failure of the method. The regions are of slides that no other study uses, and
    there are several numbers of them, to see whether more would tell more. Resumes. Writes a table of R2 by
    visibility; `lrmil study curve --ceiling` draws it.
    """
    from lrmil.studies.ceiling_study import load_ceiling_study, run_ceiling_study

    settings = load_ceiling_study(config, overrides)
    for path in run_ceiling_study(settings, _reporter(settings.out, quiet), publish=publish):
        print(path)


def look_at(
    configs: Annotated[list[Path], typer.Argument(help="Configs of region probes, like evidence/probe-tissue.yaml.")],
    crchisto: Annotated[
        Path | None, typer.Option(help="Where CRCHistoPhenotypes lies, for configs that need it.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many fields of each.")] = 8,
    out: Annotated[Path, typer.Option(help="Picture to write: OUT.png.")] = Path("look"),
) -> None:
    """Show the tissue of studies side by side, at 20x and at 5x: real beside simulated."""
    from lrmil.studies.look import write_look
    from lrmil.studies.settings import load_study

    studies = []
    for path in configs:
        settings = load_study(path)
        if crchisto is not None and settings.fields.crchisto is not None:
            settings = load_study(path, [f"fields.crchisto={crchisto}"])
        studies.append((path.stem, settings))
    print(write_look(studies, count, out))


def controls(
    config: Config,
    overrides: Override = None,
    publish: Publish = None,
    train: Train = True,
    quiet: Quiet = False,
) -> None:
    """Negative controls of stage 2: a teacher of shuffled labels, and all weights 0, beside the unbroken run.

    On a simulated or assembled cohort, which it makes. Resumes; each fold and seed is done once. Writes results.csv,
    cells.csv, table.md and summary.json.
    """
    from lrmil.studies.slide_controls import load_slide_controls, run_slide_controls

    settings = load_slide_controls(config, overrides)
    for path in run_slide_controls(settings, _reporter(settings.out, quiet), publish=publish, train=train):
        print(path)


def slides(config: Config, overrides: Override = None, publish: Publish = None, quiet: Quiet = False) -> None:
    """Whole slides: the method on simulated or assembled ones, its losses one by one, and where its attention lies.

    The config names the cohort, the run, and the parts: ablation, comparison, controls, localisation, folds, recipes,
    and what can be varied (k, temperature, layers, aggregation, magnification). Resumes. Localisation asks how well the
    attention of the teacher, of 5x without distillation and of LRMIL finds the truly positive regions of slides that no
    fold trained on; folds, what few patients or whole new sites do; recipes, what other settings of training do.
    """
    from lrmil.studies.slides import load_slide_study, run_slide_study

    settings = load_slide_study(config, overrides)
    for path in run_slide_study(settings, _reporter(settings.out, quiet), publish=publish):
        print(path)


def screen(config: Config, overrides: Override = None, publish: Publish = None, quiet: Quiet = False) -> None:
    """Which recipe: one setting changed at a time, judged on validation slides alone.

    On a simulated or assembled cohort that nothing else uses, which it makes. The config names the factors, and what
    each value changes in the run's config. Resumes. Writes a table of validation scores with paired intervals, and a
    figure.
    """
    from lrmil.studies.screen import load_screen, run_screen

    settings = load_screen(config, overrides)
    for path in run_screen(settings, _reporter(settings.out, quiet), publish=publish):
        print(path)


def gaps(config: Config, overrides: Override = None, publish: Publish = None, quiet: Quiet = False) -> None:
    """On which tasks is 20x better than 5x? Slides assembled from real tissue, nothing distilled.

    Needs CRCHistoPhenotypes, which you download (--set crchisto=PATH). Every cohort of the config is asked every task,
    by the same head at 20x and at 5x. Where there is no gap there is nothing to distil. Resumes. Writes a table with
    paired intervals, and a figure.
    """
    from lrmil.studies.gaps import load_gaps, run_gaps

    settings = load_gaps(config, overrides)
    for path in run_gaps(settings, _reporter(settings.out, quiet), publish=publish):
        print(path)


def _reporter(out: str | None, quiet: bool) -> Reporter:
    """Tell how it goes, on the terminal and in the study's output folder."""
    from lrmil.pipeline.reporting import Reporter

    assert out is not None
    return Reporter(Path(out) / "log.jsonl", quiet=quiet)
