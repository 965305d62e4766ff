"""Small images decoded once, into one file of raw pixels that is memory-mapped: no decoding, and whole batches cropped at once.

`selfsight shards cache SPEC` makes it, in the cache folder, under the data's own id; a run uses it if it is there (`data.cache`).
The file: a 64-byte header, the pixels (N, H, C, W) uint8 (rows before channels, as `resample` wants them), then the samples
that could not be decoded with their reasons as JSON. Header and contents have their CRC-32; what is damaged is not used.
"""

import json
import os
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfsight.console import say
from selfsight.data.decode import BadSample, Form, Pixels, decode
from selfsight.data.index import cache_folder
from selfsight.data.mixture import Samples
from selfsight.errors import DataError, StorageError, UsageError

MAGIC, VERSION = b"SSPIXELS", 1  # a new version, too, where `decode` gives other pixels
LARGEST_SIDE = 64
MOST_BYTES = 2**31
AHEAD = 256  # remote samples that are asked for at once
AT_ONCE = 2**24  # bytes that are checked in one go
HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("count", "<u4"),
        ("channels", "<u2"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("reserved", "V30"),
        ("told_size", "<u4"),
        ("contents_crc", "<u4"),
        ("header_crc", "<u4"),
    ]
)


class PixelCache:
    """The decoded images of a set, all of one shape. Cheap to send to a worker, which maps the file again.

    Raises:
        DataError: a file that is not what it was when it was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            head = np.fromfile(path, HEADER, 1)
            self._check_header(head)
            self.shape = tuple(int(head[axis][0]) for axis in ("channels", "height", "width"))
            self.count, told = int(head["count"][0]), int(head["told_size"][0])
            self._mapped: NDArray[np.uint8] | None = self._map()
            reasons = np.memmap(path, np.uint8, "r", HEADER.itemsize + self._mapped.size)
        except (OSError, ValueError) as error:  # ValueError: shorter than its header says
            raise DataError(f"{path}: cannot be read ({error})") from None
        if len(reasons) != told or _crc(reasons, _crc(self._mapped.reshape(-1))) != head["contents_crc"][0]:
            raise DataError(f"{path}: is damaged")
        self.bad: dict[int, str] = {int(sample): reason for sample, reason in json.loads(reasons.tobytes()).items()}
        """Samples that cannot be decoded, each with its reason."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}

    def __len__(self) -> int:
        return self.count

    def batch(self, ids: NDArray[np.int64]) -> Tensor:
        """The pixels of samples (B,): (B, H, C, W) uint8."""
        return torch.from_numpy(self._pixels[ids])

    def image(self, sample: int) -> Pixels:
        """As `decode` gives it: (C, H, W) uint8.

        Raises:
            BadSample: as `decode` did.
        """
        if sample in self.bad:
            raise BadSample(self.bad[sample])
        return np.asarray(self._pixels[sample]).transpose(1, 0, 2)

    @property
    def _pixels(self) -> NDArray[np.uint8]:
        if self._mapped is None:
            self._mapped = self._map()
        return self._mapped

    def _map(self) -> NDArray[np.uint8]:
        channels, height, width = self.shape
        return np.memmap(self.path, np.uint8, "r", HEADER.itemsize, (self.count, height, channels, width))

    def _check_header(self, head: NDArray[np.void]) -> None:
        if not head.size or head["magic"][0] != MAGIC or head["header_crc"][0] != _header_crc(head):
            raise DataError(f"{self.path}: is not a cache of this tool, or is damaged")
        if head["version"][0] != VERSION:
            raise DataError(f"{self.path}: cache version {head['version'][0]}, this release reads {VERSION}")


def cache_path(samples: Samples, form: Form) -> Path:
    """Where the pixels of a set belong."""
    return cache_folder() / "pixels" / f"{samples.id}-{form.channels}.u8"


