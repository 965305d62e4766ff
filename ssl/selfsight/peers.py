"""Who of the ranks died, failed or went silent: a line to rank 0 from every other, beside the collectives.

A collective tells that somebody is gone (gloo) or nothing at all (NCCL, a frozen process). Here the kernel closes the
line of a process that ends, however it ends, and silence is measured on this machine's monotonic clock. Rank 0 passes on
what it learns, so that every rank can name the one that is lost.
"""

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from selfsight.errors import PeerLost, SelfsightError, Stopped
from selfsight.redact import redact

ADVICE = "; the last checkpoint is whole: start all ranks again, with the same command"
SAVER = "checkpoint"  # name of the thread that writes checkpoints
BEAT = 0.25  # seconds between signs of life
GRACE = 2.0  # seconds that a rank has to end by itself, once it knows, before it is ended
PARTING = 0.5  # seconds to wait for the other side to read the last words
HELLO = 20.0  # seconds that a rank may take for its first words, on a busy machine
LONG_NEWS = 5.0
NEWS = 1.0  # seconds to wait for the name, after a collective has failed


class Line:
    """JSON objects over a socket, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.left = connection, b""
        self.connection.settimeout(1.0)

    def send(self, message: dict[str, Any]) -> None:
        """Send one object; a line that is closed is found when it is read."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """The objects that have arrived; None if the other side is gone."""
        try:
            read = self.connection.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        *whole, self.left = (self.left + read).split(b"\n")
        try:
            return [dict(json.loads(line)) for line in whole] if read else None
        except (ValueError, TypeError):  # no rank speaks so
            return None

    def first(self, seconds: float) -> dict[str, Any]:
        """The first object that arrives within so many seconds; empty if none does."""
        end = time.monotonic() + seconds
        found: list[dict[str, Any]] | None = []
        while found == [] and time.monotonic() < end:
            found = self.receive()
        return found[0] if found else {}

    def close(self) -> None:
        """Close it when the other side has read everything: one that is closed with words unread loses those it sent, too."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(PARTING)
            while self.connection.recv(65536):
                pass
        except OSError:  # it is gone already, or takes too long
            pass
        self.connection.close()


def _server(host: str, backlog: int) -> socket.socket:
    """Listens on a free port: of this machine alone if all ranks are here, else of every address that others may know it by."""
    if host in {"127.0.0.1", "localhost"}:
        return socket.create_server(("127.0.0.1", 0), backlog=backlog)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


