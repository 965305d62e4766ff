"""A set of shards as one sequence of samples, read by index: `Shards("data/train-{000..009}.tar").read(123)`."""

import glob
import os
import re
import time
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from selfsight.data import digits
from selfsight.data.decode import BadSample
from selfsight.data.index import IMAGE_SUFFIXES, Records, read_index
from selfsight.data.order import Ids, sample_ids
from selfsight.errors import DataError, DataGone, UsageError

OPEN_FILES = 128  # per process, well under the usual limit of 1,024
MOST_SHARDS, MOST_LETTERS = 1_000_000, 4096
PATIENCE = 30.0  # seconds that a file system may be away
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0

T = TypeVar("T")


class ShardChanged(DataError):
    """A shard that is no longer the file that was there at the start: no fault of one sample."""


def find_shards(spec: str | Sequence[str]) -> list[Path]:
    """The tars that a data SPEC names, in its own order: braces in sequence, globs and folders sorted by name.

    Args:
        spec: paths with `{000..009}` braces, globs, folders of tars, a list of these, or a built-in set such as
            `digits:train`.

    Raises:
        DataError: nothing matches, or named shards are missing (all of them are listed).
        UsageError: a kind of address that is not read.
    """
    shards: list[Path] = []
    for part in [spec] if isinstance(spec, str) else spec:
        if part.startswith("digits:"):
            shards += digits.shards(part.removeprefix("digits:"))
            continue
        if "://" in part or part.startswith("pipe:"):
            raise UsageError(f"{part.split('?')[0]}: only local paths are read; copy the shards to a disk first")
        for pattern in _patterns(part):
            shards += _expand(pattern)
    lost = [str(path) for path in shards if not path.is_file()]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(shards)} shards are missing: {', '.join(lost[:8])}{' ...' if lost[8:] else ''}"
        )
    if len(set(shards)) < len(shards):
        raise DataError(f"{spec}: names the same shard twice")
    return shards


def _patterns(part: str) -> list[Path]:
    """The paths that braces stand for, unless they are more than a set can have: 40 pairs are a trillion names."""
    try:
        if len(part) > MOST_LETTERS or _expansions(part) > MOST_SHARDS:
            raise UsageError(f"{part[:200]}: stands for more than {MOST_SHARDS:,} shards")
        return [Path(pattern).expanduser() for pattern in braceexpand(part)]
    except (ValueError, RecursionError):
        raise UsageError(f"{part}: its braces do not match") from None
    except RuntimeError:
        raise UsageError(f"{part}: there is no such user's home folder") from None


def _expansions(part: str) -> int:
    """How many names braces stand for, at most; counted from the innermost outwards."""
    product, inner = 1, re.compile(r"\{([^{}]*)\}")
    while found := inner.findall(part):
        for body in found:
            ends = re.match(r"(-?\d+)\.\.(-?\d+)", body)
            product *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else body.count(",") + (26 if ".." in body else 1)
        part = inner.sub("", part)
    return product


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            images = any(file.suffix[1:].lower() in IMAGE_SUFFIXES for file in path.rglob("*"))
            advice = f"; pack its images first: selfsight shards build {path} FOLDER" if images else ""
            raise DataError(f"{path}: no shards here (*.tar){advice}")
        return found
    if glob.has_magic(str(path)):
        found = sorted(Path(match) for match in glob.glob(str(path)))
        if not found:
            raise DataError(f"{path}: no shards match")
        return found
    return [path]


