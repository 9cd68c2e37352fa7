"""What do 5x pixels show? The ceiling of region probes on simulated tissue, from as many true answers as one likes.

Where stage 1 recovers little, either the pixels do not show it or the method misses it. On simulated tissue the truth
of every region is known and costs nothing, so the truth of many regions of slides that no study uses is learned in two
ways, and asked of the regions of the study: by ridge regression on the frozen 5x embedding, and by fine-tuning the
whole network. Several numbers of regions tell whether more of them would tell more. What comes out is still a lower
bound: this network, these recipes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field as Setting

from lrmil.encoders import Encoder, embed
from lrmil.errors import ConfigError
from lrmil.files import write_json, write_text
from lrmil.pipeline.reporting import Reporter, without_python_warnings
from lrmil.settings import Settings, fingerprint
from lrmil.studies.ceiling import ceiling_answers, train_ceiling
from lrmil.studies.configs import load_config
from lrmil.studies.fields import Field, FloatArray, load_fields
from lrmil.studies.figures import target_title
from lrmil.studies.kept import kept
from lrmil.studies.markdown import bracketed
from lrmil.studies.probe import build_encoder
from lrmil.studies.ridge import ridge_probe
from lrmil.studies.settings import CeilingSettings, FieldSettings, ProbeSettings, load_study
from lrmil.studies.summary import results_table
from lrmil.studies.tables import write_table
from lrmil.studies.views import ImageArray, View, look, probe_views, training_views
from lrmil.training.seeds import derive_seed

WAYS = {"ridge": "ridge regression on the frozen embedding", "network": "fine-tuning the network"}
_METHOD = 2
"""Raised whenever the same settings give other numbers than before; what is finished is then done anew."""


class CeilingStudySettings(Settings):
    """Which studies, and what is learned from."""

    title: str = Setting("What 5x shows", description="heading")
    out: str | None = Setting(None, description="output folder; null: out/<name of the config> beside the config")
    studies: tuple[str, ...] = Setting(
        min_length=1, description="configs of region probes on simulated tissue, named from this one's folder"
    )
    seed: int = Setting(ge=0, description="of the slides that are learned from; otherwise they are as the study's")
    slides: int = Setting(64, ge=4, description="slides that are learned from")
    fields_per_slide: int = Setting(40, ge=1, description="regions cut from each of them")
    val_share: float = Setting(0.1, gt=0, lt=1, description="share of these slides that choose the epoch")
    regions: tuple[int, ...] = Setting((250, 2000), min_length=1, description="numbers of regions to train with")
    recipe: CeilingSettings = Setting(
        CeilingSettings(learning_rate=5e-4, batch_size=16, epochs=10), description="how; seeds and folds have no part"
    )
    resamples: int = Setting(2000, ge=100, description="of patients, for intervals")


@dataclass(frozen=True)
class TrueRegions:
    """Regions at low resolution and what is true of them."""

    images: ImageArray
    """(n, P, P, 3)"""
    truth: FloatArray
    """(n, T)"""
    group: npt.NDArray[np.str_]
    """(n,) the patient"""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Any) -> TrueRegions:
        """Return some of them."""
        return TrueRegions(self.images[rows], self.truth[rows], self.group[rows])


def load_ceiling_study(path: Path, overrides: Sequence[str] | None = None) -> CeilingStudySettings:
    """Read the config; see `load_config`."""
    settings = load_config(CeilingStudySettings, path, overrides)
    base = path.resolve().parent
    return settings.model_copy(update={"studies": tuple(str(base / name) for name in settings.studies)})


def run_ceiling_study(settings: CeilingStudySettings, reporter: Reporter, *, publish: Path | None = None) -> list[Path]:
    """Simulate, train and ask; each study and number of regions is done once. Return what was published.

    Args:
        settings: of the study.
        reporter: told of progress.
        publish: folder of the tables; None: report/ of the study's own folder.

    Raises:
        ConfigError: a study is not one of simulated tissue, or there are fewer regions than asked for.
    """
    assert settings.out is not None  # `load_config` names one
    out = Path(settings.out)
    probes = {Path(path).stem: load_study(Path(path)) for path in settings.studies}
    for name, probe in probes.items():
        if probe.fields.simulated is None:
            raise ConfigError(f"{name}: not on simulated tissue.", fix="Leave it out.")
        if probe.fields.simulated.seed == settings.seed:
            raise ConfigError(f"{name} has the slides of seed {settings.seed}, too.", fix="Choose another seed.")
    rows: list[dict[str, Any]] = []
    for name, probe in probes.items():
        rows += _study(settings, name, probe, out / name, reporter)
    folder = out / "report" if publish is None else publish
    frame = pd.DataFrame(rows)
    paths = [folder / f"{out.name}{end}" for end in (".csv", ".md")]
    write_table(paths[0], frame)
    write_text(paths[1], to_markdown(frame))
    return paths


def to_markdown(frame: pd.DataFrame) -> str:
    """Write R2 as a table, a line a target, way and number of regions, a column a visibility."""
    seen = sorted(set(frame["visibility"]))
    lines = [
        f"| | learned by | true regions | {' | '.join(f'visibility {v:g}' for v in seen)} |",
        f"|---|---|---:|{'---:|' * len(seen)}",
    ]
    for (target, way, regions), own in frame.groupby(["target", "way", "regions"], sort=False):
        told = {row["visibility"]: bracketed(row, "r2", ".2f") for row in own.to_dict("records")}
        cells = [target_title(str(target)), WAYS[str(way)], str(regions), *(told.get(v, "") for v in seen)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _study(
    settings: CeilingStudySettings, name: str, probe: ProbeSettings, folder: Path, reporter: Reporter
) -> list[dict[str, Any]]:
    """Learn from every number of regions in both ways, and score on the regions of one study."""
    simulated = probe.fields.simulated
    assert simulated is not None  # seen by the caller
    recipe = settings.recipe.model_dump(mode="json", exclude={"seeds", "folds"})
    drawn = (settings.seed, settings.slides, settings.fields_per_slide, settings.val_share)
    asked = probe.model_dump(mode="json", include={"fields", "patch_px", "ratio", "targets", "min_nuclei"})
    encoder = build_encoder(probe)
    # A network is trained and asked in float32, whatever the precision of encoding.
    own = {"network": recipe, "ridge": probe.precision}
    keys = {
        (count, way): fingerprint(_METHOD, own[way], drawn, asked, encoder.describe(), count)
        for count, way in product(settings.regions, WAYS)
    }
    waiting = [cell for cell, key in keys.items() if kept(_path(folder, cell), key) is None]
    if waiting:
        test, (pool, val) = _asked(probe, folder), _learned(settings, probe, folder)
    for count, way in waiting:
        train = pool.take(slice(count))
        reporter.line(f"{name}, {WAYS[way]}: {len(train)} regions to learn from, {len(test)} are asked")
        if way == "network":
            said = _by_network(settings, encoder, train, val, test, reporter)
        else:
            said = _by_ridge(encoder, train, test, probe)
        told = {"groups": test.group.tolist(), "truth": test.truth.tolist(), "predicted": said.tolist()}
        write_json(_path(folder, (count, way)), {"key": keys[count, way]} | told)
    rows = []
    for (count, way), key in keys.items():
        found = kept(_path(folder, (count, way)), key)
        assert found is not None  # done above
        results = results_table(_frame(found, probe.targets), probe.targets, settings.resamples)
        about = {"study": name, "visibility": simulated.nuclei.visibility, "regions": count, "way": way}
        for row in results.to_dict("records"):
            rows.append(about | {key: row[key] for key in ("target", "r2", "r2_low", "r2_high")})
            reporter.line(f"  {row['target']}, {count} regions, {WAYS[way]}: R2 {bracketed(row, 'r2', '.2f')}")
    return rows


def _path(folder: Path, cell: tuple[int, str]) -> Path:
    return folder / f"{cell[1]}_{cell[0]}.json"


def _by_ridge(encoder: Encoder, train: TrueRegions, test: TrueRegions, probe: ProbeSettings) -> FloatArray:
    """Answers (n, T) of ridge regression on the embedding of the encoder as it is."""
    seen, asked = (embed(encoder, own.images, precision=probe.precision).embedding for own in (train, test))
    said = [ridge_probe(seen, train.truth[:, i], train.group, asked).predicted for i in range(train.truth.shape[1])]
    return np.stack(said, axis=1)


def _by_network(
    settings: CeilingStudySettings,
    encoder: Encoder,
    train: TrueRegions,
    val: TrueRegions,
    test: TrueRegions,
    reporter: Reporter,
) -> FloatArray:
    """Answers (n, T) of a copy of the encoder, fine-tuned; `val` chooses the epoch."""
    seed = derive_seed(settings.seed, "ceiling", len(train))
    with reporter.task("Training on the truth", settings.recipe.epochs) as task, without_python_warnings():
        network, _ = train_ceiling(
            copy.deepcopy(encoder),
            train,
            val,
            settings.recipe,
            seed=seed,
            on_epoch=lambda record: task.advance(note=f"val loss {record['val_loss']:.3f}"),
        )
    return ceiling_answers(network, test.images)


def _frame(found: dict[str, Any], targets: Sequence[str]) -> pd.DataFrame:
    """The answers of one way, as `results_table` wants them."""
    truth, predicted = (np.array(found[name], np.float64) for name in ("truth", "predicted"))
    view = np.arange(len(truth))
    shared = {"arm": "ceiling", "embedding": "direct", "fold": 0, "seed": 0, "group": found["groups"], "view": view}
    parts = [
        pd.DataFrame(shared | {"target": target, "truth": truth[:, i], "predicted": predicted[:, i]})
        for i, target in enumerate(targets)
    ]
    return pd.concat(parts, ignore_index=True)


def _asked(probe: ProbeSettings, folder: Path) -> TrueRegions:
    """The regions that the study's probes are asked about."""
    side_px = probe.patch_px * probe.ratio
    fields = load_fields(probe.fields, folder / "asked", side_px)
    return _looked_at(fields, [probe_views(own, side_px) for own in fields], probe)


