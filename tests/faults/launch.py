"""Runs of W ranks that can be killed: one process imports torch, every rank is a fork of it and starts in a moment.

with Launcher(folder) as launcher:
    job = launcher.start(["pretrain", "digits/mae", "--run_dir", "..."], world=2, faults="learn kill rank=1 step=3")
    assert job.wait(30) == [76, -9]
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Job:
    """The ranks of one run."""

    launcher: "Launcher"
    pids: list[int]
    logs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        running = [pid for pid in self.pids if pid not in self.codes]
        if running:
            self.codes |= {int(pid): code for pid, code in self.launcher.ask({"reap": running}).items()}
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float, but: Sequence[int] = ()) -> list[int]:
        """Exit codes (negative: a signal) by rank; ranks in `but` are then killed, however they stand.

        Raises:
            TimeoutError: a rank still runs after so many seconds; all are ended then.
        """
        end = time.monotonic() + seconds
        while not (self.poll() or all(pid in self.codes for r, pid in enumerate(self.pids) if r not in but)):
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"not over after {seconds:g} s:\n{self.told()}")
            time.sleep(0.01)
        if but:
            for rank in but:
                self.signal(rank, signal.SIGKILL)
            return self.wait(10)
        return [self.codes[pid] for pid in self.pids]

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank, if it still runs."""
        self.poll()
        if self.pids[rank] not in self.codes:
            os.kill(self.pids[rank], number)

    def kill(self) -> list[int]:
        """SIGKILL to every rank that still runs; the exit codes."""
        for rank in range(len(self.pids)):
            self.signal(rank, signal.SIGKILL)
        return self.wait(10)

    def told(self, rank: int | None = None) -> str:
        """What a rank (or all of them) has printed."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())


class Launcher:
    """The process that forks ranks.

    Args:
        folder: for the ranks' output.
        checked_export: let each run look at its export in a clean process, which takes seconds.
    """

    def __init__(self, folder: Path, checked_export: bool = False) -> None:
        self.folder, self.checked_export, self.count = folder, checked_export, 0

    def __enter__(self) -> "Launcher":
        self.server = subprocess.Popen(
            [sys.executable, __file__, "checked" if self.checked_export else "unchecked"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()  # it ends its ranks, then itself
        self.server.wait(20)
        self.server.stdout.close()

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request to the server; its answer."""
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(
        self,
        arguments: Sequence[object],
        world: int = 1,
        faults: str = "",
        environment: Mapping[str, str] | None = None,
        own: Mapping[int, Sequence[object]] | None = None,
    ) -> Job:
        """Start `selfsight ARGUMENTS` on so many ranks.

        Args:
            faults: for SELFSIGHT_FAULTS of all ranks.
            own: more arguments for some of the ranks.
        """
        self.count += 1
        shared = {"SELFSIGHT_FAULTS": faults, "SELFSIGHT_LEDGER": "1"}
        if world > 1:
            shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= environment or {}
        logs = [self.folder / f"job-{self.count}-rank-{rank}.log" for rank in range(world)]
        ranks = [
            {
                "arguments": [*map(str, arguments), *map(str, (own or {}).get(rank, ()))],
                "environment": shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}),
                "log": str(logs[rank]),
            }
            for rank in range(world)
        ]
        return Job(self, self.ask({"start": ranks}), logs)


def words(fields: Mapping[str, Any]) -> list[str]:
    """Recipe fields as command-line words."""
    return [word for key, value in fields.items() for word in (f"--{key}", "null" if value is None else str(value))]


def serve(checked: bool) -> None:
    """Fork ranks and reap them, as standard input asks."""
    import torch

    torch.set_num_threads(1)  # before the first operation: a fork does not copy threads
    import selfsight.train  # noqa: F401 - and with it what every rank needs, imported once for all
    from selfsight import finish
    from selfsight.exports import export

    if not checked:
        export.verify_export = lambda encoder, folder: 0.0
        finish.write_report = _bare_report
    pids: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            started = [_fork(rank) for rank in request["start"]]
            pids |= set(started)
            answer: Any = started
        else:
            answer = {}
            for pid in request["reap"]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    pids.discard(pid)
                    answer[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps(answer), flush=True)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _bare_report(parts: Any, found: Any, device: Any) -> Path:
    """A page without pictures and maps, which take seconds that tell nothing of faults."""
    page: Path = parts.recipe.run_dir / "report.html"
    page.write_text("<html></html>")
    return page


def _fork(rank: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        log = os.open(rank["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(rank["environment"])
        from selfsight import cli, faults

        faults.load_faults()
        code = cli.main(rank["arguments"])
        for thread in threading.enumerate():  # as an interpreter does at its end
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
    except BaseException:  # noqa: BLE001 - whatever it is, it is shown, and the rank fails
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1] == "checked")
