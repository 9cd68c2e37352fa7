"""`lrmil heatmaps`: where teacher, LR-only, LRMIL and other heads look on a slide, side by side (paper, Figure 2).

All that is shown comes from the fold that tests the slide: no model that trained on it, or that was chosen by it, is
asked. Nothing is trained here; what is missing, or was made with other settings, is named together with the command
that makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lrmil.errors import ConfigError
from lrmil.evaluation.plots import save_figure
from lrmil.pipeline.attention import TEACHER_NAME, StoredModels
from lrmil.pipeline.checks import require_usable_slides
from lrmil.pipeline.cohort import settings_cohort
from lrmil.pipeline.config import RunSettings
from lrmil.pipeline.context import Run
from lrmil.pipeline.evaluate import TEACHER
from lrmil.pipeline.figures import slide_figure
from lrmil.pipeline.methods import Method, methods_named
from lrmil.pipeline.reporting import Reporter
from lrmil.tasks import TaskKind

SHOWN = (TEACHER_NAME, "lr_only", "lrmil")
"""What is shown unless something else is asked for, as in the paper"""


def heatmaps(
    settings: RunSettings, slides: Sequence[str], reporter: Reporter, methods: Sequence[str] = SHOWN
) -> list[Path]:
    """Draw a figure of each slide into heatmaps/ of the output folder; return the files.

    Args:
        settings: of a run, and of a comparison where other heads are asked for, which are both done.
        slides: ids of the cohort.
        reporter: told of progress.
        methods: "teacher", and names of `lrmil compare`, in the order in which they are shown. Heads that choose their
            patches show those at the finest scale; they read and encode them from the slide.

    Raises:
        CohortError: there is no such slide.
        ConfigError: there is no such method; no fold tests the slide; or something has to be run first.
        HeadError: a head gives no attention.
    """
    chosen = methods_shown(methods, settings.cohort.kind)
    cohort = settings_cohort(settings)
    require_usable_slides(cohort)
    models = StoredModels(Run.of(settings, cohort, reporter))
    entries = [models.entry(slide) for slide in slides]
    written = []
    with (
        reporter.stage("heatmaps", f"Drawing {len(entries)} slides"),
        reporter.task("heatmaps", len(entries)) as progress,
    ):
        for entry in entries:
            split = models.tested_by(entry.slide_id)
            maps = [models.attention(entry, split, method) for method in chosen]
            figure = slide_figure(models.run, entry, maps, f" (models of {split.title}, which tests it)")
            path = models.run.folder.heatmaps / f"{entry.slide_id}.png"
            save_figure(path, figure)
            written.append(path)
            progress.advance(note=entry.slide_id)
    return written


def methods_shown(names: Sequence[str], kind: TaskKind) -> list[Method]:
    """Return the methods of these names.

    Raises:
        ConfigError: there is no such method, or it looks at no slide.
    """
    known = {m.name: m for m in methods_named([n for n in names if n != TEACHER_NAME], kind)}
    known[TEACHER_NAME] = Method(TEACHER_NAME, TEACHER, "Full HR", "hr")
    blind = [n for n in names if known[n].sees == "nothing"]
    if blind or not names:
        raise ConfigError(
            f"{', '.join(blind) or 'nothing'}: this looks at no slide, and has no heatmap.",
            fix=f"Choose from {TEACHER_NAME}, and the methods of `lrmil compare`.",
        )
    return [known[n] for n in dict.fromkeys(names)]
