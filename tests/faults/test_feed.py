"""Loader workers that die, freeze or lack memory: every item arrives once and in order, or the run says who is to blame."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import pictures
from sources import Item, Source, alive, crash, fail, freeze, hang, killed, pids
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from selfsight.data import feed as feeding
from selfsight.data.build import write_shards
from selfsight.data.crops import ViewMaker
from selfsight.data.decode import Form
from selfsight.data.feed import affordable_workers, culprits, feed
from selfsight.data.loader import READING, Batches
from selfsight.data.shards import Shards
from selfsight.data.views import View
from selfsight.errors import DataError, DataGone


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """DataLoader looks after its workers more often than every five seconds."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """A minute for each test: what is tested here could wait for ever."""

    def over(*_: object) -> None:
        raise TimeoutError("a minute has passed")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def ended(processes: set[int]) -> bool:
    """Whether all of these are gone, or will be in a moment."""
    end = time.monotonic() + 10
    while any(map(alive, processes)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, processes))


def plain(items: list[Item]) -> list[tuple[int, list[int], float]]:
    return [(item.number, item.samples, float(item.pixels.sum())) for item in items]


def expected(numbers: range, without: tuple[int, ...] = ()) -> list[tuple[int, list[int], float]]:
    samples = {n: [-1 if s in without else s for s in range(3 * n, 3 * n + 3)] for n in numbers}
    return [(n, samples[n], 1024.0 * n) for n in numbers]


def test_nothing_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = range(3, 20)
    assert plain(list(feed(Source(tmp_path), numbers, 0, False))) == expected(numbers)
    found = list(feed(Source(tmp_path), numbers, 1, False))
    assert plain(found) == expected(numbers)
    assert len({item.pid for item in found} - {os.getpid()}) == 1
    assert ended({item.pid for item in found})
    assert list(feed(Source(tmp_path), range(0), 1, False)) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_costs_no_item_and_repeats_none(tmp_path: Path, workers: int, capsys: Any) -> None:
    source, numbers = Source(tmp_path, {13: killed, 44: crash}, times=1), range(20)
    found = list(feed(source, numbers, workers, False))
    assert plain(found) == expected(numbers)
    said = capsys.readouterr().err
    assert said.count("; starting them again") == 2
    assert f"pid {(tmp_path / '13').read_text().split()[0]}: -9" in said
    assert "looking for" not in said
    assert ended({item.pid for item in found} | pids(tmp_path))


def test_a_worker_killed_from_outside_with_items_on_the_way(tmp_path: Path) -> None:
    found: list[Item] = []
    for item in feed(Source(tmp_path), range(12), 1, False):
        found.append(item)
        if item.number in (2, 3):
            time.sleep(0.2)  # the items ahead lie in the queue, and their pixels with the worker
            os.kill(item.pid, signal.SIGKILL)
    assert plain(found) == expected(range(12))
    assert len({item.pid for item in found}) == 3


@pytest.mark.parametrize(("fault", "how"), [(crash, "crashes"), (hang, "hangs")])
def test_the_sample_that_takes_the_worker_down_is_left_out(
    tmp_path: Path, fault: Callable[[], None], how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Source(tmp_path, {13: fault, 14: fault})
    found = list(feed(source, range(2, 12), 1, False, timeout=0.5))
    assert plain(found) == expected(range(2, 12), without=(13, 14))
    said = capsys.readouterr().err
    assert f"batch 4: left out sample 13 ({how} the decoder), sample 14 ({how} the decoder)" in said
    assert ended({item.pid for item in found} | pids(tmp_path))


def test_a_culprit_far_ahead_of_the_batch_that_is_due_is_found(tmp_path: Path) -> None:
    """With two workers the death of one is often seen while the other's batch is waited for."""
    assert plain(list(feed(Source(tmp_path, {25: crash}), range(12), 2, False))) == expected(range(12), without=(25,))


def test_when_no_sample_is_to_blame_the_run_ends_and_says_so(tmp_path: Path) -> None:
    source, found = Source(tmp_path, {4: killed}, times=2), []
    with pytest.raises(DataError) as error:
        for item in feed(source, range(1, 5), 1, False):
            found.append(item)
    assert found == []
    second = (tmp_path / "4").read_text().split()[1]
    assert str(error.value).startswith(f"batch 1: loader workers died (pid {second}: -9) twice")
    assert "every sample decodes alone (samples 3, 4, 5, 6, 7, 8)" in str(error.value)
    assert error.value.exit_code == 65
    assert ended(pids(tmp_path))


