"""Samples of a tar: which members belong together, which of them are images, and the record of each in the index.

WebDataset's rule: the key ends at the basename's first dot, the rest is the field. A sample has one image
(`KEY.jpg`), or is a clip of numbered frames (`KEY.000.jpg`, `KEY.001.jpg`, ...), and may have a label (`KEY.cls`), which
may be a list of them, a mask (`KEY.mask.png`), and the number of the patient, slide or scene that it is a part of
(`KEY.group`).
"""

import mmap
import re
import zlib
from hashlib import blake2b
from pathlib import Path

from selfsight.data.decode import BadSample
from selfsight.data.tar import Member, members
from selfsight.data.targets import LIST_MOST, NO_MASK, parse_list
from selfsight.errors import DataError

NONE = -1  # the label or group of a sample that has none
LISTED = -2  # the label of a sample whose labels are a list, which stands beside the index
IMAGE_SUFFIXES = frozenset(
    {"jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "pbm", "tif", "tiff", "gif", "npy", "dcm", "nii", "nii.gz"}
)
MASK_SUFFIXES = ("png", "tif", "tiff", "npy")  # lossless
_ENDS = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
_FRAME = re.compile(r"\d{1,9}\.([^.]+|nii\.gz)")

Fields = dict[str, Member]
Row = tuple[int, int, int, int, int, int, int]


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(_ENDS)


def key_and_field(name: str) -> tuple[str, str]:
    """`a/b.c.jpg` is the field `c.jpg` of the sample `a/b`."""
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return folder + slash + stem, field.lower()


def pair(shard: str, buffer: memoryview, missing: str) -> tuple[dict[str, Fields], str]:
    """Fields by key, in order of first appearance, of samples with an image, and how many have none, in words.

    Raises:
        DataError: a damaged tar, a member that stands twice, or (unless `missing` is "exclude") a key without an image.
    """
    samples: dict[str, Fields] = {}
    for member in members(buffer, shard):
        key, field = key_and_field(member.name)
        fields = samples.setdefault(key, {})
        if field in fields:
            raise DataError(f"{shard}: {member.name!r} stands twice; keys must be unique within a shard")
        fields[field] = member
    lacks = {key: lack for key, fields in samples.items() if (lack := _lack(fields))}
    found = [(lack, [key for key in lacks if lacks[key] == lack]) for lack in sorted(set(lacks.values()))]
    left = "; ".join(f"{len(keys)} of {len(samples)} samples have {lack}, first {keys[0]!r}" for lack, keys in found)
    if left and missing == "error":
        raise DataError(f"{shard}: {left}; leave them out with --missing exclude")
    return {key: fields for key, fields in samples.items() if key not in lacks}, left


def notes_of(path: Path) -> list[bytes | None]:
    """What `KEY.json` says of each sample of a shard.

    Raises:
        OSError: it cannot be read.
        DataError: a damaged tar.
    """
    with path.open("rb") as file:
        buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    found = [fields.get("json") for fields in pair(str(path), buffer, "exclude")[0].values()]
    return [bytes(buffer[note.offset : note.offset + note.size]) if note else None for note in found]


def record(shard: str, buffer: memoryview, key: str, fields: Fields) -> Row:
    """Offset, size, CRC-32, label, group, frames and fingerprint of a sample.

    An image is its bytes, with 0 frames. A clip spans whole members, from the headers of its first image to the end of
    its last image's bytes, so that it, too, is read at once.

    Raises:
        DataError: several images that are no numbered frames, or a label or group that is no integer.
    """
    images = _images(fields)
    start, end = images[0].offset, images[0].offset + images[0].size
    frames = 0
    if len(images) > 1:
        frames = len(_in_order(shard, key, fields))
        start, end = min(image.start for image in images), max(image.offset + image.size for image in images)
    if end - start >= 2**32:
        raise DataError(f"{shard}: sample {key!r} has {end - start:,} bytes; at most 4 GiB are read at once")
    label = LISTED if _is_list(buffer, fields) else _integer(shard, buffer, key, fields, "cls")
    group = _integer(shard, buffer, key, fields, "group")
    body = buffer[start:end]
    return start, end - start, zlib.crc32(body), label, group, frames, fingerprint(body)


def fingerprint(body: memoryview) -> int:
    """32 bits that tell contents apart. The CRC has only 16 that do so for PNGs of one size, which end with CRCs of their own:
    it finds damage all the same, but of the 50,000 images of CIFAR-10 15,000 share one with another."""
    return int.from_bytes(blake2b(body, digest_size=4).digest(), "little") or 1  # 0: an index from before there was one


def target(shard: str, buffer: memoryview, key: str, fields: Fields) -> tuple[list[int] | None, tuple[int, int, int]]:
    """The list of labels of a sample, None where it has none; and offset, size and CRC-32 of its mask.

    Raises:
        DataError: a list that is none, or several masks, or one of a kind that changes values.
    """
    labels = None
    if _is_list(buffer, fields):
        cls = fields["cls"]
        text = bytes(buffer[cls.offset : cls.offset + min(cls.size, LIST_MOST + 1)])
        labels = parse_list(text, f"{shard}: sample {key!r}")
    masks = [member for field, member in fields.items() if _is_mask(field)]
    if not masks:
        return labels, NO_MASK
    if len(masks) > 1 or not masks[0].name.lower().endswith(tuple(f".{suffix}" for suffix in MASK_SUFFIXES)):
        names = ", ".join(mask.name for mask in masks[:4])
        raise DataError(f"{shard}: sample {key!r} has {names}; a mask is one file of {', '.join(MASK_SUFFIXES)}")
    _, offset, size, _ = masks[0]
    if size >= 2**32:
        raise DataError(f"{shard}: the mask of sample {key!r} has {size:,} bytes; less than 4 GiB are read")
    return labels, (offset, size, zlib.crc32(buffer[offset : offset + size]))


def split_clip(span: bytes, frames: int) -> list[bytes]:
    """The encoded images of a clip in order of their numbers, from the bytes that its record spans.

    Raises:
        BadSample: not so many images.
    """
    buffer = memoryview(span)
    try:
        inside = [(*key_and_field(member.name), member) for member in members(buffer, "clip", whole=False)]
        own = {field: member for key, field, member in inside if key == inside[0][0]}  # others may stand between
        found = _in_order("clip", "", own)
    except DataError as error:
        raise BadSample(f"a clip whose members cannot be told apart ({error})") from None
    if len(found) != frames:
        raise BadSample(f"a clip of {len(found)} images, which the index knew as {frames}; index its shard again")
    return [bytes(buffer[image.offset : image.offset + image.size]) for image in found]


def _in_order(shard: str, key: str, fields: Fields) -> list[Member]:
    """The images of a clip by their numbers."""
    images = {field: member for field, member in fields.items() if _is_image(field)}
    numbers = [int(field.partition(".")[0]) for field in images if _FRAME.fullmatch(field)]
    if len(set(numbers)) < len(images):
        raise DataError(
            f"{shard}: sample {key!r} holds {len(images)} images; one is read, or the frames of a clip, numbered "
            "KEY.000.jpg, KEY.001.jpg, ..."
        )
    return [member for _, member in sorted(zip(numbers, images.values(), strict=True))]


def _lack(fields: Fields) -> str:
    images = _images(fields)
    if not images:
        return "no image"
    if not all(image.size for image in images):
        return "an image of zero bytes"
    return "" if all(member.size for field, member in fields.items() if _is_mask(field)) else "a mask of zero bytes"


def _images(fields: Fields) -> list[Member]:
    return [member for field, member in fields.items() if _is_image(field)]


def _is_image(field: str) -> bool:
    return is_image("." + field) and not _is_mask(field)


def _is_mask(field: str) -> bool:
    return field.startswith("mask.") and is_image("." + field)


def _is_list(buffer: memoryview, fields: Fields) -> bool:
    if "cls" not in fields:
        return False
    _, start, length, _ = fields["cls"]
    return bytes(buffer[start : start + min(length, 32)]).lstrip().startswith(b"[")


def _integer(shard: str, buffer: memoryview, key: str, fields: Fields, field: str) -> int:
    if field not in fields:
        return NONE
    _, start, length, _ = fields[field]
    text = bytes(buffer[start : start + min(length, 32)]).strip()
    if not text.isdigit() or int(text) >= 2**31:
        what = {"cls": "label"}.get(field, field)
        also = ", nor a list of them" if field == "cls" else ""
        raise DataError(f"{shard}: {what} {text!r} of sample {key!r} is not an integer of 0 or more{also}")
    return int(text)
