"""`lrmil demo`: the whole method on a simulated cohort, offline. Settings, encoder and seeds are fixed here."""

from __future__ import annotations

from pathlib import Path

from lrmil.cohorts.simulated import preset, simulate_cohort
from lrmil.errors import ConfigError
from lrmil.pipeline.config import parse_config
from lrmil.pipeline.reporting import Reporter
from lrmil.pipeline.run import Outcome, run_all

PROCESSES = 2
_SIMULATED = {"slides", "truth", "cohort.csv", "simulated.json", "contact_sheet.png"}
"""What a simulated cohort consists of"""

# Everything a reported number depends on. Chosen before any LRMIL result on this cohort; see docs/demo.md.
CONFIG = {
    "cohort": {"task": "label"},
    "grid": {"patch_px": 64, "lr_mpp": 2.0, "hr_mpp": 0.5},
    "encoder": {"name": "lrmil-small"},
    # The recipe of docs/evidence, chosen and tried on cohorts of other seeds: the paper's steps, but many, and the
    # spread of the embedding given back. Heads on few slides need larger steps than the paper's.
    "stage1": {"learning_rate": 1e-4, "batch_size": 8, "epochs": 2, "restore_spread": True},
    "teacher": {"learning_rate": 2e-3},
    "student": {"learning_rate": 2e-3},
    "evaluation": {
        "baselines": ["majority", "colour_histogram", "random_encoder", "lr_only"],
        "timed_slides": 5,
        "heatmap_slides": 4,
    },
    "seed": 0,
}


def run_demo(out: Path, reporter: Reporter) -> Outcome:
    """Simulate the cohort, run the whole method on it, and write the report.

    Raises:
        ConfigError: `out` holds files of others.
    """
    _require_own(out)
    settings = preset("demo")
    with (
        reporter.stage("simulate", f"Simulating {settings.slides} slides"),
        reporter.task("simulate", settings.slides) as progress,
    ):
        table = simulate_cohort(out / "cohort", settings, processes=PROCESSES, on_progress=progress.reach)
    config = CONFIG | {"cohort": CONFIG["cohort"] | {"table": str(table)}, "out": str(out)}  # type: ignore[operator]
    outcome = run_all(
        parse_config(config, "demo"), reporter, title="LRMIL on simulated slides", command="lrmil demo", simulated=True
    )
    return outcome


def _require_own(out: Path) -> None:
    """See, before anything is simulated, that a folder is new, empty or of a demo, finished or not."""
    there, cohort = _names(out), _names(out / "cohort")
    # The table comes last of all, simulated.json before it.
    simulated = cohort <= _SIMULATED and ("cohort.csv" not in cohort or "simulated.json" in cohort)
    begun = there <= {"cohort", "log.jsonl"} or {"cohort", "log.jsonl", "config.yaml"} <= there
    if not (simulated and begun):
        some = sorted(there)[:5]
        raise ConfigError(
            f"--out {out} is not empty, and no folder of `lrmil demo`: it holds {', '.join(some)}"
            f"{' and more' if len(there) > len(some) else ''}.",
            fix="Name a new folder.",
        )


def _names(folder: Path) -> set[str]:
    """Return what lies in a folder, hidden files apart, among which are leftovers of a killed run."""
    if not folder.is_dir():
        return {folder.name} if folder.exists() else set()
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}
