"""JPEGs by simplejpeg (the extra `fast`), where that gives Pillow's pixels in less time; everything else is Pillow's.

Both are libjpeg-turbo with the accurate DCT and smooth upsampling, so that the pixels are equal (tested). The time is saved
at Pillow's copies, by one buffer that is used again (fresh memory costs a quarter of the decoding), and by not decoding the
rows below the crops: rows come from the top, so that a file whose header says fewer rows is done sooner.
"""

import re
import sys
import threading
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

SEQUENTIAL = frozenset({0xC0, 0xC1})
FRAMES = SEQUENTIAL | {0xC2}  # with progressive ones
START_OF_SCAN, EXIF, END = 0xDA, 0xE1, b"\xff\xd9"
START = b"\xff\xd8\xff"
BLOCK = 8  # rows of a block of coefficients
REDUCTIONS = (8, 4, 2)  # by which blocks can be decoded smaller
WORTH = 0.9  # of the rows: more are decoded with the rest, sooner than it is made sure that they may be cut off
BUFFER = 3 * 2**22  # bytes that are kept between images: 4 million pixels
_MARKER = re.compile(rb"\xff[\x01-\xff]")
ORIENTATION, UPRIGHT = 0x0112, 1
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')  # as Pillow looks for it


class Need(NamedTuple):
    """What of an image will be looked at."""

    rows: int
    """Rows from the top; those below may be anything."""
    reduction: int = 1
    """By how much the sides may be divided: 1, 2, 4 or 8. Reduced pixels are not Pillow's."""


Needs = Callable[[int, int], Need]  # of width and height


class Header(NamedTuple):
    """What is said before the first scan."""

    width: int
    height: int
    components: int
    frame: int
    """Where the frame's header lies, bytes."""
    upright: bool
    """No EXIF or XMP orientation but "as it is"."""
    scan: int
    """Where the only scan begins, of rows in order; 0 where there are several."""


def decode_jpeg(body: bytes, channels: int, most: int, needs: Needs | None = None) -> NDArray[np.uint8] | None:
    """Upright pixels (C, H, W), a view of interleaved ones, of 1 or 3 channels; None: Pillow must decide.

    None is the answer to what is no JPEG, or is rotated, CMYK, of a rarer kind, of colours where grey is wanted, damaged, or
    of more than `most` pixels, and where simplejpeg is not installed. The rows beyond those in need may be anything.
    """
    header = read_header(body) if library() else None
    if header is None or not header.upright or header.width * header.height > most:
        return None
    if header.components != channels and (header.components, channels) != (1, 3):
        return None
    need = needs(header.width, header.height) if needs else Need(header.height)
    if need.reduction > 1:
        return _decode(body, channels, header, need.reduction)
    block_rows = _block_rows(body, header)
    rows = -(-(need.rows + 1) // block_rows) * block_rows  # one more: colours are smoothed between rows
    if rows > WORTH * header.height or not _is_whole(body, header.scan):
        return _decode(body, channels, header)
    fewer = bytearray(body)
    fewer[header.frame + 5 : header.frame + 7] = rows.to_bytes(2, "big")
    return _decode(fewer, channels, header, strict=False)


def reduction(crop: int, view: int) -> int:
    """The largest reduction at which a crop is not smaller than its view (sides, pixels)."""
    return next((factor for factor in REDUCTIONS if crop >= factor * view), 1)


@cache
def library() -> ModuleType | None:
    """simplejpeg, if it is installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    module: ModuleType = simplejpeg
    return module


def read_header(body: bytes) -> Header | None:
    """The header of a JPEG of 8 bits, Huffman-coded; None for any other, or a damaged one."""
    if not body.startswith(START):
        return None
    at, upright, frame = 2, True, 0
    while at + 4 <= len(body) and body[at] == 0xFF:
        marker, length = body[at + 1], body[at + 2] << 8 | body[at + 3]
        if marker in FRAMES:
            frame = at
        elif marker == EXIF:
            upright = upright and _is_upright(body[at + 4 : at + 2 + length])
        elif marker == START_OF_SCAN:
            return _header(body, frame, at, upright) if frame else None
        at += 2 + length
    return None


def _header(body: bytes, frame: int, scan: int, upright: bool) -> Header | None:
    bits, components = body[frame + 4], body[frame + 9]
    height, width = (int.from_bytes(body[frame + at : frame + at + 2], "big") for at in (5, 7))
    if bits != 8 or not height or not width or components not in {1, 3}:
        return None
    only = body[frame + 1] in SEQUENTIAL and body[scan + 4] == components
    return Header(width, height, components, frame, upright, scan + 2 if only else 0)


def _is_whole(body: bytes, scan: int) -> bool:
    """Whether nothing but the end interrupts the scan: what lies below the cut must not hide damage that Pillow would see."""
    marker = _MARKER.search(body, scan) if scan else None
    return marker is not None and marker.start() == len(body) - 2 and body.endswith(END)


def _is_upright(segment: bytes) -> bool:
    """Whether EXIF or XMP say no orientation but 1; False, too, where it is not clear."""
    if segment.startswith(b"Exif\0\0"):
        return all(value == UPRIGHT for value in _exif_orientations(segment[6:]))
    return all(value == b"1" for value in _XMP_ORIENTATION.findall(segment))


def _exif_orientations(tiff: bytes) -> list[int]:
    """The values of the tag in the first directory, one at most in a sound file; 0 for what is not understood."""
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II") else "big"
    start = int.from_bytes(tiff[4:8], order)
    entries = tiff[start + 2 : start + 2 + 12 * int.from_bytes(tiff[start : start + 2], order)]
    if len(entries) % 12:
        return [0]
    tags = [entries[at : at + 12] for at in range(0, len(entries), 12)]
    return [int.from_bytes(tag[8:10], order) for tag in tags if int.from_bytes(tag[:2], order) == ORIENTATION]


def _block_rows(body: bytes, header: Header) -> int:
    """Rows that are coded together: 8, or more where colours have fewer rows than brightness."""
    if header.components == 1:
        return BLOCK
    return BLOCK * max(body[header.frame + 11 + 3 * component] & 15 for component in range(header.components))


def _decode(
    body: bytes | bytearray, channels: int, header: Header, reduced: int = 1, strict: bool = True
) -> NDArray[np.uint8] | None:
    """Pixels; a file with fewer rows than `header` says fills the upper ones."""
    height, width = (-(-side // reduced) for side in (header.height, header.width))
    pixels = _memory(height * width * channels)
    simplejpeg = library()
    assert simplejpeg is not None
    least = {"min_height": height, "min_width": width, "min_factor": reduced} if reduced > 1 else {}
    try:
        found = simplejpeg.decode_jpeg(body, "RGB" if channels == 3 else "GRAY", buffer=pixels, strict=strict, **least)
    except ValueError:  # damaged, or worth a warning: Pillow says what becomes of it
        return None
    if found.shape[1] != width or (found.shape[0] != height and strict):
        return None
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


class _Kept(threading.local):
    """Memory of the last image."""

    buffer: NDArray[np.uint8] = np.empty(0, np.uint8)


_kept = _Kept()


def _memory(count: int) -> NDArray[np.uint8]:
    """`count` bytes: those of the last image, once nobody holds a view of it."""
    if count > BUFFER:
        return np.empty(count, np.uint8)
    # Two references are the attribute and the argument; every view of the array would be one more.
    if len(_kept.buffer) < count or sys.getrefcount(_kept.buffer) > 2:
        _kept.buffer = np.empty(max(count, min(2 * len(_kept.buffer), BUFFER)), np.uint8)
    return _kept.buffer[:count]
