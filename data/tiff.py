"""TIFF as arrays: whole ones for training, and bands of rows of ones that do not fit into memory."""

import logging
import mmap
import struct
from io import BytesIO
from typing import Any

import numpy as np

from selfsight.data.decode import BadSample, open_image
from selfsight.data.formats import ORIENTATION, Array, claim, extra, over_white, upright

# Those whose output cannot grow beyond the size that the header gave: a JPEG or JPEG 2000 brings its own.
COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32773: "PackBits", 32946: "deflate", 34925: "LZMA", 50000: "Zstd"}
MIN_IS_WHITE, MIN_IS_BLACK, RGB = 0, 1, 2  # photometric interpretations
MAX_PAGES = 16_384
PLANES, CHANNELS = "ZT", "CS"
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # it complains of every file of more than 6 bands
_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA, _FORMAT = 258, 262, 277, 338, 339  # tags


def read_tiff(body: bytes, volumes: bool) -> Array | None:
    """See `selfsight.data.formats`; None for what Pillow reads as well."""
    refuse_circle(body)
    if is_plain(body, volumes):
        return None
    with library().TiffFile(BytesIO(body)) as tiff:
        series = tiff.series[0]
        page, axes = series.keyframe, series.axes
        refuse_kind(page)
        if page.compression not in COMPRESSIONS:
            raise BadSample(f"a TIFF with the compression {page.compression}; read are {_listed()}")
        rows_last = [size for size, axis in zip(series.shape, axes, strict=True) if axis not in "YX"]
        claim((*rows_last, page.imagelength, page.imagewidth), series.dtype)
        if page.is_tiled:
            claim((page.tilelength, page.tilewidth), series.dtype, planes=page.samplesperpixel)
        _refuse_cut(series, len(body))
        array = named(series.asarray(maxworkers=1), axes, volumes)
        alpha = bool(page.extrasamples) and page.extrasamples[-1] in (1, 2)
        orientation = page.tags.valueof(ORIENTATION, 1)
    if page.photometric == MIN_IS_WHITE and array.dtype.kind == "u":
        array = np.iinfo(array.dtype).max - array
    if alpha and array.dtype.kind == "u" and len(array) == page.samplesperpixel:
        array = over_white(array)
    return upright(array, orientation)


def library() -> Any:
    """tifffile."""
    return extra("tifffile", "TIFF beyond 8 bits or 3 channels")


def refuse_circle(buffer: bytes | mmap.mmap) -> None:
    """Follow the chain of pages, which tifffile would follow for ever.

    Raises:
        BadSample: a page that leads to an earlier one, or more pages than are read.
    """
    order = "<" if buffer[:2] == b"II" else ">"
    big = struct.unpack_from(f"{order}H", buffer, 2)[0] == 43
    count, tag, place = ("Q", 20, "Q") if big else ("H", 12, "I")
    at, seen = 8 if big else 4, set[int]()
    while (page := struct.unpack_from(order + place, buffer, at)[0]) and page not in seen:
        seen.add(page)
        tags = struct.unpack_from(order + count, buffer, page)[0]
        at = page + struct.calcsize(order + count) + tags * tag
        if len(seen) > MAX_PAGES or at + struct.calcsize(order + place) > len(buffer):
            raise BadSample(f"a TIFF with more than {MAX_PAGES:,} pages, or cut off at its page {len(seen)}")
    if page:
        raise BadSample(f"a TIFF whose pages run in a circle, after {len(seen)} of them")


def is_plain(body: bytes, volumes: bool) -> bool:
    """Whether Pillow loses nothing: at most 8 bits, and grey, colours, CMYK or alpha on one page, or colours."""
    try:
        image: Any = open_image(body)
    except BadSample:  # for many kinds Pillow has no mode
        return False
    tags = image.tag_v2
    bits, kinds, samples = tags.get(_BITS, (1,)), tags.get(_FORMAT, (1,)), tags.get(_SAMPLES, 1)
    if max(bits) > 8 or set(kinds) != {1}:
        return False
    beyond = samples - {RGB: 3, 5: 4, 6: 3, 8: 3}.get(tags.get(_PHOTOMETRIC), 1)
    if beyond > 1 or (beyond == 1 and tags.get(_EXTRA, (0,))[0] not in (1, 2)):
        return False
    colours = tags.get(_PHOTOMETRIC, MIN_IS_BLACK) > MIN_IS_BLACK
    return (colours and not volumes) or image.n_frames == 1


def is_grey(body: bytes) -> bool:
    """Whether Pillow reads it as one page of unsigned 16 bits that are not inverted."""
    try:
        image: Any = open_image(body)
    except BadSample:
        return False
    kinds = image.tag_v2.get(_PHOTOMETRIC), image.tag_v2.get(_FORMAT, (1,)), image.n_frames
    return image.mode.startswith("I;16") and kinds == (MIN_IS_BLACK, (1,), 1)


def refuse_kind(page: Any) -> None:
    """Refuse the first page's way of colouring unless it is grey or RGB.

    Raises:
        BadSample: palettes, CMYK, Lab and camera raw, which have no meaning as bands.
    """
    if page.photometric not in (MIN_IS_WHITE, MIN_IS_BLACK, RGB):
        raise BadSample(f"a TIFF of the photometric kind {page.photometric.name}; store bands, grey or RGB")


def _refuse_cut(series: Any, length: int) -> None:
    """tifffile fills what a file lacks with zeros."""
    for page in series.pages:
        if page is None or not all(page.databytecounts):
            raise BadSample("a TIFF that lacks some of its strips, tiles or pages")
        if any(start + size > length for start, size in zip(page.dataoffsets, page.databytecounts, strict=True)):
            raise BadSample("a TIFF whose strips or tiles lie past its end; truncated")


def named(array: Array, axes: str, volumes: bool) -> Array:
    """An array with axes in tifffile's letters as (C, D, H, W).

    Raises:
        BadSample: no rows or columns, or slices as well as frames.
    """
    if "Y" not in axes or "X" not in axes:
        raise BadSample(f"a TIFF with the axes {axes}: no image")
    own = [axis for axis in axes if axis not in "YX"]
    unnamed = [axis for axis in own if axis not in PLANES + CHANNELS]
    channels = [axis for axis in own if axis in CHANNELS]
    planes = [axis for axis in own if axis in PLANES]
    (planes if volumes or channels else channels).extend(unnamed)
    if len([axis for axis in planes if array.shape[axes.index(axis)] > 1]) > 1:
        raise BadSample(f"a TIFF with the axes {axes} {array.shape}: one axis of planes is read, slices or frames")
    array = array.transpose([axes.index(axis) for axis in (*channels, *planes, "Y", "X")])
    return array.reshape(_size(array.shape[: len(channels)]), _size(array.shape[len(channels) : -2]), *array.shape[-2:])


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _listed() -> str:
    return ", ".join(dict.fromkeys(COMPRESSIONS.values()))
