"""What was read from remote shards, kept on a disk with a cap on its size.

Each state of a shard has one sparse file, in which what was read lies where it lies in the shard. Nothing says what is there:
a hole has not the checksum that the index knows, and neither has a torn write or a damaged block; so processes may be
killed, share files without agreement and meet full disks, and the worst is that something is read from the store again.

Blocks that are read together are needed by all workers for a while. Those that find no room there pass through files of their
own, a quarter of the whole, of which the oldest go.
"""

import errno
import fcntl
import os
import shutil
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from selfsight.console import say
from selfsight.data.index import cache_folder
from selfsight.errors import UsageError

DEFAULT = 20.0  # GB
RESERVE = 2 * 2**30  # bytes that stay free on the disk, on which checkpoints may lie, too
IN_USE = 3600.0  # seconds since the last use for which a file is nobody's to delete
TOUCH = IN_USE / 6
COUNT_EVERY = 2**26  # bytes that a process writes between two looks at what there is
OPEN_FILES = 128
OTHERS_TIME = 10.0  # seconds to wait for another process that reads the same


def disk_cache() -> "DiskCache | None":
    """The cache below the cache folder, `$SELFSIGHT_CACHE_GB` large; None for 0."""
    text = os.environ.get("SELFSIGHT_CACHE_GB", str(DEFAULT))
    try:
        most = float(text)
    except ValueError:
        most = -1.0
    if not 0 <= most < float("inf"):
        raise UsageError(f"SELFSIGHT_CACHE_GB: {text!r} is no number of gigabytes (0: no cache)")
    return DiskCache(cache_folder() / "blocks", int(most * 1e9)) if most else None


class Passing:
    """Blocks by key and start, of which those that were written first go first."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most

    def get(self, key: str, start: int, offset: int, size: int, crc: int) -> bytes | None:
        """The bytes at `offset` of the object, if the block that starts at `start` is there, and they are whole."""
        try:
            with (self.folder / f"{key}@{start}").open("rb", buffering=0) as file:
                body = os.pread(file.fileno(), size, offset - start)
        except OSError:
            return None
        return body if len(body) == size and zlib.crc32(body) == crc else None

    def put(self, key: str, start: int, block: bytes) -> None:
        """Keep a block for a while."""
        if len(block) > self.most or shutil.disk_usage(self.folder).free < RESERVE + len(block):
            return
        (self.folder / f"{key}@{start}").write_bytes(block)
        found = [(status.st_mtime, status.st_size, path) for path, status in _files_in(self.folder)]
        used = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if used <= self.most:
                break
            Path(path).unlink(missing_ok=True)
            used -= size


def _files_in(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Files with their status; without those that another process deletes at this moment."""
    found = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            if entry.is_file():
                found.append((entry.path, entry.stat()))
    return found


class DiskCache:
    """Parts of objects by key and offset.

    When it is full, files that nobody has used for an hour go, the least recently used first. What is in use stays, and
    nothing is added: an order in which each sample comes once an epoch never profits from the newest instead of the oldest.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most * 3 // 4
        self._passing = Passing(folder / "passing", most // 4)
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.RLock()  # no thread may write to a file that another one closes
        self._room = 0
        """Bytes that may be written before the next count."""
        self._full = self._broken = self._closed = False
        self._touched = time.monotonic()
        self._counted = float("-inf")

    def get(self, key: str, offset: int, size: int, crc: int, block: int | None = None) -> bytes | None:
        """The bytes, if they are there and whole. `block`: where the block starts that they may have come with."""
        with self._lock:
            try:
                body = os.pread(self._file(key), size, offset)
            except OSError:
                self._shut(key)
                return None
        if len(body) == size and zlib.crc32(body) == crc:
            return body
        return None if block is None else self._passing.get(key, block, offset, size, crc)

    def put(self, key: str, offset: int, body: bytes, block: bool = False) -> None:
        """Keep what was read, if there is room; a block at least for a while."""
        with self._lock:
            if self._broken or self._closed:
                return
            try:
                if self._fits(len(body)):
                    os.pwrite(self._file(key), body, offset)
                elif block:
                    self._passing.folder.mkdir(parents=True, exist_ok=True)
                    self._passing.put(key, offset, body)
            except OSError as error:
                self._broken = True
                self._shut(*self._files)
                say(
                    f"{self.folder}: cannot be written ({error.strerror}); reading goes on without keeping what was read"
                )

    @contextmanager
    def alone(self, key: str, offset: int, size: int) -> Iterator[None]:
        """Keep other processes from reading the same part at the same time; those that are dead or too slow are not waited for."""
        end, file = time.monotonic() + OTHERS_TIME, None
        while file is None and time.monotonic() < end:
            try:
                with self._lock:
                    fcntl.lockf(self._file(key), fcntl.LOCK_EX | fcntl.LOCK_NB, size, offset)
                    file = self._files[key]
            except (BlockingIOError, PermissionError):
                time.sleep(0.01)
            except OSError:  # a file system without locks, or closed meanwhile
                break
        try:
            yield
        finally:
            with self._lock:
                if file is not None and self._files.get(key) == file:  # closing it has unlocked it
                    fcntl.lockf(file, fcntl.LOCK_UN, size, offset)

    def close(self) -> None:
        """Close the files for good: requests that are still on their way find nothing here and keep nothing."""
        with self._lock:
            self._closed = True
            self._shut(*self._files)

    def _shut(self, *keys: str) -> None:
        """Close files; the next use opens them again."""
        for key in keys:
            if (file := self._files.pop(key, None)) is not None:
                os.close(file)

    def _file(self, key: str) -> int:
        if self._closed:
            raise OSError(errno.EBADF, "closed")
        self._touch()
        if key not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._shut(next(iter(self._files)))
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[key] = os.open(self.folder / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.utime(self._files[key])
        self._files.move_to_end(key)
        return self._files[key]

    def _touch(self) -> None:
        """Say of what is open that it is in use; what was deleted meanwhile would take room that nobody sees."""
        if time.monotonic() - self._touched < TOUCH:
            return
        self._touched = time.monotonic()
        for key, file in list(self._files.items()):
            if os.fstat(file).st_nlink:
                os.utime(file)
            else:
                self._shut(key)

    def _fits(self, size: int) -> bool:
        if self._room < size and (not self._full or time.monotonic() - self._counted > TOUCH):
            self._count()
        self._room -= size
        return self._room >= 0

    def _count(self) -> None:
        """See how much there is, and delete what is too much."""
        self._counted = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = [(status.st_mtime, 512 * status.st_blocks, path) for path, status in _files_in(self.folder)]
            free = shutil.disk_usage(self.folder).free
        except OSError:  # the disk is away
            self._full, self._room = True, 0
            return
        used, too_old = sum(size for _, size, _ in found), time.time() - IN_USE
        for when, size, path in sorted(found):
            if (used + COUNT_EVERY > self.most or free < RESERVE) and when < too_old:
                Path(path).unlink(missing_ok=True)
                used, free = used - size, free + size
        self._room = min(COUNT_EVERY, self.most - used, free - RESERVE)
        self._full = self._room < COUNT_EVERY // 8
