"""Bytes to pixels: one documented conversion, so that no image is damaged in silence.

| what is stored                    | what comes out                                                             |
|-----------------------------------|----------------------------------------------------------------------------|
| EXIF orientation                  | applied                                                                    |
| 16 bits, depth 8                  | value / 257, or data.range spread over 8 bits, never clipped else          |
| 16-bit colour, scientific files   | as `selfsight.data.formats` says; `fit` gives them the run's depth         |
| 8 bits, depth 16                  | value x 257                                                                |
| 1-bit, palette, CMYK, YCbCr, Lab  | Pillow's conversion to RGB (or grey, when one channel is asked for)        |
| transparency                      | composed over white                                                        |
| grey asked as RGB                 | the same value in the three channels                                       |
| several frames in one file        | the first                                                                  |
| 32-bit integer or float           | depth 32: as it is; refused at 8 bits: the range is unknown                |
| more than 50 million pixels       | refused from the header, before a pixel is decoded                         |
| truncated or unknown              | refused                                                                    |
"""

from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from selfsight.data.jpeg import Needs, decode_jpeg
from selfsight.errors import DataError, UsageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MAX_PIXELS = 50_000_000
MODES = {1: "L", 3: "RGB"}
DTYPES = {8: np.uint8, 16: np.uint16, 32: np.float32}
Pixels = NDArray[Any]  # (C, H, W), or (C, D, H, W) with D planes; uint8, uint16 or float32; strides as it comes
_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}


class BadSample(DataError):
    """One sample that cannot be used; training takes a substitute. Any other DataError ends the run."""


class Form(NamedTuple):
    """What a decoded image is to be."""

    channels: int
    depth: int = 8
    """Bits of a value: 8 and 16 are unsigned integers, 32 is floating point."""
    range: tuple[float, float] | None = None
    """Stored values that become 0 and the largest; None: those of the depth."""
    frames: int = 1
    """Planes that the encoder takes at once; 1: a plain image."""


def value_range(form: Form) -> tuple[float, float]:
    """Decoded values that become 0 and 1. At 8 bits a range was applied by `decode` already.

    Raises:
        UsageError: floating point without a range.
    """
    if form.depth == 8 or form.range is None:
        if form.depth == 32:
            raise UsageError("data.depth: 32 needs data.range, the values that become 0 and 1")
        return 0.0, float(2**form.depth - 1)
    return form.range


def open_image(body: bytes) -> Image.Image:
    """Read an image's header; the pixels wait.

    Raises:
        BadSample: not an image of a known format, or one with too many pixels.
    """
    try:
        image = Image.open(BytesIO(body), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadSample(f"not an image of a known format (starts with {body[:8]!r})") from None
    except Exception as error:  # noqa: BLE001 - as in `decode`: headers are parsed here
        raise BadSample(f"damaged image header ({error})") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(
            f"image of {image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} that are decoded"
        )
    return image


def decode(body: bytes, form: Form, needs: Needs | None = None) -> Pixels:
    """The upright image in `body`, of the form's depth: (C, H, W), or (C, D, H, W) where the file has planes.

    Args:
        needs: which rows will be looked at, if not all; what the others hold is then not defined.

    Raises:
        BadSample: bytes that are not one whole image of a kind in the table above, or of other channels.
        MissingLibrary: a scientific file whose library is not installed.
    """
    pixels = decode_jpeg(body, form.channels, MAX_PIXELS, needs)
    if pixels is None:
        from selfsight.data.formats import fit, read_array

        own = read_array(body, volumes=form.frames > 1, eight=form.depth == 8 and form.range is None)
        if own is not None:
            return fit(own, form)
        if form.channels not in MODES:
            raise BadSample(f"an image of at most 3 channels; the encoder takes {form.channels} (encoder.channels)")
        pixels = np.asarray(pillow_image(body, MODES[form.channels]))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if form.depth == 8:
        return pixels
    return pixels.astype(DTYPES[form.depth]) * DTYPES[form.depth](257 if form.depth == 16 else 1)


def pillow_image(body: bytes, mode: str) -> Image.Image:
    """The upright 8-bit image, grey ("L") or "RGB".

    Raises:
        BadSample: as `decode`.
    """
    image = open_image(body)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_mode(image, mode)
    except BadSample:
        raise
    except Exception as error:  # noqa: BLE001 - hostile bytes make decoders raise anything (struct.error, OverflowError, ...)
        raise BadSample(f"damaged image ({error})") from None


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    if image.mode in {"I", "F"}:
        raise BadSample(f"32-bit image (mode {image.mode}): its range is unknown; store 8 or 16 bits")
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    levels = np.rint(values.astype(np.float32) / 257).astype(np.uint8)
    if "transparency" in image.info:  # one grey value that stands for no colour; it may share its 8 bits with others
        levels[values == image.info["transparency"]] = 255
    return Image.fromarray(levels)
