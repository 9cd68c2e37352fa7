"""Images with known content, TIFFs of every flavour, and a stand-in for OpenSlide's handle with any properties."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
import openslide
import pytest
import simplejpeg
import tifffile
from PIL import Image

from lrmil.slides import Slide
from lrmil.slides.openslide_reader import OpenSlideSlide


@pytest.fixture(scope="session")
def picture() -> Callable[..., npt.NDArray[np.uint8]]:
    """`picture(width, height)`: colour ramps that differ along x and y, with noise; no two places alike."""

    def make(width: int, height: int, seed: int = 0) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        x, y = np.arange(width)[None, :], np.arange(height)[:, None]
        base = np.stack([x * 180 / width + 0 * y, y * 180 / height + 0 * x, (x + 2 * y) % 97 + 40.0], axis=-1)
        return np.clip(base + rng.normal(20, 12, (height, width, 1)), 0, 255).astype(np.uint8)

    return make


@dataclass
class FakeHandle:
    """Answers as an OpenSlide handle does: whole level pixels in RGBA, errors that stay once they came."""

    pixels: list[npt.NDArray[np.uint8]]
    properties: dict[str, str] = field(default_factory=dict)
    bad_l0: tuple[int, int, int, int] | None = None
    requests: list[tuple[tuple[int, int], int, tuple[int, int]]] = field(default_factory=list)
    before_read: Callable[[tuple[int, int]], None] | None = None
    latched: bool = False
    closed: bool = False

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        return tuple((p.shape[1], p.shape[0]) for p in self.pixels)

    @property
    def dimensions(self) -> tuple[int, int]:
        return self.level_dimensions[0]

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        (w0, h0), sizes = self.dimensions, self.level_dimensions
        return tuple((w0 / w + h0 / h) / 2 for w, h in sizes)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        assert not self.closed, "read after close"
        assert all(isinstance(v, int) for v in (*location, level, *size)), "OpenSlide takes whole numbers"
        self.requests.append((location, level, size))
        if self.before_read is not None:
            self.before_read(location)
        own = self.level_downsamples[level]
        if self.bad_l0 is not None:
            x0, y0, x1, y1 = self.bad_l0
            right, bottom = location[0] + size[0] * own, location[1] + size[1] * own
            self.latched |= location[0] < x1 and right > x0 and location[1] < y1 and bottom > y0
        if self.latched:
            raise openslide.OpenSlideError("bogus tile")
        x, y = round(location[0] / own), round(location[1] / own)
        cut = self.pixels[level][y : y + size[1], x : x + size[0]]
        assert cut.shape[:2] == (size[1], size[0]), "asked for pixels outside the level"
        return Image.fromarray(cut, "RGBA")

    def close(self) -> None:
        self.closed = True


class FakeSlides:
    """Makes slides over `FakeHandle`s and keeps every handle that was opened."""

    def __init__(self) -> None:
        self.handles: list[FakeHandle] = []

    def __call__(
        self,
        *levels: npt.NDArray[np.uint8],
        mpp: float | None = 0.25,
        properties: dict[str, str] | None = None,
        **options: Any,
    ) -> Slide:
        rgba = [
            level if level.shape[2] == 4 else np.dstack([level, np.full(level.shape[:2], 255, np.uint8)])
            for level in levels
        ]

        def open_handle(_path: str) -> FakeHandle:
            self.handles.append(FakeHandle(rgba, dict(properties or {}), **options))
            return self.handles[-1]

        return OpenSlideSlide(Path("fake.svs"), mpp, open_handle=open_handle)


@pytest.fixture
def fake_slides() -> FakeSlides:
    return FakeSlides()


def _block_mean(image: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.float64]:
    height, width = image.shape[0] // factor, image.shape[1] // factor
    cut = image[: height * factor, : width * factor].astype(np.float64)
    return cut.reshape(height, factor, width, factor, -1).mean(axis=(1, 3))


@pytest.fixture(scope="session")
def block_mean() -> Callable[[npt.NDArray[np.uint8], int], npt.NDArray[np.float64]]:
    """`block_mean(image, factor)`: unrounded averages of whole factor x factor blocks, the remainder cut off."""
    return _block_mean


def _segments(stream: bytes) -> tuple[list[bytes], bytes]:
    """The segments of a JPEG's header, and its scan."""
    position, segments = 2, []
    while stream[position + 1] != 0xDA:
        length = 2 + int.from_bytes(stream[position + 2 : position + 4], "big")
        segments.append(stream[position : position + length])
        position += length
    return segments, stream[position:]


