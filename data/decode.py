"""Bytes to pixels: one documented conversion, so that no image is damaged in silence.

| what is stored                    | what comes out                                                             |
|-----------------------------------|----------------------------------------------------------------------------|
| EXIF orientation                  | applied                                                                    |
| 16-bit grey                       | scaled to 8 bits (value / 257), never clipped                              |
| 16-bit colour                     | Pillow's upper 8 bits                                                      |
| 1-bit, palette, CMYK, YCbCr, Lab  | Pillow's conversion to RGB (or grey, when one channel is asked for)        |
| transparency                      | composed over white                                                        |
| grey asked as RGB                 | the same value in the three channels                                       |
| several frames                    | the first                                                                  |
| 32-bit integer or float           | refused: the range is unknown                                              |
| more than 50 million pixels       | refused from the header, before a pixel is decoded                         |
| truncated or unknown              | refused                                                                    |
"""

from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from selfsight.errors import DataError, UsageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MAX_PIXELS = 50_000_000
MODES = {1: "L", 3: "RGB"}
_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}


class BadSample(DataError):
    """One sample that cannot be used; training takes a substitute. Any other DataError ends the run."""


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


def decode(body: bytes, channels: int) -> Image.Image:
    """An upright 8-bit image of 1 ("L") or 3 ("RGB") channels.

    Raises:
        BadSample: bytes that are not one whole image of a kind in the table above.
    """
    if channels not in MODES:
        raise UsageError(f"encoder.channels: {channels}; images are read with 1 or 3 channels")
    image = open_image(body)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_mode(image, MODES[channels])
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
