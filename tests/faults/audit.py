"""An audit hook that notes what no data file may cause: unpickling, other processes, code, writes elsewhere, the network.

Hooks cannot be taken off again, so that it belongs into a process of its own. As a script, `python audit.py FOLDER`, it watches itself
misbehave (the proof that the hook fires), then a run and its resume, every kind of reading, and the whole corpus; it prints one object.
"""

import contextlib
import ctypes
import io
import json
import os
import pickle
import resource
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import selfsight

PACKAGE = str(Path(selfsight.__file__).resolve().parent)
REPOSITORY = str(Path(PACKAGE).parents[1])
LOCAL = {"127.0.0.1", "::1", "localhost"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEVER = {
    "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "ctypes.dlopen", "urllib.Request",
}  # fmt: skip
_CODE = {"exec", "compile", "marshal.loads"}
_PATHS = {
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.chmod": 1,
    "os.truncate": 1,
}


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

    @contextlib.contextmanager
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
            return None if event == "ctypes.dlopen" and _is_loaded(arguments[0]) else repr(arguments)
        if event in _CODE:
            return repr(arguments)[:80] if _ours(sys._getframe(2).f_code.co_filename) else None
        if event == "subprocess.Popen":
            words = [str(word) for word in ([arguments[1]] if isinstance(arguments[1], str) else arguments[1])]
            return None if self.commands(words) else " ".join(words)
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and any(letter in mode for letter in "wax+")) or bool(
                (flags or 0) & _WRITES
            )
            return self._outside([path]) if writes else None
        if event in _PATHS:
            paths = [os.fsdecode(path) for path in arguments[: _PATHS[event]] if not isinstance(path, int)]
            if (
                event in {"os.remove", "os.rmdir"} and arguments[1] >= 0
            ):  # shutil.rmtree names them by their folder's handle
                paths = [os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path) for path in paths]
            return self._outside(paths)
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


def _is_loaded(library: str | None) -> bool:
    """Whether this process has a library's code already: threadpoolctl asks for its own again to set their threads."""
    return library is None or any(line.endswith(f" {library}\n") for line in open("/proc/self/maps"))


def _ours(file: str) -> bool:
    return file.startswith((PACKAGE, *(os.path.join(REPOSITORY, part, "") for part in ("data", "eval"))))


def provoke(audit: Audit, folder: Path, outside: Path) -> dict[str, list[str]]:
    """One deed of each kind, with what was noted: the proof that the hook fires. Nothing harmful is done."""

    def connect() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as line:
            line.settimeout(0.01)
            line.connect(("192.0.2.1", 9))  # a documentation address (RFC 5737)

    def child() -> None:
        os._exit(0) if (pid := os.fork()) == 0 else os.waitpid(pid, 0)

    def terminal() -> None:
        pid, handle = os.forkpty()
        if pid == 0:
            os._exit(0)
        os.close(handle)
        os.waitpid(pid, 0)

    def as_ours(text: str) -> Callable[[], None]:
        made = compile(text, os.path.join(PACKAGE, "forged.py"), "exec")
        return lambda: exec(made, {})

    deeds: dict[str, Callable[[], Any]] = {
        "pickle.find_class": lambda: pickle.loads(b"cos\ngetcwd\n."),  # noqa: S301 - the negative control
        "os.system": lambda: os.system("true"),  # noqa: S605
        "os.exec": lambda: os.execv("/nowhere/at-all", ["x"]),
        "os.posix_spawn": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
        "os.fork": child,
        "subprocess.Popen": lambda: subprocess.run(["true"], timeout=10),
        "exec": as_ours("exec('1')"),
        "compile": as_ours("compile('1', 'x', 'exec')"),
        "marshal.loads": as_ours("import marshal; marshal.loads(b'N')"),
        "os.forkpty": terminal,
        "ctypes.dlopen": lambda: ctypes.CDLL("libnowhere.so"),
        "urllib.Request": lambda: urllib.request.urlopen("http://127.0.0.1:9/", timeout=5),
        "open": lambda: (outside / "x").write_text("x"),
        "os.mkdir": lambda: (outside / "y").mkdir(),
        "os.chmod": lambda: (outside / "x").chmod(0o600),
        "os.truncate": lambda: os.truncate(outside / "x", 0),
        "os.link": lambda: os.link(outside / "x", outside / "l"),
        "os.symlink": lambda: (outside / "s").symlink_to("x"),
        "os.rmdir": lambda: (outside / "y").rmdir(),
        "os.rename": lambda: (folder / "z").rename(outside / "z"),
        "os.remove": lambda: (outside / "x").unlink(),
        "socket.connect": connect,
        "socket.getaddrinfo": lambda: socket.getaddrinfo("selfsight.invalid", 80),
    }
    noted = {}
    for kind, deed in deeds.items():
        # It is noted before it fails.
        with audit.watching() as found, contextlib.suppress(OSError, pickle.UnpicklingError):
            deed()
        noted[kind] = list(found)
    return noted


