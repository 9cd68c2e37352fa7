"""Write a whole simulated cohort: slides, truth, cohort.csv, contact sheet. Resumes; runs in several processes."""

from __future__ import annotations

import csv
import io
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lrmil.cohorts.contact_sheet import Tile, write_contact_sheet
from lrmil.cohorts.simulated.architecture import Wish
from lrmil.cohorts.simulated.nuclei import KINDS
from lrmil.cohorts.simulated.painter import WINDOW_PX, Scene, paint_window
from lrmil.cohorts.simulated.plan import SlidePlan, label_name, plan_cohort
from lrmil.cohorts.simulated.settings import SimulatedSettings
from lrmil.cohorts.simulated.slide import build_scene, scene_truth
from lrmil.cohorts.simulated.stain import make_profile, make_site, patient_strength
from lrmil.cohorts.truth import NucleusTable, forget_truth, is_finished, mask_polygons, read_areas, write_truth
from lrmil.files import read_json, write_json, write_text
from lrmil.settings import fingerprint
from lrmil.slides import write_pyramid

Progress = Callable[[int, int, str], None]
_SITE_STREAM, _PATIENT_STREAM, _SLIDE_STREAM = 21, 31, 41
_DRAWING = 1
"""Raised whenever the same settings give other pixels than before; finished slides are then drawn anew."""


def simulate_cohort(
    out: Path | str,
    settings: SimulatedSettings,
    *,
    processes: int = 1,
    on_progress: Progress | None = None,
) -> Path:
    """Write the cohort into the folder `out` and return the path of its cohort.csv.

    `out` then holds slides/*.tif, truth/ (see `lrmil.cohorts.truth`), cohort.csv, simulated.json and contact_sheet.png,
    where positive areas are outlined. Slides that are there already, made from the same settings, are kept, so that a
    killed run resumes.

    Args:
        out: folder; made if missing.
        settings: what to simulate.
        processes: how many slides to draw at once. With more than one, a script has to call this under
            `if __name__ == "__main__":`, since the processes are started afresh.
        on_progress: called with (slides finished, slides in all, slide_id) after each slide.
    """
    out = Path(out)
    plans = plan_cohort(settings)
    waiting = [plan for plan in plans if not _is_done(out, settings, plan)]
    done = len(plans) - len(waiting)
    if on_progress is not None and done:
        on_progress(done, len(plans), "")
    for slide_id in _draw_all(out, settings, waiting, processes):
        done += 1
        if on_progress is not None:
            on_progress(done, len(plans), slide_id)
    _write_sheet(out, settings, plans)
    write_json(
        out / "simulated.json",
        {"made_by": "simulated", "settings": settings.model_dump(mode="json"), "fingerprint": fingerprint(settings)},
    )
    return _write_table(out, settings, plans)


def draw_slide(settings: SimulatedSettings, plan: SlidePlan) -> Scene:
    """Draw the scene of one slide of the cohort. It depends on the settings and the plan's own seeds alone."""
    seed = settings.seed
    site = make_site(np.random.default_rng([seed, _SITE_STREAM, plan.site]), settings.stain)
    patient = patient_strength(np.random.default_rng([seed, _PATIENT_STREAM, plan.patient]), settings.stain)
    rng = np.random.default_rng([seed, _SLIDE_STREAM, plan.index])
    stain = make_profile(rng, site, settings.stain, settings.scanner, patient)
    tissue = settings.tissue
    wish = Wish(
        positive_share=plan.positive_share,
        foci=int(rng.integers(tissue.foci[0], tissue.foci[1] + 1)),
        pieces=int(rng.integers(tissue.pieces[0], tissue.pieces[1] + 1)),
        spacing_factor=float(np.exp(rng.normal(0, tissue.gland_spacing_sd))),
    )
    side_um = settings.slide_px * settings.mpp
    pattern = plan.label if settings.target == "class" else 1
    return build_scene(rng, settings, side_um, side_um, wish, pattern, stain)


