"""`lrmil simulate` and `lrmil assemble`: cohorts to try things on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Processes = Annotated[int, typer.Option(min=1, help="Slides made at the same time.")]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(simulate)
    app.command()(assemble)


def simulate(
    out: Annotated[Path, typer.Argument(help="Folder for slides/, truth/ and cohort.csv.")],
    size: Annotated[str, typer.Option(help="test (seconds), demo (a minute), study (several minutes).")] = "demo",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the cohort.")] = None,
    processes: Processes = 2,
) -> None:
    """Simulate H&E-like slides of two classes that differ in nuclear detail, with the truth of every region."""
    import yaml

    from lrmil.cohorts.simulated import preset, simulate_cohort
    from lrmil.errors import ConfigError
    from lrmil.pipeline.reporting import Reporter

    changes = {}
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override!r} is not of the form field=value.")
        changes[key.strip()] = yaml.safe_load(value)
    if seed is not None:
        changes["seed"] = seed
    settings = preset(size, **changes)
    reporter = Reporter()
    with reporter.task("simulate", settings.slides) as progress:
        table = simulate_cohort(out, settings, processes=processes, on_progress=progress.reach)
    print(f"wrote {table}")


def assemble(
    source: Annotated[Path, typer.Argument(help="Folder of CRCHistoPhenotypes: images/, images.csv, nuclei.csv.gz.")],
    out: Annotated[Path, typer.Argument(help="Folder for slides/, truth/ and cohort.csv.")],
    task: Annotated[str, typer.Option(help="inflammatory_focus or epithelium.")] = "inflammatory_focus",
    groups: Annotated[int, typer.Option(min=5, help="Groups of source images; they play the patients.")] = 12,
    slides_per_group: Annotated[int, typer.Option(min=1, help="Slides drawn from each group.")] = 6,
    seed: Annotated[int, typer.Option(help="Seed of the cohort.")] = 0,
) -> None:
    """Compose slides from labelled real tissue that you have downloaded."""
    from lrmil.cohorts.assembled import AssembledSettings, assemble_cohort
    from lrmil.pipeline.reporting import Reporter

    settings = AssembledSettings(task=task, num_groups=groups, slides_per_group=slides_per_group, seed=seed)
    reporter = Reporter()
    with reporter.task("assemble", settings.num_slides) as progress:
        table = assemble_cohort(source, out, settings, on_progress=progress.reach)
    print(f"wrote {table}")
