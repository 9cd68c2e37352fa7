"""Read CRCHistoPhenotypes: H&E fields of colorectal adenocarcinoma, 500 x 500 px at 20x, with labelled nuclei.

Sirinukunwattana et al., "Locality Sensitive Deep Learning for Detection and Classification of Nuclei in Routine Colon
Cancer Histology Images", IEEE Transactions on Medical Imaging 2016. Released for research purposes only: users download
it themselves. Two layouts are read:

    images/img1.png, images.csv, nuclei.csv.gz (image, x, y, cls): a prepared copy
    [Classification/]img1/img1.bmp, img1/img1_epithelial.mat, and _fibroblast, _inflammatory, _others: the original
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.io import loadmat

from lrmil.errors import CohortError

CLASSES = ("epithelial", "fibroblast", "inflammatory", "others")
MPP = 0.5
_NAME = re.compile(r"img(\d+)")


@dataclass(frozen=True)
class SourceImage:
    """One field and its nuclei."""

    name: str
    path: Path
    x_px: npt.NDArray[np.float64]
    """(N,)"""
    y_px: npt.NDArray[np.float64]
    kind: npt.NDArray[np.uint8]
    """(N,) index into `CLASSES`"""

    def count(self, name: str) -> int:
        """Number of nuclei of one class."""
        return int((self.kind == CLASSES.index(name)).sum())

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Read the field, (h, w, 3) RGB.

        Raises:
            CohortError: it cannot be decoded.
        """
        image = cv2.imread(str(self.path), cv2.IMREAD_COLOR)
        if image is None:
            raise CohortError(f"{self.path} cannot be read as an image.", fix="Download the data set again.")
        return np.ascontiguousarray(image[..., ::-1]).astype(np.uint8)


def read_crchisto(folder: Path | str) -> list[SourceImage]:
    """Read the list of fields and their nuclei, ordered by number; pixels are read later, by `SourceImage.pixels`.

    Raises:
        CohortError: the folder is not that data set, or part of it is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CohortError(f"{folder} is not a folder.", fix="Give the folder that holds CRCHistoPhenotypes.")
    if (folder / "nuclei.csv.gz").is_file() or (folder / "images.csv").is_file():
        images = _read_prepared(folder)
    else:
        images = _read_original(folder)
    return sorted(images, key=lambda image: _number(image.name))


def _read_prepared(folder: Path) -> list[SourceImage]:
    listed = _table(folder / "images.csv", ("image", *(f"n_{c}" for c in CLASSES)))
    nuclei = _table(folder / "nuclei.csv.gz", ("image", "x", "y", "cls"))
    strange = sorted(set(nuclei["cls"]) - set(CLASSES))
    if strange:
        raise CohortError(f"{folder / 'nuclei.csv.gz'}: unknown class {strange[0]!r}.", fix=f"Known: {CLASSES}.")
    by_image = dict(tuple(nuclei.groupby("image")))
    images = []
    for row in listed.to_dict("records"):
        name = str(row["image"])
        path = folder / "images" / f"{name}.png"
        if not path.is_file():
            raise CohortError(f"{path} is missing, though images.csv lists it.", fix="Download the data set again.")
        own = by_image.get(name, nuclei.iloc[:0])
        kind = own["cls"].map(CLASSES.index).to_numpy(np.uint8)
        image = SourceImage(name, path, own["x"].to_numpy(np.float64), own["y"].to_numpy(np.float64), kind)
        for cls in CLASSES:
            if image.count(cls) != int(row[f"n_{cls}"]):
                raise CohortError(
                    f"{folder}: {name} has {image.count(cls)} {cls} nuclei in nuclei.csv.gz, "
                    f"but {row[f'n_{cls}']} in images.csv.",
                    fix="The two files belong to different copies: download both again.",
                )
        images.append(image)
    return images


def _read_original(folder: Path) -> list[SourceImage]:
    root = folder / "Classification" if (folder / "Classification").is_dir() else folder
    images = []
    for path in root.glob("img*/img*.bmp"):
        points, kinds = [], []
        for code, cls in enumerate(CLASSES):
            file = path.with_name(f"{path.stem}_{cls}.mat")
            if not file.is_file():
                raise CohortError(
                    f"{file} is missing.", fix="Give the folder Classification of the data set, or its parent."
                )
            found = np.asarray(loadmat(file)["detection"], np.float64).reshape(-1, 2)
            points.append(found)
            kinds.append(np.full(len(found), code, np.uint8))
        x, y = np.concatenate(points).T
        images.append(SourceImage(path.stem, path, x, y, np.concatenate(kinds)))
    if not images:
        raise CohortError(
            f"{folder} does not hold CRCHistoPhenotypes.",
            fix="It should have images/, images.csv and nuclei.csv.gz, or Classification/img1/img1.bmp and so on.",
        )
    return images


def _table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    if not path.is_file():
        raise CohortError(f"{path} is missing.", fix="Give the folder of CRCHistoPhenotypes as a whole.")
    table = pd.read_csv(path)
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise CohortError(f"{path} has no column {missing[0]!r}.", fix=f"It should have {', '.join(columns)}.")
    return table


def _number(name: str) -> tuple[int, str]:
    found = _NAME.fullmatch(name)
    return (int(found.group(1)) if found else 0, name)