class Shards:
    """N samples in tars, by number. Cheap to send to a worker: files are opened by the process that reads them.

    Raises:
        DataError: shards that are missing, or whose index is missing, damaged or stale.
    """

    patience = PATIENCE
    """Seconds for which a file that cannot be read is tried again."""

    def __init__(self, spec: str | Sequence[str]) -> None:
        self.paths = find_shards(spec)
        self.spec = spec if isinstance(spec, str) else " ".join(spec)
        self._loaded: list[Records] | None = [read_index(path) for path in self.paths]
        self._seen = [_identity(os.stat(path)) for path in self.paths]
        self._checksums = [_checksum(records) for records in self._loaded]
        self._starts = [0, *accumulate(map(len, self._records))]
        self._files: OrderedDict[int, int] = OrderedDict()

    @property
    def _records(self) -> list[Records]:
        """The indexes; a worker maps them at its first sample, where an error can be told to the one that waits."""
        if self._loaded is None:
            self._loaded = [self._waited(shard, partial(self._reopened, shard)) for shard in range(len(self.paths))]
        return self._loaded

    def __len__(self) -> int:
        return self._starts[-1]

    def ids(self, positions: Ids, seed: int) -> Ids:
        """The samples at `positions` (P,) of a run: (P,), each once an epoch."""
        return sample_ids(positions, len(self), seed)

    @property
    def labels(self) -> NDArray[np.int32]:
        """Label of every sample (N,), -1 where there is none."""
        return np.concatenate([records["label"] for records in self._records]).astype(np.int32)

    @property
    def prints(self) -> NDArray[np.uint64]:
        """Size and CRC-32 of every sample as one number (N,): of equal samples the same, of others hardly ever."""
        return np.concatenate(
            [records["size"].astype(np.uint64) << np.uint64(32) | records["crc"] for records in self._records]
        )

    @property
    def id(self) -> str:
        """A short hash of what the samples are: their sizes, checksums and labels in order; not where they lie."""
        digest = sha256()
        for records in self._records:
            for field in ("size", "crc", "label"):
                digest.update(np.ascontiguousarray(records[field]).tobytes())
        return digest.hexdigest()[:16]

    def neighbour(self, sample: int, shift: int) -> int:
        """The sample so many places after this one, else before it, that lies in its shard and has its label; else itself."""
        shard, record = self._locate(sample)
        records, place = self._records[shard], sample - self._starts[shard]
        for other in (place + shift, place - shift):
            if 0 <= other < len(records) and records[other]["label"] == record["label"]:
                return self._starts[shard] + other
        return sample

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages: `train-000003.tar@51200`."""
        shard, record = self._locate(sample)
        return f"{self.paths[shard].name}@{record['offset']}"

    def read(self, sample: int) -> bytes:
        """The encoded image of one sample, by one `pread`.

        Raises:
            BadSample: bytes that are not those that were indexed.
            ShardChanged: the shard is another file than at the start.
            DataGone: the shard cannot be read, and could not for `patience` seconds.
        """
        shard, record = self._locate(sample)
        offset, size, crc, *_ = record.item()  # one conversion: this is done for every image
        for _ in range(2):  # a second read tells a passing fault from a lasting one
            try:
                body = self._pread(shard, size, offset)
            except OSError:
                body = self._waited(shard, partial(self._pread, shard, size, offset))
            if zlib.crc32(body) == crc:
                return body
        if _identity(self._waited(shard, partial(os.stat, self.paths[shard]))) != self._seen[shard]:
            raise ShardChanged(self._changed(shard))
        raise BadSample(f"{self.describe(sample)}: the bytes are not those that were indexed (CRC)")

    def images(self, sample: int, body: bytes) -> list[bytes]:
        """The encoded images in the bytes of a sample: its one image, or the frames of a clip in order."""
        return [body]

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._file(shard), size, offset)
        except OSError:
            self.close()  # after an outage old files may stay unreadable for ever (ESTALE)
            raise

    def _waited(self, shard: int, attempt: Callable[[], T]) -> T:
        """What `attempt` gives, once the file system lets it."""
        end, pause = time.monotonic() + self.patience, FIRST_PAUSE
        while True:
            try:
                return attempt()
            except OSError as error:
                if time.monotonic() + pause > end:
                    raise DataGone(
                        f"{self.paths[shard]}: the data cannot be reached any more ({error.strerror}, for {self.patience:g} s); "
                        "run the same command when they are back"
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _reopened(self, shard: int) -> Records:
        os.stat(self.paths[shard])  # raises what `_waited` waits for, where `read_index` says that no run can start
        records = read_index(self.paths[shard])
        if _checksum(records) != self._checksums[shard]:
            raise ShardChanged(self._changed(shard))
        return records

    def _changed(self, shard: int) -> str:
        return (
            f"{self.paths[shard]}: is another file than when the run started (replaced, cut or written to); "
            "put the old one back, or start a new run with the new data"
        )

    def _locate(self, sample: int) -> tuple[int, np.void]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        shard = bisect_right(self._starts, sample) - 1
        return shard, self._records[shard][sample - self._starts[shard]]

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            file = self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
            if os.fstat(file).st_size != self._seen[shard][0]:
                raise ShardChanged(self._changed(shard))
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Close what is open; the next read opens it again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if "_files" in self.__dict__:  # not set where the constructor raised
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": OrderedDict(), "_loaded": None}


def _checksum(records: Records) -> int:
    return zlib.crc32(records.tobytes())


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino
