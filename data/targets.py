"""What an index record has no room for: lists of labels, and where masks lie. One file beside the index, only where needed.

`x.tar.targets` holds a 32-byte header, then N + 1 starts (u8), the labels of all samples one after the other (i4), and,
where there are masks, offset, size and CRC-32 of each sample's. Its own CRC-32 stands in the header of the index.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from selfsight.data.decode import BadSample, open_image
from selfsight.errors import DataError

SUFFIX = ".targets"
MAGIC, VERSION = b"SSTARGET", 1
HEADER = np.dtype(
    [("magic", "S8"), ("version", "<u4"), ("count", "<u4"), ("labels", "<u8"), ("masks", "<u4"), ("reserved", "V4")]
)
MASK = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])
CLASSES_MOST = 2**16  # of a list's labels; a table of N samples has a byte for each
LIST_MOST = 2**20  # bytes of one list
TABLE_MOST = 2**33  # bytes of the table of a whole set
IGNORED = 255  # the value of a mask that is scored nowhere, as in VOC and ADE20K; of 16 bits also the largest
_SPREAD = {2: 85, 4: 17}  # by which Pillow multiplies grey levels of so few bits
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF, and a value of the second

Row = tuple[int, int, int]
NO_MASK: Row = (0, 0, 0)


class Targets(NamedTuple):
    """Lists and masks of the N samples of a shard."""

    starts: NDArray[np.uint64]
    """(N + 1,): sample n has `labels[starts[n]:starts[n + 1]]`."""
    labels: NDArray[np.int32]
    masks: NDArray[np.void]
    """(N,) of MASK, size 0 where there is none; or (0,)."""


class Lists(NamedTuple):
    """What the lists of a set hold."""

    samples: int
    """That have one."""
    empty: int
    """Of them those that have no label in it."""
    labels: dict[int, int]
    """How many lists have each label."""


def parse_list(text: bytes, where: str) -> list[int]:
    """The labels in `[0, 3]`, sorted, each once.

    Raises:
        DataError: what is no flat list of integers from 0 to 65,535.
    """
    try:
        found = json.loads(text) if len(text) <= LIST_MOST else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(type(label) is int and 0 <= label < CLASSES_MOST for label in found):
        raise DataError(
            f"{where}: {text[:40]!r} is no list of labels, which are integers from 0 to {CLASSES_MOST - 1:,}"
        )
    return sorted(set(found))


def pack(lists: Sequence[list[int] | None], masks: Sequence[Row]) -> bytes:
    """The file of a shard whose samples have these lists (None: no list) and masks; empty where no sample has either."""
    kept = np.array(masks, MASK) if any(size for _, size, _ in masks) else np.empty(0, MASK)
    if not len(kept) and all(one is None for one in lists):
        return b""
    starts = np.cumsum([0, *(len(one or ()) for one in lists)], dtype="<u8")
    labels = np.array([label for one in lists for label in one or ()], "<i4")
    head = np.zeros(1, HEADER)
    head["magic"], head["version"], head["count"] = MAGIC, VERSION, len(lists)
    head["labels"], head["masks"] = len(labels), len(kept)
    return b"".join(part.tobytes() for part in (head, starts, labels, kept))


def checksum(body: bytes) -> int:
    """What the index says of the file: 0 where there is none."""
    return (zlib.crc32(body) or 1) if body else 0


def read_targets(path: Path, shard: str, count: int, shard_size: int, crc: int) -> Targets:
    """The file of a shard of so many samples and bytes.

    Raises:
        DataError: it is missing, damaged, or not the one that the index was made with.
    """
    fix = f"make it again with: selfsight shards index {shard}"
    try:
        body = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: lists and masks of {shard} cannot be read ({error.strerror}); {fix}") from None
    if checksum(body) != crc:
        raise DataError(f"{path}: is damaged, or belongs to another index than the one of {shard}; {fix}")
    found = _unpacked(body, count)
    if found is None:
        raise DataError(f"{path}: is not what this release reads (version {VERSION}); {fix}")
    starts, labels, masks = found
    ends = masks["offset"].astype(np.float64) + masks["size"]
    if (np.diff(starts.astype(np.int64)) < 0).any() or (len(masks) and ends.max() > shard_size):
        raise DataError(f"{path}: knows lists or masks that do not fit its shard; {fix}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < CLASSES_MOST:
        raise DataError(f"{path}: knows labels that are not from 0 to {CLASSES_MOST - 1:,}; {fix}")
    return found


def _unpacked(body: bytes, count: int) -> Targets | None:
    """None where the numbers in the header do not fit the bytes."""
    if len(body) < HEADER.itemsize:
        return None
    head = np.frombuffer(body, HEADER, 1)[0]
    if (bytes(head["magic"]), int(head["version"]), int(head["count"])) != (MAGIC, VERSION, count):
        return None
    labels, masks = int(head["labels"]), int(head["masks"])
    middle = HEADER.itemsize + 8 * (count + 1)
    if masks not in {0, count} or len(body) != middle + 4 * labels + MASK.itemsize * masks:
        return None
    starts = np.frombuffer(body, "<u8", count + 1, HEADER.itemsize)
    if starts[0] != 0 or starts[-1] != labels:
        return None
    last = middle + 4 * labels
    return Targets(starts, np.frombuffer(body, "<i4", labels, middle), np.frombuffer(body, MASK, masks, last))


def table(shards: Sequence[tuple[NDArray[np.int32], Targets | None]]) -> NDArray[np.bool_]:
    """Which sample has which label, (N, C), of shards with their labels (n,) and lists: a single label is a list of one.

    Raises:
        DataError: a table of more than 8 GiB.
    """
    most = -1
    for single, targets in shards:
        most = max(most, int(single.max(initial=-1)), int(targets.labels.max(initial=-1)) if targets else -1)
    count = sum(len(single) for single, _ in shards)
    if count * (most + 1) > TABLE_MOST:
        raise DataError(
            f"{count:,} samples with labels up to {most:,} are a table of {count * (most + 1) / 2**30:,.0f} GiB; number "
            "the classes without gaps"
        )
    made, first = np.zeros((count, most + 1), np.bool_), 0
    for single, targets in shards:
        known = np.flatnonzero(single >= 0)
        made[first + known, single[known]] = True
        if targets:
            rows = np.repeat(np.arange(len(single)), (targets.starts[1:] - targets.starts[:-1]).astype(np.int64))
            made[first + rows, targets.labels] = True
        first += len(single)
    return made


def decode_mask(body: bytes, size: tuple[int, int] | None = None) -> NDArray[np.int32]:
    """The classes in a mask (H, W); of a palette its indices, as VOC stores them.

    Args:
        size: rows and columns of its image, if known.

    Raises:
        BadSample: no image, one of colours, floating point, several pages or inverted values, one with too many pixels, or of
            another size than its image.
    """
    mask = _classes(_values(body))
    if size is not None and mask.shape != size:
        raise BadSample(f"mask of {mask.shape[1]} x {mask.shape[0]} pixels, of an image of {size[1]} x {size[0]}")
    return mask


def _values(body: bytes) -> NDArray[np.integer]:
    from selfsight.data.formats import read_array

    if body[:6] == b"\x93NUMPY":
        array = read_array(body)
        assert array is not None
        if array.dtype.kind not in "ui" or array.ndim != 3 or len(array) != 1:
            raise BadSample(
                f"mask of {array.dtype}, {' x '.join(map(str, array.shape))}: one plane of integers is read"
            )
        return array[0]
    image: Any = open_image(body)
    if image.format not in {"PNG", "TIFF"} or not (image.mode in {"1", "L", "P", "I"} or image.mode.startswith("I;16")):
        raise BadSample(
            f"mask of {image.format} {image.mode}: integers of one channel are read, from PNG, TIFF or .npy"
        )
    if getattr(image, "is_animated", False):
        raise BadSample("mask of several pages, of which one would be read; store one")
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO:
        raise BadSample("mask of a TIFF in which 0 is white, so that readers invert its values; store 0 as black")
    spread = _SPREAD.get(_grey_bits(image, body), 1)
    return _decoded(image) // spread


def _grey_bits(image: Any, body: bytes) -> int:
    """Bits of a grey level; 8 of a palette, whose indices nothing spreads."""
    if image.mode != "L":
        return 8
    return body[24] if image.format == "PNG" else int(image.tag_v2.get(_BITS, (1,))[0])


def _decoded(image: Image.Image) -> NDArray[np.integer]:
    try:
        image.load()
        return np.asarray(image).astype(np.int64)
    except Exception as error:  # noqa: BLE001 - hostile bytes make decoders raise anything, as in `decode`
        raise BadSample(f"damaged mask ({error})") from None


def _classes(array: NDArray[np.integer]) -> NDArray[np.int32]:
    """Values as they are; 65,535, which 16 bits have for it, as 255."""
    if array.min() < 0 or array.max() > 65535:
        raise BadSample(f"mask of values from {array.min():,} to {array.max():,}; 0 to 65,535 are read")
    made = array.astype(np.int32)
    made[made == 65535] = IGNORED
    return made
