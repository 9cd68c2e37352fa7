"""Slides assembled from labelled fields of real tissue (CRCHistoPhenotypes, see `crchisto`).

Groups. Fields are first dealt into groups, balanced for the label; a group is a patient. A slide draws its fields from
its own group alone, so that a field may recur within a group and never across groups: splits by patient are then splits
by field. The number of groups, not of slides, is the sample size that counts; intervals should resample groups. The
data set does not say which fields come from one patient, so the groups are not the patients of the hospital.

Labels. A slide is positive if it holds a positive field. Task "inflammatory": a field with at least 30 inflammatory
nuclei (an inflammatory focus). Task "epithelium": a field with at least one epithelial nucleus. In every group half of
the slides are positive, and a positive slide holds as many positive fields as `positive_fields` says.

Fields are laid out as `mosaic` says: a window of `window_px` of each, edge to edge. The window of a positive field is
placed so that it is itself positive wherever such a place is found, else where it holds most of the nuclei in question
(a focus whose cells lie along the border, or a small window, may hold fewer than 30).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from lrmil.cohorts.contact_sheet import Tile, write_contact_sheet
from lrmil.cohorts.crchisto import CLASSES, MPP, SourceImage, read_crchisto
from lrmil.cohorts.mosaic import FIELD_PX, AssembledSlide, Piece, compose, inside_window
from lrmil.cohorts.truth import box_polygon, forget_truth, is_finished, read_areas, write_truth
from lrmil.errors import CohortError
from lrmil.files import read_json, sha256, write_json, write_text
from lrmil.settings import Settings, fingerprint
from lrmil.slides import write_pyramid

Progress = Callable[[int, int, str], None]
_WINDOW_TRIES = 40
_LAYING = 2
"""Raised whenever the same settings give other pixels or truth than before; finished slides are then made anew."""


class AssembledSettings(Settings):
    """A cohort assembled from fields of real tissue."""

    seed: int = Field(1, ge=0, description="all randomness comes from it")
    task: Literal["inflammatory", "epithelium"] = Field(
        "inflammatory", description="what makes a field positive: an inflammatory focus, or any epithelium"
    )
    min_inflammatory: int = Field(30, ge=1, description="inflammatory nuclei that make a field an inflammatory focus")
    min_epithelial: int = Field(1, ge=1, description="epithelial nuclei that make a field epithelium")
    groups: int = Field(12, ge=2, le=100, description="groups the fields are dealt into; they are the patients")
    slides_per_group: int = Field(4, ge=2, le=200, description="slides drawn from each group, half of them positive")
    fields: tuple[int, int] = Field((4, 12), description="fewest and most fields on a slide")
    positive_fields: tuple[float, float] = Field(
        (0.1, 0.4), description="least and greatest share of positive fields on a positive slide; at least one field"
    )
    window_px: int = Field(
        448,
        ge=64,
        le=FIELD_PX,
        description="side of the window of a field that a slide shows; as wide as a region, one region is one field",
    )
    jpeg_quality: int = Field(92, ge=50, le=100, description="JPEG quality of the slides")

    @model_validator(mode="after")
    def _check(self) -> AssembledSettings:
        if not 1 <= self.fields[0] <= self.fields[1]:
            raise ValueError("fields must be two whole numbers, 1 <= fewest <= most")
        if not 0 < self.positive_fields[0] <= self.positive_fields[1] <= 1:
            raise ValueError("positive_fields must be two shares, 0 < least <= greatest <= 1")
        if self.slides_per_group % 2:
            raise ValueError("slides_per_group must be even, since half of a group's slides are positive")
        return self


def is_positive(image: SourceImage, task: str, settings: AssembledSettings) -> bool:
    """Whether a field is positive for a task ("inflammatory" or "epithelium")."""
    kind, least = _rule(task, settings)
    return image.count(kind) >= least


def deal_groups(images: Sequence[SourceImage], settings: AssembledSettings) -> list[list[SourceImage]]:
    """Deal fields into groups whose numbers of positive and of negative fields differ by at most one.

    Raises:
        CohortError: a group would get no positive, or no negative field.
    """
    rng = np.random.default_rng([settings.seed, 1])
    positive = [image for image in images if is_positive(image, settings.task, settings)]
    negative = [image for image in images if not is_positive(image, settings.task, settings)]
    fewest = min(len(positive), len(negative))
    if fewest < settings.groups:
        raise CohortError(
            f"task {settings.task}: {len(positive)} fields are positive and {len(negative)} negative, too few for "
            f"{settings.groups} groups that each need one of both.",
            fix=f"Ask for at most {fewest} groups." if fewest >= 2 else "Give more of the data set.",
        )
    groups: list[list[SourceImage]] = [[] for _ in range(settings.groups)]
    for offset, pool in ((0, positive), (len(positive), negative)):
        for place, row in enumerate(rng.permutation(len(pool))):
            groups[(place + offset) % settings.groups].append(pool[row])
    return groups


def plan_slides(groups: Sequence[Sequence[SourceImage]], settings: AssembledSettings) -> list[AssembledSlide]:
    """Draw every slide's fields, their windows, turns and order. Slides of a group differ in what they draw."""
    slides = []
    order = np.random.default_rng([settings.seed, 2]).permutation(settings.groups * settings.slides_per_group)
    for g, group in enumerate(groups):
        for s in range(settings.slides_per_group):
            number = int(order[g * settings.slides_per_group + s])
            rng = np.random.default_rng([settings.seed, 3, g, s])
            positive = s % 2 == 0
            pieces = _draw_pieces(rng, group, positive, settings)
            slides.append(AssembledSlide(f"A{number + 1:03d}", f"G{g + 1:02d}", positive, pieces, settings.window_px))
    return sorted(slides, key=lambda slide: slide.slide_id)