def _draw_all(out: Path, settings: SimulatedSettings, plans: list[SlidePlan], processes: int) -> Iterator[str]:
    if processes <= 1 or len(plans) <= 1:
        for plan in plans:
            yield _write_slide(out, settings, plan)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(plans)), mp_context=context, initializer=_one_thread) as pool:
        futures = [pool.submit(_write_slide, out, settings, plan) for plan in plans]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _one_thread() -> None:
    cv2.setNumThreads(1)


def _write_slide(out: Path, settings: SimulatedSettings, plan: SlidePlan) -> str:
    scene = draw_slide(settings, plan)
    path = _slide_path(out, plan)
    forget_truth(out / "truth", plan.slide_id)
    write_pyramid(
        path,
        _strips(scene, settings.slide_px, settings.mpp),
        settings.mpp,
        quality=settings.jpeg_quality,
        description=f"simulated H&E slide {plan.slide_id}",
    )
    truth = scene_truth(scene, plan.label, settings.mpp)
    summary = {
        "slide_id": plan.slide_id,
        "label": label_name(settings, plan.label),
        "positive_share": truth.positive_share,
        "tissue_share": float(truth.tissue.mean()),
        "nuclei": len(truth.x_px),
        "nuclei_with_positive_pattern": int((truth.pattern > 0).sum()),
        "plan": plan.as_dict(),
        "fingerprint": _fingerprint(settings, plan),
    }
    areas = {name: mask_polygons(getattr(truth, name), truth.mask_step_px) for name in ("tissue", "positive")}
    nuclei = NucleusTable(truth.x_px, truth.y_px, truth.kind, truth.pattern, truth.in_positive_area, KINDS)
    write_truth(out / "truth", plan.slide_id, areas, nuclei, summary)
    return plan.slide_id


def _strips(scene: Scene, side_px: int, mpp: float) -> Iterator[npt.NDArray[np.uint8]]:
    for y in range(0, side_px, WINDOW_PX):
        h = min(WINDOW_PX, side_px - y)
        windows = [paint_window(scene, x, y, min(WINDOW_PX, side_px - x), h, mpp) for x in range(0, side_px, WINDOW_PX)]
        yield np.concatenate(windows, axis=1)


def _slide_path(out: Path, plan: SlidePlan) -> Path:
    return out / "slides" / f"{plan.slide_id}.tif"


def _fingerprint(settings: SimulatedSettings, plan: SlidePlan) -> str:
    drawn = settings.model_dump(mode="json", exclude={"slides", "patients", "sites", "survival"})
    return fingerprint(drawn, plan.as_dict(), _DRAWING)


def _is_done(out: Path, settings: SimulatedSettings, plan: SlidePlan) -> bool:
    drawn = is_finished(out / "truth", plan.slide_id, _fingerprint(settings, plan))
    return drawn and _slide_path(out, plan).is_file()


def _write_table(out: Path, settings: SimulatedSettings, plans: list[SlidePlan]) -> Path:
    columns = ["slide_id", "patient_id", "label", "path", "mpp", "site"]
    if settings.target == "survival":
        columns += ["time", "event"]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for plan in plans:
        row: dict[str, Any] = {
            "slide_id": plan.slide_id,
            "patient_id": plan.patient_id,
            "label": label_name(settings, plan.label),
            "path": _slide_path(out, plan).relative_to(out).as_posix(),
            "mpp": settings.mpp,
            "site": plan.site_name,
        }
        if settings.target == "share":
            row["label"] = round(read_json(out / "truth" / f"{plan.slide_id}.json")["positive_share"], 4)
        if settings.target == "survival":
            row |= {"time": plan.time, "event": plan.event}
        table.writerow(row)
    write_text(out / "cohort.csv", text.getvalue())
    return out / "cohort.csv"


def _write_sheet(out: Path, settings: SimulatedSettings, plans: list[SlidePlan]) -> None:
    tiles = [
        Tile(
            _slide_path(out, plan),
            f"{plan.slide_id} {plan.patient_id} {plan.site_name} {label_name(settings, plan.label)}",
            read_areas(out / "truth" / f"{plan.slide_id}.geojson"),
        )
        for plan in plans
    ]
    write_contact_sheet(out / "contact_sheet.png", tiles)