def abbreviate(stream: bytes) -> tuple[bytes, bytes]:
    """A JPEG stream without its tables and markers, and the tables."""
    segments, scan = _segments(stream)
    tables = b"".join(s for s in segments if s[1] in (0xDB, 0xC4))
    frame = b"".join(s for s in segments if 0xC0 <= s[1] <= 0xC2)
    return b"\xff\xd8" + frame + scan, b"\xff\xd8" + tables + b"\xff\xd9"


def jpeg_ycbcr(tile: npt.NDArray[np.uint8], chroma: str = "444", quality: int = 85) -> bytes:
    return bytes(simplejpeg.encode_jpeg(tile, quality=quality, colorspace="RGB", colorsubsampling=chroma))


def jpeg_rgb(tile: npt.NDArray[np.uint8]) -> bytes:
    """RGB without any colour transform and without a marker that says so, as Aperio's scanners do."""
    stream = imagecodecs.jpeg8_encode(tile, level=85, colorspace="rgb", outcolorspace="rgb", subsampling="444")
    segments, scan = _segments(bytes(stream))
    return b"\xff\xd8" + b"".join(s for s in segments if not 0xE0 <= s[1] <= 0xEF) + scan


def jpeg_progressive(tile: npt.NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(tile).save(out, "JPEG", quality=85, progressive=True, subsampling=2)
    return out.getvalue()


def jpeg2000(tile: npt.NDArray[np.uint8]) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(tile, level=45, codecformat="j2k", reversible=False))


def jpeg2000_half_chroma(tile: npt.NDArray[np.uint8]) -> bytes:
    """Three components, the second and third at half width. No encoder at hand writes it: three streams of a single
    component are joined, component after component, which is the order called CPRL."""
    planes = [tile[..., 0], tile[:, ::2, 1], tile[:, ::2, 2]]
    segments: dict[int, bytes] = {}
    body = b""
    for plane in planes:
        stream = bytes(
            imagecodecs.jpeg2k_encode(
                np.ascontiguousarray(plane), level=0, codecformat="j2k", reversible=True, resolutions=4
            )
        )
        position = 2
        while (marker := int.from_bytes(stream[position : position + 2], "big")) != 0xFF90:
            length = int.from_bytes(stream[position + 2 : position + 4], "big")
            segments.setdefault(marker, stream[position + 4 : position + 2 + length])
            position += 2 + length
        body += stream[stream.index(b"\xff\x93", position) + 2 : -2]
    height, width = planes[0].shape
    size = struct.pack(">H8IH", 0, width, height, 0, 0, width, height, 0, 0, 3) + bytes([7, 1, 1, 7, 2, 1, 7, 2, 1])
    coding = bytearray(segments[0xFF52])
    coding[1], coding[4] = 4, 0  # CPRL, no colour transform
    header = {0xFF51: size, 0xFF52: bytes(coding), 0xFF5C: segments[0xFF5C]}
    main = b"".join(struct.pack(">HH", marker, len(data) + 2) + data for marker, data in header.items())
    part = struct.pack(">HHHIBB", 0xFF90, 10, 0, 14 + len(body), 0, 1)
    return b"\xff\x4f" + main + part + b"\xff\x93" + body + b"\xff\xd9"


