"""The run folder: one living owner, one recipe, and files that a restart does not damage."""

import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from selfsight.errors import StorageError, UsageError

LOCK = "run.lock"
STOPPED = "stopped"  # stands in the folder of a run that was asked to stop and is to go on


class RunLock:
    """Holds a run folder for this process, as long as it lives: the kernel lets go when it dies, however it dies.

    Raises:
        UsageError: another living process holds the folder.
        StorageError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.handle = -1

    def __enter__(self) -> "RunLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._acquire():
                os.close(self.handle)
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        except OSError as error:
            raise StorageError(f"{self.path.parent}: cannot be written ({error.strerror})") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.handle)

    def _acquire(self) -> bool:
        """Lock the file; False if its last owner removed it in between, so that it has to be made again."""
        self.handle = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self.handle, 4096, 0).decode("utf-8", "replace")
            os.close(self.handle)
            raise UsageError(
                f"{self.path.parent}: in use by another process {owner}; wait for it, or choose another run_dir"
            ) from None
        try:
            return os.fstat(self.handle).st_ino == self.path.stat().st_ino
        except FileNotFoundError:
            return False


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader or a crash sees the old or the new text.

    Raises:
        StorageError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text)
        sync(draft)
        draft.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


def sync(path: Path) -> None:
    """Have a file or folder reach the disk; one that does not exist has nothing to lose."""
    if not path.exists():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; lines that a crash cut off or damaged are left out."""
    found = []
    for line in path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def cut_lines_after(path: Path, step: int) -> None:
    """Drop the metrics of steps after a checkpoint: they will be made again."""
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names at which two trees differ, with both values."""
    told = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            told += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            told.append(f"{prefix}{key} (was {before!r}, is {after!r})")
    return told