class Peers:
    """While it is entered, watches the other ranks. On one rank it does nothing.

    Args:
        timeout: seconds of silence after which a rank counts as frozen.
    """

    def __init__(self, accelerator: Accelerator, timeout: float) -> None:
        self.accelerator, self.timeout = accelerator, timeout
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.step, self.doing = 0, "starting"
        self.lost = ""
        self.known = threading.Event()  # somebody is lost
        self.over = threading.Event()
        self.lines: dict[int, Line] = {}
        self.heard: dict[int, float] = {}
        self.at: dict[int, tuple[int, str]] = {}

    def __enter__(self) -> "Peers":
        if self.world > 1:
            self._connect()
            self.thread = threading.Thread(target=self._watch, name="peers", daemon=True)
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = error is not None and not isinstance(error, PeerLost | Stopped)
        told = error.told if isinstance(error, SelfsightError) else str(error)
        self.leave({"failed": (told or repr(error)).splitlines()[0]} if failed else None)

    def leave(self, last: dict[str, Any] | None = None) -> None:
        """Stop watching, and tell the others that this rank has done its part, or why not."""
        if self.world == 1 or self.over.is_set():
            return
        self.over.set()
        self.thread.join()
        for line in self.lines.values():
            line.send(last or {"done": True})
        for line in self.lines.values():
            line.close()

    def now(self, step: int, doing: str) -> None:
        """What this rank is at, for the others to read if it goes silent."""
        self.step, self.doing = step, doing

    def who(self, error: RuntimeError) -> str:
        """Which rank is lost, asked after a failure that may be a collective's; empty if none is."""
        if self.world == 1:
            return ""
        of_collective = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
        self.known.wait(LONG_NEWS if of_collective else NEWS)  # rank 0 passes it on, and may be busy
        lost = self.lost or (f"a collective failed ({str(error).splitlines()[0]})" if of_collective else "")
        return lost and lost + ADVICE

    def _connect(self) -> None:
        """Every rank with rank 0, whose port is made known by a collective, with a number that no stranger has."""
        told = torch.zeros(2, dtype=torch.long, device=self.accelerator.device)
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        server = None
        if self.rank == 0:
            server = _server(host, self.world)
            server.settimeout(self.timeout)
            told += torch.tensor([server.getsockname()[1], secrets.randbits(62)], device=told.device)
        torch.distributed.all_reduce(told)
        port, word = told.tolist()
        if server is None:
            try:
                self.lines[0] = Line(socket.create_connection((host, port), self.timeout))
            except OSError as error:
                raise PeerLost(f"rank {self.rank} cannot reach rank 0 at {host}:{port} ({error})") from None
            self.lines[0].send({"rank": self.rank, "word": word})
        else:
            with server:
                self._accept(server, word)
        self.heard = dict.fromkeys(self.lines, time.monotonic())

    def _accept(self, server: socket.socket, word: int) -> None:
        """A line from every other rank.

        Raises:
            PeerLost: one does not come.
        """
        while len(self.lines) < self.world - 1:
            try:
                line = Line(server.accept()[0])
            except TimeoutError:
                lacking = sorted({*range(1, self.world)} - {*self.lines})
                raise PeerLost(f"rank {', '.join(map(str, lacking))} did not come within {self.timeout:g} s") from None
            hello = line.first(HELLO)
            if hello.get("word") == word:
                self.lines[hello["rank"]] = line
            else:  # a stranger, on a network where ports are tried
                line.connection.close()

    def _watch(self) -> None:
        ready = selectors.DefaultSelector()
        for rank, line in self.lines.items():
            ready.register(line.connection, selectors.EVENT_READ, rank)
        beaten = time.monotonic()
        while not self.over.is_set() and not self.lost:
            for key, _ in ready.select(BEAT):
                self._listen(ready, key.data)
            now = time.monotonic()
            if now - beaten > self.timeout / 2:  # it was this process that was frozen, perhaps with all others
                self.heard = dict.fromkeys(self.heard, now)
            if now - beaten > BEAT:
                beaten = now
                self._beat()
                self._find_silent()
        ready.close()
        if self.lost:
            self._end()

    def _beat(self) -> None:
        for line in self.lines.values():
            line.send({"step": self.step, "doing": self.doing})

    def _listen(self, ready: selectors.BaseSelector, rank: int) -> None:
        messages = self.lines[rank].receive()
        if messages is None:
            self._lose(f"rank {rank} died{self._place(rank)}")
            return
        self.heard[rank] = time.monotonic()
        for message in messages:
            if "lost" in message:
                self._lose(message["lost"])
            elif "failed" in message:
                self._lose(f"rank {rank} failed{self._place(rank)}: {message['failed']}")
            elif "done" in message:
                ready.unregister(self.lines[rank].connection)
                self.lines.pop(rank).connection.close()
                del self.heard[rank]
            else:
                self.at[rank] = message["step"], message["doing"]

    def _find_silent(self) -> None:
        for rank, heard in list(self.heard.items()):
            if time.monotonic() - heard > self.timeout:
                self._lose(f"rank {rank} has been silent for {self.timeout:g} s (train.timeout){self._place(rank)}")

    def _place(self, rank: int) -> str:
        step, doing = self.at.get(rank, (0, "starting"))
        return f" (last heard of {doing}, after step {step:,})"

    def _lose(self, what: str) -> None:
        if self.lost:
            return
        self.lost = what
        for line in self.lines.values():
            line.send({"lost": self.lost})
        self.known.set()

    def _end(self) -> None:
        """A main thread that hangs in a collective would never hear of it. A checkpoint that is being written is finished."""
        if not self.over.wait(GRACE):
            for thread in threading.enumerate():
                if thread.name == SAVER:
                    thread.join()
            print(redact(f"selfsight: {self.lost}{ADVICE}"), file=sys.stderr, flush=True)
            os._exit(PeerLost.exit_code)
