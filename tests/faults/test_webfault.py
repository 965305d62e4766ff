"""Each way of misbehaving, seen by Python's own client."""

import gzip
import http.client
import socket

import pytest
from webfault import Fault, Plan, Server

BODY = bytes(range(256)) * 8
Answer = tuple[int, bytes, dict[str, str]]


def get(server: Server, path: str = "/x", read: bool = True, timeout: float = 5, **headers: str) -> Answer:
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    try:
        line.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = line.getresponse()
        return answer.status, answer.read() if read else b"", dict(answer.getheaders())
    finally:
        line.close()


@pytest.mark.parametrize(
    ("asked", "span"), [("bytes=0-0", (0, 1)), ("bytes=5-99", (5, 100)), ("bytes=2000-9999", (2000, 2048)), ("bytes=-7", (2041, 2048))]
)  # fmt: skip
def test_ranges_are_as_asked(asked: str, span: tuple[int, int]) -> None:
    with Server({"/x": Plan(BODY)}) as server:
        code, body, headers = get(server, Range=asked)
    assert (code, body) == (206, BODY[slice(*span)])
    assert headers["Content-Range"] == f"bytes {span[0]}-{span[1] - 1}/2048"


def test_whole_objects_strangers_and_ranges_outside() -> None:
    with Server({"/x": Plan(BODY)}) as server:
        assert get(server)[:2] == (200, BODY)
        assert get(server, "/x?sig=secret")[:2] == (200, BODY)
        assert get(server, "/y")[0] == 404
        assert get(server, Range="bytes=9999-")[0] == 416
        assert server.requests[-1][1]["Range"] == "bytes=9999-"


def test_the_nth_request_meets_the_nth_fault() -> None:
    faults = [Fault("status", code, {"Retry-After": "1"}) for code in (500, 503, 429, 404, 403)]
    with Server({"/x": Plan(BODY, faults), "/always": Plan(BODY, always=Fault("status", 500))}) as server:
        answers = [get(server) for _ in range(6)]
        assert [code for code, _, _ in answers] == [500, 503, 429, 404, 403, 200]
        assert answers[1][2]["Retry-After"] == "1"
        assert [get(server, "/always")[0] for _ in range(3)] == [500] * 3


def test_a_stall_is_broken_by_the_clients_own_deadline() -> None:
    with Server({"/x": Plan(BODY, [Fault("stall", 100)])}) as server:
        with pytest.raises(TimeoutError):
            get(server, timeout=0.2)
        assert get(server)[0] == 200


def test_short_bodies_and_lies() -> None:
    with Server({"/x": Plan(BODY, [Fault("short", 10), Fault("lying-length", 10), Fault("reset", 10)])}) as server:
        assert get(server)[:2] == (200, BODY[:10])  # nothing in HTTP tells: only a length or checksum that is known
        with pytest.raises(http.client.IncompleteRead):
            get(server)
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            get(server)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault("ignore-range"), (200, BODY)),
        (Fault("wrong-bytes"), (206, bytes(byte ^ 0xFF for byte in BODY[:4]))),
        (Fault("gzip"), (206, gzip.compress(BODY[:4]))),
        (Fault("redirect", "file:///etc/passwd"), (302, b"")),
    ],
)
def test_answers_that_are_not_what_was_asked(fault: Fault, expected: tuple[int, bytes]) -> None:
    with Server({"/x": Plan(BODY, [fault])}) as server:
        code, body, headers = get(server, Range="bytes=0-3")
        assert code == expected[0]
        if fault.kind == "gzip":
            assert (headers["Content-Encoding"], gzip.decompress(body)) == ("gzip", BODY[:4])
        else:
            assert body == expected[1]
        if fault.kind == "redirect":
            assert headers["Location"] == "file:///etc/passwd"
        assert get(server, Range="bytes=0-3")[:2] == (206, BODY[:4])


def test_a_changed_object_fails_if_match() -> None:
    with Server({"/x": Plan(BODY, [Fault("ok"), Fault("other-etag"), Fault("other-etag")])}) as server:
        etag = get(server)[2]["ETag"]
        assert get(server)[2]["ETag"] != etag
        assert get(server, If_Match=etag)[0] == 412
        assert get(server, If_Match=etag)[0] == 200


def test_connections_are_refused_for_a_while() -> None:
    with Server({"/x": Plan(BODY)}) as server:
        server.refuse()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", server.port), timeout=5):
            pass
        server.accept()
        assert get(server)[:2] == (200, BODY)