@pytest.mark.parametrize("moment", ["making", "sent"])
def test_a_frozen_worker_is_killed_and_replaced(
    tmp_path: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """DataLoader's own timeout would leave it, stopped for ever, and does not see a transfer that stops midway."""
    faults = {13: freeze} if moment == "making" else {}
    found: list[Item] = []
    for item in feed(Source(tmp_path, faults, times=1), range(12), 1, False, timeout=0.5):
        found.append(item)
        if moment == "sent" and item.number == 2:
            time.sleep(0.2)
            os.kill(item.pid, signal.SIGSTOP)
    assert plain(found) == expected(range(12))
    assert "gave nothing for 0.5 s" in capsys.readouterr().err
    assert ended({item.pid for item in found} | pids(tmp_path))


def test_what_an_item_raises_is_no_loss_of_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    with pytest.raises(DataError) as error:
        for item in feed(Source(tmp_path, {13: fail}), range(9), 1, False):
            found.append(item)
    assert plain(found) == expected(range(4))
    assert error.value.told == "x.tar: the shard is gone"
    assert capsys.readouterr().err == ""
    assert ended({item.pid for item in found})


def test_leaving_early_leaves_no_process_not_even_a_stopped_one(tmp_path: Path) -> None:
    with closing(feed(Source(tmp_path), range(10**6), 1, False)) as items:
        first = next(items)
        os.kill(first.pid, signal.SIGSTOP)
    assert ended({first.pid})


def test_a_lock_that_a_killed_worker_holds_does_not_stop_the_end(tmp_path: Path) -> None:
    """Without care, one end in some hundreds waited for ever: each worker looks at DataLoader's event between items."""
    running = feed(Source(tmp_path), range(10**6), 1, False)
    next(running)
    loading = running.gi_frame.f_locals["items"].gi_frame.f_locals["items"]  # type: ignore[attr-defined]
    os.kill(loading._workers[0].pid, signal.SIGKILL)
    assert loading._workers_done_event._cond.acquire(timeout=10)
    running.close()  # type: ignore[attr-defined]


def test_a_trial_ends_with_the_item_or_with_the_sample(tmp_path: Path) -> None:
    tried: list[int] = []
    assert culprits(Source(tmp_path), 1, 5, tried) == {}
    assert tried == [3, 4, 5]
    assert culprits(Source(tmp_path, {4: fail}), 1, 5, tried) == {}  # whoever makes it next says so
    assert culprits(Source(tmp_path, {5: killed}), 1, 5, tried) == {5: "crashes the decoder"}


def test_storage_that_hangs_blames_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that is away is no fault of what lies on it."""
    monkeypatch.setattr(feeding, "START", 8.0)  # a process must start in it
    with pytest.raises(DataGone, match="batch 1: its samples could not be read within 8 s"):
        culprits(Source(tmp_path, {4: hang}, reading=True), 1, 5, [])


# -- shared memory


@contextmanager
def memory(monkeypatch: pytest.MonkeyPatch, free: int) -> Iterator[list[Path]]:
    asked: list[Path] = []

    class Usage:
        def __init__(self, path: Path) -> None:
            asked.append(path)
            self.free = free

    with monkeypatch.context() as patch:
        patch.setattr(feeding.shutil, "disk_usage", Usage)
        yield asked


def test_too_little_shared_memory_means_no_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with memory(monkeypatch, 9 * 2**20) as asked:
        assert affordable_workers(2**20, 4, tmp_path) == 4  # two batches each, and the one in use
        assert affordable_workers(2**20, 0, tmp_path) == 0
        assert asked == [tmp_path, tmp_path]
        assert capsys.readouterr().err == ""
        assert affordable_workers(2**20 + 1, 4, tmp_path) == 0
    said = capsys.readouterr().err
    assert said.startswith(
        f"{tmp_path}: 9 MiB of shared memory are free, 4 loader workers a rank need 9; reading without workers"
    )
    assert said.count("\n") == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # ranks of one machine share it
    with memory(monkeypatch, 9 * 2**20):
        assert affordable_workers(2**20, 4, tmp_path) == 0
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert affordable_workers(2**60, 4, tmp_path / "nowhere") == 4
    with memory(monkeypatch, 4096) as asked:
        found = list(feed(Source(tmp_path), range(3), 2, False))
        assert asked == [Path("/dev/shm")]
    assert plain(found) == expected(range(3))
    assert {item.pid for item in found} == {os.getpid()}


# -- the batches of training


def made_of(folder: Path, **fields: Any) -> Batches:
    makers = (ViewMaker(View(), 0, 6, "bicubic", 4), ViewMaker(View(size=4, shift=2), 1, 6, "bicubic", 4))
    return Batches(Shards(str(folder)), makers, 4, Form(1), 12, **fields)


def test_batches_know_their_size(small_shards: Path) -> None:
    for fields in ({}, {"world": 2, "accumulate": 3}):
        made = made_of(small_shards, **fields)
        assert made.item_bytes == sum(view.numel() for view in made[0].views)


def test_training_batches_are_the_same_whatever_became_of_a_worker(small_shards: Path) -> None:
    made, numbers = made_of(small_shards), range(3, 15)
    before = {process.pid for process in multiprocessing.active_children()}
    found = []
    for host in feed(made, numbers, 1, False):
        found.append(host)
        if len(found) in (2, 5):
            for process in multiprocessing.active_children():
                if process.pid not in before:
                    process.kill()
    for host, number in zip(found, numbers, strict=True):
        alone = made[number]
        assert host.ids.tolist() == alone.ids.tolist()
        assert host.positions.tolist() == alone.positions.tolist()
        assert all((x == y).all() for x, y in zip(host.views, alone.views, strict=True))


def test_batches_do_without_condemned_samples_as_without_bad_ones(tmp_path: Path) -> None:
    write_shards(iter(pictures(40)), tmp_path, "s")
    whole, rotten = (
        made_of(tmp_path),
        made_of(tmp_path).without({7: "crashes the decoder"}).without({9: "hangs the decoder"}),
    )
    raw = bytearray(whole.shards.paths[0].read_bytes())
    batches = [rotten[number] for number in range(10)]
    for sample in (7, 9):
        raw[int(whole.shards._locate(sample)[1]["offset"]) + 30] ^= 1
    whole.shards.paths[0].write_bytes(raw)
    again = [made_of(tmp_path)[number] for number in range(10)]
    for ours, bad in zip(batches, again, strict=True):
        assert ours.ids.tolist() == bad.ids.tolist()
        assert all((x == y).all() for x, y in zip(ours.views, bad.views, strict=True))
        assert [b[:2] for b in ours.bad] == [b[:2] for b in bad.bad]
    reasons = {bad.sample: bad.reason for host in batches for bad in host.bad}
    assert reasons == {7: "crashes the decoder", 9: "hangs the decoder"}
    assert {bad.where for host in batches for bad in host.bad if bad.sample == 7} == {whole.shards.describe(7)}


def test_watched_batches_report_each_sample_before_it_is_decoded(small_shards: Path) -> None:
    order: list[Any] = []
    made = (
        made_of(small_shards)
        .without({int(made_of(small_shards)[0].ids[0]): "crashes the decoder"})
        .watched(order.append)
    )
    read = made.shards.read
    made.shards.read = lambda sample: order.append([sample]) or read(sample)  # type: ignore[method-assign]
    host = made[0]
    decoded = order[2::3]
    assert order[0::3] == [READING] * len(decoded)
    assert [sample for (sample,) in order[1::3]] == decoded
    assert set(host.ids.tolist()) <= set(decoded)
    assert host.bad[0].sample not in decoded


def test_the_fork_server_outlives_what_is_meant_for_the_trainer(tmp_path: Path) -> None:
    """A signal to the whole group, as terminals and clusters send it: workers are still known to live, and end in silence."""
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    from sources import Source; from selfsight.data.feed import feed\n"
        "    signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "    items = feed(Source(Path(sys.argv[2])), range(1000), 1, False)\n"
        "    next(items); os.killpg(0, signal.SIGTERM)\n"
        "    for _ in range(20): next(items)\n"
        "    items.close(); print('closed')"
    )
    (tmp_path / "main.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "main.py", Path(__file__).parent, tmp_path],
        capture_output=True,
        text=True,
        timeout=100,
        start_new_session=True,
    )
    assert (done.stdout, done.stderr) == ("closed\n", "")
