"""Tiles of images that are too large to train on: a slide of 100,000 pixels, a satellite scene.

A TIFF is read in bands of rows, of which only the strips or tiles are decoded that lie in them, those that reach into the
next band once; of a pyramid the full resolution is cut. Others, and TIFFs that are to be turned, are decoded whole. Tiles
lie at multiples of the stride and within the upright image; what remains at the right and the bottom is left out.

A pixel is background if it is near white (every channel at least 220/255 of an unsigned dtype's largest value, as the
glass of a slide is), or empty: every channel 0, the file's GDAL_NODATA, or not finite. A tile whose channels are all
constant is background as a whole.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

from selfsight.data.decode import FORMATS, BadSample
from selfsight.data.formats import ORIENTATION, Array, MissingLibrary, over_white, read_array, suffix_of, upright
from selfsight.data.tiff import MIN_IS_WHITE, PLANES, library, refuse_circle, refuse_kind
from selfsight.errors import DataError, UsageError

WHITE = 220 / 255
MOST_PIXELS = (
    2_000_000_000  # of an image that is decoded whole: its owner asked for it, and 6 GB are left to the machine
)
MOST_BYTES = 3 * MOST_PIXELS
NODATA = 42113  # GDAL's tag


class Cut(NamedTuple):
    """How images are cut."""

    size: int
    """Pixels of a side."""
    stride: int | None = None
    """Pixels from a tile to the next; None: `size`."""
    background: float = 0.9
    """Tiles with a larger share of background are left out; 1: none is."""


class Tile(NamedTuple):
    """One tile, and where it was."""

    image: Image.Image | bytes
    """Grey or RGB of 8 bits as an image, anything else as the bytes of a TIFF in its dtype."""
    left: int
    top: int


@dataclass
class Left:
    """What was left out."""

    small: int = 0
    """Images smaller than a tile."""
    background: int = 0
    """Tiles of background, or with values that are not finite."""

    def text(self, size: int) -> str:
        """In words; empty if nothing was."""
        small = f"{self.small:,} images smaller than {size} x {size} pixels" if self.small else ""
        return "; ".join(filter(None, [small, f"{self.background:,} tiles of background" if self.background else ""]))


class Large(Protocol):
    """An image of which rows are read."""

    shape: tuple[int, int, int]
    nodata: float | None

    def rows(self, top: int, bottom: int) -> Array:
        """(C, bottom - top, W)."""
        ...


def cut_tiles(path: Path, how: Cut, left_out: Left | None = None) -> Iterator[Tile]:
    """The tiles of an image file, row by row.

    Args:
        left_out: counts what is no tile.

    Raises:
        UsageError: a size, stride or share out of bounds.
        MissingLibrary: the library that reads it is not installed.
        DataError: a file that cannot be read as an image.
    """
    stride, lost = how.stride or how.size, left_out or Left()
    if how.size < 1 or stride < 1 or not 0 <= how.background <= 1:
        raise UsageError(
            f"--tile {how.size} --stride {stride} --background {how.background}: must be above 0, the last 0 to 1"
        )
    try:
        with _opened(path) as large:
            _, height, width = large.shape
            lost.small += min(height, width) < how.size
            for top in range(0, height - how.size + 1, stride):
                band = large.rows(top, top + how.size)
                for left in range(0, width - how.size + 1, stride):
                    pixels = band[..., left : left + how.size]
                    if _left_out(pixels, large.nodata, how.background):
                        lost.background += 1
                    else:
                        yield Tile(_stored(pixels), left, top)
    except (UsageError, MissingLibrary):
        raise
    except Exception as error:  # noqa: BLE001 - as in `read_array`: decoders raise anything
        told = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: cannot be cut into tiles ({told}); remove or repair it") from None


def _left_out(pixels: Array, nodata: float | None, most: float) -> bool:
    """Background beyond the share, or values of which none can be learned."""
    if background(pixels, nodata) > most:
        return True
    return pixels.dtype.kind == "f" and not bool(np.isfinite(pixels).all())


def background(pixels: Array, nodata: float | None = None) -> float:
    """The share of the pixels (C, H, W) that is background, as the head of this file says."""
    first = pixels[:, :1, :1]
    if (pixels == first).all():
        return 1.0
    found = (pixels == 0).all(0)
    if pixels.dtype.kind == "u":
        found |= (pixels >= WHITE * np.iinfo(pixels.dtype).max).all(0)
    if pixels.dtype.kind == "f":
        found |= ~np.isfinite(pixels).all(0)
    if nodata is not None:
        found |= (pixels == nodata).all(0)
    return float(found.mean())


def _stored(pixels: Array) -> Image.Image | bytes:
    if pixels.dtype == np.uint8 and len(pixels) in (1, 3):
        return Image.fromarray(np.ascontiguousarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)))
    out = BytesIO()
    planar = {"planarconfig": "separate"} if len(pixels) > 1 else {}
    library().imwrite(out, pixels if planar else pixels[0], photometric="minisblack", metadata=None, **planar)
    return out.getvalue()


@contextmanager
def _opened(path: Path) -> Iterator[Large]:
    with path.open("rb") as file:
        tiff = suffix_of(file.read(1024)) == "tif"
        if tiff:
            refuse_circle(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if tiff:
        with library().TiffFile(path) as opened:
            rows = TiffRows(opened)
            yield rows if rows.orientation == 1 else Turned(rows)
    else:
        yield Whole(path)


class Whole:
    """An image that is decoded whole."""

    nodata: float | None = None

    def __init__(self, path: Path) -> None:
        body = path.read_bytes()
        pixels = read_array(body)
        self.pixels = _by_pillow(body) if pixels is None else pixels
        if self.pixels.ndim != 3:
            raise BadSample("has planes; tiles are cut from images")
        self.shape: tuple[int, int, int] = self.pixels.shape

    def rows(self, top: int, bottom: int) -> Array:
        return self.pixels[:, top:bottom]


def _by_pillow(body: bytes) -> Array:
    """(1 or 3, H, W) uint8, upright, of an image beyond Pillow's own cap."""
    cap, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image: Image.Image = Image.open(BytesIO(body), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise BadSample(f"{image.width} x {image.height} pixels are too many to decode whole; store a tiled TIFF")
        image = ImageOps.exif_transpose(image)
        grey = image.mode in {"1", "L"}
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
    finally:
        Image.MAX_IMAGE_PIXELS = cap
    return pixels[None] if grey else np.moveaxis(pixels, -1, 0)


class Turned:
    """An image that does not stand upright in its TIFF, decoded whole."""

    def __init__(self, rows: "TiffRows") -> None:
        rows.refuse_large(rows.shape[1])
        self.nodata, self.pixels = rows.nodata, upright(rows.rows(0, rows.shape[1]), rows.orientation)
        self.shape: tuple[int, int, int] = self.pixels.shape

    def rows(self, top: int, bottom: int) -> Array:
        return self.pixels[:, top:bottom]


class Segment(NamedTuple):
    """A decoded strip or tile."""

    pixels: Array
    """(1, rows, columns, samples); a tile may leave the image."""
    sample: int
    row: int
    column: int
    end: int
    """The first row below it."""


class TiffRows:
    """Rows of the first image of a TIFF at its full resolution."""

    def __init__(self, tiff: Any) -> None:
        self.file, series = tiff.filehandle, tiff.series[0]
        self.page = page = series.keyframe
        if page.photometric.name != "YCBCR":  # whose JPEGs are decoded to RGB
            refuse_kind(page)
        if any(size > 1 and axis in PLANES for axis, size in zip(series.axes, series.shape, strict=True)):
            raise BadSample(f"a stack with the axes {series.axes} {series.shape}; tiles are cut from images")
        self.pages = list(series.pages)
        self.samples = page.samplesperpixel
        self.shape = (len(self.pages) * self.samples, page.imagelength, page.imagewidth)
        if np.prod(series.shape, dtype=np.int64) != np.prod(self.shape, dtype=np.int64):
            raise BadSample(f"a TIFF with the axes {series.axes} {series.shape} in {len(self.pages)} pages")
        self.alpha = bool(page.extrasamples) and page.extrasamples[-1] in (1, 2)
        text = str(page.tags.valueof(NODATA, "")).strip(" \0")
        self.nodata = float(text) if text else None
        orientation = page.tags.valueof(ORIENTATION, 1)
        self.orientation: int = orientation if orientation in range(1, 9) else 1
        self.refuse_large(page.tilelength if page.is_tiled else page.rowsperstrip)
        self.kept: dict[tuple[int, int], Segment] = {}  # by page and number, those that reach below the last band

    def refuse_large(self, rows: int) -> None:
        """Refuse to hold so many rows decoded.

        Raises:
            BadSample: they take more than the machine can spare.
        """
        channels, height, width = self.shape
        size = channels * min(rows, height) * width * np.dtype(self.page.dtype).itemsize
        if size > MOST_BYTES:
            raise BadSample(f"{size / 2**30:,.1f} GiB that are decoded at once; store an upright TIFF in tiles")

    def rows(self, top: int, bottom: int) -> Array:
        """(C, bottom - top, W): only the strips or tiles that hold these rows are decoded."""
        band = np.concatenate([self._rows(number, top, bottom) for number in range(len(self.pages))])
        if self.page.photometric == MIN_IS_WHITE and band.dtype.kind == "u":
            band = np.iinfo(band.dtype).max - band
        return over_white(band) if self.alpha and band.dtype.kind == "u" and len(self.pages) == 1 else band

    def _rows(self, number: int, top: int, bottom: int) -> Array:
        key, width = self.page, self.page.imagewidth
        band = np.full((self.samples, bottom - top, width), self.nodata or 0, key.dtype)
        high = key.tilelength if key.is_tiled else key.rowsperstrip
        across = -(-width // key.tilewidth) if key.is_tiled else 1
        down = -(-key.imagelength // high)
        for plane in range(self.samples if key.planarconfig == 2 else 1):
            for row in range(top // high, min(down, -(-bottom // high))):
                for column in range(across):
                    self._fill(band, (number, (plane * down + row) * across + column), top)
        return band

    def _fill(self, band: Array, key: tuple[int, int], top: int) -> None:
        """Put one strip or tile where it belongs; one that the file does not hold stays empty."""
        found = self.kept.pop(key, None) or self._decoded(*key)
        if found is None:
            return
        if found.end > top + band.shape[1]:
            self.kept[key] = found
        pixels, sample, row, column, end = found
        low, high = max(row, top), min(end, top + band.shape[1])
        here = band[sample : sample + pixels.shape[-1], low - top : high - top, column : column + pixels.shape[2]]
        here[:] = np.moveaxis(pixels[0, low - row : high - row, : here.shape[2]], -1, 0)

    def _decoded(self, number: int, segment: int) -> Segment | None:
        page = self.pages[number]
        self.file.seek(page.dataoffsets[segment])
        body = self.file.read(page.databytecounts[segment])
        if len(body) < page.databytecounts[segment]:
            raise BadSample("cut off; its strips or tiles lie past its end")
        if not body:
            return None
        tables = {"jpegtables": self.page.jpegtables} if self.page.jpegtables else {}
        pixels, (sample, _, row, column, _), (_, height, _, samples) = self.page.decode(body, segment, **tables)
        return Segment(pixels[..., :samples], sample, row, column, row + height)
