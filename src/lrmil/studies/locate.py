"""Localisation: whether a model looks where the evidence truly is, on slides whose true areas are known.

Every slide is shown to the models of the fold that tests it. The unit is the low-resolution region for all: a head that
looks at 20x gives a region the attention of its children together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from lrmil.cohorts.truth import NucleusTable, Polygon, area_mask, read_areas, read_nuclei
from lrmil.errors import ConfigError
from lrmil.evaluation.overlay import AttentionMap
from lrmil.pipeline.attention import TEACHER_NAME, StoredModels
from lrmil.pipeline.context import Run
from lrmil.pipeline.heatmaps import SHOWN, methods_shown
from lrmil.pipeline.reporting import Reporter
from lrmil.studies.markdown import bracketed

FloatArray = npt.NDArray[np.float64]

TOP = 5
"""regions of most attention whose truth is looked up"""
EPITHELIUM = "epithelial_nuclei"
"""How many of a region's nuclei are truly epithelial, in place of attention: evidence lies in epithelium, so a model
that only finds much of that scores as much"""
_MASK_UM = 4.0
"""side of a sample of the mask of true areas"""
_MEASURES = ("auc", "top_share")


def locate(run: Run, truth: Path, reporter: Reporter, methods: Sequence[str] = SHOWN) -> pd.DataFrame:
    """Ask every model where it looks on every slide that has positive and other regions; score that.

    Slides that failed, or that no fold tests, are left out; the reporter is told how many.

    Args:
        run: finished.
        truth: folder of SLIDE_ID.geojson with areas named "positive".
        reporter: told of progress.
        methods: as of `heatmaps`; they must include a head that looks at low resolution, whose regions are the unit.

    Returns:
        One row a slide and method: slide_id, patient_id, fold, method, auc, top_share (of the `TOP` regions of most
        attention, the share that is positive), positive_share (of all regions, which is what chance finds), regions.
        Where the truth has nuclei, `EPITHELIUM` is among the methods.

    Raises:
        ConfigError: no slide has both kinds of region, or something has to be run first.
    """
    models, chosen = StoredModels(run), methods_shown(methods, run.settings.cohort.kind)
    rows: list[dict[str, Any]] = []
    known = [slide for slide in run.cohort.labelled()["slide_id"] if (truth / f"{slide}.geojson").is_file()]
    slides = [slide for slide in known if models.shows(slide)]
    if len(slides) < len(known):
        reporter.line(
            f"Localisation leaves out {len(known) - len(slides)} of {len(known)} slides: they failed, or no fold "
            "tests them."
        )
    with reporter.task("Localisation", len(slides)) as progress:
        for slide_id in slides:
            progress.advance(note=slide_id)
            areas = read_areas(truth / f"{slide_id}.geojson")
            if not areas:
                continue
            entry, split = models.entry(slide_id), models.tested_by(slide_id)
            with entry.open() as slide:
                size_px, mpp = slide.dimensions, slide.mpp
            maps = {method.name: models.attention(entry, split, method) for method in chosen}
            regions_l0 = next(maps[m.name].boxes_l0 for m in chosen if m.name != TEACHER_NAME)
            positive = share_inside(regions_l0, areas, size_px, max(1.0, _MASK_UM / mpp)) >= 0.5
            if positive.all() or not positive.any():
                continue
            scores = {name: attention_of_regions(found, regions_l0) for name, found in maps.items()}
            if (truth / f"{slide_id}.nuclei.npz").is_file():
                scores[EPITHELIUM] = epithelial_nuclei(regions_l0, read_nuclei(truth / f"{slide_id}.nuclei.npz"))
            for name, score in scores.items():
                rows.append(
                    {
                        "slide_id": slide_id,
                        "patient_id": run.cohort.patient_of(slide_id),
                        "fold": split.name,
                        "method": name,
                        **found_by(score, positive),
                    }
                )
    if not rows:
        raise ConfigError(
            f"no tested slide has both positive and other regions in {truth}.",
            fix="Localisation needs slides with areas named positive, as `lrmil simulate` writes them.",
        )
    return pd.DataFrame(rows)


def share_inside(
    boxes_l0: npt.NDArray[np.int64], areas: Sequence[Polygon], size_px: tuple[int, int], downsample: float
) -> FloatArray:
    """Return the share (N,) of each box (N, 4) that lies in `areas`, on samples of `downsample` level-0 px."""
    width, height = (int(np.ceil(side / downsample)) for side in size_px)
    mask = area_mask(areas, (width, height), downsample)
    samples = np.round(np.asarray(boxes_l0) / downsample).astype(int)
    return np.array([mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].mean() for x0, y0, x1, y1 in samples])


def epithelial_nuclei(regions_l0: npt.NDArray[np.int64], nuclei: NucleusTable) -> FloatArray:
    """Return the number (R,) of epithelial nuclei in each region (R, 4)."""
    epithelial = nuclei.kind == nuclei.kinds.index("epithelial")
    x, y = nuclei.x_l0[epithelial], nuclei.y_l0[epithelial]
    boxes = np.asarray(regions_l0)
    return np.array([((x >= x0) & (x < x1) & (y >= y0) & (y < y1)).sum() for x0, y0, x1, y1 in boxes], np.float64)


def attention_of_regions(found: AttentionMap, regions_l0: npt.NDArray[np.int64]) -> FloatArray:
    """Return the attention (R,) of regions (R, 4): their own, or that of the children whose centres they hold.

    Attention that is not a distribution (logits) is made one before children are summed.
    """
    weights = np.asarray(found.attention, np.float64)
    if len(found.boxes_l0) == len(regions_l0) and np.array_equal(found.boxes_l0, regions_l0):
        return weights
    if weights.min() < 0 or not np.isclose(weights.sum(), 1.0, atol=1e-3):
        weights = softmax(weights)
    x, y = (found.boxes_l0[:, [i, i + 2]].mean(axis=1) for i in (0, 1))
    return np.array(
        [weights[(x >= x0) & (x < x1) & (y >= y0) & (y < y1)].sum() for x0, y0, x1, y1 in np.asarray(regions_l0)]
    )


def found_by(attention: FloatArray, positive: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Score attention (R,) of one slide against truth (R,)."""
    top = np.argsort(-attention, kind="stable")[:TOP]
    return {
        "auc": float(roc_auc_score(positive, attention)),
        "top_share": float(positive[top].mean()),
        "positive_share": float(positive.mean()),
        "regions": len(positive),
    }


