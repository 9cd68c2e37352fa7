"""Studies of whole slides: a cohort with known truth, the whole method on it, and what one asks of the trained models.

One config names the cohort, the run and the parts; each part is what its own verb (`lrmil ablate`, `lrmil sensitivity`,
`lrmil compare`) would do. What a part publishes is small: tables and figures, no predictions and no weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import Field, model_validator

from lrmil.evaluation.plots import save_figure
from lrmil.files import write_text
from lrmil.pipeline.ablate import ablate, compare_recipes, sensitivity
from lrmil.pipeline.cohort import settings_cohort
from lrmil.pipeline.compare import compare
from lrmil.pipeline.config import RunSettings
from lrmil.pipeline.context import Run
from lrmil.pipeline.heatmaps import SHOWN, heatmaps, methods_shown
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.run import run_all
from lrmil.pipeline.variants import Of
from lrmil.studies import fold_study
from lrmil.studies.configs import load_config
from lrmil.studies.locate import EPITHELIUM, locate, summarise, to_markdown
from lrmil.studies.on_slides import OnSlides, prepared_run
from lrmil.studies.slide_controls import control_cells, write_controls
from lrmil.studies.tables import write_table

Part = Literal["ablation", "comparison", "controls", "localisation", "folds", "recipes"] | Of

_TABLES = ("table3.md", "paper.md", "results.csv", "differences.csv", "recovery.csv", "pairs.csv")
_NOT_PUBLISHED = (
    "figure_roc.png",
    "figure_reliability.png",
    "figure_differences_acc.png",
    "figure_differences_balanced_acc.png",
)


class SlideStudySettings(OnSlides):
    """A study of slides."""

    title: str = Field("Slides", description="heading")
    folds: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="for the part folds: heading of each way of splitting, and what it changes in the run's folds",
    )
    recipes: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="for the part recipes: heading of each other recipe, and what it changes in stage1, teacher and "
        "student of the run's config, or in encoder.student_embedding",
    )
    recipe_seeds: tuple[int, ...] | None = Field(
        None, min_length=1, description="for the part recipes: seeds of all training; null: those of the comparison"
    )
    parts: tuple[Part, ...] = Field(("ablation", "localisation"), description="what is asked, in this order")

    @model_validator(mode="after")
    def _told_parts(self) -> Self:
        if "folds" in self.parts and not self.folds:
            raise ValueError("the part folds needs ways of splitting under `folds`")
        if "recipes" in self.parts and not self.recipes:
            raise ValueError("the part recipes needs others under `recipes`")
        return self


def load_slide_study(path: Path, overrides: Sequence[str] | None = None) -> SlideStudySettings:
    """Read the config; see `load_config`."""
    return load_config(SlideStudySettings, path, overrides)


def run_slide_study(settings: SlideStudySettings, reporter: Reporter, *, publish: Path | None = None) -> list[Path]:
    """Make the cohort, run, then do the parts; resumes. Return what was published.

    Args:
        settings: of the study.
        reporter: told of progress.
        publish: folder of the small results; None: report/ of the study's own folder.
    """
    out, run = settings.folder, prepared_run(settings, reporter)
    folder = out / "report" if publish is None else publish
    tables = run_all(run, reporter, title=settings.title, simulated=settings.simulated is not None).folder.tables
    scored = [tables / name for name in ("results.csv", "results.md", "differences.csv")]
    written = [_copy(path, folder / f"{out.name}_run_{path.name}") for path in scored]
    for part in settings.parts:
        if part == "localisation":
            written += _localise(run, out / "cohort" / "truth", folder, out.name, reporter)
            continue
        if part == "folds":
            written += _split_anew(settings, run, folder, out.name, reporter)
            continue
        if part == "controls":
            written += _control(settings, run, folder, reporter)
            continue
        where = _doer(part, settings)(run, reporter)
        written += _published(where, folder, f"{out.name}_{part}")
    return written


def _doer(part: Part, settings: SlideStudySettings) -> Callable[[RunSettings, Reporter], Path]:
    """Return what does a part, and says where its results lie."""
    if part == "ablation":
        return lambda run, reporter: ablate(run, reporter).folder.ablation
    if part == "recipes":
        seeds = settings.recipe_seeds
        return lambda run, reporter: compare_recipes(_with_seeds(run, seeds), reporter, settings.recipes).folder.recipes
    if part == "comparison":
        return lambda run, reporter: compare(run, reporter).folder.comparison
    of = cast(Of, part)
    return lambda run, reporter: sensitivity(run, reporter, of).folder.sensitivity / of


def _with_seeds(run: RunSettings, seeds: tuple[int, ...] | None) -> RunSettings:
    """Return the run with other seeds of its comparisons, or as it is."""
    if seeds is None:
        return run
    return run.model_copy(update={"compare": run.compare.model_copy(update={"seeds": list(seeds)})})


def _published(where: Path, folder: Path, prefix: str) -> list[Path]:
    """Copy tables and figures of a comparison."""
    chosen = [where / name for name in _TABLES if (where / name).is_file()]
    chosen += sorted(path for path in where.glob("figure_*.png") if path.name not in _NOT_PUBLISHED)
    return [_copy(path, folder / f"{prefix}_{path.name}") for path in chosen]


def _localise(run: RunSettings, truth: Path, folder: Path, name: str, reporter: Reporter) -> list[Path]:
    """Score where the models look, and draw one slide: the first, in the cohort's order, that could be scored."""
    begun = Run.of(run, settings_cohort(run), reporter)
    found = locate(begun, truth, reporter)
    titles = {method.name: method.title for method in methods_shown(SHOWN, run.cohort.kind)}
    if EPITHELIUM in set(found["method"]):
        titles = {EPITHELIUM: "no model: true number of epithelial nuclei", **titles}
    summary = summarise(found, titles, baseline="lr_only", resamples=run.evaluation.bootstrap, seed=run.seed)
    paths = [folder / f"{name}_localisation{end}" for end in ("_slides.csv", ".csv", ".md")]
    for path, frame in zip(paths[:2], (found, summary), strict=True):
        write_table(path, frame)
    write_text(paths[2], to_markdown(summary, found))
    drawn = heatmaps(run, [str(found["slide_id"].iloc[0])], reporter)
    return [*paths, *(_copy(path, folder / f"{name}_heatmap.png") for path in drawn)]


def _split_anew(
    settings: SlideStudySettings, run: RunSettings, folder: Path, name: str, reporter: Reporter
) -> list[Path]:
    """Train on other folds, and write the table and figure of that."""
    found = fold_study.fold_study(run, settings.folds, reporter)
    paths = [folder / f"{name}_folds{end}" for end in (".csv", ".md", ".png")]
    write_table(paths[0], found)
    write_text(paths[1], fold_study.to_markdown(found))
    save_figure(paths[2], fold_study.figure(found, settings.title))
    return paths


def _control(settings: SlideStudySettings, run: RunSettings, folder: Path, reporter: Reporter) -> list[Path]:
    """Train negative controls of stage 2, with the seeds of a comparison."""
    cells = settings.folder / "controls"
    done = control_cells(run, settings.made_of, run.compare.seeds or (run.seed,), cells, reporter)
    return write_controls(done, folder, f"{settings.folder.name}_controls", run.evaluation.bootstrap)


def _copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target