def assemble_cohort(
    source_dir: Path | str,
    out: Path | str,
    settings: AssembledSettings,
    *,
    on_progress: Progress | None = None,
) -> Path:
    """Write the cohort into the folder `out` and return the path of its cohort.csv.

    `out` then holds slides/*.tif, truth/ (see `lrmil.cohorts.truth`; positive areas are the cells of positive fields),
    cohort.csv, assembled.json (settings, groups, which field is where) and contact_sheet.png. cohort.csv has
    slide_id, patient_id (the group), label (negative or positive, of `settings.task`), path, mpp, and further tasks
    that follow from the same slides: inflammatory and epithelium (0 or 1, of the whole fields that its windows were cut
    from; the one that is not `settings.task` is not balanced), epithelial_share, fibroblast_share and
    inflammatory_share (of all nuclei of the slide), and nuclei_per_mm2. Finished slides are kept.

    Args:
        source_dir: folder of CRCHistoPhenotypes, see `crchisto`.
        out: folder; made if missing.
        settings: what to assemble.
        on_progress: called with (slides finished, slides in all, slide_id) after each slide.

    Raises:
        CohortError: the folder is not that data set, or has too few fields.
    """
    out = Path(out)
    images = read_crchisto(source_dir)
    groups = deal_groups(images, settings)
    slides = plan_slides(groups, settings)
    source = {image.name: image for image in images}
    prints = {image.name: _print(image) for image in images}
    # The column of the task that slides are not drawn for depends on its rule alone.
    rules = [settings.min_inflammatory, settings.min_epithelial]
    pixels: dict[str, npt.NDArray[np.uint8]] = {}
    for done, slide in enumerate(slides, start=1):
        used = [prints[piece.image] for piece in slide.pieces]
        mark = fingerprint([repr(slide), settings.jpeg_quality, *used], rules, _LAYING)
        path = out / "slides" / f"{slide.slide_id}.tif"
        if not (path.is_file() and is_finished(out / "truth", slide.slide_id, mark)):
            for piece in slide.pieces:
                if piece.image not in pixels:
                    pixels[piece.image] = _checked_pixels(source[piece.image])
            _write_slide(out, path, slide, source, pixels, settings, mark)
        if on_progress is not None:
            on_progress(done, len(slides), slide.slide_id)
    write_contact_sheet(out / "contact_sheet.png", [_tile(out, slide) for slide in slides])
    _write_record(out, images, groups, slides, settings)
    return _write_table(out, slides)


def _print(image: SourceImage) -> str:
    """Identify pixels and nuclei of a field."""
    return fingerprint(sha256(image.path), *(own.tolist() for own in (image.x_px, image.y_px, image.kind)))


def _rule(task: str, settings: AssembledSettings) -> tuple[str, int]:
    if task == "inflammatory":
        return "inflammatory", settings.min_inflammatory
    return "epithelial", settings.min_epithelial


def _draw_pieces(
    rng: np.random.Generator, group: Sequence[SourceImage], positive: bool, settings: AssembledSettings
) -> tuple[Piece, ...]:
    count = int(rng.integers(settings.fields[0], settings.fields[1] + 1))
    share = rng.uniform(*settings.positive_fields)
    hits = min(count, max(1, round(share * count))) if positive else 0
    pools = {
        flag: [image for image in group if is_positive(image, settings.task, settings) == flag]
        for flag in (True, False)
    }
    pieces = []
    for flag in rng.permutation(np.arange(count) < hits):
        image = pools[bool(flag)][int(rng.integers(len(pools[bool(flag)])))]
        offset = _place_window(rng, image, settings) if flag else _random_offset(rng, settings)
        pieces.append(Piece(image.name, offset, int(rng.integers(4)), bool(rng.integers(2)), bool(flag)))
    return tuple(pieces)


