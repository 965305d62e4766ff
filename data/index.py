"""The index beside a shard: offset, size, CRC-32, label, group and frames of every sample, so that a sample is one `pread`.

`x.tar` has `x.tar.idx`: a 64-byte header, then one 32-byte record a sample, memory-mapped when read. A tar in a folder
that cannot be written has its index in the cache folder.
"""

import mmap
import os
import zlib
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfsight.console import say
from selfsight.data import targets
from selfsight.data.samples import IMAGE_SUFFIXES, NONE, pair, record, target
from selfsight.data.store import Address
from selfsight.errors import DataError, StorageError

MAGIC, VERSION = b"SSINDEX\0", 1
UNLABELLED = NONE
RECORD = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("crc", "<u4"),
        ("label", "<i4"),
        ("group", "<i4"),
        ("frames", "<u4"),
        ("print", "<u4"),
    ]
)
HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("count", "<u4"),
        ("shard_size", "<u8"),
        ("records_crc", "<u4"),
        ("targets_crc", "<u4"),  # of the file of lists and masks (`data.targets`), 0 where there is none
        ("reserved", "V28"),
        ("header_crc", "<u4"),
    ]
)
Records = NDArray[np.void]


class Walked(NamedTuple):
    """What a walk over a tar found."""

    records: Records
    left: str
    """What was left out, in words."""
    targets: bytes
    """Lists of labels and places of masks, as `targets.pack` has them."""