def summarise(
    found: pd.DataFrame, titles: Mapping[str, str], *, baseline: str, resamples: int, seed: int = 0
) -> pd.DataFrame:
    """Average over slides, with 95 % intervals that resample patients, and paired differences from `baseline`.

    Returns:
        One row a method: method, title, slides, and of auc and top_share: value, low, high, gain, gain_low, gain_high.
    """
    patients = found["patient_id"].unique()
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=resamples).astype(float)

    def means(values: pd.DataFrame) -> FloatArray:
        """The mean over slides, then under every resample (1 + B,)."""
        of = values.groupby("patient_id")["value"].agg(["sum", "count"]).reindex(patients, fill_value=0)
        weights = np.vstack([np.ones(len(patients)), draws])
        return np.asarray(weights @ of["sum"].to_numpy() / (weights @ of["count"].to_numpy()), np.float64)

    rows = []
    for name, title in titles.items():
        row: dict[str, Any] = {"method": name, "title": title, "slides": int((found["method"] == name).sum())}
        for measure in _MEASURES:
            own, other = (
                means(found[found["method"] == m].rename(columns={measure: "value"})) for m in (name, baseline)
            )
            for label, values in (("", own), ("_gain", own - other)):
                low, high = np.nanpercentile(values[1:], (2.5, 97.5))
                row |= {f"{measure}{label}": values[0], f"{measure}{label}_low": low, f"{measure}{label}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def to_markdown(summary: pd.DataFrame, found: pd.DataFrame) -> str:
    """Write the summary as a table."""
    chance = found.drop_duplicates("slide_id")["positive_share"].mean()
    lines = [
        f"| | AUC of attention | positive among the {TOP} regions of most attention |",
        "|---|---:|---:|",
        f"| chance | 0.50 | {chance:.2f} |",
    ]
    for row in summary.to_dict("records"):
        lines.append(_line(row["title"], [bracketed(row, measure, ".2f") for measure in _MEASURES]))
    for row in summary[summary["method"] == "lrmil"].to_dict("records"):
        gains = [bracketed(row, f"{measure}_gain", "+.2f") for measure in _MEASURES]
        lines.append(_line(f"{row['title']} - 5x without distillation, paired", gains))
    slides, patients = found["slide_id"].nunique(), found["patient_id"].nunique()
    lines.append(f"\n{slides} slides of {patients} patients, each shown to the models of the fold that tests it.")
    return "\n".join(lines) + "\n"


def _line(title: str, told: Sequence[str]) -> str:
    return f"| {title} | {' | '.join(told)} |"
