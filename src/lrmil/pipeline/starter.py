"""A first config for a cohort, written after the table has been checked."""

from __future__ import annotations

from pathlib import Path

import yaml

from lrmil.cohorts.table import load_cohort
from lrmil.encoders import EncoderCard, resolve_card
from lrmil.errors import ConfigError
from lrmil.files import write_text
from lrmil.tasks import TaskKind

RATIO = 4
"""lr_mpp / hr_mpp of the template"""
TEMPLATE = """\
# lrmil run {config}
# Every setting that is not here has a default; the run writes the whole tree to its config.yaml.

cohort:
  table: {cohort}
  task: {task}
{asked}out: {out}

grid:
  patch_px: {patch_px}  # side of a patch at both scales
  lr_mpp: 2.0  # low resolution, um per pixel ("5x"): all that deployment reads
  hr_mpp: 0.5  # high resolution ("20x"): training only

encoder:
  name: {encoder}  # see `lrmil encoders`
  weights: null  # a local weight file, or null for the hub
  embedding: cls

stage1:  # patch-level distillation, for each fold anew
  learning_rate: 0.0001
  epochs: 20  # the best is kept; more where slides are few and small: 500 steps were needed in docs/evidence
  batch_size: 32  # regions a step
  restore_spread: true  # false in the paper; no worse, and better where stage 1 is short: see docs/evidence
teacher:  # the 20x head
  learning_rate: 0.0001
  epochs: 100
  patience: 20
student:  # the 5x head
  learning_rate: 0.0001
  epochs: 100
  patience: 20
  loss: {{lambda_bag: 1.0, lambda_soft: 1.0, lambda_hard: 1.0, hard_k: 4}}

{objective}folds: {{num_folds: 5, seed: 0}}
seed: 0
device: auto
threads: 4  # reader threads
"""
ASKED: dict[TaskKind, str] = {
    "classification": """\
  classes: {classes}  # in the order of the outputs
""",
    "regression": """\
  kind: regression  # the column holds a number
""",
    "survival": """\
  kind: survival
  time: {time}  # column: until the event, or the end of observation
  event: {event}  # column: 1, true, dead: seen; 0, false, alive: not
""",
}
OBJECTIVE = """\
objective: {survival: hazards, intervals: 4}  # or {survival: cox, cox_bags: 32}
"""


def write_starter(
    cohort: Path,
    config: Path,
    *,
    encoder: str,
    task: str,
    out: str,
    kind: TaskKind = "classification",
    time: str = "time",
    event: str = "event",
) -> list[str]:
    """Check a cohort and write `config` for it; return lines that describe what was found.

    Args:
        cohort: the table.
        config: file to write.
        encoder: see `lrmil encoders`.
        task: column of the label or number; for survival any name.
        out: output folder of the run.
        kind: of the task.
        time: survival: column of the time.
        event: survival: column that says whether the event was seen.

    Raises:
        ConfigError: `config` exists already.
        CohortError: the table is wrong.
        UnknownEncoder: no such encoder.
    """
    if config.exists():
        raise ConfigError(f"{config} exists.", fix="Name another file with --config.")
    card = resolve_card(encoder)
    found = load_cohort(cohort, task=task, kind=kind, time=time, event=event)
    text = TEMPLATE.format(
        config=config,
        cohort=_yaml(str(cohort.resolve())),
        task=_yaml(task),
        asked=ASKED[kind].format(classes=_yaml(list(found.classes)), time=_yaml(time), event=_yaml(event)),
        objective=OBJECTIVE if kind == "survival" else "",
        out=_yaml(out),
        patch_px=_patch_px(card),
        encoder=_yaml(card.name),
    )
    write_text(config, text)
    return [found.summary(), f"encoder {card.name}: licence {card.licence}{', gated' if card.gated else ''}"]


def _yaml(value: str | list[str]) -> str:
    """Write a value in one line of YAML, with quotes where it would be read as something else."""
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n").strip()
    )


def _patch_px(card: EncoderCard) -> int:
    """256 px, the paper's, for encoders that were trained on about that; the encoder's own side for smaller ones."""
    side = card.input_px if card.input_px < 224 or 256 % card.token_px else 256
    tokens = side // card.token_px
    return side if tokens % RATIO == 0 else card.token_px * max(RATIO, tokens - tokens % RATIO)
