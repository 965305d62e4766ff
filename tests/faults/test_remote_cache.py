"""The cache of remote shards on the disk: capped, shared, never trusted; and blocks, which are read into it whole."""

import multiprocessing
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_remote import NAMES, asked, faults, plans
from test_shards_faults import batches
from webfault import Fault, Server

from selfsight.data import disk_cache as module
from selfsight.data.disk_cache import DiskCache, disk_cache
from selfsight.data.loader import Batches
from selfsight.data.order import WINDOW
from selfsight.data.remote import MOST, Span, Want, plan
from selfsight.data.shards import Shards
from selfsight.errors import UsageError

BODY = os.urandom(10_000)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SELFSIGHT_CACHE_GB", raising=False)
    return tmp_path / "cache" / "blocks"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[DiskCache]:
    made = DiskCache(tmp_path / "blocks", 10**9)
    yield made
    made.close()


@pytest.fixture
def server(small_shards: Path, folder: Path) -> Iterator[Server]:
    with Server(plans(small_shards)) as started:
        yield started


def opened(server: Server, block: int = 1) -> Shards:
    return Shards(f"{server.address}/small-{{000000..000002}}.tar", block)


def get(cache: DiskCache, key: str, offset: int, size: int) -> bytes | None:
    return cache.get(key, offset, size, zlib.crc32(BODY[offset : offset + size]))


# -- the cache alone


def test_only_what_is_whole_is_there(cache: DiskCache) -> None:
    assert get(cache, "x", 0, 100) is None
    cache.put("x", 500, BODY[500:900])
    assert get(cache, "x", 500, 400) == BODY[500:900]
    assert get(cache, "x", 600, 100) == BODY[600:700]
    assert get(cache, "x", 450, 100) is None  # a hole and a part
    assert get(cache, "x", 850, 100) is None
    assert get(cache, "y", 500, 400) is None
    with (cache.folder / "x").open("r+b") as file:
        file.seek(555)
        file.write(bytes([BODY[555] ^ 1]))
    assert get(cache, "x", 500, 400) is None
    assert get(cache, "x", 600, 100) == BODY[600:700]


