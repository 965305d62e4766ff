"""Samples into shards: encoded or left as they are, written with webdataset's writer, indexed."""

import json
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset as wds
from PIL import Image

from selfsight.data.crops import nearest
from selfsight.data.decode import BadSample, open_image, pillow_image
from selfsight.data.formats import ORIENTATION, read_array, suffix_of
from selfsight.data.index import build_index
from selfsight.data.targets import decode_mask
from selfsight.data.tiff import is_plain
from selfsight.errors import DataError, UsageError

FORM_OF = {"MPO": "JPEG"}  # a JPEG with further pictures behind it, as many cameras write
SUFFIX_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "PPM": "ppm", "TIFF": "tif", "GIF": "gif"}


class Encoding(NamedTuple):
    """How images are stored: unchanged unless one of these is set."""

    short_side: int | None = None  # pixels; larger images are reduced so that their shorter side has these
    format: str | None = None  # "jpeg", "png" or "webp"
    quality: int = 92  # of JPEG and WebP, 1-100

    @property
    def changes(self) -> bool:
        return self.short_side is not None or self.format is not None


UNCHANGED = Encoding()
Picture = Image.Image | bytes  # to be stored as PNG; or encoded


class Sample(NamedTuple):
    """What becomes one sample of a shard."""

    image: Picture | list[Picture]
    """An image, or the frames of a clip in order."""
    label: int | list[int] | None = None
    """One, or a list of them."""
    group: int | None = None
    """Number of the whole that it is a part of."""
    about: dict[str, Any] | bytes | None = None
    """Stored beside it as JSON; bytes are JSON already."""
    mask: bytes | None = None
    """The classes of its pixels, encoded: see `targets.decode_mask`; as large as the image as it is seen."""


def write_shards(
    samples: Iterable[Sample | tuple[Picture, int | list[int] | None]],
    folder: Path,
    prefix: str,
    encoding: Encoding = UNCHANGED,
    per_shard: int = 10_000,
) -> None:
    """Write samples, or pairs of image and label, and index them.

    Raises:
        DataError: no image at all, or one that cannot be read.
        UsageError: an encoding that a scientific file does not have.
    """
    count = 0
    pattern = f"{folder}/{prefix}".replace("%", "%%") + "-%06d.tar"
    how = {"maxcount": per_shard, "maxsize": 2**40, "verbose": 0, "mtime": 0}
    with wds.ShardWriter(pattern, **how, encoder=False) as writer:  # an encoder would compress a .nii.gz again
        for sample in samples:
            try:
                members = _members(Sample(*sample), encoding)
            except DataError as error:
                raise DataError(f"image {count + 1} of the source: {error}") from None
            writer.write({"__key__": f"{count:09d}", **members})
            count += 1
    if not count:
        raise DataError("the source holds no image")
    for shard in sorted(folder.glob("*.tar")):
        build_index(shard)


def _members(sample: Sample, encoding: Encoding) -> dict[str, bytes]:
    """The members of one sample by their fields."""
    if isinstance(sample.image, list):
        frames = [encode(frame, encoding) for frame in sample.image]
        members = {f"{number:03d}.{suffix}": body for number, (suffix, body) in enumerate(frames)}
    else:
        members = dict([encode(sample.image, encoding)])
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    if sample.group is not None:
        members["group"] = str(sample.group).encode()
    if sample.about is not None:
        members["json"] = sample.about if isinstance(sample.about, bytes) else json.dumps(sample.about).encode()
    if sample.mask is not None:
        first = sample.image[0] if isinstance(sample.image, list) else sample.image
        members |= _mask(sample.mask, seen_size(first), encoding)
    return members


def seen_size(image: Picture) -> tuple[int, int]:
    """Rows and columns of an image as it is seen, upright, which its mask must have."""
    if not isinstance(image, bytes):
        return image.height, image.width
    array = read_array(image, eight=True)
    if array is not None:
        return array.shape[-2], array.shape[-1]
    opened = open_image(image)
    try:
        turned = opened.getexif().get(ORIENTATION, 1) in range(5, 9)
    except Exception as error:  # noqa: BLE001 - hostile bytes make it raise anything, as in `decode`
        raise BadSample(f"damaged EXIF ({error})") from None
    return (opened.width, opened.height) if turned else (opened.height, opened.width)


def _mask(body: bytes, size: tuple[int, int], encoding: Encoding) -> dict[str, bytes]:
    """The mask's member: as it came, or reduced as its image is, to the nearest pixel's class."""
    suffix = suffix_of(body) or "png"
    array = decode_mask(body, size)
    height, width = reduced(array.shape[0], array.shape[1], encoding)
    if (height, width) == array.shape:
        return {f"mask.{suffix}": body}
    out = BytesIO()
    np.save(out, np.ascontiguousarray(nearest(array, height, width).astype(np.uint16)))
    return {"mask.npy": out.getvalue()}


def reduced(height: int, width: int, encoding: Encoding) -> tuple[int, int]:
    """The size in which an image of this size is stored."""
    if not encoding.short_side or min(height, width) <= encoding.short_side:
        return height, width
    scale = encoding.short_side / min(height, width)
    return max(encoding.short_side, round(height * scale)), max(encoding.short_side, round(width * scale))


def encode(image: Picture, encoding: Encoding) -> tuple[str, bytes]:
    """Suffix and bytes. Bytes that came encoded stay as they are unless a change is asked for; what is encoded anew has
    8 bits, grey or RGB, by the conversion that training uses (`pillow_image`)."""
    stored = "PNG"
    if isinstance(image, bytes):
        suffix = suffix_of(image)
        if suffix and encoding.changes and not (suffix == "tif" and is_plain(image, volumes=False)):
            raise UsageError(
                f"--short-side and --format: for 8-bit images that Pillow reads; the source holds a .{suffix} with more "
                "depth, bands or planes, which is stored unchanged"
            )
        opened = None if suffix else open_image(image)
        if not encoding.changes:
            return suffix or SUFFIX_OF[_form(opened)], image
        opened = opened or open_image(image)
        stored = _form(opened)
        image = pillow_image(image, "L" if opened.mode in {"1", "L"} or opened.mode.startswith("I;16") else "RGB")
    height, width = reduced(image.height, image.width, encoding)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    form, out = (encoding.format or stored).upper(), BytesIO()
    image.save(out, form, **({} if form == "PNG" else {"quality": encoding.quality}))
    return SUFFIX_OF[form], out.getvalue()


def _form(image: Image.Image | None) -> str:
    form = (image.format if image else None) or "PNG"
    return FORM_OF.get(form, form)