def find_cache(samples: Samples, form: Form) -> PixelCache | None:
    """The cache of a set, if there is one that can be used."""
    if form != Form(form.channels) or not (path := cache_path(samples, form)).exists():
        return None
    try:
        return PixelCache(path)
    except DataError as error:
        say(f"{error}; images are decoded instead (make it anew with: selfsight shards cache)")
        return None


def build_cache(samples: Samples, form: Form, advance: Callable[[], None] = lambda: None) -> PixelCache:
    """Decode every sample into a new cache, which appears only when it is whole; `advance` is called after each.

    Raises:
        UsageError: images of several sizes, or too large.
        DataError: bytes that are not those that were indexed, and no image at all.
        StorageError: the cache folder cannot be written.
    """
    path = cache_path(samples, form)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(draft, samples, form, advance)
        draft.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); set SELFSIGHT_CACHE") from None
    finally:
        draft.unlink(missing_ok=True)
    return PixelCache(path)


def _write(draft: Path, samples: Samples, form: Form, advance: Callable[[], None]) -> None:
    bad: dict[int, str] = {}
    shape = _shape(samples, form)
    with draft.open("wb") as file:
        file.write(bytes(HEADER.itemsize))
        crc = 0
        for sample in range(len(samples)):
            if samples.remote and sample % AHEAD == 0:
                samples.prefetch(range(sample, min(sample + AHEAD, len(samples))))
            pixels = _decoded(samples, sample, form, bad)
            if pixels is not None and pixels.shape != shape:
                raise UsageError(
                    f"{samples.describe(sample)}: has the shape {pixels.shape}, others {shape}; a cache holds one"
                )
            body = bytes(prod(shape)) if pixels is None else pixels.transpose(1, 0, 2).tobytes()
            crc = zlib.crc32(body, crc)
            file.write(body)
            advance()
        told = json.dumps(bad).encode()
        file.write(told)
        file.seek(0)
        file.write(_header(len(samples), shape, len(told), zlib.crc32(told, crc)))
        file.flush()
        os.fsync(file.fileno())


def _shape(samples: Samples, form: Form) -> tuple[int, ...]:
    """The shape of the first image that can be decoded."""
    bad: dict[int, str] = {}
    found = (_decoded(samples, sample, form, bad) for sample in range(len(samples)))
    first = next((pixels for pixels in found if pixels is not None), None)
    if first is None:
        raise DataError(f"{samples.spec}: no image can be decoded, first: {bad[0]}")
    if first.ndim != 3 or max(first.shape[1:]) > LARGEST_SIDE or len(samples) * first.size > MOST_BYTES:
        raise UsageError(
            f"{samples.spec}: {len(samples):,} images of the shape {first.shape}; a cache is for plain images of at most "
            f"{LARGEST_SIDE} x {LARGEST_SIDE} pixels, {MOST_BYTES:,} bytes in all"
        )
    return first.shape


def _decoded(samples: Samples, sample: int, form: Form, bad: dict[int, str]) -> Pixels | None:
    """The image; None, and why, if it cannot be decoded. Bytes that have changed are another matter: they may come back."""
    images = samples.read_images(sample)
    if len(images) > 1:
        raise UsageError(f"{samples.describe(sample)}: is a clip of {len(images)} images; a cache is for plain images")
    try:
        return decode(images[0], form)
    except BadSample as error:
        bad[sample] = str(error)
        return None


def _header(count: int, shape: tuple[int, ...], told_size: int, contents_crc: int) -> bytes:
    head = np.zeros(1, HEADER)
    head["magic"], head["version"], head["count"] = MAGIC, VERSION, count
    head["channels"], head["height"], head["width"] = shape
    head["told_size"], head["contents_crc"] = told_size, contents_crc
    head["header_crc"] = _header_crc(head)
    return head.tobytes()


def _header_crc(head: NDArray[np.void]) -> int:
    return zlib.crc32(head.tobytes()[: -HEADER["header_crc"].itemsize])


def _crc(values: NDArray[np.uint8], crc: int = 0) -> int:
    for start in range(0, len(values), AT_ONCE):
        crc = zlib.crc32(values[start : start + AT_ONCE].data, crc)
    return crc
