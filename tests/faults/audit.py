"""An audit hook that notes what no data file may cause: unpickling, other processes, code, writes elsewhere, the network.

Hooks cannot be taken off again, so it belongs into a process of its own: `audit = Audit(allowed); audit.arm(); ...; audit.disarm()`.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import selfsight

PACKAGE = str(Path(selfsight.__file__).resolve().parent)
REPOSITORY = str(Path(PACKAGE).parents[1])
LOCAL = {"127.0.0.1", "::1", "localhost"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEVER = {
    "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
    "os.startfile", "ctypes.dlopen", "code.__new__", "urllib.Request", "ftplib.connect", "smtplib.connect", "telnetlib.Telnet.open",
}  # fmt: skip
_CODE = {"exec", "compile", "marshal.loads"}
_PATHS = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.chmod": 1, "os.truncate": 1}


class Audit:
    """Notes violations while it is armed.

    Args:
        folders: where files may be written.
        commands: tells whether a command line may be run.
    """

    def __init__(self, folders: Sequence[Path], commands: Callable[[list[str]], bool] = lambda words: False) -> None:
        self.folders = (*(os.path.realpath(folder) for folder in folders), "/dev/null")
        self.commands = commands
        self.armed = False
        self.violations: list[str] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        """What is violated within; the list is filled as it happens."""
        self.violations, self.armed = [], True
        found = self.violations
        try:
            yield found
        finally:
            self.armed = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        self.armed = False  # what is asked below must not be noted itself
        try:
            if told := self._violation(event, arguments):
                self.violations.append(f"{event}: {told[:200]}")
        finally:
            self.armed = True

    def _violation(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event in _NEVER:
            return None if event == "ctypes.dlopen" and arguments[0] is None else repr(arguments)
        if event in _CODE:
            return repr(arguments)[:80] if _ours(sys._getframe(3).f_code.co_filename) else None
        if event == "subprocess.Popen":
            words = [str(word) for word in ([arguments[1]] if isinstance(arguments[1], str) else arguments[1])]
            return None if self.commands(words) else " ".join(words)
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(mode, str) and any(letter in mode for letter in "wax+") or bool((flags or 0) & _WRITES)
            return self._outside([path]) if writes else None
        if event in _PATHS:
            return self._outside(list(arguments[: _PATHS[event]]))
        if event in {"socket.connect", "socket.sendto"}:
            address = arguments[1]
            return None if isinstance(address, tuple) and address[0] in LOCAL else repr(address)
        if event == "socket.getaddrinfo":
            return None if arguments[0] in {*LOCAL, None, ""} else repr(arguments[0])
        return None

    def _outside(self, paths: list[Any]) -> str | None:
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                real = os.path.realpath(os.fsdecode(path))
                if not any(real == folder or real.startswith(folder + os.sep) for folder in self.folders):
                    return real
        return None


def _ours(file: str) -> bool:
    return file.startswith((PACKAGE, *(os.path.join(REPOSITORY, part, "") for part in ("data", "eval"))))


def provoke(audit: Audit, folder: Path, outside: Path) -> dict[str, list[str]]:
    """One deed of each kind, with what was noted: the proof that the hook fires. Nothing harmful is done."""
    import pickle
    import socket
    import subprocess

    def connect() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as line:
            line.settimeout(0.01)
            line.connect(("192.0.2.1", 9))  # a documentation address (RFC 5737)

    def child() -> None:
        os._exit(0) if (pid := os.fork()) == 0 else os.waitpid(pid, 0)

    def code_of_ours() -> None:
        made = compile("exec(compile('1', 'x', 'exec'))", os.path.join(PACKAGE, "forged.py"), "exec")
        exec(made, {})

    deeds: dict[str, Callable[[], Any]] = {
        "pickle.find_class": lambda: pickle.loads(b"cos\ngetcwd\n."),  # noqa: S301 - the negative control
        "os.system": lambda: os.system("true"),  # noqa: S605
        "os.exec": lambda: os.execv("/nowhere/at-all", ["x"]),
        "os.posix_spawn": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
        "os.fork": child,
        "subprocess.Popen": lambda: subprocess.run(["true"], timeout=10),
        "exec": code_of_ours,
        "open": lambda: (outside / "x").write_text("x"),
        "os.mkdir": lambda: (outside / "y").mkdir(),
        "os.rename": lambda: (folder / "z").rename(outside / "z"),
        "os.remove": lambda: (outside / "x").unlink(),
        "socket.connect": connect,
        "socket.getaddrinfo": lambda: socket.getaddrinfo("selfsight.invalid", 80),
    }
    noted = {}
    for kind, deed in deeds.items():
        with audit.watching() as found:
            try:
                deed()
            except (OSError, pickle.UnpicklingError):
                pass  # it was noted before it failed
        noted[kind] = list(found)
    return noted