def _random_offset(rng: np.random.Generator, settings: AssembledSettings) -> tuple[int, int]:
    x, y = rng.integers(0, FIELD_PX - settings.window_px + 1, 2)
    return int(x), int(y)


def _place_window(rng: np.random.Generator, image: SourceImage, settings: AssembledSettings) -> tuple[int, int]:
    """Choose a place at which the window satisfies the rule by itself, else the best of those tried."""
    kind, least = _rule(settings.task, settings)
    wanted = image.kind == CLASSES.index(kind)
    best, most = (0, 0), -1
    for _ in range(_WINDOW_TRIES):
        x0, y0 = _random_offset(rng, settings)
        held = int((wanted & inside_window(image, (x0, y0), settings.window_px)).sum())
        if held >= least:
            return x0, y0
        if held > most:
            best, most = (x0, y0), held
    return best


def _checked_pixels(image: SourceImage) -> npt.NDArray[np.uint8]:
    pixels = image.pixels()
    if pixels.shape != (FIELD_PX, FIELD_PX, 3):
        raise CohortError(
            f"{image.path} measures {pixels.shape[1]} x {pixels.shape[0]} px, not {FIELD_PX} x {FIELD_PX}.",
            fix="Give CRCHistoPhenotypes as it was released.",
        )
    return pixels


def _write_slide(
    out: Path,
    path: Path,
    slide: AssembledSlide,
    source: dict[str, SourceImage],
    pixels: dict[str, npt.NDArray[np.uint8]],
    settings: AssembledSettings,
    mark: str,
) -> None:
    canvas, nuclei, corners = compose(slide, source, pixels)
    forget_truth(out / "truth", slide.slide_id)
    write_pyramid(path, canvas, MPP, quality=settings.jpeg_quality, description=f"assembled slide {slide.slide_id}")
    cells = [box_polygon(x, y, x + slide.window_px, y + slide.window_px) for x, y in corners]
    areas = {"field": cells, "positive": [c for c, p in zip(cells, slide.pieces, strict=True) if p.positive]}
    share = {f"{name}_share": float((nuclei.kind == k).sum() / max(len(nuclei), 1)) for k, name in enumerate(CLASSES)}
    fields = [source[piece.image] for piece in slide.pieces]
    summary = {
        "slide_id": slide.slide_id,
        "patient_id": slide.group,
        "label": "positive" if slide.positive else "negative",
        "inflammatory": int(any(is_positive(f, "inflammatory", settings) for f in fields)),
        "epithelium": int(any(is_positive(f, "epithelium", settings) for f in fields)),
        **share,
        "nuclei": len(nuclei),
        "nuclei_per_mm2": len(nuclei) / (len(slide.pieces) * (slide.window_px * MPP / 1000) ** 2),
        "fields": [piece.image for piece in slide.pieces],
        "fingerprint": mark,
    }
    write_truth(out / "truth", slide.slide_id, areas, nuclei, summary)


def _tile(out: Path, slide: AssembledSlide) -> Tile:
    caption = f"{slide.slide_id} {slide.group} {'positive' if slide.positive else 'negative'}"
    areas = read_areas(out / "truth" / f"{slide.slide_id}.geojson")
    return Tile(out / "slides" / f"{slide.slide_id}.tif", caption, areas)


def _write_record(
    out: Path,
    images: Sequence[SourceImage],
    groups: Sequence[Sequence[SourceImage]],
    slides: Sequence[AssembledSlide],
    settings: AssembledSettings,
) -> None:
    positive = {image.name for image in images if is_positive(image, settings.task, settings)}
    write_json(
        out / "assembled.json",
        {
            "made_by": "assembled",
            "source": "CRCHistoPhenotypes (Sirinukunwattana et al., IEEE TMI 2016), research use only",
            "settings": settings.model_dump(mode="json"),
            "images": len(images),
            "positive_images": len(positive),
            "groups": len(groups),
            "sample_size": f"{len(groups)} groups; intervals should resample groups, not slides",
            "group_images": {
                f"G{g + 1:02d}": {image.name: image.name in positive for image in group}
                for g, group in enumerate(groups)
            },
            "slides": {slide.slide_id: [asdict(piece) for piece in slide.pieces] for slide in slides},
        },
    )


def _write_table(out: Path, slides: Sequence[AssembledSlide]) -> Path:
    shares = [f"{name}_share" for name in CLASSES if name != "others"]
    extra = ["inflammatory", "epithelium", *shares, "nuclei_per_mm2"]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["slide_id", "patient_id", "label", "path", "mpp", *extra])
    for slide in slides:
        summary = read_json(out / "truth" / f"{slide.slide_id}.json")
        values = [round(summary[name], 4) for name in extra]
        label, path = summary["label"], f"slides/{slide.slide_id}.tif"
        table.writerow([slide.slide_id, slide.group, label, path, MPP, *values])
    write_text(out / "cohort.csv", text.getvalue())
    return out / "cohort.csv"
