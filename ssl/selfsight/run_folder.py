"""The run folder: one living owner, one recipe, and files that a restart does not damage."""

import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from selfsight.errors import StorageError, UsageError

LOCK = "run.lock"


class RunLock:
    """Holds a run folder for this process; a second living owner is refused, a dead one's lock is taken over.

    Raises:
        UsageError: a living process, or one on another machine, holds the folder.
        StorageError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "boot": _boot()}

    def __enter__(self) -> "RunLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._create():
                self._refuse_living()
                self.path.unlink(missing_ok=True)
                if not self._create():
                    raise UsageError(f"{self.path.parent}: another process has just taken this run")
        except OSError as error:
            raise StorageError(f"{self.path.parent}: cannot be written ({error.strerror})") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(self.me, file)
        return True

    def _refuse_living(self) -> None:
        try:
            owner = json.loads(self.path.read_text())
            host, pid = owner["host"], int(owner["pid"])
        except (ValueError, KeyError, TypeError):  # cut off by a full disk or a crash while it was written
            return
        if host != self.me["host"]:
            raise UsageError(
                f"{self.path.parent}: in use by process {pid} on {host}; if that is over, remove {self.path}"
            )
        if owner.get("boot") == self.me["boot"] and _started(pid) == owner.get("started") is not None:
            raise UsageError(f"{self.path.parent}: in use by process {pid}; wait for it, or choose another run_dir")


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot; tells a process from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
    try:  # no /proc (macOS): only whether it lives
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader or a crash sees the old or the new text.

    Raises:
        StorageError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text)
        draft.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def cut_lines_after(path: Path, step: int) -> None:
    """Drop the metrics of steps after a checkpoint: they will be made again."""
    if path.exists():
        whole = path.read_text().split("\n")[:-1]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        write_atomically(path, "".join(line + "\n" for line in kept))


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