def cache_folder() -> Path:
    """`$SELFSIGHT_CACHE`, or `~/.cache/selfsight`."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfsight"
    return Path(os.environ.get("SELFSIGHT_CACHE") or default)


def index_path(shard: Path, suffix: str = ".idx") -> Path:
    """Beside the shard, or in the cache folder when only that one exists or can be made."""
    beside = shard.with_name(shard.name + suffix)
    if beside.exists() or os.access(shard.parent, os.W_OK):
        return beside
    return cache_folder() / "index" / f"{sha256(str(shard.resolve()).encode()).hexdigest()[:16]}-{shard.name}{suffix}"


def build_index(shard: Path | Address, *, missing: str = "error") -> Records:
    """Walk one tar and write its index; see `scan`. Samples that are left out are counted aloud."""
    if isinstance(shard, Address):
        from selfsight.data.remote_index import build_remote_index

        return build_remote_index(shard, missing)
    found = _walk(shard, missing)
    if found.left:
        say(f"{shard}: {found.left}; left out")
    write_index(index_path(shard), found.records, shard.stat().st_size, found.targets)
    return found.records


def scan(shard: Path | Address, missing: str = "error") -> Walked:
    """Walk one tar and pair images with labels by WebDataset's keys.

    Args:
        shard: a plain tar of `KEY.jpg`-like images and, if there are labels, `KEY.cls` integers or lists of them.
        missing: what to do with a key that has no image, or one of zero bytes: "error", or "exclude" it.

    Raises:
        DataError: a damaged tar, a duplicate key, several images in one sample, a bad label, or no image at all.
    """
    if isinstance(shard, Address):
        from selfsight.data.remote_index import scan_remote

        return scan_remote(shard, missing)
    return _walk(shard, missing)


def _walk(shard: Path, missing: str) -> Walked:
    if shard.exists() and not shard.is_file():  # a pipe would be waited on for ever
        raise DataError(f"{shard}: is not a file")
    try:
        with shard.open("rb") as file:
            # An empty file cannot be mapped; the walk says of it what it says of any cut tar.
            buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if shard.stat().st_size else b"")
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror})") from None
    return walk(shard, buffer, missing)


def walk(shard: Path | Address, buffer: memoryview, missing: str) -> Walked:
    """What a tar holds whose bytes are `buffer`; see `scan`."""
    _refuse_compressed(shard, bytes(buffer[:6]))
    samples, left = pair(str(shard), buffer, missing)
    records = np.array([record(str(shard), buffer, key, fields) for key, fields in samples.items()], RECORD)
    if not len(records):
        raise DataError(f"{shard}: holds no image (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    found = [target(str(shard), buffer, key, fields) for key, fields in samples.items()]
    return Walked(records, left, targets.pack([one for one, _ in found], [mask for _, mask in found]))


def read_index(shard: Path | Address) -> Records:
    """The records of a shard's index, memory-mapped.

    Raises:
        DataError: no index, a damaged or foreign one, or a shard whose size is not the indexed one.
    """
    if isinstance(shard, Address):
        from selfsight.data.remote_index import read_remote_index

        return read_remote_index(shard)
    path = index_path(shard)
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is not a file; make it with: selfsight shards index {shard}")
    try:
        size = shard.stat().st_size
    except OSError as error:
        why = "not found" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        raise DataError(f"{shard}: {why}") from None
    return read_records(path, shard, size)


def read_records(path: Path, shard: Path | Address, size: int) -> Records:
    """The records in one file, of a shard of `size` bytes, memory-mapped."""
    where = "make it" if isinstance(shard, Path) else "put a new one beside the shard, made"
    fix = f"; {where} with: selfsight shards index {shard}"
    try:
        head = np.fromfile(path, HEADER, 1)
        records = (
            np.memmap(path, RECORD, "r", HEADER.itemsize) if head.size and head["count"][0] else np.empty(0, RECORD)
        )
    except FileNotFoundError:
        raise DataError(f"{shard}: has no index{fix}") from None
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
    except ValueError:  # a file that is no whole number of records
        raise DataError(f"{path}: the index is damaged{fix}") from None
    if not head.size or head["magic"][0] != MAGIC.rstrip(b"\0") or head["header_crc"][0] != _header_crc(head):
        raise DataError(f"{path}: is not an index of this tool, or is damaged{fix}")
    if head["version"][0] != VERSION:
        raise DataError(f"{path}: index version {head['version'][0]}, this release reads {VERSION}{fix}")
    if head["shard_size"][0] != size:
        raise DataError(
            f"{path}: is stale: the shard has {size:,} bytes, the index knew {head['shard_size'][0]:,}{fix}"
        )
    if len(records) != head["count"][0] or zlib.crc32(records.tobytes()) != head["records_crc"][0]:
        raise DataError(f"{path}: the index is damaged{fix}")
    if (records["size"] > size).any() or (records["offset"] > size - records["size"].astype(np.int64)).any():
        raise DataError(f"{path}: the index knows samples that lie outside the shard{fix}")
    return records


def targets_crc(path: Path, records_crc: int) -> int:
    """What an index says of the lists and masks beside it: their CRC-32, 0 where there are none.

    Raises:
        DataError: it is not the index of these records any more.
    """
    try:
        head = np.fromfile(path, HEADER, 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not head.size or head["header_crc"][0] != _header_crc(head) or head["records_crc"][0] != records_crc:
        raise DataError(f"{path}: changed while it was read; run the same command again")
    return int(head["targets_crc"][0])


def write_index(path: Path, records: Records, shard_size: int, more: bytes = b"") -> None:
    """Write the index of a shard of so many bytes, whole or not at all; beside it its lists and masks, if there are any."""
    head = np.zeros(1, HEADER)
    head["magic"], head["version"], head["count"], head["shard_size"] = MAGIC, VERSION, len(records), shard_size
    head["records_crc"] = zlib.crc32(records.tobytes())
    head["targets_crc"] = targets.checksum(more)
    head["header_crc"] = _header_crc(head)
    beside = path.with_name(path.name.removesuffix(".idx") + targets.SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if more:
            _publish(beside, more)
        _publish(path, head.tobytes() + records.tobytes())
        if not more:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: the index cannot be written ({error.strerror})") from None


def _publish(path: Path, body: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(body)
    temporary.replace(path)


def _header_crc(head: NDArray[np.void]) -> int:
    return zlib.crc32(head.tobytes()[: -HEADER["header_crc"].itemsize])


def _refuse_compressed(shard: Path | Address, start: bytes) -> None:
    if start.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")):
        raise DataError(
            f"{shard}: is compressed, so that no sample can be read by its offset; "
            f"unpack it with: selfsight shards build {shard} FOLDER"
        )


def label_histogram(labels: NDArray[np.int32]) -> dict[int, int]:
    """How many samples each label has, those without one or with a list left out."""
    return dict(sorted(Counter(labels[labels >= 0].tolist()).items()))
