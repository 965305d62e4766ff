"""The run folder: one living owner, one recipe, and files that a restart does not damage."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from selfsight.errors import StorageError, UsageError

LOCK = "run.lock"
OWNER = "run.owner"  # the lock where the file system has none
PROBE = 2**16  # bytes that a run folder must have room for at the start
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
STOPPED = "stopped"  # stands in the folder of a run that was asked to stop and is to go on


class RunLock:
    """Holds a run folder for this process, as long as it lives: the kernel lets go when it dies, however it dies.

    Where the file system knows no locks (some clusters' do not), the file itself is the lock, and is taken over only
    from an owner that is provably dead: of this machine, and gone or from before the last start of it.

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
            os.pwrite(self.handle, json.dumps(this_process()).encode(), 0)
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
            self._refuse(_owner_in(os.pread(self.handle, 4096, 0)))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return self._acquire_without_locks()
        try:
            return os.fstat(self.handle).st_ino == self.path.stat().st_ino
        except FileNotFoundError:
            return False

    def _acquire_without_locks(self) -> bool:
        """Make a file of our own appear under the owner's name, which only one can."""
        os.close(self.handle)
        self.path.unlink(missing_ok=True)
        mine = self.path.with_name(f"{OWNER}.{socket.gethostname()}-{os.getpid()}")
        self.path = self.path.with_name(OWNER)
        self.handle = os.open(mine, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
        os.pwrite(self.handle, json.dumps(this_process()).encode(), 0)
        try:
            while not self._appear(mine):
                self._bury()
        finally:
            mine.unlink()
        return True

    def _appear(self, mine: Path) -> bool:
        try:
            os.link(mine, self.path)
        except FileExistsError:
            return False
        return True

    def _bury(self) -> None:
        """Take away the file of a dead owner; whoever is there instead refuses us."""
        aside = self.path.with_name(f"{OWNER}.dead-{socket.gethostname()}-{os.getpid()}")
        with suppress(FileNotFoundError):  # its owner has left, or somebody was faster
            if not is_dead(_owner_in(self.path.read_bytes())):
                self._refuse(_owner_in(self.path.read_bytes()))
            self.path.rename(aside)
            owner = _owner_in(aside.read_bytes())
            if not is_dead(owner):  # somebody was faster, and this is theirs
                os.link(aside, self.path)
            aside.unlink()
            if not is_dead(owner):
                self._refuse(owner)

    def _refuse(self, owner: dict[str, Any]) -> NoReturn:
        os.close(self.handle)
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        raise UsageError(f"{self.path.parent}: in use by {who}; wait for it, or choose another run_dir")


def _owner_in(body: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(body)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def this_process() -> dict[str, Any]:
    """What tells this process from every other: host, the host's start, number, and the process's own start."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid)}


def is_dead(owner: dict[str, Any]) -> bool:
    """Whether a process that `this_process` described is provably gone; one of another host never is."""
    if owner.get("host") != socket.gethostname():
        return False
    if owner.get("boot") != _boot():
        return True
    pid = owner.get("pid")
    return not isinstance(pid, int) or _started(pid) != owner.get("started")


def _boot() -> str:
    """The kernel's number of this start of the machine; empty where it has none."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty if there is none of this number, "?" where nobody knows."""
    if not Path("/proc/self/stat").exists():
        return "?"
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def remove_if_empty(folder: Path) -> None:
    """Remove a folder, unless something lies in it."""
    with suppress(OSError):
        folder.rmdir()


def require_writable(folder: Path) -> None:
    """Raise StorageError if the folder cannot be made or a file in it be written: before data and models are loaded."""
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(PROBE))
        sync(probe)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            probe.unlink()


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
    return [value for value in _parsed(path) if value is not None]


def damaged_lines(path: Path) -> int:
    """How many lines of a JSON-lines file `read_lines` leaves out."""
    return sum(value is None for value in _parsed(path))


def _parsed(path: Path) -> Iterator[dict[str, Any] | None]:
    for line in path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        yield value if isinstance(value, dict) else None


def cut_lines_after(path: Path, step: int) -> None:
    """Drop the metrics of steps after a checkpoint: they will be made again."""
    if path.exists():
        kept = [line for line in read_lines(path) if isinstance(line.get("step"), int) and line["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names at which two trees differ, each told with both values."""
    told: dict[str, str] = {}
    for key in sorted({*old, *new}):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            told |= differences(before, after, f"{name}.")
        elif before != after:
            told[name] = f"{name} (was {before!r}, is {after!r})"
    return told