def test_a_file_that_is_deleted_is_made_anew(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOUCH", 0.0)
    cache.put("x", 0, BODY)
    shutil.rmtree(cache.folder)
    cache._touch()
    assert get(cache, "x", 0, 100) is None
    cache.put("x", 0, BODY)
    assert get(cache, "x", 0, 100) == BODY[:100]
    assert os.listdir(cache.folder) == ["x"]


def test_the_cap_keeps_what_is_in_use_and_deletes_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNT_EVERY", 40_000)
    cache = DiskCache(tmp_path, 133_334)
    for n in range(9):
        cache.put(f"{n}", 0, BODY)
    cache.close()
    used = sum(512 * os.stat(tmp_path / name).st_blocks for name in os.listdir(tmp_path))
    assert 60_000 < used <= 100_000
    assert (tmp_path / "0").read_bytes() == BODY  # nothing that is in use goes
    for n, age in (("0", 9000), ("1", 8000), ("2", 4000)):
        os.utime(tmp_path / n, (time.time() - age,) * 2)
    later = DiskCache(tmp_path, 133_334)
    later.put("new", 0, BODY)
    assert get(later, "new", 0, 100) is not None
    assert not (tmp_path / "0").exists()
    assert (tmp_path / "7").exists()
    later.close()
    full = DiskCache(tmp_path, 13_000)
    for n in ("3", "4"):
        os.utime(tmp_path / n)
    full.put("none", 0, BODY)
    assert get(full, "none", 0, 100) is None
    full.close()


def test_blocks_for_which_there_is_no_room_pass_through(
    server: Server, small_shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker finds them for a while; then the oldest go."""
    monkeypatch.setenv("SELFSIGHT_CACHE_GB", "0.0001")
    monkeypatch.setattr(DiskCache, "_fits", lambda *_: False)
    near, first, second = Shards(str(small_shards)), opened(server, block=5), opened(server, block=5)
    first.prefetch([3, 11])
    assert [first.read(i) for i in (3, 11)] == [near.read(i) for i in (3, 11)]
    before = len(asked(server, f"/{NAMES[0]}"))
    second.prefetch([0, 2, 14])
    assert [second.read(i) for i in (0, 2, 14)] == [near.read(i) for i in (0, 2, 14)]
    assert len(asked(server, f"/{NAMES[0]}")) == before
    for file in (folder / "passing").iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    second.prefetch([4])
    assert second.read(4) == near.read(4)
    for sample in range(0, 50, 5):
        second.prefetch([sample])
        assert second.read(sample) == near.read(sample)
    assert 0 < sum(file.stat().st_size for file in (folder / "passing").iterdir()) <= 25_000
    first.close()
    second.close()


def test_room_for_other_things_stays_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**30})())
    cache = DiskCache(tmp_path, 10**12)
    cache.put("x", 0, BODY)
    assert get(cache, "x", 0, 100) is None
    cache.close()


def test_what_is_closed_stays_closed(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that are on their way when a set is closed come back to a cache that opens nothing more."""
    far, came, go = opened(server), threading.Event(), threading.Event()
    real = server.fault
    monkeypatch.setattr(server, "fault", lambda *arguments: (came.set(), go.wait(20), real(*arguments))[2])
    far.prefetch(range(3))
    assert came.wait(20)
    reader = far._far
    far.close()
    go.set()
    (_, coming), *_ = reader._coming.values()
    assert len(coming.result(20)) == 3
    assert reader.cache is not None
    with reader.cache.alone("x", 0, 100):
        reader.cache.put("x", 0, BODY)
    assert get(reader.cache, "x", 0, 100) is None
    assert not reader.cache._files
    assert not (folder / "x").exists()


def test_a_full_disk_is_said_once_and_read_around(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    cache.put("x", 0, BODY)
    cache.put("x", 0, BODY)
    assert capsys.readouterr().err.count("cannot be written (No space left on device); reading goes on") == 1
    assert get(cache, "x", 0, 100) is None


def test_many_threads_and_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread writes to a file that another has closed: each key has its own bytes."""
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    cache = DiskCache(tmp_path, 10**9)
    bodies = {f"{n}": bytes([n]) * 3000 for n in range(8)}

    def work() -> None:
        for turn in range(40):
            for key, body in bodies.items():
                cache.put(key, 3000 * (turn % 4), body)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all((tmp_path / key).read_bytes() == 4 * body for key, body in bodies.items())
    cache.close()


def _hold(folder: Path, held: Any, leave: Any) -> None:
    with DiskCache(folder, 10**9).alone("x", 0, 100):
        held.set()
        leave.wait(30)


def test_processes_wait_for_each_other_but_not_for_ever(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    held, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(cache.folder, held, leave))
    other.start()
    assert held.wait(20)
    monkeypatch.setattr(module, "OTHERS_TIME", 0.1)
    with cache.alone("x", 200, 100):  # another part
        pass
    before = time.monotonic()
    with cache.alone("x", 50, 100):  # the other is too slow
        assert time.monotonic() - before >= 0.1
    monkeypatch.setattr(module, "OTHERS_TIME", 20.0)
    threading.Timer(0.1, leave.set).start()
    with cache.alone("x", 50, 100):
        assert leave.is_set()
    other.join(20)


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_the_size_is_a_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE_GB", text)
    with pytest.raises(UsageError, match=f"SELFSIGHT_CACHE_GB: '{text}' is no number of gigabytes"):
        disk_cache()
    with pytest.raises(UsageError, match="no number of gigabytes"):
        Shards("http://127.0.0.1:9/x.tar")  # before anything is asked for


# -- with shards


def test_what_was_read_is_not_asked_for_again(server: Server, small_shards: Path, folder: Path) -> None:
    near, far = Shards(str(small_shards)), opened(server)
    far.prefetch(range(20))
    assert [far.read(i) for i in range(20)] == [near.read(i) for i in range(20)]
    far.close()
    again, before = opened(server), len(asked(server, f"/{NAMES[0]}"))
    again.prefetch(range(10))
    assert [again.read(i) for i in range(20)] == [near.read(i) for i in range(20)]
    assert len(asked(server, f"/{NAMES[0]}")) == before
    again.close()
    for file in folder.iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    third = opened(server)
    assert third.read(7) == near.read(7)
    assert len(asked(server, f"/{NAMES[0]}")) == before + 2  # at the start, and the sample
    third.close()
    server.plans[f"/{NAMES[0]}"].etag = '"another state"'
    fourth = opened(server)
    assert fourth.read(7) == near.read(7)
    assert len(asked(server, f"/{NAMES[0]}")) == before + 4
    fourth.close()


def test_a_block_is_one_request_for_all_who_need_it(server: Server, small_shards: Path) -> None:
    near, first, second = Shards(str(small_shards)), opened(server, block=10), opened(server, block=10)
    before = len(asked(server, f"/{NAMES[0]}"))
    first.prefetch([3, 8, 25])
    assert [first.read(i) for i in (3, 8, 25)] == [near.read(i) for i in (3, 8, 25)]
    assert len(asked(server, f"/{NAMES[0]}")) == before + 2
    second.prefetch([0, 29, 20])
    assert [second.read(i) for i in (0, 29, 20, 9)] == [near.read(i) for i in (0, 29, 20, 9)]
    assert len(asked(server, f"/{NAMES[0]}")) == before + 2
    second.prefetch([55, 49], keep=False)  # blocks end where shards end
    second.prefetch([55, 49])
    assert [second.read(i) for i in (55, 49, 50)] == [near.read(i) for i in (55, 49, 50)]
    assert not second._far._coming
    second.prefetch([70])
    for sample in (80, 90, 100, 110):  # nobody comes for the first one
        second.prefetch([sample])
    assert len(second._far._coming) == 4
    first.close()
    second.close()


def test_blocks_without_a_cache_are_read_sample_by_sample(
    server: Server, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE_GB", "0")
    near, far = Shards(str(small_shards)), opened(server, block=10)
    far.prefetch([3, 25], keep=False)
    before = len(asked(server, f"/{NAMES[0]}"))
    far.prefetch([3, 25, 60])
    assert [far.read(i) for i in (3, 25, 60)] == [near.read(i) for i in (3, 25, 60)]
    assert len(asked(server, f"/{NAMES[0]}")) == before + 1  # they are near each other
    far.close()


def test_a_worker_asks_for_its_next_batch_and_the_next_window() -> None:
    rounds: list[tuple[list[int], bool]] = []

    class Far:
        remote, block = True, 2

        def __len__(self) -> int:
            return 10_000

        def ids(self, positions: np.ndarray, seed: int) -> np.ndarray:
            return positions

        def prefetch(self, ids: np.ndarray, keep: bool = True) -> None:
            rounds.append((ids.tolist(), keep))

    batches = Batches(Far(), (), 0, None, 8, rank=1, world=2, accumulate=2)  # type: ignore[arg-type]
    batches._prefetch(5, batches._ids(5))
    step, window = 2, WINDOW * 2 // 8
    first = 8 * step + 4 + 2
    assert rounds == [([first, first + 1], True), ([8 * (step + 1) + 2, 8 * (step + 1) + 3], True), ([first + 8 * window, first + 8 * window + 1], False)]  # fmt: skip


@pytest.mark.parametrize("block", [1, 7])
@pytest.mark.parametrize("gigabytes", ["0", "1"])
def test_batches_are_those_of_local_files(
    block: int, gigabytes: str, server: Server, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE_GB", gigabytes)
    near, far = Shards(str(small_shards), block), opened(server, block)
    both = [batches(shards, 24) for shards in (near, far)]
    for number in (0, 1, 4, 5, 2):  # also where an epoch ends, and back
        expected, found = (own[number] for own in both)
        assert found.ids.tolist() == expected.ids.tolist()
        assert all(torch.equal(a, b) for a, b in zip(found.views, expected.views, strict=True))
        assert found.bad == expected.bad == []
    far.close()


def test_the_plan_of_requests() -> None:
    wants = [
        Want(0, 0, 10, 0),
        Want(0, 15, 10, 0),
        Want(0, 100, 10, 0),
        Want(1, 110, 10, 0),
        Want(0, 12, 3, 0),
        Want(0, 0, 10, 0),
    ]
    spans = plan(wants, gap=5, most=20)
    assert [span for span, _ in spans] == [Span(0, 0, 15), Span(0, 15, 25), Span(0, 100, 110), Span(1, 110, 120)]
    assert sorted(want for _, those in spans for want in those) == sorted(set(wants))
    apart = [Want(0, 0, 10, 0), Want(0, 15, 10, 0), Want(0, 31, 10, 0)]
    assert [span for span, _ in plan(apart, gap=5, most=1000)] == [Span(0, 0, 25), Span(0, 31, 41)]
    assert plan([Want(0, 0, 3 * MOST, 0)])[0][0] == Span(0, 0, 3 * MOST)  # a sample is one, however large


def test_a_large_sample_comes_in_pieces_and_is_not_asked_for_ahead(
    server: Server, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfsight.data.remote.MOST", 50)
    near, far = Shards(str(small_shards)), opened(server)
    body = near.read(0)
    before = len(asked(server, f"/{NAMES[0]}"))
    faults(server, Fault("ok"), Fault("reset", 5))
    assert far.read(0) == body
    assert len(asked(server, f"/{NAMES[0]}")) == before + -(-len(body) // 50) + 1
    monkeypatch.setattr("selfsight.data.remote.HELD", 2 * len(body))
    far.prefetch(range(10, 20))
    assert len(far._far._coming) <= 2
    assert [far.read(i) for i in range(10, 20)] == [near.read(i) for i in range(10, 20)]
    far.close()
