"""Shards on a web server that misbehaves in every way: what passes is ridden out, what lasts is one clear end."""

import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from conftest import pictures
from launch import Job
from webfault import Fault, Plan, Server

from selfsight import checkpoint, cli
from selfsight.data.build import write_shards
from selfsight.data.check import check
from selfsight.data.decode import BadSample
from selfsight.data.http_store import HttpStore, _retry_after, web_address
from selfsight.data.index import cache_folder, read_index
from selfsight.data.shards import ShardChanged, Shards
from selfsight.data.spec import find_shards
from selfsight.data.store import SCHEMES, Address, Away, Changed, Outage, Refused, patiently
from selfsight.errors import DataError, DataGone, UsageError

Start = Callable[..., Job]
LOGINS = ("Authorization", "Proxy-Authorization", "Host")
NAMES = ["small-000000.tar", "small-000001.tar", "small-000002.tar"]


def plans(folder: Path, index: bool = True) -> dict[str, Plan]:
    """The files of a folder, each with an ETag of its own."""
    files = [file for file in sorted(folder.iterdir()) if index or file.suffix != ".idx"]
    return {f"/{file.name}": Plan(file.read_bytes(), etag=f'"{file.name}"') for file in files}


def asked(server: Server, path: str) -> list[str]:
    """The ranges that were asked for."""
    return [headers.get("Range", "whole") for where, headers in server.requests if where == path]


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SELFSIGHT_CACHE_GB", "0")


@pytest.fixture
def server(small_shards: Path) -> Iterator[Server]:
    with Server(plans(small_shards)) as started:
        yield started


@pytest.fixture
def far(server: Server) -> Iterator[Shards]:
    """The shards of the server, whose next requests meet what `faults` says."""
    shards = Shards(f"{server.address}/small-{{000000..000002}}.tar?sig=hunter2")
    shards.patience = 5
    yield shards
    shards.close()


def faults(server: Server, *those: Fault, always: Fault | None = None, name: str = NAMES[0]) -> None:
    plan = server.plans[f"/{name}"]
    plan.faults, plan.always = those, always or Fault("ok")
    server.attempts[f"/{name}"] = 0


# -- where nothing is wrong


def test_shards_on_a_server_are_the_local_ones(far: Shards, server: Server, small_shards: Path) -> None:
    near = Shards(str(small_shards))
    assert (len(far), far.id, far.labels.tolist()) == (len(near), near.id, near.labels.tolist())
    assert [far.read(i) for i in range(120)] == [near.read(i) for i in range(120)]
    assert far.describe(77) == near.describe(77)
    again = pickle.loads(pickle.dumps(far))  # noqa: S301 - as a loader worker gets it
    far.prefetch(range(40, 60))
    again.prefetch(range(40, 60))
    assert again.read(50) == far.read(50) == near.read(50)
    assert again.neighbour(50, 2) == near.neighbour(50, 2)
    assert all(headers["Accept-Encoding"] == "identity" for _, headers in server.requests)
    assert server.requests[-1][1]["If-Match"].startswith('"small-00000')
    again.close()


def test_neighbours_are_one_request_and_are_not_asked_for_twice(far: Shards, server: Server) -> None:
    before = len(server.requests)
    far.prefetch(range(10, 60))
    far.prefetch(range(12, 50))
    assert len([far.read(i) for i in range(10, 60)]) == 50
    assert len(server.requests) - before == 2  # one for each of the two shards


