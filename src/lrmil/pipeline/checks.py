"""What would stop a run after hours is found out at its start, before anything is written."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import yaml

from lrmil.cohorts.table import Cohort
from lrmil.distill import resolve_layers
from lrmil.encoders import Encoder, embed
from lrmil.encoders.store import is_saved_encoder
from lrmil.errors import CohortError, ConfigError, GridMismatch
from lrmil.geometry import check_token_grid
from lrmil.mil import create_head
from lrmil.pipeline.cohort import labelled_for_any
from lrmil.pipeline.context import Run
from lrmil.pipeline.folder import RunFolder
from lrmil.training.spread import require_restorable_spread
from lrmil.training.stage1 import student_layers
from lrmil.training.stage2 import trainable_pair


def require_usable_slides(cohort: Cohort) -> None:
    """See that every labelled slide has a file.

    Raises:
        CohortError: names the first slide that has none.
    """
    labelled = labelled_for_any(cohort)
    without = list(
        labelled["slide_id"] if "path" not in labelled else labelled.loc[labelled["path"].isna(), "slide_id"]
    )
    if without:
        raise CohortError(
            f"{cohort.source}: {len(without)} slides have no path (first: {without[0]}); distillation needs pixels.",
            fix="Add a path column, or name the folder of the slides as cohort.slides_dir.",
        )


def require_own_folder(folder: RunFolder) -> None:
    """See that what a run will replace or remove in its output folder was written by a run.

    A project's folder may well hold a config.yaml, a cohort.csv and a folder of figures.

    Raises:
        ConfigError: names what is there.
    """
    replaced = [folder.config, folder.cohort, folder.splits, folder.failures]
    replaced += [folder.tables, folder.report, folder.figures, folder.model]
    there = [path.name for path in replaced if path.exists()]
    if there and not _is_of_a_run(folder):
        raise ConfigError(
            f"out: {folder.root} holds {', '.join(there)}, which no run wrote and this one would replace.",
            fix="Choose another folder as out, an empty or a new one.",
        )


def _own_student(run: Run, encoder: Encoder, grey: npt.NDArray[np.uint8]) -> Encoder:
    """See that a student of another architecture can be built, works, and can be taught."""
    s = run.settings
    student = run.build_student()
    try:
        check_token_grid(student.token_grid_side, s.grid.ratio)
    except GridMismatch as error:
        fix = "Choose another stage1.student.input_px, or token_px."
        raise GridMismatch(f"stage1.student, {student.card.name}: {error.message}", fix=fix) from error
    student_layers(s.stage1, encoder.depth, student.depth)
    embed(student, grey, precision=s.encoder.precision)
    return student


def _is_of_a_run(folder: RunFolder) -> bool:
    """A run writes all of its settings, defaults too; a config written by hand hardly holds all of these sections."""
    try:
        written = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(written, dict) and {"cohort", "tissue", "tiles", "evaluation", "memory_gb"} <= set(written)


def require_fitting_parts(run: Run, encoder: Encoder) -> None:
    """See that encoder, grid, layers, precision, heads and baselines of a config fit together.

    Raises:
        GridMismatch: the token grid cannot be cut into the children's blocks.
        ConfigError, EncoderError, HeadError: something does not exist, or does not fit.
    """
    s = run.settings
    check_token_grid(encoder.token_grid_side, s.grid.ratio)
    layers = resolve_layers(s.stage1.loss.layers, encoder.depth)
    # One grey patch tells whether these taps and this precision work, and whether the weights are numbers.
    grey = np.full((1, s.grid.patch_px, s.grid.patch_px, 3), 128, np.uint8)
    embed(encoder, grey, cls_layers=layers, precision=s.encoder.precision)
    student_dim = encoder.embed_dim
    if s.stage1.student is not None:
        student_dim = _own_student(run, encoder, grey).embed_dim
    elif s.encoder.student_embedding not in (encoder.embedding, s.encoder.embedding):
        # Another output may need weights that are not there.
        student_dim = run.build_encoder(student=True).embed_dim
    if s.stage1.restore_spread:
        require_restorable_spread(run.build_encoder(student=True))
    mapped = s.stage1.student is not None
    if s.stage1.loss.lambda_attention_feature and student_dim != encoder.embed_dim and not mapped:
        raise ConfigError(
            f"stage1.loss.lambda_attention_feature compares the student's embedding of {student_dim} numbers with the "
            f"teacher's of {encoder.embed_dim}.",
            fix="Set encoder.embedding and encoder.student_embedding to the same.",
        )
    teacher, student = trainable_pair(s.teacher, s.student, run.objective)
    for head, in_dim in ((teacher, encoder.embed_dim), (student, student_dim)):
        create_head(head.name, in_dim, run.objective.outputs, **head.options)
    if "colour_histogram" in s.evaluation.baselines and run.kind == "survival":
        raise ConfigError(
            "evaluation.baselines: colour_histogram knows no survival.", fix="Leave it out, or ask for classes."
        )
    if "random_encoder" in s.evaluation.baselines and is_saved_encoder(s.encoder.name):
        raise ConfigError(
            f"evaluation.baselines: {s.encoder.name} is a saved encoder, which cannot have random weights.",
            fix="Leave random_encoder out.",
        )