def _learned(settings: CeilingStudySettings, probe: ProbeSettings, folder: Path) -> tuple[TrueRegions, TrueRegions]:
    """Regions of other slides: those to train with, shuffled, and those that choose the epoch. No slide is in both."""
    assert probe.fields.simulated is not None
    slides = {"seed": settings.seed, "slides": settings.slides, "patients": settings.slides}
    others = FieldSettings(
        simulated=probe.fields.simulated.model_copy(update=slides), fields_per_slide=settings.fields_per_slide
    )
    side_px = probe.patch_px * probe.ratio
    fields = load_fields(others, folder / "learned", side_px)
    patients = list(dict.fromkeys(own.group for own in fields))
    held = set(patients[: max(1, round(settings.val_share * len(patients)))])
    seed = derive_seed(settings.seed, "views")
    parts = []
    for chosen in (False, True):
        own = [f for f in fields if (f.group in held) == chosen]
        parts.append(_looked_at(own, [training_views(f, 1, side_px, seed) for f in own], probe))
    train, val = parts
    most = max(settings.regions)
    if most > len(train):
        raise ConfigError(f"{most} regions are asked for, {len(train)} are there.", fix="Take more slides.")
    order = np.random.default_rng(derive_seed(settings.seed, "regions")).permutation(len(train))
    return train.take(order), val


def _looked_at(fields: Sequence[Field], views: Sequence[Sequence[View]], probe: ProbeSettings) -> TrueRegions:
    images, truth, groups = [], [], []
    for own, told in zip(fields, views, strict=True):
        seen = look(own, told, probe.patch_px, probe.ratio, probe.targets, probe.min_nuclei)
        images.append(seen.images)
        truth.append(seen.truth)
        groups += [own.group] * len(told)
    return TrueRegions(np.concatenate(images), np.concatenate(truth), np.array(groups))