def test_requests_are_in_flight_together(server: Server, far: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some wait for each other: an answer is given only when all of them have come."""
    monkeypatch.setattr("selfsight.data.remote.plan.__defaults__", (-(10**9), 1))
    together = threading.Barrier(16)
    real = server.fault
    monkeypatch.setattr(server, "fault", lambda *arguments: (together.wait(20), real(*arguments))[1])
    far.prefetch(range(16))
    assert [len(far.read(i)) > 0 for i in range(16)] == [True] * 16


def test_an_index_is_made_once_where_none_lies_beside(small_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    near = Shards(str(small_shards))
    with Server(plans(small_shards, index=False)) as server:
        spec = f"{server.address}/small-{{000000..000002}}.tar?sig=hunter2"
        assert Shards(spec).id == near.id
        assert re.search(
            r"http://127.0.0.1:\d+/small-000001.tar: no index beside it; reading it once", capsys.readouterr().err
        )
        before = len(server.requests)
        assert Shards(spec.replace("hunter2", "another")).id == near.id
        assert all(headers["Range"] == "bytes=0-0" for _, headers in server.requests[before:])
        assert capsys.readouterr().err == ""
        assert cli.main(["shards", "index", spec]) == 0
        told = capsys.readouterr()
        assert told.out == "120 samples in 3 shards indexed\n"
        assert "put beside the shard as small-000002.tar.idx" in told.err
        assert "hunter2" not in told.err
        server.plans["/small-000000.tar"].etag = '"new"'
        assert Shards(spec).id == near.id
        assert capsys.readouterr().err.count("no index beside it") == 1
    # Nothing of the copies is left.
    assert {path.suffix for path in cache_folder().rglob("*") if path.is_file()} == {".idx", ".lock"}


def test_an_index_beside_is_fetched_anew_when_it_changes(small_shards: Path, server: Server, tmp_path: Path) -> None:
    address = f"{server.address}/{NAMES[0]}"
    assert len(read_index(Address(address))) == 50
    reads = len(asked(server, f"/{NAMES[0]}.idx"))
    assert len(read_index(Address(address))) == 50
    assert len(asked(server, f"/{NAMES[0]}.idx")) == reads + 1  # only looked at
    (tmp_path / "other").mkdir()
    write_shards(iter(pictures(7)), tmp_path / "other", "s")
    other = plans(tmp_path / "other")
    server.plans[f"/{NAMES[0]}"], server.plans[f"/{NAMES[0]}.idx"] = other["/s-000000.tar"], other["/s-000000.tar.idx"]
    assert len(read_index(Address(address))) == 7
    server.plans[f"/{NAMES[0]}"].body += bytes(512)
    with pytest.raises(
        DataError, match=r"is stale: the shard has 20,992 bytes.*; put a new one beside the shard, made with"
    ):
        Shards(address)


def test_a_page_in_place_of_an_index_is_none(small_shards: Path) -> None:
    """Servers of one page answer so, whatever they are asked for."""
    near = Shards(str(small_shards / NAMES[0]))
    with Server(plans(small_shards, index=False)) as server:
        for suffix in (".idx", ".stats.json"):
            server.plans[f"/{NAMES[0]}{suffix}"] = Plan(b"<!doctype html>", always=Fault("ignore-range"))
        far = Shards(f"{server.address}/{NAMES[0]}")
        assert (far.id, far.found_beside(".stats.json")) == (near.id, None)


def test_check_reads_a_server_as_it_reads_a_disk(far: Shards, small_shards: Path, server: Server) -> None:
    assert check(far) == check(Shards(str(small_shards)))
    server.plans[f"/{NAMES[1]}"].body = bytes(len(server.plans[f"/{NAMES[1]}"].body))
    assert check(far)["bad"][-1]["sample"] == NAMES[1]


# -- what an address may be


def test_addresses_that_cannot_be(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for spec, said in (
        (
            "https://u:hunter2@h/x-*.tar?k=hunter2",
            "https://h/x-*.tar: a web server lists nothing; name the shards with braces",
        ),
        ("https://h/folder/", "https://h/folder/*.tar: a web server lists nothing"),
        (
            "http://h:99999/x.tar?k=hunter2",
            "http://h:99999/x.tar: is no address of the web: its host or port is none that can be asked",
        ),
        ("http://u:hunter2@h:abc/x.tar", "http://h:abc/x.tar: is no address of the web: its host or port"),
        ("http://u:hunter2/2@h/x.tar", "is no address of the web: its host or port"),
        ("http://h:0/x.tar", "is no address of the web: its host or port"),
        ("http://two words/x.tar", "is no address of the web: its host or port"),
        (f"http://{'h' * 64}.org/x.tar", "is no address of the web: its host is no name that a host can have"),
        ("https:///x.tar?k=hunter2", "https:///x.tar: is no address of the web: it has no host"),
        ("https://[]/x.tar", "https://[]/x.tar: is no address of the web: it"),
        ("https://:80/x.tar", "is no address of the web: it has no host"),
        (
            "http://[::1/x.tar",
            "http://[::1/x.tar: is no address of the web: its host or port is none that can be asked",
        ),
        ("htps://h/x.tar?k=hunter2", "htps://h/x.tar: htps: is not read (did you mean https?)"),
        ("pipe:curl https://h/x.tar?k=hunter2", "pipe: is not read"),
    ):
        assert cli.main(["shards", "check", spec]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert len(told.splitlines()) == 1
        assert "hunter2" not in told
    with pytest.raises(UsageError, match="copy the shards to one first"):
        from selfsight.data.build import _on_disk

        _on_disk(f"{server.address}/x.tar")


def test_letters_of_all_kinds_are_quoted_once(server: Server, small_shards: Path) -> None:
    for suffix in ("", ".idx"):
        server.plans[f"/a%20%C3%A4%20b.tar{suffix}"] = server.plans[f"/{NAMES[0]}{suffix}"]
    near = Shards(str(small_shards / NAMES[0]))
    for name in ("a ä b.tar", "a%20%C3%A4 b.tar?k=ö ö"):
        far = Shards(f"{server.address}/{name}")
        assert (far.id, far.read(3)) == (near.id, near.read(3))
        far.close()
    server.plans["/moved.tar"] = Plan(b"", always=Fault("redirect", "/a ä b.tar".encode().decode("latin-1")))
    with closing(HttpStore()) as store:
        assert store.look(Address(f"{server.address}/moved.tar"), time.monotonic() + 10).size
    assert web_address("http://me@bücher.example:8/ä?ö#ü") == "http://me@xn--bcher-kva.example:8/%C3%A4?%C3%B6#%C3%BC"
    assert web_address("http://[::1]:80/x-[0-9]%20|.tar?k=~{}") == "http://[::1]:80/x-[0-9]%20|.tar?k=~{}"
    assert find_shards("http://[::1]:80/x.tar") == [Address("http://[::1]:80/x.tar")]


@pytest.mark.parametrize("where", ["http://[::1/x", "http://h:99999/x", "https:///x", f"http://{'h' * 64}/x"])
def test_a_redirect_to_what_is_no_address_is_refused(where: str, server: Server) -> None:
    faults(server, always=Fault("redirect", where))
    with closing(HttpStore()) as store, pytest.raises(Refused, match="a redirect's or the proxy's is none that can be"):
        store.look(Address(f"{server.address}/{NAMES[0]}"), time.monotonic() + 10)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("no gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    for scheme, name in (("gs", "gcsfs: pip install 'selfsight[cloud]'"), ("hf", "huggingface_hub: pip install")):
        with pytest.raises(UsageError, match=re.escape(f"{scheme}:// needs {name}")):
            Shards(f"{scheme}://bucket/x.tar")


def test_file_systems_that_are_no_coroutines(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's; here the one of fsspec that lives in memory."""
    import fsspec

    monkeypatch.setitem(SCHEMES, "hf", ("memory", "", ""))
    files = fsspec.filesystem("memory")
    for path, plan in plans(small_shards).items():
        files.pipe(f"/datasets{path}", plan.body)
    far, near = Shards("hf://datasets/*.tar"), Shards(str(small_shards))
    far.prefetch(range(5))
    assert (far.id, [far.read(i) for i in range(20)]) == (near.id, [near.read(i) for i in range(20)])
    files.pipe(f"/datasets/{NAMES[0]}", b"cut")
    with pytest.raises(ShardChanged):
        far.read(30)
    files.rm("/datasets", recursive=True)
    with pytest.raises(
        DataGone, match=r"hf://datasets/small-000001.tar: the data cannot be read any more \(not found\)"
    ):
        far.read(60)
    with pytest.raises(DataError, match="1 of 1 shards are missing"):
        Shards(f"hf://datasets/{NAMES[0]}")


# -- faults that pass


@pytest.mark.parametrize(
    "fault",
    [
        Fault("stall", 10),
        Fault("short", 10),
        Fault("lying-length", 10),
        Fault("reset", 10),
        Fault("ignore-range"),
        Fault("gzip"),
        Fault("other-etag"),
        Fault("wrong-bytes"),
        *(Fault("status", code) for code in (500, 502, 503, 429, 408)),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.value}",
)
def test_a_fault_that_passes_changes_nothing(
    fault: Fault, far: Shards, server: Server, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfsight.data.http_store.SILENCE", 0.2)
    faults(server, fault, Fault("ok"), fault)
    far.prefetch([3])
    assert [far.read(3), far.read(4)] == [Shards(str(small_shards)).read(i) for i in (3, 4)]
    assert server.attempts[f"/{NAMES[0]}"] >= 4


def test_a_server_may_ask_for_time(far: Shards, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    faults(server, Fault("status", 503, {"Retry-After": "1"}))
    before = time.monotonic()
    assert far.read(0)
    assert time.monotonic() - before >= 1
    assert re.search(r"small-000000.tar: waiting for it \(HTTP 503\)\n$", capsys.readouterr().err)
    faults(server, Fault("status", 429, {"Retry-After": "3600"}))
    with pytest.raises(DataGone, match=r"reached any more \(HTTP 429, for 0.0 s, and asks for 3,600 s more\)"):
        far.read(0)
    assert server.attempts[f"/{NAMES[0]}"] == 1  # no use in asking before


def test_an_outage_is_ridden_out(far: Shards, server: Server) -> None:
    far.prefetch([7])
    body = far.read(7)
    server.refuse()
    threading.Timer(0.3, server.accept).start()
    far.prefetch([7])
    assert far.read(7) == body


def test_redirects_are_followed_within_the_web(far: Shards, server: Server) -> None:
    body = far.read(0)
    server.plans["/else"] = server.plans[f"/{NAMES[0]}"]
    server.plans[f"/{NAMES[0]}"] = Plan(b"", always=Fault("redirect", "/else?sig=x"))
    assert far.read(0) == body
    faults(server, always=Fault("redirect", "file:///etc/passwd"))
    with pytest.raises(DataGone, match="redirected from http to file, which is not followed"):
        far.read(0)
    faults(server, always=Fault("redirect", f"/{NAMES[0]}"))
    with pytest.raises(DataGone, match="more than 5 redirects"):
        far.read(0)


@pytest.mark.parametrize("fault", [Fault("short", 10), Fault("lying-length", 10), Fault("ignore-range"), Fault("gzip")])
def test_the_client_gives_what_was_asked_for_or_nothing(fault: Fault, server: Server) -> None:
    """Whatever checksums there are besides: an index that is fetched has none until it is whole."""
    address, store, end = Address(f"{server.address}/{NAMES[0]}"), HttpStore(), time.monotonic() + 10
    faults(server, fault)
    with pytest.raises(Away):
        store.read(address, 100, 400, "", end)
    assert store.read(address, 100, 400, "", end) == server.plans[f"/{NAMES[0]}"].body[100:500]
    with pytest.raises(Changed):  # a weak ETag cannot be asked for, so that the answer's is compared
        store.read(address, 100, 400, 'W/"other"', end)
    with pytest.raises(Changed):
        store.read(address, 10**9, 400, "", end)
    store.close()


def test_the_time_that_a_server_asks_for_is_a_number_or_a_date() -> None:
    assert [_retry_after(text) for text in ("7", "", "soon", "²")] == [7.0, 0.0, 0.0, 0.0]
    assert 3500 < _retry_after(formatdate(time.time() + 3600, usegmt=True)) <= 3600
    assert _retry_after(formatdate(time.time() - 3600, usegmt=True)) == 0


# -- faults that last


def test_a_stall_is_left_by_the_deadline(far: Shards, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.data.http_store.SILENCE", 0.1)
    far.patience = 0.5
    faults(server, always=Fault("stall", 10))
    with pytest.raises(DataGone, match=r"the data cannot be reached any more \(the server is silent, for \d\.\d s\)"):
        far.read(0)
    assert server.attempts[f"/{NAMES[0]}"] >= 3


def test_what_waits_in_a_queue_does_not_begin_to_be_patient(
    far: Shards, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfsight.data.remote.IN_FLIGHT", 1)
    monkeypatch.setattr("selfsight.data.remote.plan.__defaults__", (-(10**9), 1))
    far.patience = 0.2
    faults(server, always=Fault("status", 503))
    far.prefetch(range(12))
    with pytest.raises(DataGone, match=r"HTTP 503, for \d\.\d s\)"):
        far.read(11)
    assert (
        12 <= server.attempts[f"/{NAMES[0]}"] <= 24
    )  # one try each but for the first, which has some in 0.4 s; were each patient: 48


def test_patience_is_counted_from_the_first_fault_since_anything_came(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Time:
        monotonic = staticmethod(lambda: clock[0])

        @staticmethod
        def sleep(seconds: float) -> None:
            clock[0] += seconds

    monkeypatch.setattr("selfsight.data.store.time", Time)
    outage, ends = Outage(), list[float]()

    def away(end: float) -> None:
        ends.append(end)
        raise Away("away")

    def lasted() -> float:
        before = clock[0]
        with pytest.raises(Away):
            patiently(away, 60, outage=outage)
        return clock[0] - before

    assert 50 < lasted() <= 60
    assert lasted() < 6  # what the first has left
    assert ends[-1] <= 61.0  # and is told to be quick
    patiently(lambda end: None, 60, outage=outage)
    assert 50 < lasted() <= 60
    clock[0] += 61  # the run has ended long ago, and somebody begins again
    assert 50 < lasted() <= 60


def test_a_body_that_trickles_is_left_by_the_deadline(far: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trickle:
        sock = type("Sock", (), {"settimeout": lambda *_: None})()

        def read1(self, most: int) -> bytes:
            time.sleep(0.02)
            return b"x"

    from selfsight.data.http_store import _body

    with pytest.raises(OSError, match=r"\d+ of 1,000 bytes came in time"):
        _body(Trickle(), 1000, time.monotonic() + 0.2)  # type: ignore[arg-type]
    monkeypatch.setattr("selfsight.data.http_store.TOTAL", 0.1)
    with pytest.raises(OSError, match="bytes came in time"):
        _body(Trickle(), 1000, time.monotonic() + 1e6)  # type: ignore[arg-type]


def test_a_server_without_ranges_is_never_read_whole(far: Shards, server: Server) -> None:
    faults(server, always=Fault("ignore-range"))
    with pytest.raises(DataGone, match="the server gives no ranges of an object; copy the shards to a disk"):
        far.read(0)
    assert server.attempts[f"/{NAMES[0]}"] == 3
    with pytest.raises(DataError, match=r"small-000000.tar: the server gives no ranges"):
        Shards(f"{server.address}/{NAMES[0]}")


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_no_right_is_no_fault_that_passes(
    code: int, far: Shards, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    faults(server, always=Fault("status", code))
    with pytest.raises(DataGone, match=rf"small-000000.tar: the data cannot be read any more \(HTTP {code} ") as gone:
        far.read(0)
    assert server.attempts[f"/{NAMES[0]}"] == 1
    assert "hunter2" not in str(gone.value)
    assert cli.main(["shards", "check", f"{server.address}/{NAMES[0]}?sig=hunter2"]) == 65
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert NAMES[0] in told
    assert "hunter2" not in told


def test_all_that_is_missing_is_said_at_once(server: Server) -> None:
    with pytest.raises(
        DataError, match=r"2 of 5 shards are missing: http://127.0.0.1:\d+/small-000003.tar, http.*4.tar$"
    ):
        Shards(f"{server.address}/small-{{000000..000004}}.tar?sig=hunter2")


def test_another_object_under_the_name_ends_the_run(far: Shards, server: Server) -> None:
    server.plans[f"/{NAMES[0]}"].etag = '"replaced"'
    with pytest.raises(ShardChanged, match=r"small-000000.tar: is another file than when the run started") as changed:
        far.read(0)
    assert changed.value.exit_code == 65
    far.prefetch([1])
    with pytest.raises(ShardChanged):
        far.read(1)
    assert far.read(60)


def test_an_object_that_is_cut_is_another_also_without_an_etag(server: Server) -> None:
    for plan in server.plans.values():
        plan.etag = ""
    far = Shards(f"{server.address}/{NAMES[0]}")
    far.patience = 5
    assert far.read(49)
    plan = server.plans[f"/{NAMES[0]}"]
    plan.body = plan.body[: int(far._locate(49)[1]["offset"]) + 20]
    for sample in (49, 49):
        with pytest.raises(ShardChanged):
            far.read(sample)
    far.close()


def test_wrong_bytes_are_one_bad_sample(far: Shards, server: Server) -> None:
    """A store that gives wrong bytes under the right name: the sample is bad, and no other."""
    faults(server, always=Fault("wrong-bytes"))
    with pytest.raises(BadSample, match=r"small-000000.tar@\d+: the bytes are not those that were indexed \(CRC\)"):
        far.read(3)
    faults(server)
    body = bytearray(server.plans[f"/{NAMES[0]}"].body)
    body[int(far._locate(3)[1]["offset"]) + 20] ^= 1
    server.plans[f"/{NAMES[0]}"].body = bytes(body)
    far.prefetch(range(6))
    assert [far.read(i) != b"" for i in (0, 1, 2, 4, 5)] == [True] * 5
    with pytest.raises(BadSample):
        far.read(3)


def test_a_store_that_is_away_at_the_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("selfsight.data.remote_index.PATIENCE", 0.2)
    with Server({}) as server:
        server.refuse()
        assert cli.main(["shards", "check", f"{server.address}/x.tar?sig=hunter2"]) == 75
    told = capsys.readouterr().err
    assert re.search(r"x.tar: cannot be reached \(Connection refused\); run the same command when it can", told)
    assert "hunter2" not in told


def test_a_password_is_sent_and_never_shown(server: Server) -> None:
    shards = Shards(f"{server.address.replace('://', '://me:hunter2@')}/{NAMES[0]}")
    assert server.requests[0][1]["Authorization"] == "Basic bWU6aHVudGVyMg=="
    assert "hunter2" not in shards.describe(0) + str(shards.paths[0])


def test_a_proxy_gets_whole_addresses_and_its_password(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = Shards(str(small_shards / NAMES[0]))
    with Server({f"http://far.invalid:8{path}": plan for path, plan in plans(small_shards).items()}) as proxy:
        for scheme in ("http", "https"):
            monkeypatch.setenv(f"{scheme}_proxy", f"{proxy.address.replace('://', '://me:hunter%32@')}")
        monkeypatch.setenv("no_proxy", "near.invalid")
        far = Shards(f"http://you:too@far.invalid:8/{NAMES[0]}")
        assert (far.id, far.read(3)) == (near.id, near.read(3))
        far.close()
        told = [{name: headers.get(name) for name in LOGINS} for _, headers in proxy.requests]
        assert told == [dict(zip(LOGINS, ("Basic eW91OnRvbw==", "Basic bWU6aHVudGVyMg==", "far.invalid:8"), strict=True))] * len(told)  # fmt: skip
        with pytest.raises(DataError, match=r"cannot be read \(the proxy answers HTTP 407 Proxy Authentication Req"):
            Shards("https://far.invalid/x.tar")
        assert proxy.requests[-1][0] == "far.invalid:443"
        assert proxy.requests[-1][1]["Proxy-Authorization"] == "Basic bWU6aHVudGVyMg=="
        asked_before = len(proxy.requests)
        monkeypatch.setattr("selfsight.data.remote_index.PATIENCE", 0.1)
        with pytest.raises(DataGone):
            Shards("http://near.invalid/x.tar")
        assert len(proxy.requests) == asked_before


def test_connections_are_used_again(server: Server, far: Shards) -> None:
    store, address = HttpStore(), Address(f"{server.address}/{NAMES[0]}")
    end = time.monotonic() + 10
    seen = store.look(address, end)
    sockets = set()
    for i in range(5):
        assert store.read(address, i, 7, seen.version, end) == server.plans[f"/{NAMES[0]}"].body[i : i + 7]
        sockets |= {id(line.sock) for lines in store._idle.values() for line in lines}
    store.close()
    assert len(sockets) == 1


# -- whole runs

NO_CACHE = {"SELFSIGHT_CACHE_GB": "0"}  # said to each, because the process that they are forks of may be older


def ledger(folder: Path) -> list[str]:
    return [line for line in (folder / "ledger" / "rank-0.jsonl").read_text().splitlines() if line]


def test_a_run_over_the_web_that_is_killed_is_the_local_run(start: Start, server: Server, tmp_path: Path) -> None:
    steps = {"train.steps": 12, "train.save_every": 3}
    assert start(fields=steps | {"run_dir": tmp_path / "near"}).wait(60) == [0]
    far = {"data.train": f"{server.address}/small-{{000000..000002}}.tar", "run_dir": tmp_path / "far"}
    assert start(faults="learn kill step=8", fields=steps | far, environment=NO_CACHE).wait(60) == [-9]
    faults(server, Fault("status", 503), Fault("reset", 5))
    assert start(fields=steps | far, environment=NO_CACHE).wait(60) == [0]
    assert list(dict.fromkeys(ledger(tmp_path / "far"))) == ledger(tmp_path / "near")


def test_a_run_rides_out_an_outage_ends_when_it_lasts_and_goes_on_later(
    start: Start, server: Server, tmp_path: Path
) -> None:
    fields = {
        "data.train": f"{server.address}/small-{{000000..000002}}.tar",
        "train.steps": 150,
        "train.save_every": 50,
    }
    fields |= {"plugin": "hasty"}
    job = start(faults="data sleep=0.01", fields=fields, environment=NO_CACHE)
    deadline = time.monotonic() + 30
    while len(server.requests) < 30 and time.monotonic() < deadline:
        time.sleep(0.01)
    server.refuse()
    threading.Timer(0.5, server.accept).start()
    seen = len(server.requests)
    while len(server.requests) < seen + 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    server.refuse()
    assert job.wait(60) == [75], job.told()
    assert re.search(
        r"small-00000\d\.tar: the data cannot be reached any more \(Connection refused, for [12]\.\d s\)", job.told()
    )
    saved = int(re.findall(r"the run ended after step (\d+) of 150, saved", job.told())[0])
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == saved > 0
    server.accept()
    again = start(fields=fields, environment=NO_CACHE)
    assert again.wait(60) == [0], again.told()
    assert f"goes on from step {saved}" in again.told()
