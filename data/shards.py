"""A set of shards as one sequence of samples, read by index: `Shards("data/train-{000..009}.tar").read(123)`."""

import glob
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from selfsight.data import digits
from selfsight.data.index import IMAGE_SUFFIXES, read_index
from selfsight.errors import DataError, UsageError

OPEN_FILES = 128  # per process, well under the usual limit of 1,024
MOST_SHARDS, MOST_LETTERS = 1_000_000, 4096


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
    """N samples in tars, by number. Cheap to send to a worker: files are opened by the process that reads them."""

    def __init__(self, spec: str | Sequence[str]) -> None:
        self.paths = find_shards(spec)
        self.spec = spec if isinstance(spec, str) else " ".join(spec)
        self._records = [read_index(path) for path in self.paths]
        self._starts = np.cumsum([0, *map(len, self._records)])
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def labels(self) -> NDArray[np.int32]:
        """Label of every sample (N,), -1 where there is none."""
        return np.concatenate([records["label"] for records in self._records]).astype(np.int32)

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
        records, place = self._records[shard], sample - int(self._starts[shard])
        for other in (place + shift, place - shift):
            if 0 <= other < len(records) and records[other]["label"] == record["label"]:
                return int(self._starts[shard]) + other
        return sample

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages: `train-000003.tar@51200`."""
        shard, record = self._locate(sample)
        return f"{self.paths[shard].name}@{record['offset']}"

    def read(self, sample: int) -> bytes:
        """The encoded image of one sample, by one `pread`.

        Raises:
            DataError: a file that cannot be read, or bytes that are not those that were indexed.
        """
        shard, record = self._locate(sample)
        size, reason = int(record["size"]), ""
        for _ in range(2):  # a second read tells a passing fault from a lasting one
            try:
                body = os.pread(self._file(shard), size, int(record["offset"]))
            except OSError as error:
                reason = f"cannot be read ({error.strerror})"
                continue
            if zlib.crc32(body) == record["crc"]:
                return body
            reason = "the bytes are not those that were indexed (CRC)"
        raise DataError(f"{self.describe(sample)}: {reason}")

    def _locate(self, sample: int) -> tuple[int, np.void]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        shard = int(np.searchsorted(self._starts, sample, "right")) - 1
        return shard, self._records[shard][sample - self._starts[shard]]

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
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
        return self.__dict__ | {"_files": OrderedDict(), "_records": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._records = [read_index(path) for path in self.paths]
