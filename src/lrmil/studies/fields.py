"""Fields of tissue with known nuclei: images of CRCHistoPhenotypes, or cut from a simulated cohort."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from lrmil.cohorts.crchisto import CLASSES, read_crchisto
from lrmil.cohorts.simulated import simulate_cohort
from lrmil.cohorts.simulated.nuclei import EPITHELIAL, LYMPHOCYTE, MITOSIS
from lrmil.cohorts.truth import read_nuclei
from lrmil.errors import CohortError
from lrmil.slides import open_slide
from lrmil.studies.settings import FieldSettings
from lrmil.training.seeds import derive_seed

FloatArray = npt.NDArray[np.float64]
SLACK_PX = 52
"""How much wider a field is than a region, at least: room for views to differ. 500 - 448 px, in CRCHistoPhenotypes."""


@dataclass(frozen=True)
class Field:
    """A square of tissue at the children's resolution, and its nuclei."""

    name: str
    group: str
    """Never on both sides of a split: the source image, or the patient"""
    pixels: npt.NDArray[np.uint8]
    """(S, S, 3) RGB"""
    x_px: FloatArray
    """(N,)"""
    y_px: FloatArray
    marks: dict[str, FloatArray]
    """name of a target: (N,) what each nucleus adds to the mean, nan for nuclei that do not count there"""

    def truth(self, x_px: int, y_px: int, side_px: int, targets: tuple[str, ...], min_nuclei: int) -> FloatArray:
        """What is true of the nuclei inside a window: the mean of each mark, and log(1 + number) as `log_count`.

        (T,); nan for a mean over fewer than `min_nuclei` nuclei.
        """
        inside = (self.x_px >= x_px) & (self.x_px < x_px + side_px) & (self.y_px >= y_px) & (self.y_px < y_px + side_px)
        values = []
        for target in targets:
            if target == "log_count":
                values.append(np.log1p(inside.sum()))
                continue
            if target not in self.marks:
                raise CohortError(
                    f"{target!r} is not known of {self.name}.", fix=f"Choose from {[*self.marks, 'log_count']}."
                )
            counted = self.marks[target][inside]
            counted = counted[np.isfinite(counted)]
            values.append(counted.mean() if len(counted) >= min_nuclei else np.nan)
        return np.array(values, np.float64)

    def digest(self) -> str:
        """Identify the pixels and nuclei."""
        digest = hashlib.sha256(self.pixels.tobytes())
        for array in (self.x_px, self.y_px, *(self.marks[name] for name in sorted(self.marks))):
            digest.update(np.ascontiguousarray(array).tobytes())
        return f"{self.name} {self.group} {digest.hexdigest()}"


def load_fields(settings: FieldSettings, out: Path, side_px: int) -> list[Field]:
    """Read the fields; simulate the cohort into `out` first, where that is what is asked for.

    Args:
        settings: where from.
        out: folder for what has to be made.
        side_px: side of a region.

    Raises:
        CohortError: the data set is incomplete, or its images are too small.
    """
    if settings.crchisto is not None:
        fields = _crchisto(Path(settings.crchisto))
    else:
        fields = _simulated(settings, out / "cohort", side_px + SLACK_PX)
    fields = fields[: settings.max_fields]
    small = [f for f in fields if min(f.pixels.shape[:2]) < side_px]
    if small:
        raise CohortError(
            f"{small[0].name} measures {small[0].pixels.shape[1]} px, less than a region of {side_px} px.",
            fix="Lower patch_px or ratio.",
        )
    return fields


def _crchisto(folder: Path) -> list[Field]:
    fields = []
    for image in read_crchisto(folder):
        shares = {f"{name}_share": (image.kind == code).astype(np.float64) for code, name in enumerate(CLASSES)}
        fields.append(Field(image.name, image.name, image.pixels(), image.x_px, image.y_px, shares))
    return fields


def _simulated(settings: FieldSettings, folder: Path, side_px: int) -> list[Field]:
    """Cut fields around nuclei drawn at random, so that they show tissue."""
    assert settings.simulated is not None
    table = pd.read_csv(simulate_cohort(folder, settings.simulated), dtype={"slide_id": str, "patient_id": str})
    size_px, mpp = settings.simulated.slide_px, settings.simulated.mpp
    fields = []
    for row in table.to_dict("records"):
        nuclei = read_nuclei(folder / "truth" / f"{row['slide_id']}.nuclei.npz")
        epithelial = np.isin(nuclei.kind, (EPITHELIAL, MITOSIS))
        marks = {
            "positive_share": np.where(epithelial, nuclei.pattern > 0, np.nan),
            "epithelial_share": epithelial.astype(np.float64),
            "lymphocyte_share": (nuclei.kind == LYMPHOCYTE).astype(np.float64),
        }
        rng = np.random.default_rng(derive_seed(settings.simulated.seed, "fields", row["slide_id"]))
        with open_slide(folder / row["path"]) as slide:
            for number, nucleus in enumerate(rng.choice(len(nuclei), settings.fields_per_slide, replace=False)):
                centre = np.array([nuclei.x_l0[nucleus], nuclei.y_l0[nucleus]])
                x0, y0 = np.clip(np.round(centre - side_px / 2), 0, size_px - side_px).astype(int)
                pixels = slide.read(int(x0), int(y0), side_px, side_px, mpp)
                x, y = nuclei.x_l0.astype(np.float64) - x0, nuclei.y_l0.astype(np.float64) - y0
                inside = (x >= 0) & (x < side_px) & (y >= 0) & (y < side_px)
                own = {name: mark[inside] for name, mark in marks.items()}
                name = f"{row['slide_id']}_{number}"
                fields.append(Field(name, row["patient_id"], pixels, x[inside], y[inside], own))
    return fields