def allowed(words: list[str]) -> bool:
    """The two processes that the product starts by itself: timm's look at an export, and the reader of foreign weights."""
    from selfsight.exports.export import _CLEAN
    from selfsight.import_weights import _READER

    isolated = words[:2] == [sys.executable, "-I"]
    return isolated and (words[2:4] == ["-c", _CLEAN] or words[2:3] == [str(_READER)])


SECRET = "hunter2"


def use(folder: Path) -> list[str]:
    """A run, its resume, and a reading of everything that it left; the answer is what showed the secret in its folder's name."""
    from selfsight import checkpoint
    from selfsight.loading import load_encoder
    from selfsight.weights import load_weights

    run = folder / f"run-token={SECRET}"
    fields = {
        "run_dir": run, "encoder.width": 16, "encoder.depth": 1, "encoder.heads": 2, "objective.decoder_width": 16, "train.epochs": "null",
        "train.steps": 4, "train.batch_size": 8, "train.save_every": 2, "train.workers": 0, "eval.train": "null", "eval.test": "null",
    }  # fmt: skip
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    told = _command("pretrain", "digits/mae", *words)
    (run / "scores.json").unlink()
    (run / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"damaged")
    told += _command("pretrain", "digits/mae", *words)
    checkpoint.load(run / "checkpoints" / "step-00000004")
    encoder = load_encoder(run / "encoder")
    load_weights(encoder, str(run / "encoder"), encoder.config.name)
    load_encoder(run / "checkpoints" / "step-00000004")
    _command("report", run)
    shown = {"messages": told, "report.html": (run / "report.html").read_text()}
    _command("shards", "build", "digits:test", folder / "digits")
    _command("shards", "index", folder / "digits")
    _command("shards", "check", folder / "digits")
    assert all("run-token=***" in text for text in shown.values())
    return [name for name, text in shown.items() if SECRET in text]


def _command(*words: Any) -> str:
    """What it said; fails where it fails."""
    from selfsight import cli

    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main([str(word) for word in words])
    if code:
        raise RuntimeError(f"{words[:3]}: exit code {code}: {told.getvalue()}")
    return told.getvalue()


def main(folder: Path) -> dict[str, Any]:
    """Everything that is watched, in one process."""
    import corpus

    from selfsight.exports import export

    for name in ("home", "outside"):
        (folder / name).mkdir()
    os.environ["SELFSIGHT_CACHE"] = str(folder / "home" / "cache")
    export.verify_export = lambda encoder, written: 0.0  # it has a test and a process of its own
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 4 * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    tempfile.tempdir = str(folder / "home")
    audit = Audit([folder / "home", Path(f"/proc/{os.getpid()}/clear_refs")], allowed)
    found: dict[str, Any] = {"provoked": provoke(audit, folder / "home", folder / "outside")}
    with audit.watching() as violations:
        found["leaks"] = use(folder / "home")
    found["in_use"] = violations
    written = folder / "home" / "corpus"
    attacks = corpus.attacks(written)  # pickling payloads is no violation, but need not be watched
    with audit.watching() as violations:
        found |= corpus.attack_all(written, attacks)
    return found | {"under_attack": violations}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
