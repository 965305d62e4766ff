"""A web server on 127.0.0.1 that misbehaves as it is told: `Server({"/x.tar": Plan(body, [Fault("status", 503)])})`.

The n-th request for a path meets the n-th fault of its plan; after the last, the answers are right: whole, or the Range asked for.
"""

import gzip
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal

Behaviour = Literal[
    "ok", "stall", "status", "short", "lying-length", "reset", "ignore-range", "wrong-bytes", "other-etag", "redirect", "gzip"
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What one answer does.

    Args:
        value: of stall, short, lying-length, reset: after how many bytes; of status: the code; of redirect: where to.
        headers: sent beside the others, such as Retry-After.
    """

    kind: Behaviour
    value: Any = 0
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Plan:
    """An object and the faults that its first requests meet."""

    body: bytes
    faults: Sequence[Fault] = ()
    etag: str = '"one"'
    always: Fault = Fault("ok")
    """What meets every request after the faults."""


class Server:
    """Serves plans, in a thread each request, from a free port until it is left; `requests` keeps what was asked.

    Args:
        latency: seconds before each answer.
    """

    def __init__(self, plans: Mapping[str, Plan], latency: float = 0.0) -> None:
        self.latency = latency
        self.plans, self.attempts, self.lock = plans, Counter[str](), threading.Lock()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.stopping = threading.Event()
        self.port = 0
        self._start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()  # lets go of what stalls
        self.refuse()

    @property
    def address(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self.port}"

    def refuse(self) -> None:
        """Connections are refused from now on, until `accept`, and open ones are cut; the port stays the same."""
        if self._serving is not None:
            self._serving.shutdown()
            self._serving.server_close()
            self._serving = None

    @property
    def away(self) -> bool:
        """Whether connections are refused."""
        return self._serving is None

    def accept(self) -> None:
        """Listen again."""
        if self._serving is None:
            self._start()

    def fault(self, path: str, headers: Mapping[str, str]) -> tuple[Plan | None, Fault]:
        """The plan of a path and what this request meets; called once a request."""
        self.stopping.wait(self.latency)
        with self.lock:
            self.requests.append((path, dict(headers)))
            plan = self.plans.get(path)
            if plan is None:
                return None, Fault("status", 404)
            attempt = self.attempts[path]
            self.attempts[path] += 1
        return plan, plan.faults[attempt] if attempt < len(plan.faults) else plan.always

    def _start(self) -> None:
        server = self

        class Handler(_Handler):
            web = server

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads, block_on_close, allow_reuse_address = True, False, True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that went away is no news."""

        self._serving: Listener | None = Listener(("127.0.0.1", self.port), Handler)
        self.port = self._serving.server_address[1]
        threading.Thread(target=self._serving.serve_forever, args=(0.02,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a kept connection would wait 40 ms for every body
    web: Server

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        if self.web.away:
            self.close_connection = True
            return
        plan, fault = self.web.fault(self.path.partition("?")[0], self.headers)
        if plan is None or fault.kind == "status":
            code = fault.value
            self._head(code, {"Content-Length": "0", **fault.headers})
        elif fault.kind == "redirect":
            self._head(302, {"Content-Length": "0", "Location": str(fault.value), **fault.headers})
        elif self.headers.get("If-Match", plan.etag) != self._etag(plan, fault):
            self._head(412, {"Content-Length": "0", "ETag": self._etag(plan, fault)})
        else:
            self._answer(plan, fault)

    do_HEAD = do_GET

    def do_CONNECT(self) -> None:
        """As a proxy that lets nobody through."""
        self.web.fault(self.path, self.headers)
        self._head(407, {"Content-Length": "0"})

    def _answer(self, plan: Plan, fault: Fault) -> None:
        whole = bytes(byte ^ 0xFF for byte in plan.body) if fault.kind == "wrong-bytes" else plan.body
        span = None if fault.kind == "ignore-range" else _range(self.headers.get("Range"), len(whole))
        headers = {"ETag": self._etag(plan, fault), "Accept-Ranges": "bytes", **fault.headers}
        code, body = 200, whole
        if span is not None:
            code, body = 206, whole[span[0] : span[1]]
            headers["Content-Range"] = f"bytes {span[0]}-{span[1] - 1}/{len(whole)}"
            if not body:
                self._head(416, {"Content-Length": "0", "Content-Range": f"bytes */{len(whole)}"})
                return
        if fault.kind == "gzip":
            body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
        # `short` says what it sends: less than was asked for. `lying-length` breaks its word.
        sent = body[: fault.value] if fault.kind in {"stall", "short", "lying-length", "reset"} else body
        headers["Content-Length"] = str(len(sent if fault.kind == "short" else body))
        self._head(code, headers)
        if self.command == "HEAD":
            return
        self.wfile.write(sent)
        self.wfile.flush()
        if fault.kind == "stall":
            self.web.stopping.wait()
        if fault.kind == "reset":
            with suppress(OSError):  # lingering for no time sends RST in place of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        if fault.kind in {"stall", "lying-length", "reset"}:
            self.close_connection = True

    def _etag(self, plan: Plan, fault: Fault) -> str:
        return '"other"' if fault.kind == "other-etag" else plan.etag

    def _head(self, code: int, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """`bytes=2-5` as (2, 6), `bytes=2-` to the end, `bytes=-3` the last three; None for none, or for another kind."""
    unit, _, text = (header or "").partition("=")
    first, dash, last = text.partition("-")
    if unit != "bytes" or not dash or not (first + last).isdigit():
        return None
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size
