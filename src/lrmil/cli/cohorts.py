"""`lrmil simulate` and `lrmil assemble`: cohorts to try things on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Out = Annotated[Path, typer.Argument(help="Folder for slides/, truth/ and cohort.csv.")]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change one setting, like nuclei.visibility=0; may be repeated."),
]
Processes = Annotated[int, typer.Option(min=1, help="Slides made at the same time.")]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(simulate)
    app.command()(assemble)


def simulate(
    out: Out,
    size: Annotated[str, typer.Option(help="test (seconds), demo (a minute), study (several minutes).")] = "demo",
    overrides: Override = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the cohort.")] = None,
    processes: Processes = 2,
) -> None:
    """Simulate H&E-like slides of two classes that differ in nuclear detail, with the truth of every region.

    The same settings always give the same pixels; a second call makes only what is missing. Train on the result with
    `lrmil init OUT/cohort.csv` and `lrmil run`.
    """
    from lrmil.cohorts.simulated import SimulatedSettings, preset, simulate_cohort
    from lrmil.pipeline.overrides import apply_overrides, validated
    from lrmil.pipeline.reporting import Reporter

    raw = preset(size).model_dump()
    if seed is not None:
        raw["seed"] = seed
    apply_overrides(raw, overrides or [])
    settings = validated(SimulatedSettings, raw, "lrmil simulate")
    with Reporter().task("simulate", settings.slides) as progress:
        table = simulate_cohort(out, settings, processes=processes, on_progress=progress.reach)
    print(f"wrote {table}")


def assemble(
    source: Annotated[Path, typer.Argument(help="Folder of CRCHistoPhenotypes: images/, images.csv, nuclei.csv.gz.")],
    out: Out,
    task: Annotated[
        Literal["inflammatory", "epithelium"],
        typer.Option(help="What makes a slide positive: an inflammatory focus, or any epithelium."),
    ] = "inflammatory",
    groups: Annotated[int, typer.Option(help="Groups of source images; they play the patients.")] = 12,
    slides_per_group: Annotated[int, typer.Option(help="Slides drawn from each group, half of them positive.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the cohort.")] = 1,
    overrides: Override = None,
) -> None:
    """Compose slides from labelled real tissue that you have downloaded.

    Images are dealt into groups first, and a slide draws from one group alone, so that a split by patient is a split by
    image. Train on the result with `lrmil init OUT/cohort.csv` and `lrmil run`.
    """
    from lrmil.cohorts.assembled import AssembledSettings, assemble_cohort
    from lrmil.pipeline.overrides import apply_overrides, validated
    from lrmil.pipeline.reporting import Reporter

    raw = {"task": task, "groups": groups, "slides_per_group": slides_per_group, "seed": seed}
    apply_overrides(raw, overrides or [])
    settings = validated(AssembledSettings, raw, "lrmil assemble")
    with Reporter().task("assemble", settings.groups * settings.slides_per_group) as progress:
        table = assemble_cohort(source, out, settings, on_progress=progress.reach)
    print(f"wrote {table}")