def differences(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    result = tile.copy()
    result[:, 1:] -= tile[:, :-1]
    return result


@dataclass(frozen=True)
class Flavour:
    """A way to store tiles."""

    encode: Callable[[npt.NDArray[np.uint8]], bytes]
    compression: int
    photometric: str = "rgb"
    aperio: bool = False
    shared_tables: bool = False
    predictor: bool = False
    bigtiff: bool = False
    byteorder: str = "<"
    tile_px: tuple[int, int] = (128, 128)
    subsampling: tuple[int, int] | None = None


FLAVOURS = {
    "jpeg-444": Flavour(jpeg_ycbcr, 7, "ycbcr", subsampling=(1, 1)),
    "jpeg-422": Flavour(partial(jpeg_ycbcr, chroma="422"), 7, "ycbcr", subsampling=(2, 1)),
    "jpeg-420": Flavour(partial(jpeg_ycbcr, chroma="420"), 7, "ycbcr", subsampling=(2, 2)),
    "jpeg-rgb": Flavour(jpeg_rgb, 7),
    "jpeg-rgb-shared-tables": Flavour(jpeg_rgb, 7, aperio=True, shared_tables=True, tile_px=(240, 240)),
    "jpeg-420-shared-tables": Flavour(
        partial(jpeg_ycbcr, chroma="420"), 7, "ycbcr", shared_tables=True, subsampling=(2, 2)
    ),
    "jpeg-progressive": Flavour(jpeg_progressive, 7, "ycbcr", subsampling=(2, 2)),
    "jpeg-bigtiff": Flavour(jpeg_ycbcr, 7, "ycbcr", bigtiff=True, tile_px=(128, 256), subsampling=(1, 1)),
    "jpeg-rgb-big-endian": Flavour(jpeg_rgb, 7, bigtiff=True, byteorder=">", aperio=True),
    "jpeg2000-rgb": Flavour(jpeg2000, 33005, aperio=True),
    "jpeg2000-ycbcr": Flavour(jpeg2000, 33003, aperio=True),
    "jpeg2000-ycbcr-422": Flavour(jpeg2000_half_chroma, 33003, aperio=True),
    "lzw": Flavour(lambda tile: bytes(imagecodecs.lzw_encode(tile.tobytes())), 5),
    "lzw-differences": Flavour(
        lambda tile: bytes(imagecodecs.lzw_encode(differences(tile).tobytes())), 5, predictor=True, aperio=True
    ),
    "deflate": Flavour(lambda tile: zlib.compress(tile.tobytes()), 8, tile_px=(256, 128)),
    "deflate-differences": Flavour(lambda tile: zlib.compress(differences(tile).tobytes()), 8, predictor=True),
    "none": Flavour(lambda tile: tile.tobytes(), 1),
}


def _write_tiff(
    path: Path,
    levels: list[npt.NDArray[np.uint8]],
    flavour: Flavour,
    *,
    mpp: float = 0.25,
    missing: tuple[tuple[int, int], ...] = (),
    padding: int | None = None,
    sub_levels: bool = False,
    description: str | None = None,
) -> Path:
    """Write levels (h, w, 3) as tiles of a flavour.

    Tiles (column, row) of level 0 in `missing` hold nothing. Beyond the edges the last pixel is repeated, or there is
    `padding`. Levels below the first are marked as reduced, or hang below the first as its sub-directories.
    """
    width, height = flavour.tile_px
    with tifffile.TiffWriter(path, bigtiff=flavour.bigtiff, byteorder=flavour.byteorder) as tiff:
        for index, image in enumerate(levels):
            down, across = -(-image.shape[0] // height), -(-image.shape[1] // width)
            room = ((0, down * height - image.shape[0]), (0, across * width - image.shape[1]), (0, 0))
            full = np.pad(image, room, mode="edge") if padding is None else np.pad(image, room, constant_values=padding)
            tiles: list[bytes] = []
            tables = b""
            for row in range(down):
                for column in range(across):
                    part = full[row * height : (row + 1) * height, column * width : (column + 1) * width]
                    data = flavour.encode(np.ascontiguousarray(part))
                    if flavour.shared_tables:
                        data, tables = abbreviate(data)
                    tiles.append(b"" if index == 0 and (column, row) in missing else data)
            size = f"{levels[0].shape[1]}x{levels[0].shape[0]}"
            text = f"Aperio Image Library\r\n{size}|MPP = {mpp}" if flavour.aperio else description
            tiff.write(
                iter(tiles),
                shape=image.shape,
                dtype=np.uint8,
                tile=(height, width),
                compression=flavour.compression,
                compressionargs={"outcolorspace": flavour.photometric} if flavour.compression == 7 else None,
                photometric=flavour.photometric,
                predictor=2 if flavour.predictor else None,
                subsampling=flavour.subsampling,
                jpegtables=tables or None,
                subfiletype=1 if index else 0,
                subifds=len(levels) - 1 if sub_levels and index == 0 else None,
                resolution=None if flavour.aperio or description else (1e4 / mpp,) * 2,
                resolutionunit="NONE" if flavour.aperio or description else "CENTIMETER",
                description=text if index == 0 or flavour.aperio else None,
                metadata=None,
                software=False,
            )
    return path


@pytest.fixture(scope="session")
def write_tiff() -> Callable[..., Path]:
    """`write_tiff(path, levels, flavour, ...)`; see `_write_tiff`."""
    return _write_tiff


@pytest.fixture(scope="session")
def flavours() -> dict[str, Flavour]:
    """Every way to store tiles that is read directly, by name."""
    return FLAVOURS


@pytest.fixture(params=sorted(FLAVOURS))
def flavour(request: pytest.FixtureRequest) -> Flavour:
    """Each of `flavours` in turn."""
    return FLAVOURS[request.param]


@pytest.fixture(scope="session")
def tissue() -> npt.NDArray[np.uint8]:
    """Smooth blobs in the colours of a stain, with some grain: (700, 900, 3), compressible as tissue is."""
    rng = np.random.default_rng(7)
    blobs = [cv2.GaussianBlur(rng.random((700, 900)), (0, 0), sigma) for sigma in (3, 9, 25)]
    share = sum((b - b.min()) / (b.max() - b.min()) for b in blobs)[..., None] / 3
    image = 240 - share * np.array([90.0, 190.0, 60.0]) + rng.normal(0, 2, (700, 900, 1))
    return np.clip(image, 0, 255).astype(np.uint8)
